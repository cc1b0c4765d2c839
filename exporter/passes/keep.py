"""Logits of the last positions only: a graph input says of how many, and the rest is not computed.

A prompt needs the logits after its last token; with a vocabulary of 65 536 the head is over a third of a
prefill. The input ``logits_to_keep`` (int64 [1], the name that Hugging Face gives it) is n: logits become
``[B,kept,V]`` with kept = min(n, T), and 0 means all T. It has a default of 0, so whoever runs the graph
without feeding it gets every position, as the chunk form promises.

From the logits back, a node may run on the kept positions alone if position t of its result depends on
position t of its inputs and nothing outside needs its result. The region of all such nodes is found, and
what enters it is sliced: before the final norm, before the last layer's feed-forward network, wherever
the first value lies that something else (a state, a shift, a scan) needs at every position.

Runs after the other passes, on nodes whose meaning is known here; quantization and fusion come after it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from xexport.core.manifest import KEEP_INPUT as INPUT
from xexport.core.manifest import Refusal
from xexport.exporter.constants import initializer

__all__ = ["KEPT", "rewrite"]

KEPT = "kept"
_LENGTH = "T"
_END = np.iinfo(np.int64).max

#: results that depend on the same element of their inputs alone
_NAMES = (
    "Abs Add And Cast Ceil Clip Cos Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid "
    "HardSwish IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Min Mish Mod Mul Neg Not Or Pow Reciprocal "
    "Relu Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu Where Xor"
)
_ELEMENTWISE = frozenset(_NAMES.split())
#: one axis is normalised, cut or joined; it must lie after the positions
_ONE_AXIS = {"LayerNormalization", "RMSNormalization", "Softmax", "LogSoftmax", "Split", "Concat"}
#: the axes are the second input
_MANY_AXES = {"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "Squeeze", "Unsqueeze"}
_PRODUCTS = {("", "MatMul"), ("com.microsoft", "MatMulNBits")}


def rewrite(model: ir.Model) -> list[Refusal]:
    """Give the graph the input, or say why it can't have it.

    Needs outputs whose first is the logits ``[B,T,V]``, and symbolic shapes.
    """
    graph = model.graph
    logits = graph.outputs[0]
    region = _region(graph, logits)
    if not region:
        return [_refuse(logits, _why_empty(logits))]
    border = _prune(region)
    if not any(_is_product(node) for node in region):
        return [_refuse(logits, "no product with a weight makes the logits position by position")]
    _insert(graph, region, border)
    return []


def _refuse(logits: ir.Value, reason: str) -> Refusal:
    made = logits.producer()
    return Refusal("keep", (made.name if made is not None else logits.name) or "", reason)


def _region(graph: ir.Graph, logits: ir.Value) -> list[ir.Node]:
    """Nodes that may run on the kept positions alone, in the graph's order."""
    inside: set[ir.Node] = set()
    for node in reversed(list(graph)):
        wanted = [v for v in node.outputs if v is logits or list(v.uses())]
        if wanted and all(_stays(v, logits, inside) for v in wanted) and _is_per_position(node):
            inside.add(node)
    return [node for node in graph if node in inside]


def _stays(value: ir.Value, logits: ir.Value, inside: set[ir.Node]) -> bool:
    """Whether nobody outside the region reads the value."""
    if value.is_graph_output() and value is not logits:
        return False
    return all(user in inside for user, _ in value.uses())


def _prune(region: list[ir.Node]) -> list[ir.Value]:
    """Leave out nodes before the first product that would take several slices where one does it.

    ``region`` is changed; returns the values that enter what is left.
    """
    worth: set[ir.Node] = set()  # products, and what comes after one
    for node in region:
        before = {v.producer() for v in node.inputs if v is not None}
        if _is_product(node) or before & worth:
            worth.add(node)
    left: set[ir.Node] = set()
    for node in reversed(region):
        single = sum(_has_positions(v) for v in node.inputs) == 1
        users = {user for v in node.outputs for user, _ in v.uses()}
        if node in worth or (single and users <= left):
            left.add(node)
    region[:] = [node for node in region if node in left]
    border = [v for n in region for v in n.inputs if v is not None and _has_positions(v)]
    return list(dict.fromkeys(v for v in border if v.producer() not in left))


def _insert(graph: ir.Graph, region: list[ir.Node], border: list[ir.Value]) -> None:
    """The input, and a slice of every value that enters the region."""
    count = initializer(graph, INPUT, np.zeros(1, np.int64))
    graph.inputs.append(count)
    negated = ir.node("Neg", [count], name=f"{INPUT}/Neg")
    start = _named(negated, ir.Shape([1]), ir.DataType.INT64)
    axis, end = (
        initializer(graph, f"{INPUT}/{n}", np.array([v], np.int64)) for n, v in (("axis", 1), ("end", _END))
    )
    graph.insert_before(graph[0], negated)
    inside = set(region)
    for index, value in enumerate(border):
        name = f"{INPUT}/Slice_{index}" if index else f"{INPUT}/Slice"
        cut = ir.node("Slice", [value, start, end, axis], name=name)
        sliced = _named(cut, _kept_shape(value), value.dtype)
        for user, place in list(value.uses()):
            if user in inside:
                user.replace_input_with(place, sliced)
        made = value.producer()
        graph.insert_after(negated if made is None else made, cut)
    for node in region:
        for value in node.outputs:
            if value.shape is not None:
                value.shape = _kept_shape(value)


def _named(node: ir.Node, shape: ir.Shape, dtype: ir.DataType | None) -> ir.Value:
    value = node.outputs[0]
    value.name, value.shape = node.name, shape
    value.type = None if dtype is None else ir.TensorType(dtype)
    return value


def _kept_shape(value: ir.Value) -> ir.Shape:
    assert value.shape is not None
    return ir.Shape([KEPT if at == 1 else d for at, d in enumerate(value.shape)])


def _is_product(node: ir.Node) -> bool:
    return (node.domain, node.op_type) in _PRODUCTS


def _has_positions(value: ir.Value | None) -> bool:
    """Whether it is a computed value ``[B,T,...]``."""
    shape = value.shape if value is not None and value.const_value is None else None
    return shape is not None and shape.rank() >= 2 and str(shape[1]) == _LENGTH


def _rank(value: ir.Value | None) -> int:
    return value.shape.rank() if value is not None and value.shape is not None else -1


def _is_per_position(node: ir.Node) -> bool:
    """Whether position t of every result depends on position t of the inputs that have positions."""
    data = [v for v in node.inputs if _has_positions(v)]
    rest = [v for v in node.inputs if v is not None and not _has_positions(v)]
    if not data or not all(_has_positions(v) for v in node.outputs if list(v.uses()) or v.is_graph_output()):
        return False
    if _is_product(node):
        return node.inputs[0] is data[0] and len(data) == 1 and _rank(data[0]) >= 3 and _is_matrix(node)
    if node.domain:
        return False
    rank = _rank(node.outputs[0])
    if node.op_type in _ELEMENTWISE:
        return all(_rank(v) == rank for v in data) and all(_is_same_everywhere(v, rank) for v in rest)
    if node.op_type in _ONE_AXIS:
        axis = node.attributes.get_int("axis", 0 if node.op_type == "Split" else -1)
        after = axis >= 2 or (axis < 0 and _rank(data[0]) + axis >= 2)
        # a norm's weight spans the axes from ``axis`` on; one of the input's full shape, which torch writes
        # where there is no weight, has positions and may not say so
        spans = -axis if axis < 0 else rank - axis
        weights = "Normalization" not in node.op_type or all(0 <= _rank(v) <= spans for v in node.inputs[1:])
        return after and weights and (node.op_type != "Concat" or not rest)
    axes = _numbers(node, 1)
    if node.op_type in _MANY_AXES:
        total = max(_rank(data[0]), rank)
        return axes is not None and all(a >= 2 or (a < 0 and total + a >= 2) for a in axes)
    if node.op_type == "Reshape":
        return axes is not None and axes[:2] == [0, 0] and not node.attributes.get_int("allowzero", 0)
    if node.op_type == "Transpose":
        perm = node.attributes.get("perm")
        return perm is not None and list(perm.as_ints())[:2] == [0, 1]
    return False


def _is_matrix(node: ir.Node) -> bool:
    """Whether a product's weight is one matrix for every position, known before the run."""
    return bool(node.domain) or (node.inputs[1] is not None and _rank(node.inputs[1]) == 2)


def _is_same_everywhere(value: ir.Value, rank: int) -> bool:
    """Whether an input without positions is broadcast over them."""
    if value.shape is None:
        return False
    at = _rank(value) - rank + 1  # its axis that meets the positions
    return at < 0 or value.shape[at] == 1


def _numbers(node: ir.Node, place: int) -> list[int] | None:
    value = node.inputs[place] if len(node.inputs) > place else None
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else [int(n) for n in tensor.numpy().reshape(-1)]


def _why_empty(logits: ir.Value) -> str:
    node = logits.producer()
    if node is None:
        return "the logits are an input of the graph"
    if list(logits.uses()):
        return "something in the graph reads the logits of every position"
    what = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    return f"{what} makes the logits, which is not known to work position by position"
