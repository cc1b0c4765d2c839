"""ONNX body of ``xexport::linear_int4x8``: rows put one after another, and one com.microsoft MatMulNBits."""

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
    g = BodyBuilder("linear_int4x8")
    blocks = g.op("Shape", "weight", start=1, end=2)
    count = g.op("Reshape", g.attribute("N", "int"), g.ints(1))

    def rows(groups: str, perm: list[int], *shape: str) -> str:
        """The first N rows, each in one piece."""
        turned = g.op("Transpose", groups, perm=perm)
        every = g.op("Reshape", turned, g.op("Concat", g.ints(-1), blocks, *shape, axis=0))
        return g.op("Slice", every, g.ints(0), count, g.ints(0))

    g.op(
        "MatMulNBits",
        "x",
        rows("weight", [0, 3, 1, 2, 4], g.ints(BLOCK // 2)),
        rows(g.op("Cast", "scales", to=onnx.TensorProto.FLOAT), [0, 2, 1]),
        out="y",
        domain="com.microsoft",
        same=_ATTRIBUTES,
        bits=4,
        block_size=BLOCK,
        accuracy_level=_ACCURACY_LEVEL,
    )
    return g.function(
        "linear_int4x8",
        _INPUTS,
        ("y",),
        opset,
        attributes=tuple(_ATTRIBUTES),
        imports=[("com.microsoft", 1)],
    )


SPEC = OpSpec(
    name="linear_int4x8",
    inputs=_INPUTS,
    outputs=("y",),
    attributes=_ATTRIBUTES,
    input_types={"weight": "U8", "scales": "F16"},
    bodies={
        "matmul_nbits": Body(
            _matmul_nbits,
            "the native kernel reads the file as it lies; without it ONNX Runtime's MatMulNBits, whose "
            "weights are put in its order once, when the session opens",
        )
    },
)
