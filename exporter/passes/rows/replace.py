"""Putting the fused nodes in the place of their groups."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from xexport.exporter.passes.rows.compile import Compiled
from xexport.exporter.passes.rows.groups import Group

__all__ = ["replace_groups"]


def replace_groups(model: ir.Model, plans: Iterable[tuple[Group, Compiled, str]]) -> None:
    """Insert a node for every (group, program, function name), and remove what nobody reads any more."""
    moved: dict[ir.Value, ir.Value] = {}
    for number, (group, compiled, op_type) in enumerate(plans):
        first = group.steps[0].node.name or "rows"
        node = _node(compiled, op_type, f"{first}/{op_type}.{number}", moved)
        model.graph.append(node)
        for old, new in zip(compiled.outputs, node.outputs, strict=True):
            new.name, new.type, new.shape = old.name, old.type, old.shape
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            old.name = f"{old.name}/unfused"
            moved[old] = new
    RemoveUnusedNodesPass()(model)
    model.graph.sort()


def _node(compiled: Compiled, op_type: str, name: str, moved: dict[ir.Value, ir.Value]) -> ir.Node:
    program = compiled.program
    return ir.Node(
        "xexport",
        op_type,
        [moved.get(value, value) for value in compiled.inputs],
        [ir.AttrInt64s("program", program.encode()), ir.AttrFloat32s("constants", list(program.constants))],
        num_outputs=len(compiled.outputs),
        name=name,
    )
