"""ONNX bodies of ``xexport::modal_conv``: one step, a Scan, and a choice by T."""

from __future__ import annotations

from functools import partial

from xexport.core.op import Body, OpSpec
from xexport.ops.builder import BodyBuilder, function_of, tensor

__all__ = ["SPEC"]

_INPUTS = ("packed", "poles", "residues", "skip", "state")
_OUTPUTS = ("y", "new_state")


def _gated(g: BodyBuilder) -> tuple[str, str]:
    """x0 and z = x1 v: [B,T,D]."""
    out, gate, v = g.multi("Split", "packed", outs=3, axis=2, num_outputs=3)
    return out, g.op("Mul", gate, v)


def _pair(g: BodyBuilder, value: str, axis: int) -> list[str]:
    """Real and imaginary parts, without the axis that held them."""
    parts = g.multi("Split", value, outs=2, axis=axis, num_outputs=2)
    return [g.op("Squeeze", part, g.ints(axis)) for part in parts]


def _advanced(g: BodyBuilder, state: list[str], poles: list[str], z: str) -> tuple[str, str]:
    """The next state ([B,N,D] twice) with an input [B,1,D]."""
    (re, im), (pole_re, pole_im) = state, poles
    turned = g.op("Sub", g.op("Mul", pole_re, re), g.op("Mul", pole_im, im))
    return g.op("Add", turned, z), g.op("Add", g.op("Mul", pole_re, im), g.op("Mul", pole_im, re))


def _read(g: BodyBuilder, re: str, im: str, residues: list[str], keep: int) -> str:
    """Re sum_n R s: [B,D], or [B,1,D]."""
    terms = g.op("Sub", g.op("Mul", residues[0], re), g.op("Mul", residues[1], im))
    return g.op("ReduceSum", terms, g.ints(1), keepdims=keep)


def _finish(g: BodyBuilder, out: str, z: str, read: str, re: str, im: str) -> tuple[str, str]:
    y = g.op("Mul", out, g.op("Add", read, g.op("Mul", z, "skip")))
    parts = [g.op("Unsqueeze", part, g.ints(2)) for part in (re, im)]
    return y, g.op("Concat", *parts, axis=2)


def _step_nodes(g: BodyBuilder) -> tuple[str, str]:
    """T = 1."""
    out, z = _gated(g)
    # Slice, so that shape inference also accepts this branch of "auto" where T is known not to be 1
    out, z = (g.op("Slice", x, g.ints(0), g.ints(1), g.ints(1)) for x in (out, z))
    re, im = _advanced(g, _pair(g, "state", 2), _pair(g, "poles", 1), z)
    return _finish(g, out, z, _read(g, re, im, _pair(g, "residues", 1), 1), re, im)


def _scan_nodes(g: BodyBuilder) -> tuple[str, str]:
    """One Scan step a token, on axis 0; poles and residues travel as loop state, as a Scan body must not
    capture them.
    """
    out, z = _gated(g)
    rows = g.op("Unsqueeze", g.op("Transpose", z, perm=[1, 0, 2]), g.ints(2))
    constants = [*_pair(g, "poles", 1), *_pair(g, "residues", 1)]
    body = BodyBuilder("scan")
    re_in, im_in, *fixed, now = (body.fresh(x) for x in ("re", "im", "pr", "pi", "rr", "ri", "z"))
    re, im = _advanced(body, [re_in, im_in], fixed[:2], now)
    read = _read(body, re, im, fixed[2:], 0)
    same = [body.op("Identity", x) for x in fixed]
    graph = body.graph(
        "modal_conv_token",
        [*(tensor(n, 3) for n in (re_in, im_in)), *(tensor(n, 2) for n in fixed), tensor(now, 3)],
        [*(tensor(n, 3) for n in (re, im)), *(tensor(n, 2) for n in same), tensor(read, 2)],
    )
    start = [*_pair(g, "state", 2), *constants, rows]
    re, im, *_, reads = g.multi("Scan", *start, outs=7, body=graph, num_scan_inputs=1)
    return _finish(g, out, z, g.op("Transpose", reads, perm=[1, 0, 2]), re, im)


def _auto_nodes(g: BodyBuilder) -> list[str]:
    """If T is 1 the step, else the Scan."""
    return g.by_length("packed", (3, 4), _step_nodes, _scan_nodes)


_body = partial(function_of, "modal_conv", _INPUTS, _OUTPUTS)

SPEC = OpSpec(
    name="modal_conv",
    inputs=_INPUTS,
    outputs=_OUTPUTS,
    bodies={
        "auto": Body(
            _body(_auto_nodes),
            "one graph for both uses: the step body at T = 1, a Scan for prefill",
        ),
        "step": Body(_body(_step_nodes), "static T = 1 graphs: no loop and no branch"),
        "scan": Body(_body(_scan_nodes), "any T: one loop step a token"),
    },
)
