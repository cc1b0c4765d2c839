"""ONNX body of ``xexport::linear_int6x8``: rows put one after another in 8 bits, for one MatMulNBits."""

from __future__ import annotations

import numpy as np
import onnx

from xexport.core.op import Body, OpSpec
from xexport.ops.builder import BodyBuilder
from xexport.ops.linear_int4x8.function import ATTRIBUTES, INPUTS, float_scales, nbits_body

__all__ = ["SPEC"]


def _matmul_nbits(opset: int) -> onnx.FunctionProto:
    return nbits_body("linear_int6x8", 8, opset, _turned, _quarter_scales)


def _turned(g: BodyBuilder, blocks: str) -> str:
    return g.op("Transpose", _four_times_codes(g, blocks), perm=[0, 4, 1, 2, 3, 5])


def _four_times_codes(g: BodyBuilder, blocks: str) -> str:
    """Codes shifted by two bits, so that zero is at 128: [groups, blocks, 2, 4, 8, 4]."""
    shape = g.op("Concat", g.ints(-1), blocks, g.ints(2, 3, 8, 4), axis=0)
    stored = g.op("Reshape", "weight", shape)

    def shifted(value: str, bits: int, direction: str) -> str:
        return g.op("BitShift", value, g.const(bits, np.uint8), direction=direction)

    high = g.op("BitwiseAnd", stored, g.const(0xC0, np.uint8))
    low_part, part, high_part = g.multi("Split", high, outs=3, axis=3, num_outputs=3)
    rest = g.op("BitwiseOr", shifted(low_part, 4, "RIGHT"), shifted(part, 2, "RIGHT"))
    return g.op("Concat", shifted(stored, 2, "LEFT"), g.op("BitwiseOr", rest, high_part), axis=3)


def _quarter_scales(g: BodyBuilder) -> str:
    return g.op("Mul", float_scales(g), g.const(0.25, np.float32))


SPEC = OpSpec(
    name="linear_int6x8",
    inputs=INPUTS,
    outputs=("y",),
    attributes=ATTRIBUTES,
    input_types={"weight": "U8", "scales": "F16"},
    bodies={
        "matmul_nbits": Body(
            _matmul_nbits,
            "the native kernel reads the file as it lies; without it ONNX Runtime's MatMulNBits, whose "
            "weights are put in 8 bits and in its order once, when the session opens",
        )
    },
)
