"""ONNX bodies of ``xexport::wkv7``: one step, a Scan, chunks of matrix products, and a choice by T."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx

from xexport.core.op import Body, OpSpec
from xexport.ops.builder import BodyBuilder, function_of, tensor

__all__ = ["SPEC"]

_INPUTS = ("r", "w", "k", "v", "a", "b", "state")
_OUTPUTS = ("y", "new_state")
_CHUNK = 16
_SHORT = 8


def _step_nodes(g: BodyBuilder) -> tuple[str, str]:
    """T = 1: every [B,1,H,N] becomes a row or a column by one transpose that moves no data."""

    def column(name: str) -> str:
        return g.op("Transpose", name, perm=[0, 2, 3, 1])

    removed = g.op("MatMul", "state", column("a"))
    left = g.op("Concat", removed, column("v"), axis=3)
    right = g.op("Transpose", g.op("Concat", "b", "k", axis=1), perm=[0, 2, 1, 3])
    # Gather, so that shape inference also accepts this branch of "auto" where T is known not to be 1
    decay = g.op("Unsqueeze", g.op("Gather", "w", g.const(0, np.int64), axis=1), g.ints(2))
    kept = g.op("Mul", "state", decay)
    state = g.op("Add", kept, g.op("MatMul", left, right))
    y = g.op("Transpose", g.op("MatMul", state, column("r")), perm=[0, 3, 1, 2])
    return y, state


def _scan_nodes(g: BodyBuilder) -> tuple[str, str]:
    """One Scan step a token, on axis 0; rows and columns are made once, outside the loop."""
    last, row_axis = g.ints(-1), g.ints(3)

    def column(name: str) -> str:
        return g.op("Unsqueeze", g.op("Transpose", name, perm=[1, 0, 2, 3]), last)

    def row(name: str) -> str:
        return g.op("Unsqueeze", g.op("Transpose", name, perm=[1, 0, 2, 3]), row_axis)

    sequences = [row("w"), column("a"), column("v"), g.op("Concat", row("b"), row("k"), axis=3), column("r")]
    body = BodyBuilder("wkv7_scan")
    s_in, w, a, v, bk, r = (body.fresh(x) for x in ("s", "w", "a", "v", "bk", "r"))
    left = body.op("Concat", body.op("MatMul", s_in, a), v, axis=3)
    s_out = body.op("Add", body.op("Mul", s_in, w), body.op("MatMul", left, bk))
    y_t = body.op("MatMul", s_out, r)
    graph = body.graph(
        "wkv7_token", [tensor(n, 4) for n in (s_in, w, a, v, bk, r)], [tensor(n, 4) for n in (s_out, y_t)]
    )
    state, rows = g.multi("Scan", "state", *sequences, outs=2, body=graph, num_scan_inputs=5)
    y = g.op("Transpose", g.op("Squeeze", rows, last), perm=[1, 0, 2, 3])
    return y, state


def _chunk_nodes(g: BodyBuilder) -> tuple[str, str]:
    """The form of parallel.py: what needs the state is a loop of three products a chunk (see README.md)."""
    C = _CHUNK
    batch, length = g.op("Shape", "r", start=0, end=1), g.op("Shape", "r", start=1, end=2)
    heads, size = g.op("Shape", "r", start=2, end=4), g.ints(C)
    count = g.op("Div", g.op("Add", length, g.ints(C - 1)), size)
    padded = g.op("Mul", count, size)
    pads = g.op("Concat", g.ints(0, 0, 0, 0, 0), g.op("Sub", padded, length), g.ints(0, 0), axis=0)
    shape = g.op("Concat", batch, count, size, heads, axis=0)

    def cut(name: str, fill: float = 0.0) -> str:
        """[B,T,H,N] -> [chunks,B,H,C,N]; padding tokens (decay 1, no key) leave the state alone."""
        padded_x = g.op("Pad", name, pads, g.const(fill, np.float32))
        return g.op("Transpose", g.op("Reshape", padded_x, shape), perm=[1, 0, 3, 2, 4])

    def turned(name: str) -> str:
        return g.op("Transpose", name, perm=[0, 1, 2, 4, 3])

    w, values = cut("w", 1.0), cut("v")
    lower = np.tril(np.ones((C, C), np.float32))
    decay = g.op("Exp", g.op("MatMul", g.const(lower), g.op("Log", w)))
    undo = g.op("Reciprocal", decay)
    a_hat = g.op("Mul", cut("a"), g.op("Div", decay, w))
    r_hat = g.op("Mul", cut("r"), decay)
    keys = g.op("Concat", g.op("Mul", cut("b"), undo), g.op("Mul", cut("k"), undo), axis=3)
    strict = g.const(np.tile(lower - np.eye(C, dtype=np.float32), 2))
    a_scores = g.op("Mul", g.op("MatMul", a_hat, turned(keys)), strict)
    r_scores = g.op("Mul", g.op("MatMul", r_hat, turned(keys)), g.const(np.tile(lower, 2)))
    a_b, a_k = g.multi("Split", a_scores, g.ints(C, C), outs=2, axis=4)
    inverse = _unit_lower_inverse(g, a_b, C)
    removes = g.op("MatMul", inverse, a_hat)
    update = g.op("MatMul", inverse, g.op("MatMul", a_k, values))
    kept = g.op("Slice", decay, g.ints(C - 1), g.ints(C), g.ints(3))
    loop = [removes, update, values, r_hat, g.op("Mul", keys, kept), turned(kept)]
    start = g.op("Transpose", "state", perm=[0, 1, 3, 2])
    end, new, old = g.multi("Scan", start, *loop, outs=3, body=_chunk_loop(), num_scan_inputs=6)
    y = g.op("Add", g.op("MatMul", r_scores, new), old)
    y = g.op("Transpose", y, perm=[1, 0, 3, 2, 4])
    y = g.op("Reshape", y, g.op("Concat", batch, padded, heads, axis=0))
    return g.op("Slice", y, g.ints(0), length, g.ints(1)), g.op("Transpose", end, perm=[0, 1, 3, 2])


def _chunk_loop() -> onnx.GraphProto:
    """(Z [B,H,K,V]; ...) -> (Z after the chunk, its rows [U; V] [B,H,2C,V], what r^ reads of Z [B,H,C,V])."""
    g = BodyBuilder("wkv7_chunk")
    names = [g.fresh(x) for x in ("z", "removes", "update", "values", "r_hat", "keys", "kept")]
    z, removes, update, values, r_hat, keys, kept = names
    rows = g.op("Concat", g.op("Add", g.op("MatMul", removes, z), update), values, axis=2)
    written = g.op("MatMul", g.op("Transpose", keys, perm=[0, 1, 3, 2]), rows)
    old = g.op("MatMul", r_hat, z)
    z_out = g.op("Add", g.op("Mul", z, kept), written)
    return g.graph("wkv7_chunk", [tensor(n, 4) for n in names], [tensor(n, 4) for n in (z_out, rows, old)])


def _unit_lower_inverse(g: BodyBuilder, strict: str, size: int) -> str:
    """(I - M)^-1 for a strictly lower triangular M, by merging inverted diagonal blocks of 2, 4, 8 ...

    The inverse of [[A, 0], [-B, D]] is [[A', 0], [D' B A', D']]. The product (I + M)(I + M^2)(I + M^4) ...
    costs the same, but where tokens repeat (M near -1 everywhere) its powers reach 6435 and cancel: that
    loses four digits.
    """
    rows, columns = np.indices((size, size))
    pair = (rows // 2 == columns // 2).astype(np.float32)
    inverse = g.op("Add", g.const(np.eye(size, dtype=np.float32)), g.op("Mul", strict, g.const(pair)))
    reach = 2
    while reach < size:
        merged = (rows // (2 * reach) == columns // (2 * reach)) & (rows // reach != columns // reach)
        below = g.op("Mul", strict, g.const(merged.astype(np.float32)))
        inverse = g.op("Add", inverse, g.op("MatMul", g.op("MatMul", inverse, below), inverse))
        reach *= 2
    return inverse


def _prefill_nodes(g: BodyBuilder) -> list[str]:
    """A padded chunk costs as much as about 8 Scan steps, so shorter pieces go through the Scan."""
    is_short = g.op("Less", g.op("Shape", "r", start=1, end=2), g.ints(_SHORT))
    return g.choose(is_short, (4, 4), _scan_nodes, _chunk_nodes, ("short", "long"))


def _auto_nodes(g: BodyBuilder) -> list[str]:
    """If T is 1 the step, else a Scan or chunks."""
    return g.by_length("r", (4, 4), _step_nodes, _prefill_nodes, ("step", "prefill"))


_body = partial(function_of, "wkv7", _INPUTS, _OUTPUTS)

SPEC = OpSpec(
    name="wkv7",
    inputs=_INPUTS,
    outputs=_OUTPUTS,
    bodies={
        "auto": Body(
            _body(_auto_nodes),
            "one graph for every T: the step body at 1, a Scan below 8, chunks of 16 tokens beyond",
        ),
        "step": Body(
            _body(_step_nodes),
            "static T = 1 graphs: no loop and no branch, both outer products in one MatMul",
        ),
        "chunked": Body(
            _body(_chunk_nodes),
            "prefill as matrix products (UT transform, 16 tokens a loop step): fastest body for long T",
        ),
        "scan": Body(
            _body(_scan_nodes),
            "any T, any decay in (0, 1), least memory: one loop step a token",
        ),
    },
)
