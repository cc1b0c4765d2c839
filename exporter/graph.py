"""From a module to an optimised, written graph: the exporter's steps in their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass

from xexport.core.contract import Contract
from xexport.core.manifest import FileEntry, GraphTensor, Lowering
from xexport.core.progress import Progress
from xexport.core.state import StateSpec
from xexport.exporter.functions import attach_functions
from xexport.exporter.passes import optimize
from xexport.exporter.trace import trace
from xexport.exporter.weights import bind, check_tensors
from xexport.exporter.writer import write_model

__all__ = ["Written", "build_graph", "graph_tensors", "write_graph"]


@dataclass(frozen=True)
class Written:
    """A graph on the disk: its files, and which body every operator got."""

    files: tuple[FileEntry, ...]
    lowerings: tuple[Lowering, ...]


def build_graph(
    skeleton: torch.nn.Module,
    tensors: Mapping[str, torch.Tensor],
    specs: Sequence[StateSpec],
    *,
    opset: int,
    source: str,
    contract: Contract | None = None,
    progress: Progress,
) -> ir.Model:
    """Check the weights, trace the skeleton, bind the weights lazily and run every pass.

    Raises:
        CheckpointError: weights that are missing, misshapen or not finite.
        ExportError: the module can't be traced.
    """
    progress.stage("check weights")
    check_tensors(skeleton, tensors, source)
    progress.stage("trace")
    model = trace(skeleton, specs, opset=opset, contract=contract)
    bind(model, tensors)
    progress.stage("optimise the graph")
    optimize(model)
    return model


def write_graph(
    model: ir.Model,
    folder: Path,
    bodies: Mapping[str, str],
    why: Mapping[str, str],
    progress: Progress,
    *,
    inline: bool = False,
) -> Written:
    """Attach the operators' bodies and write graph and weights.

    With ``inline`` the bodies take the place of their nodes, for a runtime without local functions.
    """
    lowerings = attach_functions(model, bodies, why)
    if inline:
        InlinePass()(model)
    files = write_model(model, folder, progress)
    return Written(tuple(files), tuple(lowerings))


def graph_tensors(values: Sequence[ir.Value]) -> tuple[GraphTensor, ...]:
    """Graph inputs or outputs as plain data."""
    return tuple(
        GraphTensor(
            name=value.name or "",
            dtype=_dtype(value),
            shape=tuple(d if isinstance(d, int) else str(d) for d in value.shape or ()),
        )
        for value in values
    )


def _dtype(value: ir.Value) -> str:
    return str(value.dtype.numpy()) if value.dtype is not None else "unknown"
