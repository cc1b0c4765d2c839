"""RMSNormalization in nodes of older operator sets, for providers that do not know it.

y = x / sqrt(mean(x^2) + epsilon) * scale        over the last axis
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from xexport.core.manifest import Refusal
from xexport.exporter.constants import initializer

__all__ = ["rewrite"]

_PASS = "plain_norms"


def rewrite(model: ir.Model) -> list[Refusal]:
    """Replace every RMSNormalization of the main graph over the last axis; others have their reason."""
    refusals = []
    for node in list(model.graph):
        if node.domain or node.op_type != "RMSNormalization":
            continue
        axis = node.attributes.get("axis")
        rank = len(node.outputs[0].shape or ())
        if axis is not None and axis.as_int() not in (-1, rank - 1):
            refusals.append(Refusal(_PASS, node.name or "", f"it is over several axes, from {axis.as_int()}"))
            continue
        _replace(model, node)
    return refusals


def _replace(model: ir.Model, node: ir.Node) -> None:
    x, scale = node.inputs
    old = node.outputs[0]
    given = node.attributes.get("epsilon")
    epsilon = _constant(
        model, node, "epsilon", np.array(1e-5 if given is None else given.as_float(), np.float32)
    )
    axes = _constant(model, node, "axes", np.array([-1], np.int64))
    nodes: list[ir.Node] = []

    def add(op: str, *inputs: ir.Value | None) -> ir.Value:
        made = ir.Node("", op, inputs, name=f"{node.name}/{op}{len(nodes)}")
        made.outputs[0].name = made.name
        nodes.append(made)
        return made.outputs[0]

    power = add("Add", add("ReduceMean", add("Mul", x, x), axes), epsilon)
    new = add("Mul", add("Div", x, add("Sqrt", power)), scale)
    new.name, new.type, new.shape = old.name, old.type, old.shape
    model.graph.insert_before(node, nodes)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)


def _constant(model: ir.Model, node: ir.Node, what: str, array: np.ndarray) -> ir.Value:
    """A new initializer of that node."""
    name = f"{node.name}.{what}"
    return initializer(model.graph, name, array)
