"""ONNX bodies of ``xexport::band_product``: one product at T = 1, blocks of tokens beyond."""

from __future__ import annotations

from functools import partial

import numpy as np

from xexport.core.op import Body, OpSpec
from xexport.ops.builder import BodyBuilder, function_of

__all__ = ["SPEC"]

_INPUTS = ("weight", "rows")
_OUTPUTS = ("out",)


def _step_nodes(g: BodyBuilder) -> list[str]:
    """T = 1: the band is the matrix.

    Both are cut to what they are, so that shapes agree in a branch that is not taken.
    """
    zero, one = g.ints(0), g.ints(1)
    taps = g.op("Shape", "weight", start=1)
    weight = g.op("Slice", "weight", zero, one, zero)
    return [g.op("MatMul", weight, g.op("Slice", "rows", zero, taps, one))]


def _band(g: BodyBuilder, blocks: str, block: str, taps: str, short: str) -> str:
    """``weight [T,S]`` as one matrix [c,c+S-1] a block of c tokens, in which row i begins at column i.

    c zeros behind each row, then rows that are one shorter: every row has moved by one more than the last.
    """
    wide, minus = g.op("Add", block, taps), g.ints(-1)
    three = g.ints(0, 0, 0)
    padded = g.op("Pad", "weight", g.op("Concat", g.ints(0, 0), short, g.ints(0), axis=0))
    split = g.op("Reshape", padded, g.op("Concat", blocks, block, taps, axis=0))
    tailed = g.op("Pad", split, g.op("Concat", three, g.ints(0, 0), block, axis=0))
    flat = g.op("Reshape", tailed, g.op("Concat", blocks, minus, axis=0))
    cut = g.op("Slice", flat, g.ints(0), g.op("Mul", block, g.op("Sub", wide, g.ints(1))), g.ints(1))
    return g.op("Reshape", cut, g.op("Concat", blocks, block, minus, axis=0))


def _block_nodes(g: BodyBuilder) -> list[str]:
    """Blocks of c = min(T, S) tokens, each with the c+S-1 rows it sees: 2 T S products a channel at most."""
    zero, one, none = g.ints(0), g.ints(1), g.const(0, np.int64)
    length, taps = (g.op("Shape", "weight", start=i, end=i + 1) for i in (0, 1))
    block = g.op("Min", length, taps)
    blocks = g.op("Div", g.op("Sub", g.op("Add", length, block), one), block)
    short = g.op("Sub", g.op("Mul", blocks, block), length)
    band = _band(g, blocks, block, taps, short)
    seen = g.op("Sub", g.op("Add", block, taps), one)
    starts, reach = (
        g.op("Range", none, g.op("Squeeze", n, zero), g.const(1, np.int64)) for n in (blocks, seen)
    )
    index = g.op("Add", g.op("Mul", g.op("Unsqueeze", starts, one), block), reach)
    last = g.op("Sub", g.op("Shape", "rows", start=1, end=2), one)
    windows = g.op("Gather", "rows", g.op("Min", index, last), axis=1)  # [B,n,c+S-1,C]
    shape = g.op(
        "Concat",
        g.op("Shape", "rows", start=0, end=1),
        g.ints(-1),
        g.op("Shape", "rows", start=2),
        axis=0,
    )
    return [g.op("Slice", g.op("Reshape", g.op("MatMul", band, windows), shape), zero, length, one)]


def _auto_nodes(g: BodyBuilder) -> list[str]:
    return g.by_length("weight", (3,), _step_nodes, _block_nodes, axis=0)


_body = partial(function_of, "band_product", _INPUTS, _OUTPUTS)

SPEC = OpSpec(
    name="band_product",
    inputs=_INPUTS,
    outputs=_OUTPUTS,
    bodies={
        "auto": Body(_body(_auto_nodes), "one graph for every T: one product at 1, else blocks"),
        "step": Body(_body(_step_nodes), "static T = 1 graphs: one product"),
        "blocks": Body(_body(_block_nodes), "any T without a branch"),
    },
)
