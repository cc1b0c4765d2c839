"""The manifest of a graph that was just written."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import onnx_ir as ir

import xexport
from xexport.core.manifest import (
    SCHEMA_VERSION,
    Activation,
    FileEntry,
    GraphTensor,
    Manifest,
    ModelInfo,
    Refusal,
    StateTensor,
    TensorDecision,
)
from xexport.core.state import StateSpec
from xexport.core.target import Target
from xexport.exporter.appended import appended_states
from xexport.exporter.graph import Written, graph_tensors
from xexport.exporter.trace import output_name
from xexport.exporter.writer import GRAPH_NAME

__all__ = ["describe"]


def describe(
    model: ir.Model,
    written: Written,
    info: ModelInfo,
    target: Target,
    specs: Sequence[StateSpec],
    *,
    decisions: Sequence[TensorDecision] = (),
    refusals: Sequence[Refusal] = (),
    tokenizer: dict[str, Any],
    checks: dict[str, Any],
    environment: dict[str, Any],
    warnings: Sequence[str] = (),
    extra_files: Sequence[FileEntry] = (),
    activations: Sequence[Activation] = (),
) -> Manifest:
    """Everything a device needs, and every decision with its reason; figures are added later."""
    appended = appended_states(model, [s.name for s in specs])
    return Manifest(
        schema_version=SCHEMA_VERSION,
        xexport_version=xexport.__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=info,
        target=target.name,
        precision=target.precision,
        runtime=target.runtime,
        provider=target.provider,
        target_row=target.row(),
        opset=model.opset_imports[""],
        ir_version=model.ir_version or 0,
        graph=written.graphs[min(written.graphs)] if written.graphs else GRAPH_NAME,
        graph_form=target.graph_form,
        graphs=dict(written.graphs),
        files=(*written.files, *extra_files),
        inputs=_tensors(model.graph.inputs, written),
        outputs=_tensors(model.graph.outputs, written),
        state=tuple(
            StateTensor(s.name, output_name(s.name), s.dtype, s.shape, s.init, appended.get(s.name))
            for s in specs
        ),
        tokenizer=tokenizer,
        lowerings=written.lowerings,
        decisions=tuple(decisions),
        checks=checks,
        environment=environment,
        warnings=tuple(warnings),
        refusals=tuple(refusals),
        activations=tuple(activations),
    )


def _tensors(values: Sequence[ir.Value], written: Written) -> tuple[GraphTensor, ...]:
    """Inputs or outputs; a graph of fixed shape takes one sequence."""
    found = graph_tensors(values)
    if not written.graphs:
        return found
    return tuple(
        msgspec.structs.replace(t, shape=tuple(1 if d == "B" else d for d in t.shape)) for t in found
    )
