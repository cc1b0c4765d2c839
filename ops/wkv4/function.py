"""ONNX bodies of ``xexport::wkv4``: one step, a Scan, and a choice by T.

There is no chunked body: the rule is elementwise, so chunks would save no products, and joining pieces
(parallel.py) costs as many exponentials a token as the number of its rounds.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from xexport.core.op import Body, OpSpec
from xexport.ops.builder import BodyBuilder, function_of, tensor

__all__ = ["SPEC"]

_INPUTS = ("w", "u", "k", "v", "aa", "bb", "pp")
_OUTPUTS = ("y", "new_aa", "new_bb", "new_pp")


def _joined(g: BodyBuilder, v: str, old: tuple[str, str, str], exponent: str) -> list[str]:
    """(aa, bb, exponent) and one more value with its own exponent -> (aa, bb, the larger exponent)."""
    aa, bb, before = old
    most = g.op("Max", before, exponent)
    left, right = (g.op("Exp", g.op("Sub", x, most)) for x in (before, exponent))
    top = g.op("Add", g.op("Mul", left, aa), g.op("Mul", right, v))
    return [top, g.op("Add", g.op("Mul", left, bb), right), most]


def _token(g: BodyBuilder, w: str, bonus: str, k: str, v: str, old: tuple[str, str, str]) -> list[str]:
    """One token, all ``[B,C]``: y, aa, bb, pp."""
    top, bottom, _ = _joined(g, v, old, bonus)
    faded = (old[0], old[1], g.op("Add", old[2], w))
    return [g.op("Div", top, bottom), *_joined(g, v, faded, k)]


def _step_nodes(g: BodyBuilder) -> list[str]:
    """T = 1. Gather, so that shape inference also accepts this branch where T is known not to be 1."""
    first = g.const(0, np.int64)
    k, v = (g.op("Gather", x, first, axis=1) for x in ("k", "v"))
    y, *new = _token(g, "w", g.op("Add", "u", k), k, v, ("aa", "bb", "pp"))
    return [g.op("Unsqueeze", y, g.ints(1)), *new]


def _scan_nodes(g: BodyBuilder) -> list[str]:
    """One Scan step a token, on axis 0. w is carried along: nothing is captured from outside."""
    k, v = (g.op("Transpose", x, perm=[1, 0, 2]) for x in ("k", "v"))
    bonus = g.op("Add", "u", k)
    body = BodyBuilder("wkv4_scan")
    names = [body.fresh(x) for x in ("w", "aa", "bb", "pp", "k", "v", "bonus")]
    w, aa, bb, pp, k_t, v_t, bonus_t = names
    y, *new = _token(body, w, bonus_t, k_t, v_t, (aa, bb, pp))
    ranks = [1, *[2] * 6]
    graph = body.graph(
        "wkv4_token",
        [tensor(n, r) for n, r in zip(names, ranks, strict=True)],
        [tensor(body.op("Identity", w), 1), *(tensor(n, 2) for n in (*new, y))],
    )
    outs = g.multi("Scan", "w", "aa", "bb", "pp", k, v, bonus, outs=5, body=graph, num_scan_inputs=3)
    return [g.op("Transpose", outs[4], perm=[1, 0, 2]), *outs[1:4]]


def _auto_nodes(g: BodyBuilder) -> list[str]:
    return g.by_length("k", (3, 2, 2, 2), _step_nodes, _scan_nodes, ("step", "scan"))


_body = partial(function_of, "wkv4", _INPUTS, _OUTPUTS)

SPEC = OpSpec(
    name="wkv4",
    inputs=_INPUTS,
    outputs=_OUTPUTS,
    bodies={
        "auto": Body(_body(_auto_nodes), "one graph for every T: the step body at 1, else a Scan"),
        "step": Body(_body(_step_nodes), "static T = 1 graphs: no loop and no branch"),
        "scan": Body(_body(_scan_nodes), "any T: one loop step a token"),
    },
)
