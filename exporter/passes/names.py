"""Readable names: nodes and values are called after the module they came from; trace metadata goes.

torch's stack traces are most of an exported file. Before they go, the module path of every node
(``pkg.torch.onnx.name_scopes``) becomes its name: ``blocks.0.att/MatMul_2``.
"""

from __future__ import annotations

import ast
from collections import Counter

import onnx_ir as ir

__all__ = ["SCOPE", "run"]

SCOPE = "pkg.torch.onnx.name_scopes"
_WRAPPER = "module"


def run(model: ir.Model) -> int:
    """Rename every node and its non-output values and strip metadata; returns the number of nodes."""
    seen: Counter[str] = Counter()
    for node in model.graph:
        scope = scope_of(node)
        base = f"{scope}/{node.op_type}" if scope else node.op_type
        name = f"{base}_{seen[base]}" if seen[base] else base
        seen[base] += 1
        node.name = name
        for index, value in enumerate(node.outputs):
            if not value.is_graph_output():
                value.name = name if len(node.outputs) == 1 else f"{name}:{index}"
            value.metadata_props.clear()
        node.metadata_props.clear()
        node.doc_string = None
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.doc_string = None
    model.producer_name, model.producer_version = "xexport", None
    return len(model.graph)


def scope_of(node: ir.Node) -> str:
    """The dotted path of the module a node was traced in, or an empty string."""
    text = node.metadata_props.get(SCOPE)
    if not text:
        return ""
    scopes = [s for s in ast.literal_eval(text)[:-1] if not s.startswith("_empty")]
    path = scopes[-1] if scopes else ""
    return path.removeprefix(_WRAPPER).removeprefix(".")
