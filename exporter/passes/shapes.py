"""Shape arithmetic: ``Reshape(x, Concat(Shape(x)[0], Shape(x)[1], ...))`` needs no Shape nodes.

torch writes every view of [B,T,...] with sizes read at run time. ONNX's Reshape can copy a
dimension from its input (0) and infer one (-1), so most of those nodes are constants in disguise.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from xexport.exporter.constants import initializer

__all__ = ["run"]


def run(model: ir.Model) -> int:
    """Give every Reshape a constant target where its symbolic shapes allow; returns how many."""
    count = 0
    for node in list(model.graph):
        if node.op_type != "Reshape" or node.domain:
            continue
        target = _constant_target(node)
        if target is None:
            continue
        name = f"{node.name}.shape"
        node.replace_input_with(1, initializer(model.graph, name, np.array(target, np.int64)))
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)  # torch writes 1: 0 must mean "copy"
        count += 1
    RemoveUnusedNodesPass()(model)
    return count


def _constant_target(node: ir.Node) -> list[int] | None:
    """The Reshape's output shape with 0 for a copied and -1 for an inferred dimension, if that is exact."""
    source, wanted = node.inputs[0], node.outputs[0].shape
    if source is None or source.shape is None or wanted is None:
        return None
    if node.inputs[1] is not None and node.inputs[1].const_value is not None:
        return None
    have = [str(d) for d in source.shape]
    target: list[int] = []
    for axis, dim in enumerate(wanted):
        if isinstance(dim, int):
            target.append(dim)
        elif axis < len(have) and have[axis] == str(dim):
            target.append(0)
        elif -1 not in target:
            target.append(-1)
        else:
            return None
    return target
