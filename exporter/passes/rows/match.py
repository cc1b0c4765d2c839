"""Which nodes are row-wise, and what each of them is to a program over rows.

``match(node)`` gives a Step, a reason (str) why a node that looks like one is none, or None for any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir

from xexport.exporter.passes.rows.values import Lead, constant, lead_of, operand_of, spread, trailing_of
from xexport.ops.fused_rows.program import Kind, OpCode

__all__ = ["Step", "match"]


@dataclass(frozen=True)
class Step:
    """One row-wise operation.

    Attributes:
        kind: "view" (a value's values under another shape, or a part of them), "unary", "binary",
            "clip", "reduce", "norm", "pick" (parts of the last axis), "join" (along it), "shift" or
            "tail".
        node: the node that gives the result.
        covers: every node that the step stands for, in graph order.
        lead: names of the first two dimensions of the rows.
        reads: the operands; for a shift (rows, history).
        writes: the results.
        op: what is computed.
        offsets: where each result of a view begins in a row, or of a pick on the last axis.
        numbers: a norm's epsilon, a clip's bounds (None: no bound), or the step of a pick.
    """

    kind: str
    node: ir.Node
    covers: tuple[ir.Node, ...]
    lead: Lead
    reads: tuple[ir.Value, ...]
    writes: tuple[ir.Value, ...]
    op: OpCode = OpCode.COPY
    offsets: tuple[int, ...] = (0,)
    numbers: tuple[float | None, ...] = ()

    @property
    def free(self) -> bool:
        """Whether ONNX Runtime does it without moving a number."""
        return self.kind == "view" and self.node.op_type in _FREE

    @property
    def computes(self) -> bool:
        """Whether it does more than show a value's numbers under another shape."""
        return self.kind != "view"


Matched = Step | str | None

_FREE = ("Reshape", "Squeeze", "Unsqueeze", "Flatten")
_UNARY = {
    "Neg": OpCode.NEG,
    "Abs": OpCode.ABS,
    "Exp": OpCode.EXP,
    "Sqrt": OpCode.SQRT,
    "Reciprocal": OpCode.RECIPROCAL,
    "Sigmoid": OpCode.SIGMOID,
    "Tanh": OpCode.TANH,
    "Relu": OpCode.RELU,
    "Softplus": OpCode.SOFTPLUS,
    "Erf": OpCode.ERF,
}
_BINARY = {
    "Add": OpCode.ADD,
    "Sub": OpCode.SUB,
    "Mul": OpCode.MUL,
    "Div": OpCode.DIV,
    "Max": OpCode.MAX,
    "Min": OpCode.MIN,
}
_REDUCE = {
    "ReduceSum": OpCode.SUM,
    "ReduceMean": OpCode.MEAN,
    "ReduceMax": OpCode.LARGEST,
    "ReduceL2": OpCode.L2,
}


def match(node: ir.Node) -> Matched:
    """What a node of the graph is."""
    if node.domain:
        return None
    matcher = _MATCHERS.get(node.op_type)
    if matcher is None or not any(lead_of(v) for v in (*node.inputs, *node.outputs)):
        return None
    return matcher(node)


def _first(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _unary(node: ir.Node) -> Matched:
    x, y = _first(node), node.outputs[0]
    lead = lead_of(x)
    if lead is None or lead_of(y) != lead:
        return "its shape is not known"
    op = _UNARY.get(node.op_type)
    if op is None:
        approximate = node.attributes.get("approximate")
        op = (
            OpCode.GELU_TANH if approximate is not None and approximate.as_string() == "tanh" else OpCode.GELU
        )
    return Step("unary", node, (node,), lead, (x,), (y,), op)


def _binary(node: ir.Node) -> Matched:
    out = node.outputs[0]
    lead = lead_of(out)
    if lead is None:
        return "its shape is not known"
    if len(node.inputs) != 2:
        return f"it has {len(node.inputs)} operands, not two"
    assert out.shape is not None
    operands = [operand_of(value, lead, len(out.shape)) for value in node.inputs]
    result, cuts = trailing_of(out), set()
    for value, operand in zip(node.inputs, operands, strict=True):
        way = spread(operand.shape, result) if operand is not None else None
        if way is None:
            shape = value.shape if value is not None else None
            return f"operand {shape} is neither rows of {list(result)} nor a constant that repeats in them"
        cuts |= {way[:2]} if way[0] else set()
    if len(cuts) > 1:
        return "its operands repeat in different ways"
    if all(o is not None and o.kind != Kind.ROWS for o in operands):
        return "none of its operands are rows"
    reads = tuple(v for v in node.inputs if v is not None)
    return Step("binary", node, (node,), lead, reads, (out,), _BINARY[node.op_type])


def _pow(node: ir.Node) -> Matched:
    x, exponent = _first(node), constant(node.inputs[1])
    lead = lead_of(x)
    if lead is None or exponent is None or exponent.size != 1:
        return "its exponent is not one constant"
    power = float(exponent.reshape(-1)[0])
    if power == 2.0:
        return Step("binary", node, (node,), lead, (x, x), tuple(node.outputs), OpCode.MUL)
    if power == 0.5:
        return Step("unary", node, (node,), lead, (x,), tuple(node.outputs), OpCode.SQRT)
    return f"exponent {power} has no instruction"


def _clip(node: ir.Node) -> Matched:
    x, lead = _first(node), lead_of(node.inputs[0])
    bounds: list[float | None] = []
    for value in (*node.inputs[1:], None, None)[:2]:
        number = constant(value)
        if value is not None and (number is None or number.size != 1):
            return "its bounds are not constants"
        bounds.append(None if number is None else float(number.reshape(-1)[0]))
    if lead is None or bounds == [None, None]:
        return "it has no bounds"
    return Step("clip", node, (node,), lead, (x,), tuple(node.outputs), numbers=tuple(bounds))


def _reduce(node: ir.Node) -> Matched:
    x, y = _first(node), node.outputs[0]
    lead = lead_of(x)
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if lead is None or axes is None or x.shape is None:
        return "it does not sum rows over constant axes"
    if axes.tolist() not in ([-1], [len(x.shape) - 1]) or len(x.shape) < 3:
        return f"it sums over axes {axes.tolist()}, not the last one alone"
    if lead_of(y) != lead:
        return "its shape is not known"
    return Step("reduce", node, (node,), lead, (x,), (y,), _REDUCE[node.op_type])


def _norm(node: ir.Node) -> Matched:
    x = _first(node)
    lead = lead_of(x)
    if lead is None or x.shape is None or len(x.shape) < 3:
        return "it does not work on rows"
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    if axis not in (-1, len(x.shape) - 1):
        return f"it works over axes from {axis} on, not the last one alone"
    if any(list(out.uses()) or out.is_graph_output() for out in node.outputs[1:]):
        return "its mean or deviation is used"
    weights = tuple(v for v in node.inputs[1:] if v is not None)
    last = trailing_of(x)[-1]
    for weight in weights:
        if weight.shape is None or list(weight.shape) != [last] or weight.dtype != ir.DataType.FLOAT:
            return "its weight is not one number a channel"
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    op = OpCode.LAYER_NORM if node.op_type == "LayerNormalization" else OpCode.RMS_NORM
    return Step("norm", node, (node,), lead, (x, *weights), (node.outputs[0],), op, numbers=(epsilon,))


def _view(node: ir.Node) -> Matched:
    x, y = _first(node), node.outputs[0]
    lead = lead_of(x)
    if lead is None or lead_of(y) != lead:
        return None  # it moves numbers between rows: not row-wise at all
    if prod(trailing_of(x)) != prod(trailing_of(y)):
        return None
    if len(node.inputs) > 1 and constant(node.inputs[1]) is None:
        return "its shape is computed"
    return Step("view", node, (node,), lead, (x,), (y,))


def _split(node: ir.Node) -> Matched:
    x = _first(node)
    lead = lead_of(x)
    if lead is None or x.shape is None:
        return None
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    if len(x.shape) < 3 or axis not in (-1, len(x.shape) - 1):
        return "it does not split the last axis of rows"
    if any(lead_of(y) != lead for y in node.outputs):
        return "its shapes are not known"
    if len(node.inputs) > 1 and constant(node.inputs[1]) is None:
        return "its sizes are computed"
    sizes = [trailing_of(y)[-1] for y in node.outputs]
    starts = tuple(int(s) for s in np.cumsum([0, *sizes[:-1]]))
    kind = "view" if prod(trailing_of(x)[:-1]) == 1 else "pick"
    return Step(kind, node, (node,), lead, (x,), tuple(node.outputs), offsets=starts, numbers=(1,))


def _slice(node: ir.Node) -> Matched:
    x, y = _first(node), node.outputs[0]
    parts = [constant(v) for v in node.inputs[1:]]
    if any(p is None for p in parts) or len(parts) < 3:
        return "its bounds are computed"
    start, end, axis = (int(p.reshape(-1)[0]) for p in parts[:3] if p is not None)
    step = int(parts[3].reshape(-1)[0]) if len(parts) > 3 and parts[3] is not None else 1
    if any(p is not None and p.size != 1 for p in parts) or step < 1 or x.shape is None:
        return "it cuts more than one axis, or backwards"
    if axis in (1, 1 - len(x.shape)) and step == 1:
        return _shift(node, start, end)
    lead = lead_of(x)
    if lead is None or lead_of(y) != lead or axis not in (-1, len(x.shape) - 1):
        return "it does not cut the last axis of rows"
    start += trailing_of(x)[-1] if start < 0 else 0
    kind = "view" if prod(trailing_of(x)[:-1]) == 1 and step == 1 else "pick"
    return Step(kind, node, (node,), lead, (x,), (y,), offsets=(start,), numbers=(step,))


def _join(node: ir.Node) -> Matched:
    out = node.outputs[0]
    lead = lead_of(out)
    if lead is None or out.shape is None:
        return None
    axis = node.attributes["axis"].as_int()
    if len(out.shape) < 3 or axis not in (-1, len(out.shape) - 1):
        return None if axis == 1 else "it does not join along the last axis of rows"
    reads = tuple(v for v in node.inputs if v is not None)
    if any(lead_of(v) != lead for v in reads):
        return "it joins rows with something else"
    return Step("join", node, (node,), lead, reads, (out,))


def _shift(node: ir.Node, start: int, end: int) -> Matched:
    """Slice(Concat(Unsqueeze(last [B,w]), x [B,T,w]), 0:-1): the row before."""
    y, joined = node.outputs[0], _first(node).producer()
    if (start, end) != (0, -1) or joined is None or joined.op_type != "Concat" or len(joined.inputs) != 2:
        return "it cuts along the tokens and is no shift by one token"
    history, x = joined.inputs
    lead = lead_of(x)
    before = history.producer() if history is not None else None
    if lead is None or x is None or lead_of(y) != lead or before is None or before.op_type != "Unsqueeze":
        return "it joins something else than the last row and the rows"
    last, axes = before.inputs[0], constant(before.inputs[1])
    if len(list(joined.outputs[0].uses())) != 1 or joined.outputs[0].is_graph_output():
        return "the joined rows have another reader"
    if joined.attributes["axis"].as_int() != 1 or axes is None or axes.tolist() != [1]:
        return "it joins along another axis than the tokens"
    if last is None or last.dtype != ir.DataType.FLOAT or trailing_of(x) != trailing_of(last, 1):
        return "the last row has another shape than the rows"
    return Step("shift", node, (before, joined, node), lead, (x, last), (y,))


def _tail(node: ir.Node) -> Matched:
    x, index = _first(node), constant(node.inputs[1])
    lead = lead_of(x)
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    if lead is None or axis != 1:
        return None
    if index is None or index.shape != () or int(index) != -1:
        return "it takes other rows than the last"
    if node.outputs[0].shape is None:
        return "its shape is not known"
    return Step("tail", node, (node,), lead, (x,), tuple(node.outputs))


_MATCHERS: dict[str, Callable[[ir.Node], Matched]] = {
    **dict.fromkeys((*_UNARY, "Gelu"), _unary),
    **dict.fromkeys(_BINARY, _binary),
    **dict.fromkeys(_REDUCE, _reduce),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _norm),
    **dict.fromkeys(_FREE, _view),
    "Pow": _pow,
    "Clip": _clip,
    "Split": _split,
    "Slice": _slice,
    "Concat": _join,
    "Gather": _tail,
}
