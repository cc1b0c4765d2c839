"""ONNX body of ``xexport::linear_int8``: one com.microsoft MatMulNBits."""

from __future__ import annotations

import onnx

from xexport.core.op import Body, OpSpec
from xexport.ops.builder import BodyBuilder

__all__ = ["SPEC"]

_INPUTS = ("x", "weight", "scales")
_ATTRIBUTES = {"K": "int", "N": "int", "block_size": "int"}
#: 8-bit activations: ONNX Runtime is 36 times slower at level 0
_ACCURACY_LEVEL = 4


def _matmul_nbits(opset: int) -> onnx.FunctionProto:
    g = BodyBuilder("linear_int8")
    g.op(
        "MatMulNBits",
        *_INPUTS,
        out="y",
        domain="com.microsoft",
        same=_ATTRIBUTES,
        bits=8,
        accuracy_level=_ACCURACY_LEVEL,
    )
    return g.function(
        "linear_int8", _INPUTS, ("y",), opset, attributes=tuple(_ATTRIBUTES), imports=[("com.microsoft", 1)]
    )


SPEC = OpSpec(
    name="linear_int8",
    inputs=_INPUTS,
    outputs=("y",),
    attributes=_ATTRIBUTES,
    input_types={"weight": "U8"},
    bodies={
        "matmul_nbits": Body(
            _matmul_nbits,
            "the native kernel reads the same bytes and keeps 16 bits of the activations; without it ONNX "
            "Runtime's MatMulNBits keeps 8",
        )
    },
)
