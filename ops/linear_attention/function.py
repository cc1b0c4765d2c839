"""ONNX bodies of gated linear attention, for runtimes without the contrib operator.

ONNX Runtime from 1.31 has com.microsoft LinearAttention and ignores the local function of that name;
older ones, and other runtimes, run it. Inside a chunk of C tokens, with ``c`` the running sum of the
decays (arXiv 2312.06635, section 4.1):

    o_t = scale * ( sum_{s<=t} exp(c_t - c_s) (q_t.k_s) v_s  +  exp(c_t) S^T q_t )
    S'  = exp(c_C) S + sum_s exp(c_C - c_s) k_s v_s^T

Every exponent is 0 or below, so nothing overflows. A difference of two sums of hundreds would keep the
rounding of the sums, 3e-5: the decays are summed as multiples of 2^-8, which float32 does exactly up to 2^16,
and as the rest, whose sums stay small. A short last chunk is padded with k = v = g = 0, which leaves the
state as it is. With one decay a key the fading is inside the sum over keys, and has to be written out for
every pair of tokens of a chunk: chunks are shorter then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import onnx

from xexport.core.op import Body, OpSpec
from xexport.ops.builder import BodyBuilder

__all__ = ["SPEC"]

_Inside = Callable[["_Chunk"], tuple[str, str, str, str]]

_INPUTS = ("q", "k", "v", "state", "decay")
_OUTPUTS = ("out", "new_state")
_ATTRIBUTES = {"q_num_heads": "int", "kv_num_heads": "int", "scale": "float", "update_rule": "string"}
_CHUNK, _CHUNK_KEYS = 64, 16


def _heads(b: BodyBuilder, x: str, lead: str) -> str:
    """``x [...]`` reshaped to ``lead + [H,-1]``."""
    heads = b.op("Unsqueeze", b.attribute("q_num_heads", "int"), b.ints(0))
    return b.op("Reshape", x, b.op("Concat", lead, heads, b.ints(-1), axis=0))


class _Chunk(NamedTuple):
    """One chunk, or many at once: ``q, k, v [...,H,C,*]`` and ``decay [...,H,C,1]`` or ``[...,H,C,K]``, all
    of ``rank`` axes.
    """

    b: BodyBuilder
    rank: int
    q: str
    k: str
    v: str
    decay: str

    def swap(self, x: str) -> str:
        """The last two axes swapped."""
        *lead, row, column = range(self.rank)
        return self.b.op("Transpose", x, perm=[*lead, column, row])


def _inside(chunk: _Chunk) -> tuple[str, str, str, str]:
    """One decay a head.

    Returns the output from inside the chunk ``[...,C,V]``, q faded for the state before it ``[...,C,K]``,
    the state's increment ``[...,K,V]`` and its decay ``[...,1,1]``.
    """
    b, _, q, k, v, decay = chunk
    # one column, which it has: ONNX Runtime infers shapes in the branch that is never taken as well
    decay = b.op("Slice", decay, b.ints(0), b.ints(1), b.ints(-1))
    sums = _sums(b, decay)
    lag = _difference(b, sums.running, [chunk.swap(x) for x in sums.running])
    fade = b.op("Exp", b.op("Min", lag, b.const(0.0, np.float32)))
    scores = b.op("MatMul", q, chunk.swap(k))
    out = b.op("MatMul", b.op("Mul", b.op("Trilu", fade, upper=0), scores), v)
    faded_q, faded_k, keep = _faded(b, q, k, sums)
    return out, faded_q, b.op("MatMul", chunk.swap(faded_k), v), keep


def _inside_keys(chunk: _Chunk) -> tuple[str, str, str, str]:
    """The same for one decay a key, ``decay [...,H,C,K]``; the state's decay is ``[...,K,1]``."""
    b, _, q, k, v, decay = chunk
    sums = _sums(b, decay)
    here, there = (b.ints(-2), b.ints(-3))
    lag = _difference(b, *([b.op("Unsqueeze", x, axis) for x in sums.running] for axis in (here, there)))
    fade = b.op("Exp", b.op("Min", lag, b.const(0.0, np.float32)))
    pairs = b.op("Mul", b.op("Unsqueeze", q, here), b.op("Unsqueeze", k, there))
    scores = b.op("ReduceSum", b.op("Mul", pairs, fade), b.ints(-1), keepdims=0)
    out = b.op("MatMul", b.op("Trilu", scores, upper=0), v)
    faded_q, faded_k, keep = _faded(b, q, k, sums)
    return out, faded_q, b.op("MatMul", chunk.swap(faded_k), v), chunk.swap(keep)


class _Sums(NamedTuple):
    """Sums of decays up to each token and over all, each in two parts: multiples of 2^-8, and the rest."""

    running: list[str]
    total: list[str]


def _sums(b: BodyBuilder, decay: str) -> _Sums:
    """Of ``decay [...,C,D]``: the running sums, and ``[...,1,D]``."""
    steps = b.op("Round", b.op("Mul", decay, b.const(256.0, np.float32)))
    coarse = b.op("Mul", steps, b.const(2.0**-8, np.float32))
    parts = (coarse, b.op("Sub", decay, coarse))
    return _Sums(
        [b.op("CumSum", x, b.const(-2, np.int64)) for x in parts],
        [b.op("ReduceSum", x, b.ints(-2)) for x in parts],
    )


def _difference(b: BodyBuilder, x: Sequence[str], y: Sequence[str]) -> str:
    """x - y of values in two parts."""
    return b.op("Add", *(b.op("Sub", one, other) for one, other in zip(x, y, strict=True)))


def _faded(b: BodyBuilder, q: str, k: str, sums: _Sums) -> tuple[str, str, str]:
    """q faded for the state before the chunk, k for that behind it, and what the chunk leaves of a state."""
    fade_q = b.op("Exp", b.op("Add", *sums.running))
    fade_k = b.op("Exp", _difference(b, sums.total, sums.running))
    return b.op("Mul", q, fade_q), b.op("Mul", k, fade_k), b.op("Exp", b.op("Add", *sums.total))


def _chunks(b: BodyBuilder, x: str, padding: str, lead: str) -> str:
    """``x [B,T,H*X]`` as ``[n,B,H,C,X]``; ``lead`` is ``[B,n,C]``, ``padding`` what T lacks to n*C."""
    pads = b.op("Concat", b.ints(0, 0, 0, 0), padding, b.ints(0), axis=0)
    return b.op("Transpose", _heads(b, b.op("Pad", x, pads), lead), perm=[1, 0, 3, 2, 4])


def _joined(b: BodyBuilder, x: str, length: str, shape: str, out: str) -> None:
    """Undo :func:`_chunks`: ``x [n,B,H,C,V]`` as ``out [B,T,H*V]``."""
    flat = b.op("Reshape", b.op("Transpose", x, perm=[1, 0, 3, 2, 4]), shape)
    b.op("Slice", flat, b.ints(0), length, b.ints(1), out=out)


def _whole(b: BodyBuilder, longest: int, inside: _Inside) -> onnx.GraphProto:
    """The branch for chunks of at most ``longest`` tokens."""
    batch, length = (b.op("Shape", "q", start=i, end=i + 1) for i in (0, 1))
    one = b.ints(1)
    size = b.op("Min", length, b.ints(longest))
    count = b.op("Div", b.op("Sub", b.op("Add", length, size), one), size)
    lead = b.op("Concat", batch, count, size, axis=0)
    padded = b.op("Mul", count, size)
    padding = b.op("Sub", padded, length)
    q, k, v, decay = (_chunks(b, x, padding, lead) for x in ("q", "k", "v", "decay"))
    q = b.op("Mul", q, b.attribute("scale", "float"))
    out, faded_q, increment, keep = inside(_Chunk(b, 5, q, k, v, decay))
    _, before = b.multi(
        "Scan",
        "state",
        keep,
        increment,
        outs=["new_state", b.fresh("before")],
        body=_carry(),
        num_scan_inputs=2,
    )
    out = b.op("Add", out, b.op("MatMul", faded_q, before))
    shape = b.op("Concat", batch, padded, b.ints(-1), axis=0)
    _joined(b, out, length, shape, "out")
    return _renamed(b)


def _carry() -> onnx.GraphProto:
    """Scan body: the state from chunk to chunk, and what it was before each."""
    b = BodyBuilder("carry")
    state, keep, increment = b.fresh("state"), b.fresh("keep"), b.fresh("increment")
    before = b.op("Identity", state)
    after = b.op("Add", b.op("Mul", keep, state), increment)
    return b.graph("carry", [state, keep, increment], [after, before])


def _step(b: BodyBuilder) -> onnx.GraphProto:
    """If branch for T = 1. It reads token 0, so its shapes agree with the state's for other T too:
    ONNX Runtime infers them in the branch that is never taken as well.
    """
    shape, first = b.op("Shape", "q", start=0, end=1), b.const(0, np.int64)
    q, k, v, decay = (_heads(b, b.op("Gather", x, first, axis=1), shape) for x in ("q", "k", "v", "decay"))
    last, row = b.ints(-1), b.ints(-2)
    keep = b.op("Exp", b.op("Unsqueeze", decay, last))
    pair = b.op("Mul", b.op("Unsqueeze", k, last), b.op("Unsqueeze", v, row))
    state = b.op("Add", b.op("Mul", keep, "state"), pair)
    scaled = b.op("Unsqueeze", b.op("Mul", q, b.attribute("scale", "float")), row)
    out = b.op("Reshape", b.op("MatMul", scaled, state), b.op("Concat", shape, b.ints(1, -1), axis=0))
    return b.graph("step", [], [out, state])


def _chunked(opset: int) -> onnx.FunctionProto:
    b = BodyBuilder("linatt")
    length = b.op("Shape", "q", start=1, end=2)
    many = BodyBuilder("choice")
    heads = many.op("Unsqueeze", many.attribute("q_num_heads", "int"), many.ints(0))
    outs = many.multi(
        "If",
        many.op("Squeeze", many.op("Equal", many.op("Shape", "decay", start=2), heads)),
        outs=2,
        then_branch=_whole(BodyBuilder("heads"), _CHUNK, _inside),
        else_branch=_whole(BodyBuilder("keys"), _CHUNK_KEYS, _inside_keys),
    )
    b.multi(
        "If",
        b.op("Squeeze", b.op("Equal", length, b.ints(1))),
        outs=_OUTPUTS,
        then_branch=_step(BodyBuilder("step")),
        else_branch=many.graph("many", [], outs),
    )
    return _function(b, opset)


def _renamed(b: BodyBuilder) -> onnx.GraphProto:
    """Nodes that write ``out`` and ``new_state`` as a branch, with other names: those are its If's."""
    names = {name: b.fresh(name) for name in _OUTPUTS}
    for node in b.nodes:
        for i, name in enumerate(node.output):
            node.output[i] = names.get(name, name)
    return b.graph("many", [], list(names.values()))


def _parallel_nodes(b: BodyBuilder, inside: _Inside, each: str) -> tuple[str, str]:
    """The chunk as one, with as many decays a head as ``each`` says: out and new_state."""
    lead = b.op("Shape", "q", end=2)
    heads = [_heads(b, x, lead) for x in ("q", "k", "v")]
    one = b.op("Unsqueeze", b.attribute("q_num_heads", "int"), b.ints(0))
    heads.append(b.op("Reshape", "decay", b.op("Concat", lead, one, each, axis=0)))
    q, k, v, decay = (b.op("Transpose", x, perm=[0, 2, 1, 3]) for x in heads)
    q = b.op("Mul", q, b.attribute("scale", "float"))
    out, faded_q, increment, keep = inside(_Chunk(b, 4, q, k, v, decay))
    out = b.op("Add", out, b.op("MatMul", faded_q, "state"))
    joined = b.op("Transpose", out, perm=[0, 2, 1, 3])
    state = b.op("Add", b.op("Mul", keep, "state"), increment)
    return b.op("Reshape", joined, b.ints(0, 0, -1)), state


def _parallel(opset: int) -> onnx.FunctionProto:
    b = BodyBuilder("linatt")
    # a decay a key does not fit: an error, as it should be
    for name, made in zip(_OUTPUTS, _parallel_nodes(b, _inside, b.ints(1)), strict=True):
        b.op("Identity", made, out=name)
    return _function(b, opset)


def _parallel_either(opset: int) -> onnx.FunctionProto:
    b = BodyBuilder("linatt")
    heads = b.op("Unsqueeze", b.attribute("q_num_heads", "int"), b.ints(0))
    branches = {}
    for branch, inside in (("then_branch", _inside_keys), ("else_branch", _inside)):
        inner = BodyBuilder(branch[:4])
        branches[branch] = inner.graph(branch, [], _parallel_nodes(inner, inside, inner.ints(-1)))
    more = b.op("Greater", b.op("Shape", "decay", start=2), heads)
    b.multi("If", b.op("Squeeze", more), outs=_OUTPUTS, **branches)
    return _function(b, opset)


def _function(b: BodyBuilder, opset: int) -> onnx.FunctionProto:
    return b.function(
        "LinearAttention", _INPUTS, _OUTPUTS, opset, attributes=tuple(_ATTRIBUTES), domain="com.microsoft"
    )


SPEC = OpSpec(
    name="linear_attention",
    inputs=_INPUTS,
    outputs=_OUTPUTS,
    attributes=_ATTRIBUTES,
    domain="com.microsoft",
    op_type="LinearAttention",
    bodies={
        "chunked": Body(
            _chunked,
            "ONNX Runtime's own LinearAttention runs where it exists (1.31 on); elsewhere chunks of 64 as "
            "products, the state carried by a Scan",
        ),
        "parallel": Body(
            _parallel,
            "no control flow, for providers without Scan and If, one decay a head; memory grows with the "
            "square of the chunk",
        ),
        "parallel_either": Body(
            _parallel_either,
            "the same for one decay a head or a key: an If that is decided when the shapes are",
        ),
    },
)
