"""What a report is made of: a bundle's manifest and its records, looked up by kind and runner."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from xexport.core.manifest import Manifest, read_manifest
from xexport.core.records import Fidelity, Latency, OpTimes, Record
from xexport.core.results import RESULTS_NAME, read_records

__all__ = [
    "Entry",
    "all_of",
    "compared_latency",
    "fidelity_of",
    "last_of",
    "latency_of",
    "op_times_of",
    "read_entry",
    "same_machine",
]

R = TypeVar("R", bound=msgspec.Struct)


class Entry(NamedTuple):
    """One bundle of a report; any ``(manifest, records)`` pair will do in its place."""

    manifest: Manifest
    records: Sequence[Record]


def read_entry(folder: Path) -> Entry:
    """The manifest and the records of a bundle folder.

    Raises:
        BundleError: either can't be read.
    """
    return Entry(read_manifest(folder), read_records(folder / RESULTS_NAME))


def all_of(records: Sequence[Record], kind: type[R], runner: str | None = None) -> list[R]:
    """Records of one kind, of one runner if named, in the order written."""
    found: list[R] = [r for r in records if isinstance(r, kind)]
    if runner is None:
        return found
    return [r for r in found if getattr(r, "setup").runner == runner]  # noqa: B009


def last_of(records: Sequence[Record], kind: type[R], runner: str = "bundle") -> R | None:
    """The newest record of one kind for one runner."""
    found = all_of(records, kind, runner)
    return found[-1] if found else None


def fidelity_of(records: Sequence[Record], runner: str = "bundle") -> Fidelity | None:
    """The newest comparison with a reference that really ran.

    A later check against logits that travel with the bundle covers a short text only, and counts
    where there is nothing else.
    """
    found = all_of(records, Fidelity, runner)
    live = [r for r in found if "recorded" not in r.reference]
    chosen = live or found
    return chosen[-1] if chosen else None


def latency_of(records: Sequence[Record]) -> Latency | None:
    """The newest times of the bundle itself."""
    found = [r for r in all_of(records, Latency, "bundle") if r.step_ns]
    return found[-1] if found else None


def compared_latency(records: Sequence[Record]) -> dict[str, Latency]:
    """Times that may be compared: runner -> row, all from one run on one machine.

    The newest run that timed the bundle beside others, if that was on the machine of the bundle's
    newest times; else those alone. A bundle profiled again later, or elsewhere, is not set beside
    what was timed before.
    """
    newest = latency_of(records)
    if newest is None:
        return {}
    runs: dict[str, dict[str, Latency]] = {}
    for row in all_of(records, Latency):
        if row.step_ns and same_machine(row, newest):
            runs.setdefault(row.setup.date, {})[row.setup.runner] = row
    beside = [run for run in runs.values() if "bundle" in run and len(run) > 1]
    return beside[-1] if beside else {"bundle": newest}


def op_times_of(records: Sequence[Record], form: str) -> OpTimes | None:
    """The newest profile of one form (``step`` or ``prefill``)."""
    found = [r for r in all_of(records, OpTimes, "bundle") if r.form == form]
    return found[-1] if found else None


def same_machine(first: Record, second: Record) -> bool:
    """Whether two rows were measured on the same processor with the same number of threads."""
    a, b = first.setup.environment, second.setup.environment
    return (a.cpu, a.threads) == (b.cpu, b.threads)
