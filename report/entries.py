"""What a report is made of: a bundle's manifest and its records, looked up by kind and runner."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from xexport.core.manifest import Manifest, read_manifest
from xexport.core.records import Record
from xexport.core.results import RESULTS_NAME, read_records

__all__ = ["Entry", "all_of", "last_of", "read_entry"]

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
