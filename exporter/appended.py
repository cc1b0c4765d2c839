"""Which state tensors an operator only appends to, so that a runtime may keep one buffer of them.

A state tensor normally needs two: a run reads one and writes the other, and what it read stays whole until
the run has succeeded. A cache of a stream's past is different. If its one reader is a node that hands it on
with the new values behind the old ones (``core/op.py Append``), writing them into the same memory leaves
everything up to the position as it was; or, in a ring, all but the rows that the tokens overwrite, which a
runtime can keep meanwhile. Whether a runtime does it depends on its having that node's kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from xexport.core.manifest import Appended, Ring
from xexport.core.op import OpSpec
from xexport.core.registry import get_op, op_names
from xexport.exporter.trace import output_name

__all__ = ["appended_states"]


def appended_states(model: ir.Model, names: Sequence[str]) -> dict[str, Appended]:
    """State name -> how it is appended to, for the states where that is all that happens to it.

    Args:
        names: the state tensors, as :func:`trace` names the graph's inputs and outputs.
    """
    specs = {(s.domain, s.graph_name): s for s in map(get_op, op_names()) if s.appends}
    olds = {v.name: v for v in model.graph.inputs}
    news = {v.name: v for v in model.graph.outputs}
    states = {olds[name]: name for name in names}
    found = {}
    for old, name in states.items():
        new = news[output_name(name)]
        node = new.producer()
        spec = specs.get((node.domain, node.op_type)) if node is not None else None
        if node is not None and spec is not None:
            appended = _appended(node, spec, old, new, states)
            if appended is not None:
                found[name] = appended
    return found


def _appended(
    node: ir.Node, spec: OpSpec, old: ir.Value, new: ir.Value, states: dict[ir.Value, str]
) -> Appended | None:
    """How ``node`` appends to ``old``, if it is its only reader and is told the position by the state."""
    append = spec.appends.get(spec.outputs[node.outputs.index(new)])
    if append is None:
        return None
    source = spec.inputs.index(append.source)
    position = node.inputs[spec.inputs.index(append.position)]
    alone = [(u.node, u.idx) for u in old.uses()] == [(node, source)]
    if not alone or old.is_graph_output() or position not in states:
        return None
    rings: tuple[Ring, ...] = ()
    if append.rings is not None:
        length = old.shape[append.axis] if old.shape is not None else None
        told = append.rings(_constants(node, spec), length) if isinstance(length, int) else None
        if told is None:
            return None
        rings = told
    return Appended(spec.graph_name, append.axis, states[position], rings)


def _constants(node: ir.Node, spec: OpSpec) -> dict[str, Any]:
    """The node's attributes and the values of its inputs that are constant, by their formal names."""
    found = {name: a.value for name, a in node.attributes.items() if isinstance(a, ir.Attr)}
    for name, value in zip(spec.inputs, node.inputs, strict=True):
        if (
            value is not None
            and value.const_value is not None
            and value.const_value.dtype == ir.DataType.INT64
        ):
            found[name] = value.const_value.numpy()
    return found
