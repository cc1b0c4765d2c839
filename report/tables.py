"""The rows of a report's tables as text, shared by HTML and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from xexport.core.contract import InputSpec
from xexport.core.manifest import Manifest
from xexport.core.records import (
    Bandwidth,
    ChunkLaw,
    Fidelity,
    Latency,
    Memory,
    OpTimes,
    Record,
)
from xexport.report import format as fmt
from xexport.report.entries import all_of, compared_latency, fidelity_of, last_of, latency_of, op_times_of
from xexport.report.jsonout import state_bytes, weights_bytes

__all__ = [
    "RUNNERS",
    "Table",
    "checks",
    "chunk_law",
    "decisions",
    "environment",
    "fallbacks",
    "fidelity",
    "files",
    "latency",
    "lowerings",
    "model",
    "placement",
    "positions",
    "refusals",
    "resources",
    "short_name",
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
    """One column a runner: bits per byte, what was lost, KL, agreement, errors."""
    live = [r for r in (fidelity_of(records, n) for n in ("onnx", "bundle")) if r is not None]
    recorded = [r for r in all_of(records, Fidelity, "bundle") if "recorded" in r.reference][-1:]
    shown = live + [r for r in recorded if r not in live]
    if not shown:
        return Table((), [])
    heads = [RUNNERS.get(r.setup.runner, r.setup.runner) for r in live]
    heads += [f"This bundle, {r.tokens} tokens recorded at export" for r in shown[len(live) :]]
    first = shown[0]
    rows = [
        ("Bits per byte", _reference(first, fmt.plus_minus(*first.bits_per_byte("reference")))),
        ("Lost against PyTorch, bits per byte", fmt.MISSING),
        ("Perplexity per token", _reference(first, fmt.figure(first.perplexity("reference")[0], 4))),
        *((name, fmt.MISSING) for name in _MEASURES),
    ]
    columns = [_figures(r) for r in shown]
    table = [(*row, *(c[i] for c in columns)) for i, row in enumerate(rows)]
    return Table(
        ("Measure", RUNNERS.get(first.reference, first.reference), *heads),
        table if any(r.scored for r in shown) else table[-len(_MEASURES) :],
        tuple(range(1, len(shown) + 2)),
    )


_MEASURES = (
    "KL divergence, mean (nats)",
    "KL divergence, median",
    "KL divergence, 99%",
    "KL divergence, largest",
    "Same token ranked first",
    "Logit error, largest",
    "Logit error, RMS",
    "Logit error, RMS over RMS of logits",
)


def _reference(row: Fidelity, text: str) -> str:
    """The reference's own figure; a recorded one is not of the same text as the others."""
    return fmt.MISSING if "recorded" in row.reference else text


def _figures(row: Fidelity) -> tuple[str, ...]:
    return (
        fmt.plus_minus(*row.bits_per_byte("candidate")),
        fmt.plus_minus(*row.bits_lost),
        fmt.figure(row.perplexity("candidate")[0], 4),
        fmt.plus_minus(row.kl_mean, row.kl_se),
        fmt.figure(row.kl_percentile(50)),
        fmt.figure(row.kl_percentile(99)),
        fmt.figure(row.kl_percentile(100)),
        f"{fmt.percent(row.agreement, 2)} ± {fmt.percent(row.agreement_se, 2)}",
        fmt.figure(row.max_error),
        fmt.figure(row.rms_error),
        fmt.figure(row.relative_rms_error),
    )


def short_name(runner: str) -> str:
    """A runner as tables of times call it."""
    return RUNNERS.get(runner, runner).replace(" (reference)", "")


def latency(records: Sequence[Record], unit: str = "token") -> Table:
    """One row a runner: step percentiles, decode, prefill by length, first token, load."""
    run, newest = compared_latency(records), latency_of(records)
    named = [(short_name(n), run[n]) for n in RUNNERS if n in run]
    if newest is not None and newest is not run.get("bundle"):
        named.append((f"This bundle again, {newest.setup.date[:16].replace('T', ' ')}", newest))
    others = {
        r.setup.runner: r for r in all_of(records, Latency) if r.setup.runner.startswith("bundle with ")
    }
    named += [(name.replace("bundle", "This bundle", 1), row) for name, row in others.items()]
    found = [row for _, row in named]
    lengths = sorted({p.length for r in found for p in r.prefill})
    columns = (
        "Runner", "Step p50", "p90", "p99", "Decode /s",
        *(f"Prefill {n} /s" for n in lengths), "First token" if unit == "token" else "First call", "Load",
    )  # fmt: skip
    rows = []
    for name, r in named:
        speeds = {p.length: p.tokens_per_s for p in r.prefill}
        rows.append(
            (
                name,
                *(fmt.ms(r.step_ms(q)) for q in (50, 90, 99)),
                fmt.count(r.decode_tokens_per_s),
                *(fmt.count(speeds.get(n, float("nan"))) for n in lengths),
                fmt.ms(r.first_token_ms),
                fmt.ms(r.load_ms),
            )
        )
    return Table(columns, rows, tuple(range(1, len(columns))))


def positions(records: Sequence[Record], unit: str = "token") -> Table:
    """Median step time along the stream, by runner."""
    found = [r for r in compared_latency(records).values() if r.positions]
    places = sorted({p.position for r in found for p in r.positions})
    rows = []
    for r in found:
        at = {p.position: p.median_ms for p in r.positions}
        name = short_name(r.setup.runner)
        rows.append((name, *(fmt.ms(at.get(p, float("nan"))) for p in places)))
    return Table(
        ("Runner", *(f"at {unit} {fmt.count(p)}" for p in places)), rows, tuple(range(1, len(places) + 1))
    )


def chunk_law(records: Sequence[Record], unit: str = "token") -> Table:
    """One row a cut of the newest check of each runner."""
    rows = []
    for name in ("torch", "onnx", "bundle"):
        law = last_of(records, ChunkLaw, name)
        if law is None:
            continue
        for cut in law.cuts:
            rows.append(
                (
                    short_name(name),
                    _pieces(cut.pieces, unit),
                    "not finite" if cut.logit_error is None else fmt.figure(cut.logit_error),
                    fmt.figure(cut.logit_rms),
                    "not finite" if cut.state_error is None else fmt.figure(cut.state_error),
                    cut.state or fmt.MISSING,
                    "worst" if cut is law.worst and cut.error > 0 else "",
                )
            )
    columns = ("Runner", "Cut", "Max logit error", "Logit RMS", "State error", "Worst state", "")
    return Table(columns, rows, (2, 3, 4))


def _pieces(pieces: tuple[int, ...], unit: str) -> str:
    if len(pieces) > 3 and set(pieces) == {1}:
        return f"{len(pieces)} single {unit}s"
    shown = " + ".join(str(n) for n in pieces[:6])
    return f"{shown} + … ({len(pieces)} pieces)" if len(pieces) > 6 else shown


def resources(manifest: Manifest, records: Sequence[Record]) -> Table:
    """Weights, state, memory, bandwidth: name, figure, meaning."""
    streams = manifest.model.contract.streams
    rows = [("Weights and graph", fmt.bytes_text(weights_bytes(manifest)), "what a device stores")]
    if streams:
        state = fmt.bytes_text(state_bytes(manifest))
        rows.append(("State", state, "one stream; kept twice while running"))
    memory = last_of(records, Memory)
    doing = "streaming" if streams else "whole passes"
    if memory:
        rows.append(
            ("Peak memory", fmt.bytes_text(memory.peak_rss), f"resident, whole process, loading and {doing}")
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
                    f"reading {fmt.bytes_text(bandwidth.bytes_per_token)} of weights a step would take "
                    f"{fmt.ms(bandwidth.floor_ms)}",
                )
            )
    times = op_times_of(records, "step" if streams else "whole")
    for placed in times.placed if times else ():
        share = f"{fmt.percent(placed.share)} of the nodes' time" if placed.us_per_call else "never run"
        rows.append(("Nodes", str(placed.nodes), f"on {placed.provider}, {share}"))
    return Table(("What", "Figure", "Meaning"), rows, (1,))


def placement(records: Sequence[Record]) -> Table:
    """Which execution provider ran how many nodes, for how long: one row a form and provider."""
    rows = [
        (
            found.form,
            placed.provider,
            str(placed.nodes),
            fmt.ms(placed.us_per_call / 1e3),
            fmt.percent(placed.share),
        )
        for found in _profiles(records)
        for placed in found.placed
    ]
    return Table(("Call", "Provider", "Nodes", "Time a call", "Share"), rows, (2, 3, 4))


def fallbacks(records: Sequence[Record]) -> Table:
    """Nodes that another provider ran than the target's, and why; empty where all ran as promised."""
    rows = [
        (
            found.form,
            row.op,
            str(len(row.nodes)),
            row.provider,
            fmt.ms(row.ns / 1e6 / max(found.calls, 1)),
            row.why,
            row.nodes[0],
        )
        for found in _profiles(records)
        for row in found.fallbacks
    ]
    return Table(("Call", "Operator", "Nodes", "Ran on", "Time a call", "Why", "The first"), rows, (2, 4))


def _profiles(records: Sequence[Record]) -> list[OpTimes]:
    """The newest profile of every form."""
    found = (op_times_of(records, form) for form in ("step", "prefill", "whole"))
    return [row for row in found if row is not None]


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


def refusals(manifest: Manifest) -> Table:
    """What the exporter's passes looked at and left as it was: one row a reason."""
    nodes: dict[tuple[str, str], list[str]] = {}
    for row in manifest.refusals:
        nodes.setdefault((row.pass_, row.reason), []).append(row.node)
    rows = [(by, why, str(len(names)), names[0]) for (by, why), names in nodes.items()]
    return Table(("Pass", "Why it left them", "Nodes", "The first"), rows, (2,))


def checks(manifest: Manifest) -> Table:
    """The checks made at export, flattened."""
    return Table(("Check", "Result"), list(_flatten("", manifest.checks)))


def environment(manifest: Manifest, records: Sequence[Record]) -> Table:
    """Where it was measured (from the newest record) and exported (from the manifest)."""
    rows: list[tuple[str, ...]] = []
    here: dict[str, Any] = {}
    if records:
        here = msgspec.to_builtins(records[-1].setup.environment)
        for key, value in here.items():
            if value is not None:
                text = fmt.bytes_text(value) if key == "memory_bytes" else str(value)
                rows.append((key.replace("_bytes", "").replace("_", " "), text))
        rows.append(("measured", records[-1].setup.date))
    rows.append(("exported", f"{manifest.created} by xexport {manifest.xexport_version}"))
    other = {k: v for k, v in manifest.environment.items() if k != "load_average" and here.get(k) != v}
    rows += [(f"at export: {k.replace('_', ' ')}", v) for k, v in _flatten("", other)]
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


def _input(spec: InputSpec) -> str:
    unit = f", T a multiple of {spec.multiple}" if spec.multiple > 1 else ""
    return f"{spec.kind} [B, T, {spec.width}] {spec.dtype}{unit}"


def model(manifest: Manifest) -> Table:
    """What was exported: family, configuration, checkpoint, notes."""
    info = manifest.model
    limit = fmt.count(info.max_tokens) if info.max_tokens else "no limit"
    contract = info.contract
    rows: list[tuple[str, ...]] = [
        ("family", info.family),
        ("checkpoint", info.source),
        ("parameters", fmt.count(info.parameters)),
        ("vocabulary", fmt.count(info.vocab_size)),
        ("form", "chunks: it streams" if contract.streams else "whole sequences only"),
        *([("input", _input(contract.inputs))] if contract.inputs.width else []),
        *([("length", fmt.count(contract.fixed_length))] if contract.fixed_length else []),
        *([] if contract.fixed_length else [("longest stream" if contract.streams else "longest", limit)]),
        *((f"config: {k}", v) for k, v in _flatten("", info.config)),
        *(("note", note) for note in info.notes),
    ]
    return Table(("Fact", "Value"), rows)
