"""ONNX body of the causal long convolution: a Monarch DFT of constant size (see monarch.py)."""

from __future__ import annotations

import onnx

from xexport.core.op import Body, OpSpec
from xexport.ops.builder import BodyBuilder
from xexport.ops.fft_conv.monarch import convolve, monarch

__all__ = ["SPEC", "sizes"]


def sizes(b: BodyBuilder) -> tuple[str, str]:
    """The attributes n1 and n2 as vectors of one."""
    n1, n2 = (b.op("Unsqueeze", b.attribute(name, "int"), b.ints(0)) for name in ("n1", "n2"))
    return n1, n2


def _monarch(opset: int) -> onnx.FunctionProto:
    b = BodyBuilder("fftconv")
    y = convolve(b, "u", "h", monarch(b, *sizes(b)))
    b.op("Slice", y, b.ints(0), b.op("Shape", "u", start=2), b.ints(2), out="y")
    return b.function("fft_conv", ["u", "h"], ["y"], opset, attributes=["n1", "n2"])


SPEC = OpSpec(
    name="fft_conv",
    inputs=("u", "h"),
    outputs=("y",),
    attributes={"n1": "int", "n2": "int"},
    bodies={
        "monarch": Body(
            _monarch, "the DFT as matrix products: the DFT operator is many times slower, and inaccurate"
        )
    },
)
