"""From a module to an optimised, written graph: the exporter's steps in their order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass

from xexport.core.contract import Contract
from xexport.core.errors import ExportError
from xexport.core.manifest import FileEntry, GraphTensor, Lowering
from xexport.core.progress import Progress
from xexport.core.state import StateSpec
from xexport.core.target import Target
from xexport.exporter.functions import attach_functions
from xexport.exporter.passes import optimize
from xexport.exporter.static import specialize
from xexport.exporter.trace import trace
from xexport.exporter.weights import bind, check_tensors
from xexport.exporter.writer import write_graphs, write_model

__all__ = ["Written", "build_graph", "graph_tensors", "write_graph", "write_static"]


@dataclass(frozen=True)
class Written:
    """A graph on the disk: its files, which body every operator got, and of static ones T -> file."""

    files: tuple[FileEntry, ...]
    lowerings: tuple[Lowering, ...]
    graphs: Mapping[int, str] = field(default_factory=dict)


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
    title: str = "write weights",
) -> Written:
    """Attach the operators' bodies and write graph and weights.

    With ``inline`` the bodies take the place of their nodes, for a runtime without local functions. ``title``
    is what ``progress`` calls the writing.
    """
    lowerings = attach_functions(model, bodies, why)
    if inline:
        InlinePass()(model)
    files = write_model(model, folder, progress, title=title)
    return Written(tuple(files), tuple(lowerings))


def write_static(
    model: ir.Model, folder: Path, target: Target, contract: Contract, progress: Progress
) -> Written:
    """Attach the operators' bodies and write the weights once, with a graph of fixed shape a length.

    Raises:
        ExportError: the model takes whole sequences of any length, or a graph can't be made static.
    """
    if not contract.streams and contract.fixed_length is None:
        raise ExportError(
            f"{target.name} takes graphs of fixed shape, and this model takes whole sequences of any length",
            got="no state is carried, so a longer input can't be fed in pieces",
            fix="export for a target with dynamic graphs (cpu-*)",
        )
    lengths = contract.prepared(target.lengths)
    lowerings = attach_functions(model, target.bodies, target.why)
    names = {length: f"model.t{length}.onnx" for length in sorted(lengths)}

    def graphs() -> Iterator[tuple[str, ir.Model]]:
        progress.stage("fix the shapes", total=len(names))
        for length, name in names.items():
            sizes = {"B": 1, "T": length}
            yield (
                name,
                specialize(model, sizes, inline=target.inline, unroll=target.unroll, lower=target.lower),
            )
            progress.advance()

    files = write_graphs(model, folder, graphs, progress)
    return Written(tuple(files), tuple(lowerings), names)


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
