"""ONNX body of ``xexport::linear_int6x8``: rows put one after another in 8 bits, for one MatMulNBits."""

from __future__ import annotations

import numpy as np
import onnx

from xexport.core.op import Body, OpSpec
from xexport.ops.builder import BodyBuilder

__all__ = ["SPEC"]

#: weights that share a scale
_BLOCK = 32
_INPUTS = ("x", "weight", "scales")
_ATTRIBUTES = {"K": "int", "N": "int"}
#: 8-bit activations
_ACCURACY_LEVEL = 4


def _matmul_nbits(opset: int) -> onnx.FunctionProto:
    g = BodyBuilder("linear_int6x8")
    blocks = g.op("Shape", "weight", start=1, end=2)
    count = g.op("Reshape", g.attribute("N", "int"), g.ints(1))

    def rows(turned: str, *shape: str) -> str:
        """The first N rows, each in one piece."""
        every = g.op("Reshape", turned, g.op("Concat", g.ints(-1), blocks, *shape, axis=0))
        return g.op("Slice", every, g.ints(0), count, g.ints(0))

    g.op(
        "MatMulNBits",
        "x",
        rows(g.op("Transpose", _four_times_codes(g, blocks), perm=[0, 4, 1, 2, 3, 5]), g.ints(_BLOCK)),
        rows(g.op("Transpose", _quarter_scales(g), perm=[0, 2, 1])),
        out="y",
        domain="com.microsoft",
        same=_ATTRIBUTES,
        bits=8,
        block_size=_BLOCK,
        accuracy_level=_ACCURACY_LEVEL,
    )
    return g.function(
        "linear_int6x8",
        _INPUTS,
        ("y",),
        opset,
        attributes=tuple(_ATTRIBUTES),
        imports=[("com.microsoft", 1)],
    )


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
    scales = g.op("Cast", "scales", to=onnx.TensorProto.FLOAT)
    return g.op("Mul", scales, g.const(0.25, np.float32))


SPEC = OpSpec(
    name="linear_int6x8",
    inputs=_INPUTS,
    outputs=("y",),
    attributes=_ATTRIBUTES,
    input_types={"weight": "U8", "scales": "F16"},
    bodies={
        "matmul_nbits": Body(
            _matmul_nbits,
            "the native kernel reads the file as it lies; without it ONNX Runtime's MatMulNBits, whose "
            "weights are put in 8 bits and in its order once, when the session opens",
        )
    },
)
