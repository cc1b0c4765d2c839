"""Fold constants: nodes whose inputs are all small constants. Weights are never read or folded here."""

from __future__ import annotations

import logging

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript import optimizer

__all__ = ["run"]

_SMALL = 4096  # elements: shapes, axes, scalars and small tables; anything larger stays as it is


def run(model: ir.Model) -> int:
    """Fold and drop what became unused; returns the number of nodes that went away."""
    before = len(model.graph)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    optimizer.fold_constants(model, should_fold=_should_fold, output_size_limit=_SMALL)
    RemoveUnusedNodesPass()(model)
    return before - len(model.graph)


def _should_fold(node: ir.Node) -> bool | None:
    """Refuse nodes that read a weight: a lazy tensor would be loaded and its name lost."""
    for value in node.inputs:
        if value is not None and isinstance(value.const_value, ir.LazyTensor | ir.ExternalTensor):
            return False
    return None
