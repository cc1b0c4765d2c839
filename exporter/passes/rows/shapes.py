"""Shapes that torch.onnx left out: of element-wise nodes and of matrix products."""

from __future__ import annotations

import onnx_ir as ir

from xexport.exporter.passes.rows.values import constant

__all__ = ["fill_shapes"]

_SAME = {"Sigmoid", "Tanh", "Exp", "Neg", "Relu", "Softplus", "Gelu", "Erf", "Abs", "Sqrt", "Reciprocal"}
_BROADCAST = {"Add", "Sub", "Mul", "Div", "Max", "Min"}


def fill_shapes(graph: ir.Graph) -> None:
    """Give every output of unknown shape or type its own, where the inputs decide it."""
    for node in graph:
        if node.domain not in ("", "com.microsoft") or len(node.outputs) != 1:
            continue
        out = node.outputs[0]
        shape = out.shape if out.shape is not None else _shape(node)
        if shape is not None and out.shape is None:
            out.shape = shape
        if out.dtype is None and node.inputs and node.inputs[0] is not None and node.op_type != "Cast":
            source = node.inputs[0]
            if source.dtype is not None and (
                node.op_type
                in _SAME | _BROADCAST | {"MatMul", "MatMulNBits", "Slice", "Unsqueeze", "Squeeze", "Concat"}
            ):
                out.type = ir.TensorType(source.dtype)


def _shape(node: ir.Node) -> ir.Shape | None:
    shapes = [value.shape if value is not None else None for value in node.inputs]
    if node.op_type in _SAME:
        return shapes[0]
    if node.op_type in _BROADCAST:
        return _broadcast([s for s in shapes if s is not None]) if None not in shapes else None
    if node.op_type == "MatMul" and len(shapes) == 2 and shapes[0] is not None and shapes[1] is not None:
        return ir.Shape([*shapes[0][:-1], shapes[1][-1]]) if len(shapes[1]) == 2 else None
    if node.op_type in ("Slice", "Unsqueeze", "Squeeze") and shapes[0] is not None:
        return _cut(node, shapes[0])
    if node.op_type == "Concat" and all(s is not None for s in shapes):
        return _joined(node, [s for s in shapes if s is not None])
    if node.op_type == "MatMulNBits" and shapes[0] is not None:
        return ir.Shape([*shapes[0][:-1], node.attributes["N"].as_int()])
    return None


def _cut(node: ir.Node, shape: ir.Shape) -> ir.Shape | None:
    """Of a Slice of one known axis, or of dimensions of 1 that come or go."""
    numbers = [constant(value) for value in node.inputs[1:]]
    if any(n is None for n in numbers) or not numbers:
        return None
    dims = list(shape)
    values = [n.reshape(-1).tolist() for n in numbers if n is not None]
    if node.op_type == "Unsqueeze":
        rank = len(dims) + len(values[0])
        for axis in sorted(a % rank for a in values[0]):
            dims.insert(axis, 1)
        return ir.Shape(dims)
    if node.op_type == "Squeeze":
        gone = {a % len(dims) for a in values[0]}
        return ir.Shape([d for i, d in enumerate(dims) if i not in gone])
    if any(len(v) != 1 for v in values) or len(values) < 3:
        return None
    axis, size = values[2][0] % len(dims), dims[values[2][0] % len(dims)]
    if not isinstance(size, int):
        return None
    dims[axis] = len(
        range(*slice(values[0][0], values[1][0], *(values[3] if len(values) > 3 else ())).indices(size))
    )
    return ir.Shape(dims)


def _joined(node: ir.Node, shapes: list[ir.Shape]) -> ir.Shape | None:
    dims = list(shapes[0])
    axis = node.attributes["axis"].as_int() % len(dims)
    sizes = [s[axis] for s in shapes]
    total = 0
    for size in sizes:
        if not isinstance(size, int):
            return None
        total += size
    dims[axis] = total
    return ir.Shape(dims)


def _broadcast(shapes: list[ir.Shape]) -> ir.Shape | None:
    rank = max(map(len, shapes))
    dims: list[int | ir.SymbolicDim] = []
    for axis in range(-rank, 0):
        found = [s[axis] for s in shapes if len(s) >= -axis and s[axis] != 1]
        if any(str(d) != str(found[0]) for d in found):
            return None
        dims.append(found[0] if found else 1)
    return ir.Shape(dims)
