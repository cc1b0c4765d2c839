"""ONNX bodies of ``xexport::causal_conv1d``: one step, windows, a Conv, and a choice by T."""

from __future__ import annotations

import numpy as np
import onnx

from xexport.core.op import Body, OpSpec
from xexport.ops.builder import BodyBuilder, Nodes, tensor

__all__ = ["SPEC"]

_INPUTS = ("x", "weight", "bias", "state")
_OUTPUTS = ("y", "new_state")
_ATTRIBUTES = {"channels": "int", "silu": "int"}
_END = 2**62
_SHORT = 32


def _past(g: BodyBuilder) -> str:
    """[B,K-1+T,D]: the state and the chunk."""
    return g.op("Concat", "state", "x", axis=1)


def _step_nodes(g: BodyBuilder) -> list[str]:
    """T = 1: state and token are one window. The token is cut to one, which it is, so that shapes agree in a
    branch not taken."""
    zero, one = g.ints(0), g.ints(1)
    window = g.op("Concat", "state", g.op("Slice", "x", zero, one, one), axis=1)
    return [g.op("ReduceSum", g.op("Mul", window, "weight"), one, keepdims=1)]


def _window_nodes(g: BodyBuilder) -> list[str]:
    """Few tokens: the windows [B,T,K,D] side by side, K times the input's memory."""
    zero, one = g.const(0, np.int64), g.const(1, np.int64)
    ends = []
    for name, axis in (("x", 1), ("weight", 0)):
        length = g.op("Squeeze", g.op("Shape", name, start=axis, end=axis + 1), g.ints(0))
        ends.append(g.op("Range", zero, length, one))
    index = g.op("Add", g.op("Unsqueeze", ends[0], g.ints(1)), ends[1])
    windows = g.op("Gather", _past(g), index, axis=1)
    return [g.op("ReduceSum", g.op("Mul", windows, "weight"), g.ints(2), keepdims=0)]


def _conv_nodes(g: BodyBuilder) -> list[str]:
    """Any T: the Conv operator, one group a channel, between two transposes."""
    rows = g.op("Transpose", _past(g), perm=[0, 2, 1])
    filters = g.op("Unsqueeze", g.op("Transpose", "weight", perm=[1, 0]), g.ints(1))
    y = g.op("Conv", rows, filters)
    group = g.nodes[-1].attribute.add()
    group.name, group.ref_attr_name, group.type = "group", "channels", onnx.AttributeProto.INT
    return [g.op("Transpose", y, perm=[0, 2, 1])]


def _up_to(g: BodyBuilder, limit: int, short: Nodes, long: Nodes) -> list[str]:
    """``short`` up to ``limit`` tokens, else ``long``."""
    length = g.op("Shape", "x", start=1, end=2)
    return g.choose(g.op("Less", length, g.ints(limit + 1)), (3,), short, long)


def _auto_nodes(g: BodyBuilder) -> list[str]:
    """If T is 1 the step, else windows or the Conv."""
    return _up_to(g, 1, _step_nodes, lambda inner: _up_to(inner, _SHORT, _window_nodes, _conv_nodes))


def _body(nodes: Nodes, opset: int) -> onnx.FunctionProto:
    g = BodyBuilder("causal_conv1d")
    (convolved,) = nodes(g)
    y = g.op("Add", convolved, "bias")
    flag = g.op("Cast", g.attribute("silu", "int"), to=onnx.TensorProto.BOOL)
    plain, active = BodyBuilder("plain"), BodyBuilder("active")
    outs = [plain.op("Identity", y), active.op("Mul", y, active.op("Sigmoid", y))]
    typed = [tensor(n, 3) for n in outs]
    g.multi(
        "If",
        flag,
        outs=["y"],
        then_branch=active.graph("active", [], typed[1:]),
        else_branch=plain.graph("plain", [], typed[:1]),
    )
    length = g.op("Shape", "x", start=1, end=2)
    g.multi("Slice", _past(g), length, g.ints(_END), g.ints(1), outs=["new_state"])
    return g.function("causal_conv1d", _INPUTS, _OUTPUTS, opset, attributes=list(_ATTRIBUTES))


SPEC = OpSpec(
    name="causal_conv1d",
    inputs=_INPUTS,
    outputs=_OUTPUTS,
    attributes=_ATTRIBUTES,
    bodies={
        "auto": Body(
            lambda opset: _body(_auto_nodes, opset),
            f"one graph for every T: a product and a sum at 1, windows up to {_SHORT}, beyond that a Conv",
        ),
        "step": Body(lambda opset: _body(_step_nodes, opset), "static T = 1 graphs: a product and a sum"),
        "conv": Body(
            lambda opset: _body(_conv_nodes, opset), "any T: the Conv operator, which every accelerator has"
        ),
    },
)
