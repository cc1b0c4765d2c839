"""Block-wise 8- and 4-bit products: ``MatMul(x, W)`` becomes com.microsoft MatMulNBits.

Activations are quantized by the kernel per row and block (accuracy_level 4), so a token's result
does not depend on its neighbours: the chunk law survives, which it does not when one scale covers
a whole chunk (DynamicQuantizeMatMul), and nothing saturates on CPUs without VNNI. Measured in
benchmarks/int8_formats.py. The 4-bit scales are float16 where that holds them (4.5 bits a weight
instead of 5). Where native kernels run, exporter/passes/products.py takes over from here: the same
bytes, activations in 16 bits for 8-bit weights. Matrices too small to gain take the other way (stored.py).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from xexport.exporter.weights import as_array
from xexport.quant.blocks import block_size_for, quantize_blocks, relative_error
from xexport.quant.formats import Context, Refusal, Stored
from xexport.quant.formats.stored import FASTER_ABOVE, store

__all__ = ["apply_int4", "apply_int8", "blocks_of", "drop_unused", "products_of", "to_float"]

_MIN_DEPTH = 16
_ACCURACY_LEVEL = 4  # int8 activations; level 0 is 36 times slower at 8 bits


def apply_int8(context: Context, value: ir.Value) -> Stored | Refusal:
    """Store a weight in 8 bits."""
    return _apply(context, value, 8)


def apply_int4(context: Context, value: ir.Value) -> Stored | Refusal:
    """Store a weight in 4 bits."""
    return _apply(context, value, 4)


def _apply(context: Context, value: ir.Value, bits: int) -> Stored | Refusal:
    products, matrix = products_of(value)
    if not products:
        return Refusal("no matrix product reads it as its right-hand side")
    if matrix is None:
        return Refusal("it is not a float32 matrix")
    depth = matrix.shape[1]  # of [N, K]: one row an output, as MatMulNBits stores it
    if depth < _MIN_DEPTH:
        return Refusal(f"its depth of {depth} is shorter than the smallest block ({_MIN_DEPTH})")
    if matrix.size < FASTER_ABOVE:
        stored = store(context, value, products, matrix, bits)
        drop_unused(context, value)
        return stored
    return blocks_of(context, value, products, matrix, bits)


def blocks_of(
    context: Context, value: ir.Value, products: list[ir.Node], matrix: np.ndarray, bits: int
) -> Stored:
    """Let ``products`` read the weight, ``matrix`` [N, K], in blocks of 8 or 4 bits."""
    columns, depth = matrix.shape
    size = block_size_for(depth, bits)
    blocks = quantize_blocks(matrix, bits, size, half_scales=bits == 4)
    codes = blocks.codes
    if bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    name = value.name or ""
    b = context.initializer(f"{name}.int{bits}", context.spool.put(name, codes))
    scales = blocks.scales
    if bits == 4 and blocks.are_half:
        scales = scales.astype(np.float16)
    s = context.initializer(f"{name}.scale", context.spool.put(name, scales))
    if scales.dtype == np.float16:
        s = to_float(context, s)
    for node in products:
        _rewrite(context, node, b, s, bits, depth, columns, size)
    drop_unused(context, value)
    error = relative_error(matrix, blocks.dequantize()[:, :depth])
    return Stored(f"int{bits} block {size}", codes.nbytes + scales.nbytes, error)


def products_of(value: ir.Value) -> tuple[list[ir.Node], np.ndarray | None]:
    """MatMul nodes that read the weight (or its transpose) on the right, and the weight as [N, K]."""
    direct = [n for n, i in value.uses() if n.op_type == "MatMul" and i == 1]
    swapped = [
        n
        for t, _ in value.uses()
        if t.op_type == "Transpose" and list(t.attributes["perm"].as_ints()) == [1, 0]
        for n, i in t.outputs[0].uses()
        if n.op_type == "MatMul" and i == 1
    ]
    if not direct and not swapped:
        return [], None
    array = as_array(value)
    if array.dtype != np.float32 or array.ndim != 2 or (direct and swapped):
        return direct + swapped, None
    return (direct, np.ascontiguousarray(array.T)) if direct else (swapped, array)


def _rewrite(
    context: Context, node: ir.Node, b: ir.Value, s: ir.Value, bits: int, depth: int, columns: int, size: int
) -> None:
    attributes = {
        "K": depth,
        "N": columns,
        "bits": bits,
        "block_size": size,
        "accuracy_level": _ACCURACY_LEVEL,
    }
    old = node.outputs[0]
    new = ir.Node(
        "com.microsoft",
        "MatMulNBits",
        [node.inputs[0], b, s],
        [ir.AttrInt64(k, v) for k, v in attributes.items()],
        name=(node.name or "").replace("MatMul", "MatMulNBits"),
    )
    new.outputs[0].name, new.outputs[0].type, new.outputs[0].shape = old.name, old.type, old.shape
    graph = context.model.graph
    graph.insert_before(node, new)
    ir.convenience.replace_all_uses_with(old, new.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)
    context.model.opset_imports.setdefault("com.microsoft", 1)


def to_float(context: Context, half: ir.Value) -> ir.Value:
    """A Cast to float32 at the front of the graph; ONNX Runtime folds it when the session opens."""
    name = f"{half.name}/Cast"
    cast = ir.Node("", "Cast", [half], [ir.AttrInt64("to", int(ir.DataType.FLOAT))], name=name)
    result = cast.outputs[0]
    result.name, result.type, result.shape = name, ir.TensorType(ir.DataType.FLOAT), half.shape
    context.model.graph.insert_before(context.model.graph[0], cast)
    return result


def drop_unused(context: Context, value: ir.Value) -> None:
    """Remove transposes that nothing reads any more, and the fp32 weight if nothing else reads it."""
    for node, _ in list(value.uses()):
        if node.op_type == "Transpose" and not list(node.outputs[0].uses()):
            context.model.graph.remove(node, safe=True)
    if not list(value.uses()):
        del context.model.graph.initializers[value.name or ""]
