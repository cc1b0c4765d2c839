"""ONNX bodies of ``xexport::selective_scan``: one step, a Scan, and a choice by T."""

from __future__ import annotations

from functools import partial

import numpy as np
from onnx import numpy_helper

from xexport.core.op import Body, OpSpec
from xexport.ops.builder import BodyBuilder, function_of, tensor

__all__ = ["SPEC"]

_INPUTS = ("u", "dt", "A", "B", "C", "D", "state")
_OUTPUTS = ("y", "new_state")


def _step_nodes(g: BodyBuilder) -> tuple[str, str]:
    """T = 1: [B,1,D] and [B,1,N] become columns by one transpose that moves no data."""

    def column(name: str) -> str:
        return g.op("Transpose", name, perm=[0, 2, 1])

    # Slice, so that shape inference also accepts this branch of "auto" where T is known not to be 1
    dt = g.op("Slice", column("dt"), g.ints(0), g.ints(1), g.ints(2))
    # dt x ones by a product: broadcasting a column over rows of N = 16 costs three times as much
    row = g.op("Concat", g.ints(1), g.op("Shape", "A", start=1, end=2), axis=0)
    ones = g.op("ConstantOfShape", row, value=numpy_helper.from_array(np.ones(1, np.float32)))
    decay = g.op("Exp", g.op("Mul", g.op("MatMul", dt, ones), "A"))
    added = g.op("MatMul", column(g.op("Mul", "dt", "u")), "B")
    state = g.op("Add", g.op("Mul", decay, "state"), added)
    read = column(g.op("MatMul", state, column("C")))
    return g.op("Add", read, g.op("Mul", "u", "D")), state


def _scan_nodes(g: BodyBuilder) -> tuple[str, str]:
    """One Scan step a token, on axis 0. Inside, the state is [B,N,D]: broadcasts over long rows are 1.6 times
    as fast as over rows of N = 16. A travels as loop state, since a Scan body must not capture it.
    """

    def row(name: str, axis: int) -> str:
        return g.op("Unsqueeze", g.op("Transpose", name, perm=[1, 0, 2]), g.ints(axis))

    sequences = [row("dt", 2), row(g.op("Mul", "dt", "u"), 2), row("B", 3), row("C", 2)]
    start = [g.op("Transpose", "state", perm=[0, 2, 1]), g.op("Transpose", "A", perm=[1, 0])]
    body = BodyBuilder("scan")
    h_in, a_in, dt, q, b_col, c_row = (body.fresh(x) for x in ("h", "A", "dt", "q", "B", "C"))
    decay = body.op("Exp", body.op("Mul", dt, a_in))
    h_out = body.op("Add", body.op("Mul", decay, h_in), body.op("Mul", b_col, q))
    y_t = body.op("MatMul", c_row, h_out)
    a_out = body.op("Identity", a_in)
    graph = body.graph(
        "selective_scan_token",
        [tensor(h_in, 3), tensor(a_in, 2), *(tensor(n, 3) for n in (dt, q, b_col, c_row))],
        [tensor(h_out, 3), tensor(a_out, 2), tensor(y_t, 3)],
    )
    end, _, rows = g.multi("Scan", *start, *sequences, outs=3, body=graph, num_scan_inputs=4)
    read = g.op("Transpose", g.op("Squeeze", rows, g.ints(2)), perm=[1, 0, 2])
    return g.op("Add", read, g.op("Mul", "u", "D")), g.op("Transpose", end, perm=[0, 2, 1])


def _auto_nodes(g: BodyBuilder) -> list[str]:
    """If T is 1 the step, else the Scan."""
    return g.by_length("u", (3, 3), _step_nodes, _scan_nodes)


_body = partial(function_of, "selective_scan", _INPUTS, _OUTPUTS)

SPEC = OpSpec(
    name="selective_scan",
    inputs=_INPUTS,
    outputs=_OUTPUTS,
    bodies={
        "auto": Body(
            _body(_auto_nodes),
            "one graph for both uses: the step body at T = 1, a Scan for prefill",
        ),
        "step": Body(_body(_step_nodes), "static T = 1 graphs: no loop and no branch"),
        "scan": Body(_body(_scan_nodes), "any T: one loop step a token, long rows inside"),
    },
)
