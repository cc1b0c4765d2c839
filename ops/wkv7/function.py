"""ONNX bodies of ``xexport::wkv7``: one step, a Scan, chunks of matrix products, and a choice by T."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx

from xexport.core.op import Body, OpSpec
from xexport.ops.builder import BodyBuilder

__all__ = ["SPEC"]

_INPUTS = ("r", "w", "k", "v", "a", "b", "state")
_OUTPUTS = ("y", "new_state")
_CHUNK = 32
_SHORT = 12
_Nodes = Callable[[BodyBuilder], tuple[str, str]]


def _tensor(name: str, rank: int) -> onnx.ValueInfoProto:
    """Typed and ranked, as OpenVINO wants the interface of a Scan body."""
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * rank)


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
        "wkv7_token", [_tensor(n, 4) for n in (s_in, w, a, v, bk, r)], [_tensor(n, 4) for n in (s_out, y_t)]
    )
    state, rows = g.multi("Scan", "state", *sequences, outs=2, body=graph, num_scan_inputs=5)
    y = g.op("Transpose", g.op("Squeeze", rows, last), perm=[1, 0, 2, 3])
    return y, state


def _chunk_nodes(g: BodyBuilder) -> tuple[str, str]:
    """The form of parallel.py with C = 32: a loop of two matrix products a chunk (see README.md)."""
    C = _CHUNK
    length = g.op("Shape", "r", start=1, end=2)
    size = g.ints(C)
    count = g.op("Div", g.op("Add", length, g.ints(C - 1)), size)
    padding = g.op("Sub", g.op("Mul", count, size), length)
    pads = g.op("Concat", g.ints(0, 0, 0, 0, 0), padding, g.ints(0, 0), axis=0)
    heads = g.op("Shape", "r", start=2, end=4)
    shape = g.op("Concat", g.op("Shape", "r", start=0, end=1), count, size, heads, axis=0)

    def cut(name: str) -> str:
        """[B,T,H,N] -> [chunks,B,H,C,N]; padding with 0 (log decay 0, no key) leaves the state alone."""
        return g.op("Transpose", g.op("Reshape", g.op("Pad", name, pads), shape), perm=[1, 0, 3, 2, 4])

    def turned(name: str) -> str:
        return g.op("Transpose", name, perm=[0, 1, 2, 4, 3])

    log_w = cut(g.op("Log", "w"))
    ones = np.tril(np.ones((C, C), np.float32))
    total = g.op("MatMul", g.const(ones), log_w)
    decay, decay_inverse = g.op("Exp", total), g.op("Exp", g.op("Neg", total))
    values = cut("v")
    a_hat = g.op("Mul", cut("a"), g.op("Exp", g.op("Sub", total, log_w)))
    r_hat = g.op("Mul", cut("r"), decay)
    keys = turned(
        g.op("Concat", g.op("Mul", cut("b"), decay_inverse), g.op("Mul", cut("k"), decay_inverse), axis=3)
    )
    strict = ones - np.eye(C, dtype=np.float32)
    halves = g.ints(C, C)
    a_scores = g.op("Mul", g.op("MatMul", a_hat, keys), g.const(np.hstack([strict, strict])))
    r_scores = g.op("Mul", g.op("MatMul", r_hat, keys), g.const(np.hstack([ones, ones])))
    a_b, a_k = g.multi("Split", a_scores, halves, outs=2, axis=4)
    inverse = _unit_lower_inverse(g, a_b, C)
    reads = g.op("Concat", g.op("MatMul", inverse, a_hat), r_hat, axis=3)
    update = g.op("MatMul", inverse, g.op("MatMul", a_k, values))
    kept = turned(g.op("Slice", decay, g.ints(C - 1), g.ints(C), g.ints(3)))
    writes = g.op("Concat", r_scores, g.op("Mul", keys, kept), axis=3)
    loop = [reads, update, values, writes, kept]
    start = g.op("Transpose", "state", perm=[0, 1, 3, 2])
    end, rows = g.multi("Scan", start, *loop, outs=2, body=_chunk_loop(C), num_scan_inputs=5)
    padded = g.op("Concat", g.op("Shape", "r", start=0, end=1), g.op("Mul", count, size), heads, axis=0)
    y = g.op("Reshape", g.op("Transpose", rows, perm=[1, 0, 3, 2, 4]), padded)
    return g.op("Slice", y, g.ints(0), length, g.ints(1)), g.op("Transpose", end, perm=[0, 1, 3, 2])


def _chunk_loop(C: int) -> onnx.GraphProto:
    """(Z [B,H,K,V]; W over r^, U0, V, scores over keys, decay) -> (Z after the chunk, y [B,H,C,V])."""
    g = BodyBuilder("wkv7_chunk")
    names = [g.fresh(x) for x in ("z", "reads", "update", "values", "writes", "kept")]
    z, reads, update, values, writes, kept = names
    read_u, read_y = g.multi("Split", g.op("MatMul", reads, z), g.ints(C, C), outs=2, axis=2)
    rows = g.op("Concat", g.op("Add", read_u, update), values, axis=2)
    width = g.op("Sub", g.op("Shape", writes, start=2, end=3), g.ints(C))
    sizes = g.op("Concat", g.ints(C), width, axis=0)
    write_y, write_z = g.multi("Split", g.op("MatMul", writes, rows), sizes, outs=2, axis=2)
    y = g.op("Add", read_y, write_y)
    z_out = g.op("Add", g.op("Mul", z, kept), write_z)
    return g.graph("wkv7_chunk", [_tensor(n, 4) for n in names], [_tensor(n, 4) for n in (z_out, y)])


def _unit_lower_inverse(g: BodyBuilder, strict: str, size: int) -> str:
    """(I - M)^-1 = (I + M)(I + M^2)(I + M^4)... for a strictly lower triangular M."""
    inverse = g.op("Add", g.const(np.eye(size, dtype=np.float32)), strict)
    power, reach = strict, 2
    while reach < size:
        power = g.op("MatMul", power, power)
        inverse = g.op("Add", inverse, g.op("MatMul", inverse, power))
        reach *= 2
    return inverse


def _branch(nodes: _Nodes, name: str) -> onnx.GraphProto:
    g = BodyBuilder(f"wkv7_{name}")
    return g.graph(name, [], [_tensor(n, 4) for n in nodes(g)])


def _prefill_nodes(g: BodyBuilder) -> tuple[str, str]:
    """A padded chunk costs as much as about 12 Scan steps, so shorter pieces go through the Scan."""
    is_short = g.op("Less", g.op("Shape", "r", start=1, end=2), g.ints(_SHORT))
    short, long = _branch(_scan_nodes, "short"), _branch(_chunk_nodes, "long")
    y, state = g.multi("If", is_short, outs=2, then_branch=short, else_branch=long)
    return y, state


def _auto_nodes(g: BodyBuilder) -> tuple[str, str]:
    """If T is 1 the step, else a Scan or chunks."""
    is_step = g.op("Equal", g.op("Shape", "r", start=1, end=2), g.ints(1))
    step, prefill = _branch(_step_nodes, "step"), _branch(_prefill_nodes, "prefill")
    y, state = g.multi("If", is_step, outs=2, then_branch=step, else_branch=prefill)
    return y, state


def _body(nodes: _Nodes, opset: int) -> onnx.FunctionProto:
    g = BodyBuilder("wkv7")
    y, state = nodes(g)
    g.op("Identity", y, out=_OUTPUTS[0])
    g.op("Identity", state, out=_OUTPUTS[1])
    return g.function("wkv7", _INPUTS, _OUTPUTS, opset)


SPEC = OpSpec(
    name="wkv7",
    inputs=_INPUTS,
    outputs=_OUTPUTS,
    bodies={
        "auto": Body(
            lambda opset: _body(_auto_nodes, opset),
            "one graph for every T: the step body at 1, a Scan below 12, chunks of 32 tokens beyond",
        ),
        "step": Body(
            lambda opset: _body(_step_nodes, opset),
            "static T = 1 graphs: no loop and no branch, both outer products in one MatMul",
        ),
        "chunked": Body(
            lambda opset: _body(_chunk_nodes, opset),
            "prefill as matrix products (UT transform, 32 tokens a loop step): fastest body for long T",
        ),
        "scan": Body(
            lambda opset: _body(_scan_nodes, opset),
            "any T, any decay in (0, 1), least memory: one loop step a token",
        ),
    },
)
