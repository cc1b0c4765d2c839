"""Operators that follow one another become one node: ``xexport::sequence_<i>`` (ops/sequence).

A node costs ONNX Runtime some 5 us beside its kernel in a step that streams weights through all caches. Runs
after ``products``, ``rows`` and ``together``: what is left of a layer are a dozen of this project's own
operators and a reshape or two, and one node runs them all. A new node begins where the layer's number in the
names of modules changes, so that layers of one structure share one function body.

Left outside are operators that may write a state over itself (caches: the runtime decides that from the
graph's own nodes) and results of other types than float32.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper

from xexport.core.manifest import Refusal
from xexport.core.op import DOMAIN

__all__ = ["FEWEST", "NAME", "NAMES", "rewrite"]

NAME = "sequence"
#: functions of one file: the kernel library registers sequence_0 to sequence_31
NAMES = 32
#: operators of a node
FEWEST = 3

#: operators with a kernel whose results are float32 and never lie over an input
_ABLE = {
    "causal_conv1d",
    "fused_rows",
    "linear",
    "linear_group",
    "linear_int4x8",
    "linear_int6x8",
    "linear_int8",
    "linear_recurrence",
    "selective_scan",
    "wkv4",
    "wkv6",
    "wkv7",
}
_NUMBERED = re.compile(r"(fused_rows|linear_group)_\d+")
_RESHAPE = "reshape"
_LAYER = re.compile(r"(?:^|[./])(\d+)(?=[./])")
_MOST_RANK = 8


def rewrite(model: ir.Model) -> list[Refusal]:
    """Join what follows one another; a row of operators that stays apart has its reason."""
    _independent_first(model.graph)
    names: dict[bytes, str] = {}
    refusals = []
    for nodes in list(_rows(model.graph)):
        part = _Sequence(nodes)
        if not part.outputs:  # nothing reads it
            continue
        key = part.body("").SerializeToString()
        if key not in names:
            if len(names) == NAMES:
                why = f"the graph has {NAMES} different sequences, all that the kernels have names for"
                refusals.append(Refusal("sequence", nodes[0].name or "", why))
                continue
            names[key] = f"{NAME}_{len(names)}"
            opset = model.opset_imports[""]
            function = ir.serde.deserialize_function(part.body(names[key], opset))
            model.functions[function.identifier()] = function
        part.replace(model.graph, names[key])
    return refusals


def _independent_first(graph: ir.Graph) -> None:
    """Nodes that need no result of an operator move to the front, out of the rows of operators."""
    behind: set[ir.Node] = set()
    front = []
    for node in graph:
        if _is_able(node) or any(b in behind for b in _producers(node)):
            behind.add(node)
        else:
            front.append(node)
    if not front or not behind:
        return
    for node in front:
        graph.remove(node)
    graph.insert_before(graph[0], front)


def _producers(node: ir.Node) -> Iterable[ir.Node]:
    inner = [
        n for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH for n in _all(a.as_graph())
    ]
    values = [v for n in (node, *inner) for v in n.inputs if v is not None]
    return [p for v in values if (p := v.producer()) is not None]


def _all(graph: ir.Graph) -> Iterable[ir.Node]:
    return ir.traversal.RecursiveGraphIterator(graph)


def _kind(node: ir.Node) -> str:
    """The operator's name without its number."""
    match = _NUMBERED.fullmatch(node.op_type)
    return match[1] if match else node.op_type


def _is_able(node: ir.Node) -> bool:
    floats = all(v.dtype in (None, ir.DataType.FLOAT) for v in node.outputs)
    return node.domain == DOMAIN and _kind(node) in _ABLE and floats and None not in node.inputs


def _rows(graph: ir.Graph) -> Iterable[list[ir.Node]]:
    """Consecutive operators of one layer, and reshapes between them."""
    row: list[ir.Node] = []
    layer = ""
    for node in graph:
        found = _LAYER.findall(node.name or "")
        here = found[0] if found else layer
        if row and (here != layer or not (_is_able(node) or _shape_of(node))):
            yield from _trimmed(row)
            row = []
        layer = here
        if _is_able(node) or (row and _shape_of(node)):
            row.append(node)
    yield from _trimmed(row)


def _trimmed(row: list[ir.Node]) -> Iterable[list[ir.Node]]:
    """The parts of the row between reshapes whose result something else needs, too."""
    inside = set(row)
    parts: list[list[ir.Node]] = [[]]
    for node in row:
        if _is_able(node) or _stays_inside(node, inside):
            parts[-1].append(node)
        else:
            parts.append([])
    if len(parts) > 1:  # less is inside now
        for part in parts:
            yield from _trimmed(part)
    elif sum(map(_is_able, row)) >= FEWEST:
        yield row


def _stays_inside(node: ir.Node, inside: set[ir.Node]) -> bool:
    (out,) = node.outputs
    users = [n for n, _ in out.uses()]
    return not out.is_graph_output() and bool(users) and all(n in inside for n in users)


def _shape_of(node: ir.Node) -> list[int] | None:
    """The constant shape of a reshape of floats, or None if the node is no such thing."""
    if node.domain or node.op_type != "Reshape" or node.outputs[0].dtype not in (None, ir.DataType.FLOAT):
        return None
    allow = node.attributes.get("allowzero")
    target = node.inputs[1]
    shape = None if target is None else target.const_value
    if shape is None or (allow is not None and allow.as_int()):
        return None
    values = np.asarray(shape.numpy()).reshape(-1).tolist()
    return values if 0 < len(values) <= _MOST_RANK else None


@dataclass
class _Sequence:
    """One node to be: what it reads from outside, what others read of it, and the plan between."""

    nodes: Sequence[ir.Node]
    inputs: list[ir.Value] = field(default_factory=list)
    outputs: list[ir.Value] = field(default_factory=list)

    def __post_init__(self) -> None:
        made = {v for n in self.nodes for v in n.outputs}
        read = [v for n in self.nodes for v in _inputs(n)]
        self.inputs = [v for v in dict.fromkeys(read) if v not in made]
        inside = set(self.nodes)
        self.outputs = [
            v
            for n in self.nodes
            for v in n.outputs
            if v.is_graph_output() or any(user not in inside for user, _ in v.uses())
        ]

    def plan(self) -> list[int]:
        """The attribute ``plan``, see ops/sequence/plan.h."""
        number = {v: i for i, v in enumerate(self.inputs)}
        last = self._last_reads()
        place = {v: i for i, v in enumerate(self.outputs)}
        free: list[int] = []
        memories = 0
        held: dict[ir.Value, int] = {}
        plan = [len(self.inputs)]
        for step, node in enumerate(self.nodes):
            name = _RESHAPE if not node.domain else _kind(node)
            read = _inputs(node)
            plan += [len(name), *name.encode(), len(read), *(number[v] for v in read), len(node.outputs)]
            for value in node.outputs:
                number[value] = len(number)
                if value in place:
                    plan.append(place[value])
                    continue
                if name == _RESHAPE:  # lies where its input lies
                    plan.append(-1)
                    continue
                if free:
                    slot = free.pop()
                else:
                    slot, memories = memories, memories + 1
                held[value] = slot
                plan.append(-1 - slot)
            for value in [v for v in held if last[v] <= step]:
                free.append(held.pop(value))
        return plan

    def _last_reads(self) -> dict[ir.Value, int]:
        """The last node that reads a value's memory: a reshape of it lies in the same."""
        last = {v: step for step, n in enumerate(self.nodes) for v in n.outputs}
        for step, node in enumerate(self.nodes):
            for value in _inputs(node):
                last[value] = max(last.get(value, 0), step)
        for node in reversed(self.nodes):
            if not node.domain:
                source = node.inputs[0]
                assert source is not None
                last[source] = max(last[source], last[node.outputs[0]])
        return last

    def attributes(self) -> list[onnx.AttributeProto]:
        """``plan``, and those of the parts."""
        made = [helper.make_attribute("plan", self.plan())]
        for i, node in enumerate(self.nodes):
            if not node.domain:
                made.append(helper.make_attribute(f"p{i}_shape", _shape_of(node) or []))
                continue
            for attribute in node.attributes.values():
                proto = ir.serde.serialize_attribute(attribute)
                proto.name = f"p{i}_{attribute.name}"
                made.append(proto)
        return made

    def body(self, name: str, opset: int = 1) -> onnx.FunctionProto:
        """The operators that the node replaces."""
        names = {v: f"in{i}" for i, v in enumerate(self.inputs)}
        nodes = []
        for node in self.nodes:
            for value in node.outputs:
                names[value] = f"v{len(names)}"
            read = [names[v] for v in _inputs(node)]
            if not node.domain:
                shape = f"{names[node.outputs[0]]}.shape"
                nodes.append(helper.make_node("Constant", [], [shape], value_ints=_shape_of(node)))
                read.append(shape)
            copy = helper.make_node(node.op_type, read, [names[v] for v in node.outputs], domain=node.domain)
            copy.attribute.extend(ir.serde.serialize_attribute(a) for a in node.attributes.values())
            nodes.append(copy)
        opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
        inputs, outputs = ([names[v] for v in values] for values in (self.inputs, self.outputs))
        attributes = [a.name for a in self.attributes()]
        return helper.make_function(DOMAIN, name, inputs, outputs, nodes, opsets, attributes=attributes)

    def replace(self, graph: ir.Graph, op_type: str) -> None:
        """Put the node where the last of its operators was."""
        attributes = [ir.serde.deserialize_attribute(a) for a in self.attributes()]
        made = ir.Node(
            DOMAIN,
            op_type,
            self.inputs,
            attributes,
            num_outputs=len(self.outputs),
            name=f"{self.nodes[0].name}/{op_type}",
        )
        graph.insert_after(self.nodes[-1], made)
        for old, new in zip(self.outputs, made.outputs, strict=True):
            new.name, new.type, new.shape = old.name, old.type, old.shape
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.remove(self.nodes, safe=True)


def _inputs(node: ir.Node) -> list[ir.Value]:
    """What a part reads: of a reshape the shape is an attribute."""
    values = [v for v in node.inputs if v is not None]
    return values[:1] if not node.domain else values
