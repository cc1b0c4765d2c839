"""What a sweep says at its end: the object that ``--json`` prints, and the sections of its report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xexport.core.errors import BundleError
from xexport.core.manifest import decode_manifest
from xexport.core.results import decode_records
from xexport.report import format as fmt
from xexport.report.entries import Entry
from xexport.report.pareto import front, points
from xexport.report.tables import Table
from xexport.report.view import Section
from xexport.sweep.store import Row

__all__ = ["entries_of", "sections", "summary"]

#: a report of more bundles leaves out each one's own part, which is in the bundle's own report
DETAILED = 12


def entries_of(rows: Sequence[Row]) -> list[tuple[Row, Entry]]:
    """Manifest and records of every cell that has them, also of those that were exported and not run."""
    found = []
    for row in rows:
        if row.manifest and row.status in ("done", "not run", "exported"):
            where = f"the store's row {row.id}"
            try:
                entry = Entry(decode_manifest(row.manifest, where), decode_records(row.records or b"", where))
            except BundleError as error:
                raise BundleError(
                    "a row of the store can't be read", got=f"{row.id}: {error.got}", fix="sweep it again"
                ) from error
            found.append((row, entry))
    return found


def summary(rows: Sequence[Row], store: Path, report: Path | None) -> dict[str, Any]:
    """Plain data.

    Keys: cells[{id, model, target, preset, status, error, figures, bundle, exported_on, machine, seconds,
    front}], counts{status: n}, machines[], front[ids], warnings[], store, report.
    """
    best = _front(rows)
    machines = sorted({r.machine for r in rows if r.machine and r.status == "done"})
    return {
        "cells": [_cell(row, row.id in best) for row in rows],
        "counts": dict(Counter(row.status for row in rows)),
        "machines": machines,
        "front": [row.id for row in rows if row.id in best],
        "warnings": _warnings(rows, machines),
        "store": str(store),
        "report": str(report) if report else None,
    }


def sections(rows: Sequence[Row]) -> list[Section]:
    """The table of all cells, the failed and those that were not run with the reason."""
    best = _front(rows)
    columns = (
        "Model", "Target", "Status", "Bits per byte", "Lost", "Step p50", "Prefill /s", "Weights",
        "Machine", "On the front", "Why",
    )  # fmt: skip
    table = Table(columns, [_table_row(row, row.id in best) for row in rows], (3, 4, 5, 6, 7))
    counts = Counter(row.status for row in rows)
    said = ", ".join(f"{count} {status}" for status, count in counts.items())
    machines = sorted({r.machine for r in rows if r.machine and r.status == "done"})
    notes = [f"{len(rows)} cells: {said}.", *(f"{w}." for w in _warnings(rows, machines))]
    return [Section("cells", "The grid", " ".join(notes), table)]


def _front(rows: Sequence[Row]) -> set[str]:
    """Cells that no other beats in both accuracy and speed."""
    found = entries_of(rows)
    timed = []
    for row, entry in found:
        timed += [(row.id, p) for p in points([entry]) if p.runner == "bundle"]
    best = {id(p) for p in front([p for _, p in timed])}
    return {key for key, p in timed if id(p) in best}


def _warnings(rows: Sequence[Row], machines: Sequence[str]) -> list[str]:
    found = []
    if len(machines) > 1:
        found.append(
            f"the times are of different machines ({', '.join(machines)}): the front compares every cell "
            "as it ran where it was measured"
        )
    for row in rows:
        figures = row.figures or {}
        fallen = sum(len(f["nodes"]) for f in figures.get("fallbacks") or ())
        if fallen and row.status == "done":
            found.append(f"{row.id}: {fallen} nodes fell back to another provider than the target's")
        if figures.get("not_timed"):
            found.append(f"{row.id} was validated and not timed: {figures['not_timed']}")
    return found


def _cell(row: Row, on_front: bool) -> dict[str, Any]:
    figures = {k: v for k, v in (row.figures or {}).items() if k != "fingerprint"}
    keys = ("id", "model", "target", "preset", "status", "error", "bundle", "exported_on", "machine")
    return {
        **{key: getattr(row, key) for key in keys},
        "seconds": row.seconds,
        "front": on_front,
        "figures": figures or None,
    }


def _table_row(row: Row, on_front: bool) -> tuple[str, ...]:
    figures = row.figures or {}
    latency = figures.get("latency") or {}
    step = (latency.get("step_ms") or {}).get("p50")
    lost = (figures.get("bits_lost") or {}).get("percent")
    nan = float("nan")

    def number(value: Any) -> float:
        return nan if value is None else float(value)

    return (
        Path(row.model).name,
        row.target,
        row.status,
        fmt.figure(number((figures.get("bits_per_byte") or {}).get("bundle")), 4),
        f"{lost:+.3f} %" if lost is not None else fmt.MISSING,
        fmt.ms(number(step)),
        fmt.count(number(latency.get("prefill_tokens_per_s"))),
        fmt.bytes_text((figures.get("bytes") or {}).get("weights")),
        row.machine or row.exported_on or fmt.MISSING,
        "yes" if on_front else "",
        _why(row),
    )


def _why(row: Row) -> str:
    error = row.error or {}
    return ": ".join(str(error[key]) for key in ("what", "got") if error.get(key))
