"""ONNX bodies of ``xexport::rotary_angles``: the product modulo 2^32 in integers of 64 bits, or of 32.

In 32 bits both factors are split in halves, the lower half signed so that every product fits:

    p = p1 2^16 + p0,  t = t1 2^16 + t0,  |p0|, |t0| <= 2^15,  p1 < 2^15,  t1 <= 2^14
    p t mod 2^32 = ((p0 t1 + p1 t0) mod 2^16) 2^16 + p0 t0          (p1 t1 2^32 is whole turns)

The first sum is below 2^31, the last product 2^30. A runtime that divides integers in floating point may
be off by one in a quotient: p0 and p1 belong together all the same, and the remainder modulo 2^16 moves by
a whole turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx

from xexport.core.op import Body, OpSpec
from xexport.ops.builder import BodyBuilder

__all__ = ["SPEC"]

_INPUTS, _OUTPUTS = ("positions", "turns"), ("cos", "sin")
_HALF = 1 << 16


def _long(b: BodyBuilder) -> str:
    """The angle [T,1,N] in radians, from 0 to 2 pi."""
    product = b.op("Mul", b.op("Unsqueeze", "positions", b.ints(1, 2)), "turns")
    units = b.op("Mod", product, b.const(1 << 32, np.int64))
    return b.op(
        "Mul", b.op("Cast", units, to=onnx.TensorProto.FLOAT), b.const(2 * math.pi / (1 << 32), np.float32)
    )


def _halves(b: BodyBuilder, x: str) -> tuple[str, str]:
    """int32 x >= 0 as (x1, x0) with x = x1 2^16 + x0 and -2^15 <= x0 < 2^15."""
    half = b.const(_HALF, np.int32)
    high = b.op("Div", b.op("Add", x, b.const(_HALF // 2, np.int32)), half)
    return high, b.op("Sub", x, b.op("Mul", high, half))


def _short(b: BodyBuilder) -> str:
    """The same modulo whole turns, with no integer beyond 32 bits."""
    p = b.op("Unsqueeze", b.op("Cast", "positions", to=onnx.TensorProto.INT32), b.ints(1, 2))
    p1, p0 = _halves(b, p)
    t1, t0 = _halves(b, b.op("Cast", "turns", to=onnx.TensorProto.INT32))
    half = b.const(_HALF, np.int32)
    high = b.op("Add", b.op("Mul", p0, t1), b.op("Mul", p1, t0))
    high = b.op("Sub", high, b.op("Mul", b.op("Div", high, half), half))
    parts = []
    for units, size in ((high, _HALF), (b.op("Mul", p0, t0), _HALF * _HALF)):
        real = b.op("Cast", units, to=onnx.TensorProto.FLOAT)
        parts.append(b.op("Mul", real, b.const(2 * math.pi / size, np.float32)))
    return b.op("Add", *parts)


def _body(angle: Callable[[BodyBuilder], str]) -> Callable[[int], onnx.FunctionProto]:
    def build(opset: int) -> onnx.FunctionProto:
        b = BodyBuilder("angles")
        found = angle(b)
        b.op("Cos", found, out="cos")
        b.op("Sin", found, out="sin")
        return b.function("rotary_angles", _INPUTS, _OUTPUTS, opset)

    return build


SPEC = OpSpec(
    name="rotary_angles",
    inputs=_INPUTS,
    outputs=_OUTPUTS,
    input_types={"positions": "I", "turns": "I"},
    bodies={
        "int64": Body(_body(_long), "the product modulo one turn in 64-bit integers: exact, and few nodes"),
        "int32": Body(
            _body(_short),
            "the same in halves of 16 bits, for runtimes that compute integers in 32 bits",
        ),
    },
)
