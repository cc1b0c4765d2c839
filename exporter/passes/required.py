"""Inputs with a default become inputs that must be given, for a runtime whose callers can't name the former.

onnxruntime-web 1.30 lists a session's required inputs alone and refuses any other name, so ``logits_to_keep``
would stay at its default: a prompt would cost the head's product of every position.
"""

from __future__ import annotations

import onnx_ir as ir

from xexport.core.manifest import Refusal

__all__ = ["rewrite"]


def rewrite(model: ir.Model) -> list[Refusal]:
    """Take the default of every graph input away; nothing is refused."""
    graph = model.graph
    for value in graph.inputs:
        if value.name is not None and value.name in graph.initializers:
            del graph.initializers[value.name]
            value.const_value = None
    return []
