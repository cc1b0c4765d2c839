"""Small matrices: 8- or 4-bit in the file, float32 in memory, multiplied with exact activations.

``Cast``, ``Sub``, ``Mul`` and ``Reshape`` give the graph its float matrix back; ONNX Runtime folds them
once when the session opens. Below FASTER_ABOVE elements an 8-bit product is no faster than a float
one (benchmarks/int8_formats.py), and it would round the activations to 8 bits: on the reversal model
of width 32 (shared test data) that alone loses 7% of the digits, while 8-bit weights lose none.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from xexport.quant.blocks import Blocks, quantize_blocks, relative_error
from xexport.quant.formats import Context, Stored

__all__ = ["FASTER_ABOVE", "store"]

#: elements of a matrix from which MatMulNBits beats MatMul at T=1 by 1.2 (AVX2, one thread, measured)
FASTER_ABOVE = 1 << 17

_WHY = (
    "{} elements: an 8-bit product is no faster at this size, and float activations keep the accuracy; "
    "small in the file, float32 when the session opens"
)


def store(
    context: Context, value: ir.Value, products: list[ir.Node], matrix: np.ndarray, bits: int
) -> Stored:
    """Rewrite ``products`` to read the dequantized matrix.

    Args:
        matrix: float32 [N, K], one row an output.
    """
    columns, depth = matrix.shape
    size = next((s for s in (32, 16) if depth % s == 0), depth)
    blocks = quantize_blocks(matrix, bits, size)
    name = value.name or ""
    codes = _codes(context, name, blocks, bits)
    scales = np.ascontiguousarray(blocks.scales.T[:, None, :])  # [blocks, 1, N]
    s = context.initializer(f"{name}.scale", context.spool.put(name, scales))
    result = _dequantize(context, name, codes, s, blocks.zero if bits == 4 else 0, (depth, columns))
    for node in products:
        node.replace_input_with(1, result)
    stored = matrix.size * bits // 8 + scales.nbytes
    error = relative_error(matrix, blocks.dequantize())
    return Stored(f"int{bits} block {size}, float32 in memory", stored, error, _WHY.format(matrix.size))


def _codes(context: Context, name: str, blocks: Blocks, bits: int) -> ir.Value:
    """[blocks, size, N]: int8 around 0, or 4-bit codes two to a byte."""
    codes = np.ascontiguousarray(blocks.codes.transpose(1, 2, 0))
    if bits == 8:
        signed = (codes.astype(np.int16) - blocks.zero).astype(np.int8)
        return context.initializer(f"{name}.int8", context.spool.put(name, signed))
    flat = codes.reshape(-1)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    packed = context.spool.put(
        name, flat[0::2] | (flat[1::2] << 4), dtype=ir.DataType.UINT4, shape=codes.shape
    )
    return context.initializer(f"{name}.int4", packed)


def _dequantize(
    context: Context, name: str, codes: ir.Value, scales: ir.Value, zero: int, shape: tuple[int, int]
) -> ir.Value:
    """``Reshape((Cast(codes) - zero) * scales, [K, N])`` at the front of the graph."""
    nodes = [ir.Node("", "Cast", [codes], [ir.AttrInt64("to", int(ir.DataType.FLOAT))])]
    if zero:
        offset = context.initializer(f"{name}.zero", ir.Tensor(np.array(zero, np.float32)))
        nodes.append(ir.Node("", "Sub", [nodes[-1].outputs[0], offset]))
    nodes.append(ir.Node("", "Mul", [nodes[-1].outputs[0], scales]))
    target = context.initializer(f"{name}.shape", ir.Tensor(np.array(shape, np.int64)))
    nodes.append(ir.Node("", "Reshape", [nodes[-1].outputs[0], target]))
    for node in nodes:
        node.name = f"{name}/{node.op_type}"
        node.outputs[0].name = node.name
    result = nodes[-1].outputs[0]
    result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
    context.model.graph.insert_before(context.model.graph[0], nodes)
    return result
