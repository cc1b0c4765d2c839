"""Row fusion: chains of row-wise nodes become one ``xexport::fused_rows_<i>`` node (ops/fused_rows).

After quantization most of a step's time goes to some 600 small nodes at 1 to 3 us each: norms, token
shifts, interpolations, gates, decays. Each of them works on the rows of a [B,T,...] tensor by itself. The
pass takes every such node (match.py), groups those that no other node stands between (groups.py), and
replaces a group by one node that holds its program (compile.py) and carries the original nodes as its
function body (body.py), so that a runtime without the kernels runs what it ran before.
"""

from __future__ import annotations

import onnx_ir as ir

from xexport.core.manifest import Refusal
from xexport.exporter.passes.rows.body import build_body
from xexport.exporter.passes.rows.compile import Compiled, compile_group
from xexport.exporter.passes.rows.groups import Group, find_groups
from xexport.exporter.passes.rows.replace import replace_groups
from xexport.exporter.passes.rows.shapes import fill_shapes

__all__ = ["NAME", "NAMES", "rewrite"]

NAME = "fused_rows"
#: functions of one file: the kernel library registers fused_rows_0 to fused_rows_63
NAMES = 64


def rewrite(model: ir.Model) -> list[Refusal]:
    """Fuse what can be fused; returns the row-wise nodes that stay, with the reason."""
    fill_shapes(model.graph)
    groups, refusals = find_groups(model.graph)
    names: dict[bytes, str] = {}
    plans: list[tuple[Group, Compiled, str]] = []
    for group in groups:
        plan = _plan(model, group, names)
        if isinstance(plan, str):
            refusals += [Refusal("rows", _name(step.node), plan) for step in group.steps if step.computes]
        else:
            plans.append((group, *plan))
    replace_groups(model, plans)
    return refusals


def _plan(model: ir.Model, group: Group, names: dict[bytes, str]) -> tuple[Compiled, str] | str:
    """The program of a group and the name of its function, which the model then has; or why neither."""
    compiled = compile_group(group)
    if isinstance(compiled, str):
        return compiled
    body = build_body(group, compiled, model.opset_imports[""])
    key = body.SerializeToString(deterministic=True)
    if key not in names:
        if len(names) == NAMES:
            return f"the graph already has {NAMES} different chains, which is all the kernels have names for"
        names[key] = body.name = f"{NAME}_{len(names)}"
        function = ir.serde.deserialize_function(body)
        model.functions[function.identifier()] = function
        model.opset_imports.setdefault("xexport", 1)
    return compiled, names[key]


def _name(node: ir.Node) -> str:
    return node.name or node.op_type
