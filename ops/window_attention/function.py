"""ONNX body of attention over sinks and a ring: one softmax over sinks, ring and chunk, masked.

The columns of the scores are the new cache's sinks, the old ring, the chunk; the sinks' have queries of their
own. The cost is T (S + C + T): for runtimes without the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from xexport.core.manifest import Ring
from xexport.core.op import Append, Body, OpSpec
from xexport.ops.builder import BodyBuilder

__all__ = ["SPEC"]

_INPUTS = ("q", "q_sinks", "k", "v", "k_cache", "v_cache", "pos")
_OUTPUTS = ("out", "new_k_cache", "new_v_cache")
_ATTRIBUTES = {"heads": "int", "kv_heads": "int", "window": "int", "sinks": "int", "scale": "float"}


class _Body:
    """The parts of the body, each a few nodes."""

    def __init__(self) -> None:
        self.b = b = BodyBuilder("window")
        self.zero, self.one, self.two, self.last = b.ints(0), b.ints(1), b.ints(2), b.ints(-1)
        self.zeros = b.ints(0, 0)
        self.sinks, self.window, self.kv, heads = (
            b.op("Unsqueeze", b.attribute(n, "int"), self.zero)
            for n in ("sinks", "window", "kv_heads", "heads")
        )
        self.group = b.op("Div", heads, self.kv)
        self.rows = b.op("Shape", "k_cache", start=2, end=3)
        self.ring = b.op("Sub", self.rows, self.sinks)
        self.row = self.range(b.const(0, np.int64), b.op("Squeeze", self.rows))
        self.end = b.op("Add", "pos", b.op("Shape", "q", start=1, end=2))
        self.here = self.range(b.op("Squeeze", "pos"), b.op("Squeeze", self.end))

    def range(self, begin: str, end: str) -> str:
        return self.b.op("Range", begin, end, self.b.const(1, np.int64))

    def token_in_row(self, end: str) -> str:
        """Which token every row of the cache [S+C] holds after ``end`` tokens, -1 where none."""
        b = self.b
        last = b.op("Sub", end, self.one)
        sink = b.op("Less", self.row, self.sinks)
        # Mod of ONNX has the divisor's sign, as in Python
        recent = b.op("Sub", last, b.op("Mod", b.op("Sub", last, self.row), self.ring))
        token = b.op("Where", sink, self.row, recent)
        lowest = b.op("Where", sink, self.zero, self.sinks)
        filled = b.op("And", b.op("Less", token, end), b.op("GreaterOrEqual", token, lowest))
        return b.op("Where", filled, token, self.last)

    def caches(self) -> None:
        b = self.b
        new = self.token_in_row(self.end)
        fresh = b.op("GreaterOrEqual", new, "pos")
        from_chunk = b.op("Sub", b.op("Add", self.rows, new), "pos")
        index = b.op("Where", fresh, from_chunk, self.row)  # in concat(cache, chunk)
        lead = b.op("Concat", self.zeros, self.kv, self.last, axis=0)
        self.seen, self.new = [], []
        for name in ("k", "v"):
            chunk = b.op("Transpose", b.op("Reshape", name, lead), perm=[0, 2, 1, 3])
            both = b.op("Concat", f"{name}_cache", chunk, axis=2)
            self.new.append(b.op("Gather", both, index, axis=2, out=f"new_{name}_cache"))
            self.seen.append(b.op("Slice", both, self.sinks, b.ints(2**62), self.two))

    def open(self) -> str:
        """Which of concat(sinks, ring, chunk) a token of the chunk sees: [T,S+C+T]."""
        b = self.b
        old, new = self.token_in_row("pos"), self.token_in_row(self.end)
        chunk = b.op("Where", b.op("GreaterOrEqual", self.here, self.sinks), self.here, self.last)
        sinks = b.op("Slice", new, self.zero, self.sinks, self.zero)
        ring = b.op("Slice", old, self.sinks, b.ints(2**62), self.zero)
        there = b.op("Concat", sinks, ring, chunk, axis=0)
        column = b.op("Unsqueeze", self.here, self.one)
        near = b.op("Greater", there, b.op("Sub", column, self.window))
        near = b.op("Or", near, b.op("Less", there, self.sinks))
        past = b.op("And", b.op("GreaterOrEqual", there, self.zero), b.op("LessOrEqual", there, column))
        return b.op("And", near, past)

    def scores(self, query: str, keys: str) -> str:
        """[B,kv,group*T,N]: heads that share keys are rows of one product."""
        b = self.b
        split = b.op("Concat", self.zeros, self.kv, self.group, self.last, axis=0)
        query = b.op("Transpose", b.op("Reshape", query, split), perm=[0, 2, 3, 1, 4])
        size = b.op("Shape", "k_cache", start=3)
        query = b.op("Reshape", query, b.op("Concat", self.zeros, self.last, size, axis=0))
        scaled = b.op("Mul", query, b.attribute("scale", "float"))
        return b.op("MatMul", scaled, b.op("Transpose", keys, perm=[0, 1, 3, 2]))

    def attend(self) -> None:
        b = self.b
        sink_keys, sink_values = (b.op("Slice", x, self.zero, self.sinks, self.two) for x in self.new)
        scores = b.op("Concat", self.scores("q_sinks", sink_keys), self.scores("q", self.seen[0]), axis=3)
        values = b.op("Concat", sink_values, self.seen[1], axis=2)
        count = b.op("Shape", values, start=2, end=3)
        lead = b.op("Concat", self.zeros, self.group, self.last, count, axis=0)
        closed = b.const(-np.inf, np.float32)
        shares = b.op("Softmax", b.op("Where", self.open(), b.op("Reshape", scores, lead), closed), axis=-1)
        shares = b.op("Reshape", shares, b.op("Concat", self.zeros, self.last, count, axis=0))
        out = b.op("MatMul", shares, values)
        width = b.op("Shape", "v_cache", start=3)
        out = b.op("Reshape", out, b.op("Concat", self.zeros, self.group, self.last, width, axis=0))
        b.op("Reshape", b.op("Transpose", out, perm=[0, 3, 1, 2, 4]), b.ints(0, 0, -1), out="out")


def _build(opset: int) -> onnx.FunctionProto:
    body = _Body()
    body.caches()
    body.attend()
    return body.b.function("window_attention", _INPUTS, _OUTPUTS, opset, attributes=tuple(_ATTRIBUTES))


def _rings(node: Mapping[str, Any], rows: int) -> tuple[Ring, ...]:
    """Row s of a sink s, row S + (s - S) mod C of any other token s."""
    sinks = int(node["sinks"])
    ring = Ring(first=sinks, span=rows - sinks, start=sinks)
    return (Ring(first=0, span=sinks, until=sinks), ring) if sinks else (ring,)


SPEC = OpSpec(
    name="window_attention",
    inputs=_INPUTS,
    outputs=_OUTPUTS,
    attributes=_ATTRIBUTES,
    input_types={"pos": "I"},
    appends={f"new_{name}": Append(name, "pos", 2, _rings) for name in ("k_cache", "v_cache")},
    bodies={
        "masked": Body(
            _build,
            "one softmax over sinks, ring and chunk, masked: standard operators of every runtime",
        ),
    },
)
