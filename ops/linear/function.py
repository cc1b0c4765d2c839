"""ONNX body of ``xexport::linear``: MatMul with the weight transposed and in float32."""

from __future__ import annotations

import onnx

from xexport.core.op import Body, OpSpec
from xexport.ops.builder import BodyBuilder

__all__ = ["SPEC"]

_INPUTS = ("x", "weight")


def _matmul(opset: int) -> onnx.FunctionProto:
    g = BodyBuilder("linear")
    weight = g.op("Cast", "weight", to=onnx.TensorProto.FLOAT)
    g.op("MatMul", "x", g.op("Transpose", weight, perm=[1, 0]), out="y")
    return g.function("linear", _INPUTS, ("y",), opset)


SPEC = OpSpec(
    name="linear",
    inputs=_INPUTS,
    outputs=("y",),
    input_types={"weight": "W"},
    bodies={
        "matmul": Body(
            _matmul,
            "the native kernel reads the weight as it lies in the file, float16 in half the bytes; without "
            "it a MatMul, whose weight ONNX Runtime converts and transposes once when the session opens",
        )
    },
)
