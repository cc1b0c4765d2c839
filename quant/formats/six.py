"""6-bit products: ``MatMul(x, W)`` becomes ``xexport::linear_int6x8``, blocks of 32 with float16 scales.

No operator of ONNX or ONNX Runtime reads 6 bits, so the node is this project's own from the start; its body
is com.microsoft MatMulNBits with 8 bits (ops/linear_int6x8). A weight that it can't serve is stored in 8
bits, with the reason.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from xexport.exporter.passes import products as passes
from xexport.ops.linear_int4x8.layout import interleaved_scales
from xexport.ops.linear_int6x8.layout import interleaved_six
from xexport.quant.blocks import quantize_blocks, relative_error
from xexport.quant.formats import Context, Refusal, Stored
from xexport.quant.formats.block import apply_int8, drop_unused, products_of
from xexport.quant.formats.stored import FASTER_ABOVE

__all__ = ["apply"]

_BITS = 6
_BLOCK = 32


def apply(context: Context, value: ir.Value) -> Stored | Refusal:
    """Store a weight in 6 bits, or in 8 where that can't be."""
    products, matrix = products_of(value)
    if matrix is None or matrix.size < FASTER_ABOVE:
        return apply_int8(context, value)
    columns, depth = matrix.shape
    if depth % _BLOCK:
        return _eight(context, value, f"its depth of {depth} is no multiple of {_BLOCK}")
    blocks = quantize_blocks(matrix, _BITS, _BLOCK, half_scales=True)
    if not blocks.are_half:
        return _eight(context, value, "its scales are out of the range of float16")
    name = value.name or ""
    codes, scales = interleaved_six(blocks.codes), interleaved_scales(blocks.scales.astype(np.float16))
    b = context.initializer(f"{name}.int6", context.spool.put(name, codes))
    s = context.initializer(f"{name}.scale", context.spool.put(name, scales))
    for node in products:
        assert node.inputs[0] is not None
        passes.replace(
            context.model, node, "linear_int6x8", [node.inputs[0], b, s], {"K": depth, "N": columns}
        )
    drop_unused(context, value)
    error = relative_error(matrix, blocks.dequantize())
    return Stored(f"int6 block {_BLOCK}", codes.nbytes + scales.nbytes, error)


def _eight(context: Context, value: ir.Value, why: str) -> Stored | Refusal:
    stored = apply_int8(context, value)
    if isinstance(stored, Refusal):
        return stored
    return replace(stored, reason=f"8 bits, as 6 are not possible: {why}")
