"""Shapes that torch.onnx left out: of element-wise nodes and of matrix products."""

from __future__ import annotations

import onnx_ir as ir

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
            if source.dtype is not None and (node.op_type in _SAME | _BROADCAST | {"MatMul", "MatMulNBits"}):
                out.type = ir.TensorType(source.dtype)


def _shape(node: ir.Node) -> ir.Shape | None:
    shapes = [value.shape if value is not None else None for value in node.inputs]
    if node.op_type in _SAME:
        return shapes[0]
    if node.op_type in _BROADCAST:
        return _broadcast([s for s in shapes if s is not None]) if None not in shapes else None
    if node.op_type == "MatMul" and len(shapes) == 2 and shapes[0] is not None and shapes[1] is not None:
        return ir.Shape([*shapes[0][:-1], shapes[1][-1]]) if len(shapes[1]) == 2 else None
    if node.op_type == "MatMulNBits" and shapes[0] is not None:
        return ir.Shape([*shapes[0][:-1], node.attributes["N"].as_int()])
    return None


def _broadcast(shapes: list[ir.Shape]) -> ir.Shape | None:
    rank = max(map(len, shapes))
    dims: list[int | ir.SymbolicDim] = []
    for axis in range(-rank, 0):
        found = [s[axis] for s in shapes if len(s) >= -axis and s[axis] != 1]
        if any(str(d) != str(found[0]) for d in found):
            return None
        dims.append(found[0] if found else 1)
    return ir.Shape(dims)
