"""Graphs of fixed shape: one a length, for runtimes that compile a graph once for its shapes.

The finished dynamic graph is copied for every length: B and T get their numbers, functions are inlined, and
what follows from the numbers is computed now: shapes, the branches of ``If``, and, where the runtime has no
loops, the steps of every ``Scan`` (unroll.py). The graphs share one file of weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from importlib import import_module

import onnx_ir as ir
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    InlinePass,
    NameFixPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)
from onnxscript import optimizer

from xexport.core.errors import ExportError
from xexport.exporter.passes import cse, noop
from xexport.exporter.unroll import unroll_scans

__all__ = ["specialize"]

_LIMIT = 1 << 16  # elements of a folded constant: masks and tables of one chunk
#: rounds of folding: each may make constants that the next one needs (a branch in a branch)
_ROUNDS = 8


def specialize(
    model: ir.Model, sizes: Mapping[str, int], *, inline: bool, unroll: bool, lower: Iterable[str] = ()
) -> ir.Model:
    """A copy of a graph whose symbolic dimensions are numbers.

    Args:
        model: a finished graph with its function bodies; it is not changed, and shares its weights.
        sizes: symbol of an input's dimension -> its number: ``{"B": 1, "T": 16}``.
        inline: put the functions' bodies in the place of their nodes.
        unroll: write the steps of every Scan one after another.
        lower: passes over the result (files in exporter/lower/), in order.

    Raises:
        ExportError: a dimension of an input is not in ``sizes``, or a branch on the length remains that the
            runtime would have to take.
    """
    made = model.clone()
    if inline:
        InlinePass()(made)
    _fix_shapes(made.graph, sizes)
    for _ in range(_ROUNDS):
        before = _signature(made)
        _fold(made)
        noop.run(made)
        if unroll:
            unroll_scans(made)
        if _signature(made) == before:
            break
    for name in lower:
        import_module(f"xexport.exporter.lower.{name}").rewrite(made)
    _fold(made)
    cse.run(made)
    _finish(made)
    if inline:
        _require_no_branch(made)
    return made


def _fix_shapes(graph: ir.Graph, sizes: Mapping[str, int]) -> None:
    """Every known symbol becomes its number; a dimension of another symbol is left to be inferred."""
    for value in graph.inputs:
        assert value.shape is not None
        value.shape = _fixed(value.shape, sizes)
        if not value.shape.is_static():
            raise ExportError(
                f"the graph's input {value.name!r} has no fixed shape",
                got=value.shape,
                allowed=f"dimensions {', '.join(sizes)}, or numbers",
            )
    for node in ir.traversal.RecursiveGraphIterator(graph):
        for value in node.outputs:
            if value.shape is not None:
                value.shape = _fixed(value.shape, sizes)


def _fixed(shape: ir.Shape, sizes: Mapping[str, int]) -> ir.Shape:
    return ir.Shape([d if isinstance(d, int) else sizes.get(str(d.value)) for d in shape])


def _signature(model: ir.Model) -> tuple[int, int]:
    nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
    return len(nodes), sum(len(n.outputs) for n in nodes)


def _fold(model: ir.Model) -> None:
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    optimizer.fold_constants(
        model,
        onnx_shape_inference=True,
        should_fold=_should_fold,
        input_size_limit=_LIMIT,
        output_size_limit=_LIMIT,
    )
    RemoveUnusedNodesPass()(model)


def _should_fold(node: ir.Node) -> bool | None:
    """Weights are never read; what onnxscript leaves by default (ConstantOfShape) is folded if small."""
    for value in node.inputs:
        tensor = value.const_value if value is not None else None
        if isinstance(tensor, ir.LazyTensor | ir.ExternalTensor):
            return False
    return True if node.op_type == "ConstantOfShape" else None


def _finish(model: ir.Model) -> None:
    ClearMetadataAndDocStringPass()(model)
    RemoveUnusedNodesPass()(model)
    RemoveUnusedOpsetsPass()(model)
    NameFixPass()(model)


def _require_no_branch(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type == "If" and not node.domain:
            raise ExportError(
                "a branch of the graph depends on more than its shapes",
                got=node.name,
                fix="export for a target with dynamic graphs (cpu-*)",
            )
