"""ONNX bodies of attention over a bounded cache.

Two read only the ``pos + T`` rows in use: a cut of the cache is copied, the rest of it is never looked at.
The new rows are scattered into the cache, which a runtime that does not alias input and output copies whole.
The third, ``masked``, has no shape that depends on ``pos``: it reads all L rows of a cache and masks those
that are not in use, and puts the new ones in place by a product with ones and zeros. What an empty row of a
cache holds must be finite.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx

from xexport.core.op import Append, Body, OpSpec
from xexport.ops.builder import BodyBuilder

__all__ = ["SPEC"]

_INPUTS = ("q", "k", "v", "k_cache", "v_cache", "pos")
_OUTPUTS = ("out", "new_k_cache", "new_v_cache")
#: added to a score that must not count: e to that is 0, and 16-bit floats hold it
_CLOSED = -3e4
_ATTRIBUTES = {"heads": "int", "kv_heads": "int", "scale": "float"}


class _Frame:
    """What both bodies begin with: sizes, the mask, keys and values so far.

    A chunk may have no tokens, and a Reshape can't find out an axis of a tensor without elements: every
    axis is named.
    """

    def __init__(self, b: BodyBuilder) -> None:
        self.b = b
        zero, one, time = b.ints(0), b.ints(1), b.ints(2)
        self.kv = b.op("Unsqueeze", b.attribute("kv_heads", "int"), zero)
        self.heads = b.op("Unsqueeze", b.attribute("heads", "int"), zero)
        self.lead = b.op("Shape", "q", end=2)
        self.batch = b.op("Shape", "q", end=1)
        self.length = b.op("Shape", "q", start=1, end=2)
        self.key_size, self.value_size = (b.op("Shape", c, start=3) for c in ("k_cache", "v_cache"))
        self.end = b.op("Add", "pos", self.length)
        places = b.op("Range", b.const(0, np.int64), b.op("Squeeze", self.end, zero), b.const(1, np.int64))
        here = b.op("Slice", places, "pos", self.end, zero)
        column = b.op("Unsqueeze", here, one)
        self.allowed = b.op("LessOrEqual", places, column)  # [T, pos+T]
        k = self.shaped("k", self.lead, self.kv, self.key_size)
        v = self.shaped("v", self.lead, self.kv, self.value_size)
        self.k, self.v = (b.op("Transpose", y, perm=[0, 2, 1, 3]) for y in (k, v))
        self.past_k = b.op("Slice", "k_cache", zero, "pos", time)
        self.past_v = b.op("Slice", "v_cache", zero, "pos", time)
        for cache, new in (("k_cache", self.k), ("v_cache", self.v)):
            rows = b.op("Expand", column, b.op("Shape", new))
            b.op("ScatterElements", cache, rows, new, axis=2, out=f"new_{cache}")

    def shaped(self, value: str, *sizes: str) -> str:
        """``value`` in a shape whose every axis is named."""
        return self.b.op("Reshape", value, self.b.op("Concat", *sizes, axis=0), allowzero=1)

    def finish(self, out: str) -> None:
        """The output from ``[B,T,...]``."""
        width = self.b.op("Mul", self.heads, self.value_size)
        shape = self.b.op("Concat", self.lead, width, axis=0)
        self.b.op("Reshape", out, shape, allowzero=1, out="out")


def _products(b: BodyBuilder) -> None:
    """Grouped heads are rows of one product, so that shared keys are not repeated."""
    frame = _Frame(b)
    group = b.op("Div", frame.heads, frame.kv)
    rows = b.op("Mul", group, frame.length)
    keys = b.op("Concat", frame.past_k, frame.k, axis=2)
    values = b.op("Concat", frame.past_v, frame.v, axis=2)
    query = frame.shaped("q", frame.lead, frame.kv, group, frame.key_size)
    query = b.op("Transpose", query, perm=[0, 2, 3, 1, 4])  # [B,kv,group,T,K]
    query = frame.shaped(query, frame.batch, frame.kv, rows, frame.key_size)
    scaled = b.op("Mul", query, b.attribute("scale", "float"))
    scores = b.op("MatMul", scaled, b.op("Transpose", keys, perm=[0, 1, 3, 2]))
    scores = frame.shaped(scores, frame.batch, frame.kv, group, frame.length, frame.end)
    closed = b.const(-np.inf, np.float32)
    masked = b.op("Where", frame.allowed, scores, closed)
    shares = b.op("Softmax", masked, axis=-1)
    shares = frame.shaped(shares, frame.batch, frame.kv, rows, frame.end)
    out = b.op("MatMul", shares, values)
    out = frame.shaped(out, frame.batch, frame.kv, group, frame.length, frame.value_size)
    frame.finish(b.op("Transpose", out, perm=[0, 3, 1, 2, 4]))


def _masked(b: BodyBuilder) -> None:
    """Every shape follows from T and L: for runtimes that compile a graph for its shapes."""
    heads, kv = (b.op("Unsqueeze", b.attribute(name, "int"), b.ints(0)) for name in ("heads", "kv_heads"))
    lead, batch = b.op("Shape", "q", end=2), b.op("Shape", "q", end=1)
    length, rows = b.op("Shape", "q", start=1, end=2), b.op("Shape", "k_cache", start=2, end=3)

    def split(value: str, count: str) -> str:
        """``[B,T,n*X]`` as ``[B,n,T,X]``."""
        apart = b.op("Reshape", value, b.op("Concat", lead, count, b.ints(-1), axis=0))
        return b.op("Transpose", apart, perm=[0, 2, 1, 3])

    def numbered(count: str) -> str:
        every = b.op("Range", b.const(0, np.int64), b.op("Squeeze", count), b.const(1, np.int64))
        return b.op("Cast", every, to=onnx.TensorProto.INT32)

    first = b.op("Cast", "pos", to=onnx.TensorProto.INT32)
    here = b.op("Unsqueeze", b.op("Add", numbered(length), first), b.ints(1))  # [T,1]
    places = b.op("Unsqueeze", numbered(rows), b.ints(0))  # [1,L]
    one, zero = b.const(1.0, np.float32), b.const(0.0, np.float32)
    chosen = b.op("Where", b.op("Equal", here, places), one, zero)  # [T,L]
    spread = b.op("Transpose", chosen, perm=[1, 0])
    kept = b.op("Sub", one, b.op("ReduceSum", spread, b.ints(1)))  # [L,1]
    caches = {}
    for name in ("k", "v"):
        written = b.op("MatMul", spread, split(name, kv))
        caches[name] = b.op("Add", b.op("Mul", f"{name}_cache", kept), written, out=f"new_{name}_cache")
    query = b.op("Mul", split("q", heads), b.attribute("scale", "float"))  # [B,H,T,K]
    grouped = b.op(
        "Reshape", query, b.op("Concat", batch, kv, b.ints(-1), b.op("Shape", "k_cache", start=3), axis=0)
    )
    scores = b.op("MatMul", grouped, b.op("Transpose", caches["k"], perm=[0, 1, 3, 2]))
    scores = b.op("Reshape", scores, b.op("Concat", batch, heads, length, rows, axis=0))
    closed = b.op("Where", b.op("LessOrEqual", places, here), zero, b.const(_CLOSED, np.float32))
    shares = b.op("Softmax", b.op("Add", scores, closed), axis=-1)
    shares = b.op("Reshape", shares, b.op("Concat", batch, kv, b.ints(-1), rows, axis=0))
    out = b.op("MatMul", shares, caches["v"])
    out = b.op("Reshape", out, b.op("Concat", batch, heads, length, b.ints(-1), axis=0))
    joined = b.op("Transpose", out, perm=[0, 2, 1, 3])
    b.op("Reshape", joined, b.op("Concat", lead, b.ints(-1), axis=0), out="out")


def _attention(b: BodyBuilder) -> None:
    """The standard operator. It takes its scale as an attribute that a function can hand on."""
    frame = _Frame(b)
    query = frame.shaped("q", frame.lead, frame.heads, frame.key_size)
    query = b.op("Transpose", query, perm=[0, 2, 1, 3])
    out = b.fresh("attention")
    node = onnx.helper.make_node(
        "Attention",
        [query, frame.k, frame.v, frame.allowed, frame.past_k, frame.past_v],
        [out, b.fresh("present_k"), b.fresh("present_v")],
    )
    scale = onnx.AttributeProto(name="scale", ref_attr_name="scale", type=onnx.AttributeProto.FLOAT)
    node.attribute.append(scale)
    b.nodes.append(node)
    frame.finish(b.op("Transpose", out, perm=[0, 2, 1, 3]))


def _body(write: Callable[[BodyBuilder], None]) -> Callable[[int], onnx.FunctionProto]:
    def build(opset: int) -> onnx.FunctionProto:
        b = BodyBuilder("attention")
        write(b)
        return b.function("cached_attention", _INPUTS, _OUTPUTS, opset, attributes=tuple(_ATTRIBUTES))

    return build


SPEC = OpSpec(
    name="cached_attention",
    inputs=_INPUTS,
    outputs=_OUTPUTS,
    attributes=_ATTRIBUTES,
    input_types={"pos": "I"},
    appends={f"new_{name}": Append(name, "pos", axis=2) for name in ("k_cache", "v_cache")},
    bodies={
        "products": Body(
            _body(_products),
            "two products and a softmax over the rows of the cache in use: every runtime has them, and heads "
            "that share keys don't repeat them",
        ),
        "masked": Body(
            _body(_masked),
            "no shape that depends on the position, for runtimes that compile a graph for its shapes: every "
            "step reads and writes the whole cache",
        ),
        "attention": Body(
            _body(_attention),
            "one Attention node of opset 23, for runtimes that fuse it",
        ),
    },
)
