"""What a report says of a model in the whole-sequence form: passes instead of steps, no chunk law."""

from __future__ import annotations

from collections.abc import Sequence

from xexport.core.contract import Contract
from xexport.core.manifest import Manifest
from xexport.core.records import PairedLatency, Passes, Record
from xexport.report import format as fmt
from xexport.report.entries import all_of, fidelity_of, same_machine
from xexport.report.tables import RUNNERS, Table, short_name
from xexport.report.words import (
    BLUR,
    RUNNER_NAMES,
    Sentence,
    Speed,
    accuracy_sentences,
    price,
    size_sentences,
)

__all__ = [
    "compared_passes",
    "form_sentence",
    "headline",
    "passes_note",
    "passes_of",
    "passes_table",
    "speed_against",
    "verdict",
]


def passes_of(records: Sequence[Record]) -> Passes | None:
    """The newest times of the bundle itself."""
    found = [r for r in all_of(records, Passes, "bundle") if r.passes]
    return found[-1] if found else None


def compared_passes(records: Sequence[Record]) -> dict[str, Passes]:
    """Runner -> times that may be compared: of one run on the machine of the bundle's newest ones."""
    newest = passes_of(records)
    if newest is None:
        return {}
    runs: dict[str, dict[str, Passes]] = {}
    for row in all_of(records, Passes):
        if row.passes and same_machine(row, newest):
            runs.setdefault(row.setup.date, {})[row.setup.runner] = row
    beside = [run for run in runs.values() if "bundle" in run and len(run) > 1]
    return beside[-1] if beside else {"bundle": newest}


def passes_table(records: Sequence[Record]) -> Table:
    """One row a runner: time and throughput by length, the first pass, load."""
    run = compared_passes(records)
    lengths = sorted({p.length for r in run.values() for p in r.passes})
    columns = ("Runner", *(h for n in lengths for h in (f"Pass of {n}", f"{n}, /s")), "First pass", "Load")
    rows = []
    for name in (n for n in RUNNERS if n in run):
        at = {p.length: p for p in run[name].passes}
        cells = [
            cell
            for n in lengths
            for cell in (
                (fmt.ms(at[n].median_ms), fmt.count(at[n].tokens_per_s)) if n in at else (fmt.MISSING,) * 2
            )
        ]
        row = run[name]
        rows.append((short_name(name), *cells, fmt.ms(row.first_ms), fmt.ms(row.load_ms)))
    return Table(columns, rows, tuple(range(1, len(columns))))


def passes_note(records: Sequence[Record], contract: Contract) -> str:
    """How the passes were timed."""
    row = passes_of(records)
    if row is None:
        return ""
    threads, unit = row.setup.environment.threads, contract.inputs.unit
    return (
        f"Medians of {len(row.longest.ns)} calls, batch {row.batch}, {threads} thread"
        f"{'' if threads == 1 else 's'}. Every call is one whole sequence and computes all its logits; /s is "
        f"{unit}s per second. The first pass is the first call of a fresh session, {row.first} {unit}s long."
    )


def form_sentence(contract: Contract) -> str:
    """What this form is, and what it rules out."""
    length = f" of exactly {contract.fixed_length} {contract.inputs.unit}s" if contract.fixed_length else ""
    return (
        "This model has the whole-sequence form only: every output depends on the whole input, so it can't "
        f"stream. Feed it whole sequences{length}; there is no state, and the chunk law does not apply."
    )


def headline(records: Sequence[Record]) -> str:
    """What was paid for what, in one line; empty if neither was measured."""
    row, speed = fidelity_of(records), speed_against(records, "torch") or speed_against(records, "onnx")
    parts = [_ratio(speed)] if speed else []
    if row is not None:
        parts.append(price(row))
    text = ", ".join(parts)
    if speed is not None and _busy(records):
        text += " (timed on a busy machine)"
    return f"{text[0].upper()}{text[1:]}." if text else ""


def verdict(manifest: Manifest, records: Sequence[Record]) -> list[Sentence]:
    """The form, speed, accuracy and size, one sentence each; nothing that was not measured."""
    found = [
        Sentence("plain", form_sentence(manifest.model.contract)),
        *_speed(manifest, records),
        *accuracy_sentences(records),
        *size_sentences(manifest),
    ]
    if fidelity_of(records) is None and passes_of(records) is None:
        text = "Neither accuracy nor speed was measured: run “xexport validate” and “xexport profile”."
        found.append(Sentence("plain", text))
    return found


def speed_against(records: Sequence[Record], other: str) -> Speed | None:
    """The bundle's pass against another runner's, from interleaved rounds."""
    mine = passes_of(records)
    pairs = [p for p in all_of(records, PairedLatency, "bundle") if p.other == other and p.length]
    pairs = [p for p in pairs if mine is None or same_machine(p, mine)]
    return Speed(other, *pairs[-1].speedup, True, pairs[-1].length) if pairs else None


def _speed(manifest: Manifest, records: Sequence[Record]) -> list[Sentence]:
    row = passes_of(records)
    if row is None:
        return []
    threads, unit, longest = row.setup.environment.threads, manifest.model.input.unit, row.longest
    text = (
        f"A sequence of {longest.length} {unit}s takes {fmt.ms(longest.median_ms)} here, which is "
        f"{fmt.count(longest.tokens_per_s)} {unit}s per second on {threads} thread"
        f"{'s' if threads != 1 else ''} of {row.setup.environment.cpu}."
    )
    found = [Sentence("plain", text)]
    if _busy(records):
        facts = row.setup.environment
        busy = (
            f"The machine was busy while this was timed (load {facts.load_average:.1f} on {facts.cores} "
            "cores): times are too long, and ratios uncertain. Run “xexport profile” when it is idle."
        )
        found.append(Sentence("bad", busy))
    for other in ("onnx", "torch"):
        speed = speed_against(records, other)
        if speed is not None:
            tone = "bad" if speed.slower else "good" if speed.faster else "plain"
            interval = f"95% interval {fmt.figure(speed.low)} to {fmt.figure(speed.high)}"
            how = f"{interval}, {speed.length} {unit}s in alternate rounds"
            text = _ratio(speed)
            found.append(Sentence(tone, f"{text[0].upper()}{text[1:]} ({how})."))
    return found


def _ratio(speed: Speed) -> str:
    name = RUNNER_NAMES.get(speed.other, speed.other)
    if speed.slower:
        return f"this target makes the model slower than {name} here: {fmt.times(speed.ratio)} as fast"
    if speed.faster or abs(speed.ratio - 1) > BLUR:
        sure = "" if speed.faster else ", within the noise of equal"
        return f"{fmt.times(speed.ratio)} as fast as {name}{sure}"
    return f"as fast as {name}"


def _busy(records: Sequence[Record]) -> bool:
    """Whether other work than the export's own took the machine while the bundle was timed."""
    row = passes_of(records)
    load = row.setup.environment.load_average if row else None
    return row is not None and load is not None and load > row.setup.environment.cores + 1
