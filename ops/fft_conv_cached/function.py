"""ONNX body of the causal long convolution of a chunk: three ways, chosen at run time.

- T = 1: the dot product of the cache, up to here, with the reversed filter;
- the stream so far fits a transform smaller than the filter's: a Monarch DFT of just that size, its
  tables and the filter's spectrum computed on the spot, so a short prompt costs a short transform;
- else the Monarch DFT of the whole filter, whose tables and spectrum are constants.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx

from xexport.core.op import Append, Body, OpSpec
from xexport.ops.builder import BodyBuilder
from xexport.ops.fft_conv.function import sizes
from xexport.ops.fft_conv.monarch import convolve, monarch

__all__ = ["SPEC"]

_INPUTS, _OUTPUTS = ("u", "h", "cache", "pos"), ("y", "new_cache")
_INT64_MIN = -(2**63)
_MAX_BITS = 40


def _step() -> onnx.GraphProto:
    """T = 1: write one column, then y = sum_s h[pos-s] cache[s].

    The chunk is cut to one column, which it has, so that shapes agree in the branch not taken.
    """
    b = BodyBuilder("step")
    zero, one, time = b.ints(0), b.ints(1), b.ints(2)
    column = b.op("Slice", "u", zero, one, time)
    cache = b.op("ScatterElements", "cache", b.op("Expand", "pos", b.op("Shape", column)), column, axis=2)
    length = b.op("Shape", "h", start=1)
    reverse = b.op("Slice", "h", b.ints(-1), b.ints(_INT64_MIN), one, b.ints(-1))
    window = b.op("Slice", reverse, b.op("Sub", b.op("Sub", length, "pos"), one), length, one)
    seen = b.op("Slice", cache, zero, b.op("Add", "pos", one), time)
    y = b.op("ReduceSum", b.op("Mul", seen, window), time, keepdims=1)
    return b.graph("step", [], [y, cache])


def _written(b: BodyBuilder) -> tuple[str, str]:
    """The cache with the chunk in it, and the position behind the chunk."""
    zero, time = b.ints(0), b.ints(2)
    end = b.op("Add", "pos", b.op("Shape", "u", start=2))
    before = b.op("Slice", "cache", zero, "pos", time)
    behind = b.op("Slice", "cache", end, b.op("Shape", "cache", start=2), time)
    return b.op("Concat", before, "u", behind, axis=2), end


def _whole(b: BodyBuilder, n1: str, n2: str) -> onnx.GraphProto:
    """T > 1, the transform of the whole filter whatever the position."""
    cache, end = _written(b)
    y = convolve(b, cache, "h", monarch(b, n1, n2))
    return b.graph("whole", [], [b.op("Slice", y, "pos", end, b.ints(2)), cache])


def _many(b: BodyBuilder, n1: str, n2: str) -> onnx.GraphProto:
    """T > 1: write the chunk, convolve everything so far, keep the chunk's part."""
    time = b.ints(2)
    cache, end = _written(b)
    powers = b.const([1 << i for i in range(_MAX_BITS)], np.int64)
    bits = b.op("ReduceSum", b.op("Cast", b.op("Less", powers, b.op("Mul", end, time)), to=7), keepdims=1)
    small = b.op("Less", b.op("Gather", powers, bits), b.op("Mul", n1, n2))
    y = b.op(
        "If",
        b.op("Squeeze", small),
        then_branch=_small(cache, end, powers, bits),
        else_branch=_full(cache, n1, n2),
    )
    return b.graph("many", [], [b.op("Slice", y, "pos", end, time), cache])


def _small(cache: str, end: str, powers: str, bits: str) -> onnx.GraphProto:
    """The power of two that holds twice the stream so far, split into factors at run time."""
    b = BodyBuilder("small")
    zero, one, time = b.ints(0), b.ints(1), b.ints(2)
    low = b.op("Div", b.op("Sub", bits, one), b.ints(2))
    n1, n2 = (b.op("Gather", powers, n) for n in (b.op("Sub", bits, low), low))
    seen, taps = b.op("Slice", cache, zero, end, time), b.op("Slice", "h", zero, end, one)
    return b.graph("small", [], [convolve(b, seen, taps, monarch(b, n1, n2))])


def _full(cache: str, n1: str, n2: str) -> onnx.GraphProto:
    b = BodyBuilder("full")
    return b.graph("full", [], [convolve(b, cache, "h", monarch(b, n1, n2))])


def _body(long: Callable[[BodyBuilder, str, str], onnx.GraphProto], opset: int) -> onnx.FunctionProto:
    b = BodyBuilder("fftcached")
    n1, n2 = sizes(b)
    b.multi(
        "If",
        b.op("Squeeze", b.op("Equal", b.op("Shape", "u", start=2), b.ints(1))),
        outs=_OUTPUTS,
        then_branch=_step(),
        else_branch=long(BodyBuilder("many"), n1, n2),
    )
    return b.function("fft_conv_cached", _INPUTS, _OUTPUTS, opset, attributes=["n1", "n2"])


SPEC = OpSpec(
    name="fft_conv_cached",
    inputs=_INPUTS,
    outputs=_OUTPUTS,
    attributes={"n1": "int", "n2": "int"},
    input_types={"pos": "I"},
    appends={"new_cache": Append("cache", "pos", axis=2)},
    bodies={
        "monarch": Body(
            partial(_body, _many),
            "one token is a dot product; more are a DFT as matrix products, of the stream's size while it "
            "is short: the DFT operator is many times slower, and inaccurate",
        ),
        "whole": Body(
            partial(_body, _whole),
            "the same with the DFT of the whole filter alone, for runtimes without sizes that are data",
        ),
    },
)
