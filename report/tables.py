"""The rows of a report's tables as text, shared by HTML and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from xexport.core.manifest import Manifest
from xexport.core.records import (
    Bandwidth,
    ChunkLaw,
    Environment,
    Fidelity,
    Memory,
    Record,
)
from xexport.report import format as fmt
from xexport.report.entries import all_of, fidelity_of, last_of, latency_of, op_times_of
from xexport.report.jsonout import state_bytes, weights_bytes

__all__ = [
    "Table",
    "checks",
    "chunk_law",
    "decisions",
    "environment",
    "fidelity",
    "files",
    "latency",
    "lowerings",
    "model",
    "positions",
    "resources",
    "signature",
    "sizes_by_role",
]

RUNNERS = {"torch": "PyTorch (reference)", "onnx": "ONNX fp32", "bundle": "This bundle"}


class Table(NamedTuple):
    """A heading row and rows of text; ``numeric`` are the indices of right-aligned columns."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numeric: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.rows)


def fidelity(records: Sequence[Record]) -> Table:
    """One row a runner: bits per byte, what was lost, KL, agreement, errors."""
    columns = (
        "Runner", "Bits per byte", "Lost", "Perplexity", "KL mean", "KL median", "KL 99%", "KL max",
        "Same top-1", "Max error", "RMS error", "Relative RMS",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for name in ("onnx", "bundle"):
        row = fidelity_of(records, name)
        if row is None:
            continue
        if not rows:
            rows.append(_reference_row(row, len(columns)))
        rows.append(_fidelity_row(row))
    recorded = [r for r in all_of(records, Fidelity, "bundle") if "recorded" in r.reference]
    if recorded and recorded[-1] is not fidelity_of(records):
        name = f"This bundle, {recorded[-1].tokens} tokens recorded at export"
        rows.append((name, *_fidelity_row(recorded[-1])[1:]))
    return Table(columns, rows, tuple(range(1, len(columns))))


def _reference_row(row: Fidelity, width: int) -> tuple[str, ...]:
    bits = fmt.plus_minus(*row.bits_per_byte("reference"))
    head = (
        RUNNERS.get(row.reference, row.reference),
        bits,
        fmt.MISSING,
        fmt.figure(row.perplexity("reference")[0], 4),
    )
    return head + (fmt.MISSING,) * (width - len(head))


def _fidelity_row(row: Fidelity) -> tuple[str, ...]:
    agreement = f"{fmt.percent(row.agreement, 2)} ± {fmt.percent(row.agreement_se, 2)}"
    return (
        RUNNERS.get(row.setup.runner, row.setup.runner),
        fmt.plus_minus(*row.bits_per_byte("candidate")),
        fmt.plus_minus(*row.bits_lost),
        fmt.figure(row.perplexity("candidate")[0], 4),
        fmt.figure(row.kl_mean),
        fmt.figure(row.kl_percentile(50)),
        fmt.figure(row.kl_percentile(99)),
        fmt.figure(row.kl_percentile(100)),
        agreement,
        fmt.figure(row.max_error),
        fmt.figure(row.rms_error),
        fmt.figure(row.relative_rms_error),
    )


def latency(records: Sequence[Record]) -> Table:
    """One row a runner: step percentiles, decode, prefill by length, first token, load."""
    found = [r for r in (latency_of(records, n) for n in RUNNERS) if r is not None]
    lengths = sorted({p.length for r in found for p in r.prefill})
    columns = (
        "Runner", "Step p50", "p90", "p99", "Decode tokens/s",
        *(f"Prefill {n} tokens/s" for n in lengths), "First token", "Load", "Samples",
    )  # fmt: skip
    rows = []
    for r in found:
        speeds = {p.length: p.tokens_per_s for p in r.prefill}
        rows.append(
            (
                RUNNERS.get(r.setup.runner, r.setup.runner).replace(" (reference)", ""),
                *(fmt.ms(r.step_ms(q)) for q in (50, 90, 99)),
                fmt.count(r.decode_tokens_per_s),
                *(fmt.count(speeds.get(n, float("nan"))) for n in lengths),
                fmt.ms(r.first_token_ms),
                fmt.ms(r.load_ms),
                str(len(r.step_ns)),
            )
        )
    return Table(columns, rows, tuple(range(1, len(columns))))


def positions(records: Sequence[Record]) -> Table:
    """Median step time along the stream, by runner."""
    found = [r for r in (latency_of(records, n) for n in RUNNERS) if r is not None and r.positions]
    places = sorted({p.position for r in found for p in r.positions})
    rows = []
    for r in found:
        at = {p.position: p.median_ms for p in r.positions}
        name = RUNNERS.get(r.setup.runner, r.setup.runner).replace(" (reference)", "")
        rows.append((name, *(fmt.ms(at.get(p, float("nan"))) for p in places)))
    return Table(
        ("Runner", *(f"at token {fmt.count(p)}" for p in places)), rows, tuple(range(1, len(places) + 1))
    )


def chunk_law(records: Sequence[Record]) -> Table:
    """One row a cut of the newest check of each runner."""
    rows = []
    for name in ("torch", "onnx", "bundle"):
        law = last_of(records, ChunkLaw, name)
        if law is None:
            continue
        for cut in law.cuts:
            rows.append(
                (
                    RUNNERS[name].replace(" (reference)", ""),
                    _pieces(cut.pieces),
                    "not finite" if cut.logit_error is None else fmt.figure(cut.logit_error),
                    fmt.figure(cut.logit_rms),
                    "not finite" if cut.state_error is None else fmt.figure(cut.state_error),
                    cut.state or fmt.MISSING,
                    "worst" if cut is law.worst else "",
                )
            )
    columns = ("Runner", "Cut", "Max logit error", "Logit RMS", "State error", "Worst state", "")
    return Table(columns, rows, (2, 3, 4))


def _pieces(pieces: tuple[int, ...]) -> str:
    if len(pieces) > 3 and set(pieces) == {1}:
        return f"{len(pieces)} single tokens"
    shown = " + ".join(str(n) for n in pieces[:6])
    return f"{shown} + … ({len(pieces)} pieces)" if len(pieces) > 6 else shown


def resources(manifest: Manifest, records: Sequence[Record]) -> Table:
    """Weights, state, memory, bandwidth: name, figure, meaning."""
    rows = [
        ("Weights and graph", fmt.bytes_text(weights_bytes(manifest)), "what a device stores"),
        ("State", fmt.bytes_text(state_bytes(manifest)), "one stream; kept twice while running"),
    ]
    memory = last_of(records, Memory)
    if memory:
        rows.append(
            ("Peak memory", fmt.bytes_text(memory.peak_rss), "resident, whole process, loading and streaming")
        )
        rows.append(
            ("Added by the bundle", fmt.bytes_text(memory.added_rss), "peak above the bare interpreter")
        )
    bandwidth, step = last_of(records, Bandwidth), latency_of(records)
    if bandwidth:
        rows.append(
            (
                "Memory bandwidth",
                f"{fmt.figure(bandwidth.bytes_per_s / 1e9)} GB/s",
                f"read, {bandwidth.threads} threads, measured in the same run",
            )
        )
        if step:
            rows.append(
                (
                    "Share of the bandwidth floor",
                    fmt.percent(bandwidth.fraction(step.step_ms(50))),
                    f"reading {fmt.bytes_text(bandwidth.bytes_per_token)} of weights a token would take "
                    f"{fmt.ms(bandwidth.floor_ms)}",
                )
            )
    times = op_times_of(records, "step")
    if times:
        placed = ", ".join(f"{n} on {ep}" for ep, n in times.placement.items())
        rows.append(("Nodes", placed, "read from the runtime's profile"))
    return Table(("What", "Figure", "Meaning"), rows, (1,))


def decisions(manifest: Manifest) -> Table:
    """Every weight tensor: role, format, bytes, error, reason."""
    rows = [
        (d.tensor, d.role, fmt.shape(d.shape), d.format, f"{d.bytes:,}", fmt.figure(d.error), d.reason)
        for d in manifest.decisions
    ]
    return Table(("Tensor", "Role", "Shape", "Format", "Bytes", "Relative error", "Why"), rows, (4, 5))


def sizes_by_role(manifest: Manifest) -> dict[tuple[str, str], int]:
    """(role, format) -> bytes of weights."""
    table: dict[tuple[str, str], int] = {}
    for d in manifest.decisions:
        table[d.role, d.format] = table.get((d.role, d.format), 0) + d.bytes
    return table


def lowerings(manifest: Manifest) -> Table:
    """Every operator outside the standard set: what body it got and why."""
    rows = [(f"{row.domain}::{row.op}", row.variant, str(row.nodes), row.why) for row in manifest.lowerings]
    return Table(("Operator", "Body", "Nodes", "Why"), rows, (2,))


def checks(manifest: Manifest) -> Table:
    """The checks made at export, flattened."""
    return Table(("Check", "Result"), list(_flatten("", manifest.checks)))


def environment(manifest: Manifest, records: Sequence[Record]) -> Table:
    """Where it was measured (from the newest record) and exported (from the manifest)."""
    rows: list[tuple[str, ...]] = []
    if records:
        facts: Environment = records[-1].setup.environment
        for key, value in msgspec.to_builtins(facts).items():
            if value is not None:
                text = fmt.bytes_text(value) if key == "memory_bytes" else str(value)
                rows.append((key.replace("_bytes", "").replace("_", " "), text))
        rows.append(("measured", records[-1].setup.date))
    rows.append(("exported", f"{manifest.created} by xexport {manifest.xexport_version}"))
    rows += [(f"export: {k}", v) for k, v in _flatten("", manifest.environment)]
    return Table(("Fact", "Value"), rows)


def files(manifest: Manifest) -> Table:
    """The bundle's files with their hashes."""
    rows = [(f.path, f"{f.bytes:,}", f.sha256) for f in manifest.files]
    return Table(("File", "Bytes", "SHA-256"), rows, (1,))


def signature(manifest: Manifest) -> Table:
    """Inputs, outputs and state of the graph."""
    rows = [("input", t.name, t.dtype, fmt.shape(t.shape), "") for t in manifest.inputs]
    rows += [("output", t.name, t.dtype, fmt.shape(t.shape), "") for t in manifest.outputs]
    rows += [
        ("state", f"{t.name} → {t.output}", t.dtype, fmt.shape(t.shape), f"begins at {t.init:g}")
        for t in manifest.state
    ]
    return Table(("Kind", "Name", "Type", "Shape", "Note"), rows)


def _flatten(prefix: str, value: Any) -> list[tuple[str, str]]:
    """Nested plain data as (dotted key, text)."""
    if isinstance(value, Mapping):
        found = []
        for key, inner in value.items():
            found += _flatten(f"{prefix}.{key}" if prefix else str(key), inner)
        return found
    if isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
        found = []
        for index, inner in enumerate(value):
            found += _flatten(f"{prefix}[{index}]", inner)
        return found
    if isinstance(value, float):
        return [(prefix, fmt.figure(value))]
    if isinstance(value, list | tuple):
        return [(prefix, ", ".join(str(v) for v in value))]
    return [(prefix, str(value))]


def model(manifest: Manifest) -> Table:
    """What was exported: family, configuration, checkpoint, notes."""
    info = manifest.model
    rows: list[tuple[str, ...]] = [
        ("family", info.family),
        ("checkpoint", info.source),
        ("parameters", fmt.count(info.parameters)),
        ("vocabulary", fmt.count(info.vocab_size)),
        ("longest stream", fmt.count(info.max_tokens) if info.max_tokens else "no limit"),
        *((f"config: {k}", v) for k, v in _flatten("", info.config)),
        *(("note", note) for note in info.notes),
    ]
    return Table(("Fact", "Value"), rows)
