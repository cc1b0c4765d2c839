"""The function body of a fused node: the nodes that it replaces."""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from xexport.exporter.passes.rows.compile import Compiled
from xexport.exporter.passes.rows.groups import Group

__all__ = ["ATTRIBUTES", "build_body"]

ATTRIBUTES = ("program", "constants")


def build_body(group: Group, compiled: Compiled, opset: int) -> onnx.FunctionProto:
    """A FunctionProto (its name is up to the caller) with names that depend on the structure alone."""
    names: dict[ir.Value, str] = {}
    for i, value in enumerate(compiled.inputs):
        names.setdefault(value, f"in{i}")
    inputs = [f"in{i}" for i in range(len(compiled.inputs))]
    outputs = [f"out{i}" for i in range(len(compiled.outputs))]
    names |= dict(zip(compiled.outputs, outputs, strict=True))
    nodes: list[onnx.NodeProto] = []
    for node in (n for step in group.steps for n in step.covers):
        _copy(node, names, nodes)
    return helper.make_function(
        "xexport",
        "fused_rows",
        inputs,
        outputs,
        nodes,
        [helper.make_opsetid("", opset)],
        attributes=list(ATTRIBUTES),
    )


def _copy(node: ir.Node, names: dict[ir.Value, str], nodes: list[onnx.NodeProto]) -> None:
    read = [_read(value, names, nodes) for value in node.inputs]
    written = [names.setdefault(value, f"v{len(names)}") for value in node.outputs]
    copy = helper.make_node(node.op_type, read, written, domain=node.domain)
    copy.attribute.extend(ir.serde.serialize_attribute(a) for a in node.attributes.values())
    nodes.append(copy)


def _read(value: ir.Value | None, names: dict[ir.Value, str], nodes: list[onnx.NodeProto]) -> str:
    """The local name of an input; a constant that is no input of the function becomes a node."""
    if value is None:
        return ""
    if value in names:
        return names[value]
    tensor = ir.convenience.get_const_tensor(value)
    assert tensor is not None, f"{value.name} is neither an input nor a constant"
    name = names[value] = f"c{len(names)}"
    constant = numpy_helper.from_array(tensor.numpy(), name)
    nodes.append(helper.make_node("Constant", [], [name], value=constant))
    return name
