"""ONNX body of ``xexport::linear_int4x8``: rows put one after another, and one com.microsoft MatMulNBits."""

from __future__ import annotations

from collections.abc import Callable

import onnx

from xexport.core.op import Body, OpSpec
from xexport.ops.builder import BodyBuilder

__all__ = ["ATTRIBUTES", "BLOCK", "INPUTS", "SPEC", "float_scales", "nbits_body"]

#: weights that share a scale
BLOCK = 32

INPUTS = ("x", "weight", "scales")
ATTRIBUTES = {"K": "int", "N": "int"}
#: 8-bit activations
_ACCURACY_LEVEL = 4


def nbits_body(
    name: str,
    bits: int,
    opset: int,
    codes: Callable[[BodyBuilder, str], str],
    scales: Callable[[BodyBuilder], str],
) -> onnx.FunctionProto:
    """The product of interleaved rows as one MatMulNBits.

    Args:
        name: of the operator ``(x, weight, scales) -> y`` with the attributes K and N.
        bits: of the codes as MatMulNBits reads them.
        codes: given the number of blocks (1-D), ``[groups, 8, blocks, ...]`` with a row's bytes in order.
        scales: ``[groups, blocks, 8]`` float32.
    """
    g = BodyBuilder(name)
    blocks = g.op("Shape", "weight", start=1, end=2)
    count = g.op("Reshape", g.attribute("N", "int"), g.ints(1))

    def rows(turned: str, *shape: str) -> str:
        """The first N rows, each in one piece."""
        every = g.op("Reshape", turned, g.op("Concat", g.ints(-1), blocks, *shape, axis=0))
        return g.op("Slice", every, g.ints(0), count, g.ints(0))

    g.op(
        "MatMulNBits",
        "x",
        rows(codes(g, blocks), g.ints(BLOCK * bits // 8)),
        rows(g.op("Transpose", scales(g), perm=[0, 2, 1])),
        out="y",
        domain="com.microsoft",
        same=ATTRIBUTES,
        bits=bits,
        block_size=BLOCK,
        accuracy_level=_ACCURACY_LEVEL,
    )
    return g.function(
        name, INPUTS, ("y",), opset, attributes=tuple(ATTRIBUTES), imports=[("com.microsoft", 1)]
    )


def _matmul_nbits(opset: int) -> onnx.FunctionProto:
    return nbits_body("linear_int4x8", 4, opset, _turned, float_scales)


def _turned(g: BodyBuilder, _: str) -> str:
    return g.op("Transpose", "weight", perm=[0, 3, 1, 2, 4])


def float_scales(g: BodyBuilder) -> str:
    """The stored scales in float32."""
    return g.op("Cast", "scales", to=onnx.TensorProto.FLOAT)


SPEC = OpSpec(
    name="linear_int4x8",
    inputs=INPUTS,
    outputs=("y",),
    attributes=ATTRIBUTES,
    input_types={"weight": "U8", "scales": "F16"},
    bodies={
        "matmul_nbits": Body(
            _matmul_nbits,
            "the native kernel reads the file as it lies; without it ONNX Runtime's MatMulNBits, whose "
            "weights are put in its order once, when the session opens",
        )
    },
)
