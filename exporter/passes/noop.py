"""Nodes that do nothing: Identity, full-range Slice, Cast to the same type."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

__all__ = ["run"]

_END = 2**31 - 1  # ONNX convention: an end this large means "to the end"


def run(model: ir.Model) -> int:
    """Bypass them; returns how many there were."""
    count = 0
    for node in list(model.graph):
        if node.domain or len(node.outputs) != 1 or not _does_nothing(node):
            continue
        source, result = node.inputs[0], node.outputs[0]
        if source is None or result.is_graph_output():
            continue
        result.replace_all_uses_with(source)
        model.graph.remove(node, safe=True)
        count += 1
    return count


def _does_nothing(node: ir.Node) -> bool:
    match node.op_type:
        case "Identity":
            return True
        case "Cast":
            source = node.inputs[0]
            return (
                source is not None
                and source.dtype is not None
                and source.dtype == node.attributes["to"].as_int()
            )
        case "Slice":
            return _is_full_slice(node)
        case _:
            return False


def _is_full_slice(node: ir.Node) -> bool:
    if len(node.inputs) < 3:
        return False
    starts, ends = _constant(node.inputs[1]), _constant(node.inputs[2])
    steps = _constant(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] else np.ones(1)
    if starts is None or ends is None or steps is None:
        return False
    return bool((starts == 0).all() and (ends >= _END).all() and (steps == 1).all())


def _constant(value: ir.Value | None) -> np.ndarray | None:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()
