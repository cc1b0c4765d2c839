"""ONNX bodies of ``xexport::wkv6``: one step, a Scan, and a choice by T."""

from __future__ import annotations

from functools import partial

import numpy as np

from xexport.core.op import Body, OpSpec
from xexport.ops.builder import BodyBuilder, function_of, tensor

__all__ = ["SPEC"]

_INPUTS = ("r", "w", "k", "v", "u", "state")
_OUTPUTS = ("y", "new_state")


def _bonus(g: BodyBuilder) -> str:
    """<r u, k> v of every token, which needs no state: ``[B,T,H,M]``."""
    products = g.op("Mul", g.op("Mul", "r", "u"), "k")
    return g.op("Mul", g.op("ReduceSum", products, g.ints(-1)), "v")


def _step_nodes(g: BodyBuilder) -> tuple[str, str]:
    """T = 1: the axis of one token becomes the other side of each outer product."""

    def column(name: str) -> str:
        return g.op("Transpose", name, perm=[0, 2, 3, 1])

    def row(name: str) -> str:
        return g.op("Transpose", name, perm=[0, 2, 1, 3])

    read = g.op("MatMul", row("r"), "state")
    y = g.op("Add", g.op("Transpose", read, perm=[0, 2, 1, 3]), _bonus(g))
    added = g.op("MatMul", column("k"), row("v"))
    # Gather, so that shape inference also accepts this branch of "auto" where T is known not to be 1
    decay = g.op("Unsqueeze", g.op("Gather", "w", g.const(0, np.int64), axis=1), g.ints(3))
    return y, g.op("Add", g.op("Mul", decay, "state"), added)


def _scan_nodes(g: BodyBuilder) -> tuple[str, str]:
    """One Scan step a token, on axis 0; what needs no state is made outside the loop."""
    last, row_axis = g.ints(-1), g.ints(3)

    def turned(name: str, axes: str) -> str:
        return g.op("Unsqueeze", g.op("Transpose", name, perm=[1, 0, 2, 3]), axes)

    every = g.op("Expand", "w", g.op("Shape", "k"))
    sequences = [turned("r", row_axis), turned(every, last), turned("k", last), turned("v", row_axis)]
    body = BodyBuilder("wkv6_scan")
    s_in, r, w, k, v = (body.fresh(x) for x in ("s", "r", "w", "k", "v"))
    read = body.op("MatMul", r, s_in)
    s_out = body.op("Add", body.op("Mul", w, s_in), body.op("Mul", k, v))
    graph = body.graph(
        "wkv6_token", [tensor(n, 4) for n in (s_in, r, w, k, v)], [tensor(n, 4) for n in (s_out, read)]
    )
    state, rows = g.multi("Scan", "state", *sequences, outs=2, body=graph, num_scan_inputs=4)
    read = g.op("Transpose", g.op("Squeeze", rows, row_axis), perm=[1, 0, 2, 3])
    return g.op("Add", read, _bonus(g)), state


def _auto_nodes(g: BodyBuilder) -> list[str]:
    return g.by_length("k", (4, 4), _step_nodes, _scan_nodes, ("step", "scan"))


_body = partial(function_of, "wkv6", _INPUTS, _OUTPUTS)

SPEC = OpSpec(
    name="wkv6",
    inputs=_INPUTS,
    outputs=_OUTPUTS,
    bodies={
        "auto": Body(_body(_auto_nodes), "one graph for every T: the step body at 1, else a Scan"),
        "step": Body(_body(_step_nodes), "static T = 1 graphs: no loop and no branch"),
        "scan": Body(
            _body(_scan_nodes),
            "any T and any decay: one loop step a token, what needs no state outside of it",
        ),
    },
)
