"""What each weight does: from the family's globs, or, for a user's own module, from how it is used."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

import onnx_ir as ir

__all__ = ["role_of", "roles_of"]

#: a matrix whose short side is this much shorter than its long side is a low-rank control path
_LOW_RANK = 6


def roles_of(model: ir.Model, globs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Role of every initializer of the model by name; the first matching glob wins."""
    rows = tuple(globs)
    return {name: role_of(value, rows) for name, value in model.graph.initializers.items()}


def role_of(value: ir.Value, globs: tuple[tuple[str, str], ...]) -> str:
    """The declared role of an initializer, else a guess from the graph, else ``other``."""
    name = value.name or ""
    for pattern, role in globs:
        if fnmatchcase(name, pattern):
            return role
    return _guess(value)


def _guess(value: ir.Value) -> str:
    """A matrix read by Gather is an embedding; the one that makes the logits is the head."""
    if value.shape is None or len(value.shape) != 2:
        return "norm" if value.shape is not None and len(value.shape) == 1 else "other"
    users = [node for node, _ in value.uses()]
    if any(node.op_type == "Gather" and node.inputs[0] is value for node in users):
        return "embedding"
    if not any(node.op_type == "MatMul" and node.inputs[1] is value for node in users):
        return "other"
    if any(out.is_graph_output() for node in users for out in node.outputs):
        return "head"
    short, long = sorted(value.shape.numpy())
    return "low_rank" if long >= _LOW_RANK * short else "projection"
