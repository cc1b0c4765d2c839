"""ONNX body of dilated attention: one softmax over the rows of the cache and the chunk's own tokens.

Mixing the pairs' outputs by their softmaxes' denominators is one softmax over all keys in which a key
counts as often as there are pairs that show it; a count's logarithm is added to the score. Every row of the
cache and every pair of the chunk's tokens is computed and masked, so this costs T (R + T) products: it is
for runtimes without the kernel, and right for every stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from xexport.core.manifest import Ring
from xexport.core.op import Append, Body, OpSpec
from xexport.ops.builder import BodyBuilder
from xexport.ops.dilated_attention.reference import cache_rows

__all__ = ["SPEC"]

_INPUTS = ("q", "k", "v", "k_cache", "v_cache", "pos", "segments", "rates", "offsets")
_OUTPUTS = ("out", "new_k_cache", "new_v_cache")
_ATTRIBUTES = {"heads": "int", "scale": "float"}


class _Body:
    """The parts of the body, each a few nodes."""

    def __init__(self) -> None:
        self.b = b = BodyBuilder("dilated")
        self.zero, self.one, self.last = b.ints(0), b.ints(1), b.ints(-1)
        heads = b.op("Unsqueeze", b.attribute("heads", "int"), self.zero)
        self.split = b.op("Concat", b.ints(0, 0), heads, self.last, axis=0)
        length = b.op("Shape", "q", start=1, end=2)
        self.end = b.op("Add", "pos", length)
        self.tokens = b.op("Range", b.op("Squeeze", "pos"), b.op("Squeeze", self.end), b.const(1, np.int64))

    def axes(self, value: str, *axes: int) -> str:
        return self.b.op("Unsqueeze", value, self.b.ints(*axes))

    def heads_first(self, value: str) -> str:
        """[B,T,H*N] -> [B,H,T,N]."""
        return self.b.op("Transpose", self.b.op("Reshape", value, self.split), perm=[0, 2, 1, 3])

    def rows(self) -> None:
        """For every row of the cache its pair [R], that pair's w [R], and its place [H,R] in the segment."""
        b = self.b
        count = b.op("Div", b.op("Sub", b.op("Add", "segments", "rates"), self.one), "rates")
        ends = b.op("CumSum", count, b.const(0, np.int64))
        number = b.op("Squeeze", b.op("Shape", "k_cache", start=2, end=3))
        row = b.op("Range", b.const(0, np.int64), number, b.const(1, np.int64))
        behind = b.op("GreaterOrEqual", self.axes(row, 1), ends)
        self.pair = b.op("ReduceSum", b.op("Cast", behind, to=onnx.TensorProto.INT64), self.one, keepdims=0)
        self.segment = b.op("Gather", "segments", self.pair)
        inside = b.op("Sub", row, b.op("Gather", b.op("Sub", ends, count), self.pair))
        begin = b.op("Mul", inside, b.op("Gather", "rates", self.pair))
        offset = b.op("Gather", b.op("Transpose", "offsets", perm=[1, 0]), self.pair, axis=1)
        self.place = b.op("Add", begin, offset)
        # the last row of a pair has no place in the segment if r does not divide w
        self.inside = b.op("Less", self.place, self.segment)

    def newest(self, end: str) -> str:
        """The last token [H,R] before ``end`` at each row's place, negative if there is none."""
        b = self.b
        # a quotient of ONNX is cut off, so the numerator is kept at 0 or above
        above = b.op("Add", b.op("Sub", b.op("Sub", end, self.one), self.place), self.segment)
        turns = b.op("Sub", b.op("Div", above, self.segment), self.one)
        return b.op("Add", b.op("Mul", turns, self.segment), self.place)

    def membership(self) -> None:
        """Of every token its segment [T,P], and which heads have its place: [P,H,T]."""
        b = self.b
        token = self.axes(self.tokens, 1)
        self.number = b.op("Div", token, "segments")
        place = b.op("Mod", b.op("Mod", token, "segments"), "rates")
        self.member = b.op(
            "Equal", self.axes(b.op("Transpose", place, perm=[1, 0]), 1), self.axes("offsets", 2)
        )

    def cache_open(self) -> str:
        """Which rows of the cache a token sees: [H,T,R]."""
        b = self.b
        old = self.newest("pos")
        there = b.op("And", b.op("GreaterOrEqual", old, self.zero), self.inside)
        of_row = b.op("Div", old, self.segment)
        of_token = b.op("Gather", self.number, self.pair, axis=1)
        same = b.op("Equal", self.axes(of_row, 1), of_token)
        member = b.op("Transpose", b.op("Gather", self.member, self.pair, axis=0), perm=[1, 2, 0])
        return b.op("And", b.op("And", same, self.axes(there, 1)), member)

    def counts(self) -> str:
        """How many pairs show a token of the chunk to another: float32 [H,T,T]."""
        b = self.b
        number = b.op("Transpose", self.number, perm=[1, 0])
        same = b.op("Equal", self.axes(number, 2), self.axes(number, 1))
        past = b.op("LessOrEqual", self.tokens, self.axes(self.tokens, 1))
        both = b.op("And", self.axes(self.member, 3), self.axes(self.member, 2))
        shown = b.op("And", both, self.axes(b.op("And", same, past), 1))
        return b.op("ReduceSum", b.op("Cast", shown, to=onnx.TensorProto.FLOAT), self.zero, keepdims=0)

    def attend(self) -> None:
        b = self.b
        q = b.op("Mul", self.heads_first("q"), b.attribute("scale", "float"))
        self.k, self.v = self.heads_first("k"), self.heads_first("v")
        closed = b.const(-np.inf, np.float32)
        past = b.op("MatMul", q, b.op("Transpose", "k_cache", perm=[0, 1, 3, 2]))
        past = b.op("Where", self.cache_open(), past, closed)
        own = b.op("MatMul", q, b.op("Transpose", self.k, perm=[0, 1, 3, 2]))
        counts = self.counts()
        shown = b.op("Greater", counts, b.const(0, np.float32))
        own = b.op("Where", shown, b.op("Add", own, b.op("Log", counts)), closed)
        share = b.op("Softmax", b.op("Concat", past, own, axis=3), axis=-1)
        values = b.op("Concat", "v_cache", self.v, axis=2)
        out = b.op("Transpose", b.op("MatMul", share, values), perm=[0, 2, 1, 3])
        b.op("Reshape", out, b.ints(0, 0, -1), out="out")

    def append(self) -> None:
        b = self.b
        new = self.newest(self.end)
        fresh = b.op("And", b.op("GreaterOrEqual", new, "pos"), self.inside)
        index = self.axes(b.op("Where", fresh, b.op("Sub", new, "pos"), self.zero), 0, 3)
        fresh = self.axes(fresh, 2)
        for name, chunk in (("k_cache", self.k), ("v_cache", self.v)):
            wanted = b.op("Expand", index, b.op("Shape", name))
            rows = b.op("GatherElements", chunk, wanted, axis=2)
            b.op("Where", fresh, rows, name, out=f"new_{name}")


def _build(opset: int) -> onnx.FunctionProto:
    body = _Body()
    body.rows()
    body.membership()
    body.attend()
    body.append()
    return body.b.function("dilated_attention", _INPUTS, _OUTPUTS, opset, attributes=tuple(_ATTRIBUTES))


def _rings(node: Mapping[str, Any], rows: int) -> tuple[Ring, ...] | None:
    """A ring for every pair, one behind the other; a head without the token's place writes nothing."""
    if "segments" not in node or "rates" not in node:
        return None
    found, first = [], 0
    for segment, rate in zip(node["segments"].tolist(), node["rates"].tolist(), strict=True):
        found.append(Ring(first=first, span=segment, rate=rate))
        first += cache_rows(segment, rate)
    return tuple(found) if first == rows else None


SPEC = OpSpec(
    name="dilated_attention",
    inputs=_INPUTS,
    outputs=_OUTPUTS,
    attributes=_ATTRIBUTES,
    input_types=dict.fromkeys(("pos", "segments", "rates", "offsets"), "I"),
    appends={f"new_{name}": Append(name, "pos", 2, _rings) for name in ("k_cache", "v_cache")},
    bodies={
        "masked": Body(
            _build,
            "one softmax over cache and chunk, a key weighted by the number of pairs that show it: standard "
            "operators of every runtime",
        ),
    },
)
