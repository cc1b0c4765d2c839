"""One bundle as a page shows it: every text, table and figure, made from manifest and records."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

from xexport.core.manifest import Manifest
from xexport.core.records import ChunkLaw, Fidelity, Latency, Memory, Record
from xexport.report import format as fmt
from xexport.report import tables, whole, words
from xexport.report.entries import compared_latency, fidelity_of, last_of, latency_of
from xexport.report.jsonout import state_bytes, warnings_of, weights_bytes
from xexport.report.rivals import Rival, common_unit
from xexport.report.versus import side_by_side, state_bytes_table, steps_table

__all__ = [
    "Section",
    "Tile",
    "bundle_view",
    "compared",
    "compared_tables",
    "name_of",
    "reproduce",
    "title_of",
]


_SIDE = "Step times after so many {unit}s; the state after the first, and what every {unit} adds to it."
_SIDE_WHOLE = "Whole sequences in one call each: these models have no steps and no state."


class Tile(NamedTuple):
    """One headline figure."""

    label: str
    value: str
    note: str


class Section(NamedTuple):
    """A table with its heading and what it says."""

    id: str
    heading: str
    note: str
    table: tables.Table


def compared_tables(rivals: Sequence[Rival]) -> list[Section]:
    """What several bundles are compared by, beside the one row each: empty for a single one."""
    if len(rivals) < 2:
        return []
    turns = rivals[0].turns
    found = [
        Section(
            "side",
            "Side by side",
            _SIDE.format(unit=common_unit(rivals))
            if any(r.manifest.model.contract.streams for r in rivals)
            else _SIDE_WHOLE,
            side_by_side(rivals),
        ),
        Section(
            "steps",
            "Step time along the stream, in numbers",
            _turns_note(rivals),
            steps_table(rivals) if turns else tables.Table((), []),
        ),
        Section(
            "state",
            "State along the stream, in numbers",
            "Bytes in use of one stream. A cache of a graph has its full size from the beginning: that is "
            "what is set aside.",
            state_bytes_table(rivals) if any(r.manifest.state for r in rivals) else tables.Table((), []),
        ),
    ]
    return [s for s in found if s.table]


def _turns_note(rivals: Sequence[Rival]) -> str:
    row = next((r.turns for r in rivals if r.turns), None)
    if row is None or not row.steps:
        return ""
    rounds = row.steps[0].ns
    facts = row.setup.environment
    threads = f"{facts.threads} thread{'s' if facts.threads != 1 else ''} of {facts.cpu}"
    busy = f" (load {facts.load_average:.1f} on {facts.cores} cores)" if facts.load_average else ""
    return (
        f"Medians of {len(rounds)} rounds of {len(rounds[0])} steps at each position. The models took turns "
        f"in one process, the order turned each round, on {threads}{busy}."
    )


def name_of(manifest: Manifest) -> str:
    """``rwkv · cpu-int8``."""
    return f"{manifest.model.family} · {manifest.target}"


def title_of(manifests: Sequence[Manifest]) -> str:
    """The heading of a report."""
    if len(manifests) == 1:
        return f"{manifests[0].model.family} for {manifests[0].target}"
    families = list(dict.fromkeys(m.model.family for m in manifests))
    return f"{len(manifests)} bundles of {', '.join(families[:4])}{' …' if len(families) > 4 else ''}"


def bundle_view(manifest: Manifest, records: Sequence[Record]) -> dict[str, Any]:
    """Everything but the figures, by the names the templates use."""
    row, latency = fidelity_of(records), latency_of(records)
    unit = manifest.model.input.unit
    contract = manifest.model.contract
    said = words if contract.streams else whole
    newest = latency or (records[-1] if records else None)
    return {
        "name": name_of(manifest),
        "subtitle": subtitle(manifest),
        "warnings": warnings_of(manifest, records),
        "headline": said.headline(records),
        "tiles": _tiles(manifest, records),
        "verdict": said.verdict(manifest, records),
        "fidelity": tables.fidelity(records),
        "fidelity_note": _fidelity_note(row) if row else "",
        "latency": tables.latency(records, unit) if contract.streams else whole.passes_table(records),
        "latency_note": _latency_note(latency, records, unit)
        if latency
        else whole.passes_note(records, contract),
        "position_times": tables.positions(records, unit),
        "resources": tables.resources(manifest, records),
        "placement": tables.placement(records),
        "fallbacks": tables.fallbacks(records),
        "law": tables.chunk_law(records, unit),
        "law_note": _law_note(records, unit),
        "lowerings": tables.lowerings(manifest),
        "refusals": tables.refusals(manifest),
        "decisions": tables.decisions(manifest),
        "checks": tables.checks(manifest),
        "signature": tables.signature(manifest),
        "files": tables.files(manifest),
        "model": tables.model(manifest),
        "source": manifest.model.source,
        "environment": tables.environment(manifest, records),
        "machine": newest.setup.environment.cpu if newest else "",
        "reproduce": reproduce(manifest),
        "reproduce_note": _reproduce_note(row),
    }


def subtitle(manifest: Manifest) -> str:
    """Title, parameters, precision, runtime."""
    model = manifest.model
    return (
        f"{model.title.rstrip('.')}. {_millions(model.parameters)} parameters, {manifest.precision}, "
        f"{manifest.runtime} with {manifest.provider}, opset {manifest.opset}"
    )


def compared(entries: Sequence[tuple[Manifest, Sequence[Record]]]) -> tables.Table:
    """One row a bundle."""
    columns = (
        "Bundle", "Bits per byte", "Lost", "Same top-1", "KL mean", "Step p50", "× PyTorch", "× fp32",
        "Prefill /s", "Weights", "Peak memory",
    )  # fmt: skip
    rows = []
    for manifest, records in entries:
        row, latency, memory = fidelity_of(records), latency_of(records), last_of(records, Memory)
        speeds = [_speed_against(manifest, records, other) for other in ("torch", "onnx")]
        rows.append(
            (
                name_of(manifest),
                *_compared_accuracy(row),
                fmt.ms(latency.step_ms(50)) if latency else fmt.MISSING,
                *(fmt.figure(s.ratio) if s else fmt.MISSING for s in speeds),
                fmt.count(latency.prefill_tokens_per_s if latency else _passes_per_s(records)),
                fmt.bytes_text(weights_bytes(manifest)),
                fmt.bytes_text(memory.peak_rss if memory else None),
            )
        )
    return tables.Table(columns, rows, tuple(range(1, len(columns))))


def _speed_against(manifest: Manifest, records: Sequence[Record], other: str) -> words.Speed | None:
    if manifest.model.contract.streams:
        return words.speed_against(records, other)
    return whole.speed_against(records, other)


def _passes_per_s(records: Sequence[Record]) -> float:
    """Throughput of the longest whole passes, for which there is no prefill."""
    row = whole.passes_of(records)
    return row.longest.tokens_per_s if row else math.nan


def _compared_accuracy(row: Fidelity | None) -> tuple[str, ...]:
    if row is None:
        return (fmt.MISSING,) * 4
    return (
        fmt.figure(row.bits_per_byte("candidate")[0], 4),
        fmt.plus_minus(*row.bits_lost),
        fmt.percent(row.agreement, 2),
        fmt.figure(row.kl_mean),
    )


def reproduce(manifest: Manifest) -> str:
    """The commands that make this bundle and measure it again."""
    model, folder = manifest.model, f"{manifest.model.family}-{manifest.target}"
    if model.source.startswith("module "):
        first = (
            f"xexport.export(module, target={manifest.target!r}, out={folder!r})  # in Python: {model.source}"
        )
    else:
        first = shlex.join(
            ["xexport", model.family, "--target", manifest.target, *_weights(manifest), "--out", folder]
        )
    return f"{first}\nxexport validate {shlex.quote(folder)}\nxexport profile {shlex.quote(folder)}"


def _weights(manifest: Manifest) -> list[str]:
    """The option that names the weights; none for the checkpoint that ships with the package."""
    source = manifest.model.source
    if source.startswith("preset "):
        return ["--preset", source.removeprefix("preset ").split(",", 1)[0]]
    return [] if source == f"{manifest.model.family}.safetensors" else ["--weights", source]


def _reproduce_note(row: Fidelity | None) -> str:
    if row is None or not row.setup.text:
        return ""
    digest = f" (SHA-256 {row.setup.text_sha256[:16]}…)" if row.setup.text_sha256 else ""
    return f"Scored on {row.setup.text}{digest}."


def _tiles(manifest: Manifest, records: Sequence[Record]) -> list[Tile]:
    found: list[Tile] = []
    row, latency, memory = fidelity_of(records), latency_of(records), last_of(records, Memory)
    if latency:
        speed = words.speed_against(records, "torch")
        note = (
            f"{fmt.times(speed.ratio)} as fast as PyTorch" if speed else f"p99 {fmt.ms(latency.step_ms(99))}"
        )
        found.append(Tile("Step, median", fmt.ms(latency.step_ms(50)), note))
        unit = manifest.model.input.unit
        found.append(Tile("Decode", f"{fmt.count(latency.decode_tokens_per_s)} /s", f"{unit}s, one stream"))
        if latency.prefill:
            longest = max(p.length for p in latency.prefill)
            value = f"{fmt.count(latency.prefill_tokens_per_s)} /s"
            found.append(Tile("Prefill", value, f"{unit}s, in one call of {longest}"))
    passes = whole.passes_of(records)
    if passes:
        unit, calls = manifest.model.input.unit, passes.longest
        found.append(Tile("Pass, median", fmt.ms(calls.median_ms), f"{calls.length} {unit}s"))
        found.append(Tile("Throughput", f"{fmt.count(calls.tokens_per_s)} /s", f"{unit}s, whole sequences"))
    if row and row.scored:
        lost, error = row.bits_lost
        found.append(
            Tile("Bits per byte", fmt.figure(row.bits_per_byte("candidate")[0], 4), _lost_note(lost, error))
        )
    if row:
        found.append(
            Tile("Same top-1", fmt.percent(row.agreement, 2), f"± {fmt.percent(row.agreement_se, 2)}")
        )
    streams = manifest.model.contract.streams
    state = f"state {fmt.bytes_text(state_bytes(manifest))} a stream" if streams else "no state"
    found.append(Tile("Weights", fmt.bytes_text(weights_bytes(manifest)), state))
    if memory:
        note = f"bundle adds {fmt.bytes_text(memory.added_rss)}"
        found.append(Tile("Peak memory", fmt.bytes_text(memory.peak_rss), note))
    return found


def _lost_note(lost: float, error: float) -> str:
    if math.isnan(lost):
        return "not finite"
    return f"{'+' if lost >= 0 else '−'}{fmt.plus_minus(abs(lost), error)} against PyTorch"


def _fidelity_note(row: Fidelity) -> str:
    text = row.setup.text or "the given text"
    how = (
        f"streamed {row.chunk} at a time with the state carried"
        if row.form == "chunk"
        else f"in whole sequences of at most {row.chunk}"
    )
    kl = "KL is from the reference to the runner, in nats."
    if not row.scored:
        return (
            f"{fmt.count(row.tokens)} positions of {text}, {how}. {kl} Its error is from the means of 32 "
            "blocks, that of the first choice binomial. No bits per byte: the model was not made to predict "
            "what comes next."
        )
    return (
        f"{fmt.count(row.tokens)} tokens of {text} ({fmt.bytes_text(row.text_bytes)}), {how}. "
        f"{kl} Errors: bits per byte from the means of 32 "
        "blocks of the text (tokens are correlated), “lost” paired by token, top-1 binomial."
    )


def _latency_note(latency: Latency, records: Sequence[Record], unit: str) -> str:
    first = "first token" if unit == "token" else "first call"
    threads = latency.setup.environment.threads
    note = (
        f"Batch {latency.batch}, {threads} thread{'' if threads == 1 else 's'}, times of "
        f"{len(latency.step_ns)} steps, each {fmt.step_text(unit, latency.unit)}, after {latency.warmup} "
        f"thrown away. Decode and prefill are in {unit}s per second; prefill, {first} and load are medians."
    )
    if latency.prompt:
        is_that = " is the first call" if unit == "token" else " is that"
        note += f" The {first}{is_that} of a fresh session, {latency.prompt} {unit}s long."
    return note + _prefill_note([latency, *compared_latency(records).values()], unit)


def _prefill_note(rows: Sequence[Latency], unit: str) -> str:
    """Of which positions a prefill computed the logits: a prompt needs the last one's only."""
    place = "token" if unit == "token" else "position"
    whole = {tables.short_name(r.setup.runner): not p.logits for r in rows for p in r.prefill}
    if not any(whole.values()):
        return f" A prefill computes the logits of its last {place} only." if whole else ""
    who = "" if all(whole.values()) else f" in {' and '.join(n for n, every in whole.items() if every)}"
    return f" A prefill computes the logits of every {place}{who}."


def _law_note(records: Sequence[Record], unit: str) -> str:
    law = last_of(records, ChunkLaw)
    if law is None:
        return ""
    return (
        f"{law.tokens} {unit}s fed whole and in pieces, from the state after {law.start} {unit}s: any way "
        "of cutting gives the same logits and the same final state. State errors are relative to its RMS."
    )


def _millions(parameters: int) -> str:
    if parameters >= 1e9:
        return f"{parameters / 1e9:.3g} billion"
    return f"{parameters / 1e6:.3g} million" if parameters >= 1e6 else fmt.count(parameters)
