"""ONNX body of ``xexport::linear_int4``: one com.microsoft MatMulNBits."""

from __future__ import annotations

import onnx

from xexport.core.op import Body, OpSpec
from xexport.ops.builder import BodyBuilder

__all__ = ["BLOCK", "SPEC"]

#: weights that share a scale
BLOCK = 32

_INPUTS = ("x", "weight", "scales")
_ATTRIBUTES = {"K": "int", "N": "int"}
#: 8-bit activations
_ACCURACY_LEVEL = 4


def _matmul_nbits(opset: int) -> onnx.FunctionProto:
    g = BodyBuilder("linear_int4")
    scales = g.op("Cast", "scales", to=onnx.TensorProto.FLOAT)
    g.op(
        "MatMulNBits",
        "x",
        "weight",
        scales,
        out="y",
        domain="com.microsoft",
        same=_ATTRIBUTES,
        bits=4,
        block_size=BLOCK,
        accuracy_level=_ACCURACY_LEVEL,
    )
    return g.function(
        "linear_int4", _INPUTS, ("y",), opset, attributes=tuple(_ATTRIBUTES), imports=[("com.microsoft", 1)]
    )


SPEC = OpSpec(
    name="linear_int4",
    inputs=_INPUTS,
    outputs=("y",),
    attributes=_ATTRIBUTES,
    input_types={"weight": "U8", "scales": "F16"},
    bodies={
        "matmul_nbits": Body(
            _matmul_nbits,
            "the native kernel reads the same bytes; without it ONNX Runtime's MatMulNBits, whose scales are "
            "converted once when the session opens",
        )
    },
)
