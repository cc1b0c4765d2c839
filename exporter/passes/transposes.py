"""``MatMul(x, Transpose(W))`` becomes ``MatMul(x, W)`` with the stored weight transposed under its own name.

torch's Linear stores [out, in]; ONNX's MatMul and ORT's quantized products want [in, out].
"""

from __future__ import annotations

import onnx_ir as ir

from xexport.exporter.weights import CheckpointTensor

__all__ = ["run"]


def run(model: ir.Model) -> int:
    """Fold every 2-D transpose of a weight whose uses are all the same transpose."""
    count = 0
    for value in list(model.graph.initializers.values()):
        users = [node for node, _ in value.uses()]
        if not isinstance(value.const_value, CheckpointTensor) or len(value.const_value.shape) != 2:
            continue
        if users and not value.is_graph_output() and all(_is_swap(node) for node in users):
            _fold(model, value, users)
            count += 1
    return count


def _is_swap(node: ir.Node) -> bool:
    if node.op_type != "Transpose" or node.domain:
        return False
    perm = node.attributes.get("perm")
    return perm is None or list(perm.as_ints()) == [1, 0]


def _fold(model: ir.Model, value: ir.Value, users: list[ir.Node]) -> None:
    assert isinstance(value.const_value, CheckpointTensor)
    value.const_value = value.const_value.transposed()
    value.shape = ir.Shape(value.const_value.shape)
    for node in users:
        node.outputs[0].replace_all_uses_with(value)
        model.graph.remove(node, safe=True)
