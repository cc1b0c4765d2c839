"""Small matrices: 8- or 4-bit in the file, float32 in memory, multiplied with exact activations.

``Cast``, ``Sub``, ``Mul`` and ``Reshape`` give the graph its float matrix back; ONNX Runtime folds them
once when the session opens. 4-bit codes lie two to a byte of uint8, which ``BitwiseAnd`` and ``BitShift``
take apart: ONNX has a type of 4 bits, but on WebGPU onnxruntime-web 1.30 opens no graph with a Cast of it.

Below FASTER_ABOVE elements an 8-bit product is no faster than a float one (benchmarks/int8_formats.py), and
it would round the activations to 8 bits: on the reversal model of width 32 (shared test data) that alone
loses 7% of the digits, while 8-bit weights lose none.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from xexport.quant.blocks import quantize_blocks, relative_error
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
    codes = np.ascontiguousarray(blocks.codes.transpose(1, 2, 0))  # [blocks, size, N]
    scales = np.ascontiguousarray(blocks.scales.T[:, None, :])  # [blocks, 1, N]
    made = _Nodes(context, name)
    if bits == 4 and size % 2 == 0:
        stored, whole, zero = codes.size // 2, _nibbles(made, codes), blocks.zero
    else:  # a byte a code; codes of 4 bits too where an odd depth has no halves
        signed = (codes.astype(np.int16) - blocks.zero).astype(np.int8)
        stored, whole, zero = codes.size, made.constant("int8", signed, spooled=True), 0
    values = made.node("Cast", whole, to=int(ir.DataType.FLOAT))
    if zero:
        values = made.node("Sub", values, made.constant("zero", np.array(zero, np.float32)))
    values = made.node("Mul", values, made.constant("scale", scales, spooled=True))
    target = made.constant("shape", np.array((depth, columns), np.int64))
    result = made.node("Reshape", values, target)
    result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape((depth, columns))
    context.model.graph.insert_before(context.model.graph[0], made.nodes)
    for node in products:
        node.replace_input_with(1, result)
    error = relative_error(matrix, blocks.dequantize())
    return Stored(
        f"int{bits} block {size}, float32 in memory",
        stored + scales.nbytes,
        error,
        _WHY.format(matrix.size),
    )


class _Nodes:
    """Nodes and constants of one weight, all named after it."""

    def __init__(self, context: Context, name: str) -> None:
        self._context, self._name = context, name
        self.nodes: list[ir.Node] = []

    def constant(self, what: str, array: np.ndarray, *, spooled: bool = False) -> ir.Value:
        tensor = self._context.spool.put(self._name, array) if spooled else ir.Tensor(array)
        return self._context.initializer(f"{self._name}.{what}", tensor)

    def node(self, op: str, *inputs: ir.Value, **attributes: int | str) -> ir.Value:
        made = ir.Node("", op, inputs, ir.convenience.convert_attributes(attributes))
        made.name = made.outputs[0].name = f"{self._name}/{op}"
        self.nodes.append(made)
        return made.outputs[0]


def _nibbles(made: _Nodes, codes: np.ndarray) -> ir.Value:
    """Codes below 16, uint8 [blocks, size, N], in the graph: the first half of ``size`` has the low bits."""
    low, high = np.split(codes, 2, axis=1)
    packed = made.constant("int4", low | (high << 4), spooled=True)
    mask, shift = (made.constant(n, np.array(v, np.uint8)) for n, v in (("mask", 15), ("shift", 4)))
    low_bits = made.node("BitwiseAnd", packed, mask)
    high_bits = made.node("BitShift", packed, shift, direction="RIGHT")
    return made.node("Concat", low_bits, high_bits, axis=1)
