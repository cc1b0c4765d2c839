"""Products that wait for the same things become one node: ``xexport::linear_group_<i>`` (ops/linear_group).

At T=1 a region of threads takes some 5 us to start and a node 2 to 3 us, as long as a low-rank product takes.
The queries, keys, values and low-rank projections of a layer need nothing of each other, so one node
computes them with all threads. Joined are products of the main graph with as many nodes before them on the
longest way, so that no way leads from one to the other.

Runs after ``products`` and ``rows``. The body calls the operators that the node replaces.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import onnx
import onnx_ir as ir
from onnx import helper

from xexport.core.manifest import Refusal
from xexport.core.op import DOMAIN

__all__ = ["MOST", "NAME", "NAMES", "rewrite"]

NAME = "linear_group"
#: functions of one file: the kernel library registers linear_group_0 to linear_group_31
NAMES = 32
#: products of a node
MOST = 16

#: numbers of the formats in the attribute ``products``; ops/linear_group/kernel.cc has them too
_FLOAT32, _FLOAT16, _INT8, _INT4, _INT6 = range(5)
_KINDS = {"linear_int8": _INT8, "linear_int4x8": _INT4, "linear_int6x8": _INT6}

#: format, K, N, numbers that share a scale (0: none)
Numbers = tuple[int, int, int, int]


def rewrite(model: ir.Model) -> list[Refusal]:
    """Join what can be joined; a row of products that stays apart has its reason."""
    names: dict[tuple[Numbers, ...], str] = {}
    refusals = []
    for group in _groups(model.graph):
        key = tuple(_numbers(node) for node in group)
        if key not in names:
            if len(names) == NAMES:
                why = (
                    f"the graph has {NAMES} different groups already, which is all the kernels have names for"
                )
                refusals += [Refusal("together", node.name or "", why) for node in group]
                continue
            names[key] = f"{NAME}_{len(names)}"
            function = ir.serde.deserialize_function(_body(names[key], group, model.opset_imports[""]))
            model.functions[function.identifier()] = function
        _replace(model.graph, group, names[key], key)
    model.graph.sort()
    return refusals


def _groups(graph: ir.Graph) -> list[list[ir.Node]]:
    """Products with as many nodes before them, those with the largest weights first."""
    levels: dict[ir.Node, int] = {}
    found: dict[int, list[ir.Node]] = defaultdict(list)
    for node in graph:
        before = [v.producer() for n in (node, *_inside(node)) for v in n.inputs if v is not None]
        levels[node] = 1 + max((levels.get(b, 0) for b in before if b is not None), default=0)
        if node.domain == DOMAIN and node.op_type in ("linear", *_KINDS):
            found[levels[node]].append(node)
    groups = []
    for products in found.values():
        products.sort(key=lambda node: -_size(node))
        groups += [products[i : i + MOST] for i in range(0, len(products), MOST)]
    return [group for group in groups if len(group) > 1]


def _inside(node: ir.Node) -> list[ir.Node]:
    """The nodes of a node's subgraphs, which read values of the graph around them."""
    graphs = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
    return [n for graph in graphs for n in ir.traversal.RecursiveGraphIterator(graph)]


def _size(node: ir.Node) -> int:
    """Bytes of weights."""
    tensors = [v.const_value for v in node.inputs[1:] if v is not None]
    return sum(t.nbytes for t in tensors if t is not None)


def _numbers(node: ir.Node) -> Numbers:
    weight = node.inputs[1]
    assert weight is not None
    if node.op_type == "linear":
        columns, depth = weight.shape.numpy() if weight.shape is not None else (0, 0)
        half = weight.dtype == ir.DataType.FLOAT16
        return (_FLOAT16 if half else _FLOAT32, int(depth), int(columns), 0)
    depth, columns = (node.attributes[name].as_int() for name in ("K", "N"))
    block = node.attributes["block_size"].as_int() if "block_size" in node.attributes else 32
    return (_KINDS[node.op_type], depth, columns, block)


def _body(name: str, group: Sequence[ir.Node], opset: int) -> onnx.FunctionProto:
    """The operators that a node replaces, each with the attributes it has."""
    nodes: list[onnx.NodeProto] = []
    inputs: list[str] = []
    for i, node in enumerate(group):
        read = [f"in{len(inputs) + k}" for k in range(len(node.inputs))]
        inputs += read
        copy = helper.make_node(node.op_type, read, [f"out{i}"], domain=node.domain)
        copy.attribute.extend(ir.serde.serialize_attribute(a) for a in node.attributes.values())
        nodes.append(copy)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    outputs = [f"out{i}" for i in range(len(group))]
    return helper.make_function(DOMAIN, name, inputs, outputs, nodes, opsets, attributes=["products"])


def _replace(graph: ir.Graph, group: Sequence[ir.Node], op_type: str, key: Sequence[Numbers]) -> None:
    numbers = [n for product in key for n in product]
    made = ir.Node(
        DOMAIN,
        op_type,
        [value for node in group for value in node.inputs],
        [ir.AttrInt64s("products", numbers)],
        num_outputs=len(group),
        name=f"{group[0].name}/{op_type}",
    )
    graph.append(made)
    for node, new in zip(group, made.outputs, strict=True):
        old = node.outputs[0]
        new.name, new.type, new.shape = old.name, old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.remove(node, safe=True)
