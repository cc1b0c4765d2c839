"""results.jsonl: measurement rows, one JSON object a line, only ever appended to."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from xexport.core.errors import BundleError, OutputError
from xexport.core.records import Record

__all__ = ["RESULTS_NAME", "append_records", "decode_records", "read_records"]

RESULTS_NAME = "results.jsonl"


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Add rows to a file (made if it is not there), all in one write.

    What a killed writer left unfinished at the end of the file is cut off first.

    Raises:
        OutputError: the file can't be written.
    """
    data = b"".join(msgspec.json.encode(record) + b"\n" for record in records)
    try:
        if path.is_file():
            _cut_unfinished(path)
        # One write of whole lines in append mode: a reader sees all rows or an unfinished last line.
        with path.open("ab", buffering=0) as handle:
            handle.write(data)
            os.fsync(handle.fileno())
    except OSError as error:
        raise OutputError("the results can't be written", got=f"{path}: {error}") from error


def read_records(path: Path) -> list[Record]:
    """The rows of a file in the order written; a missing file has none.

    A last line without its newline is what a killed writer left: it is passed over. Any other line
    that can't be read is an error.

    Raises:
        BundleError: a line is not one of the known rows.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise BundleError("the results can't be read", got=f"{path}: {error}") from error
    return decode_records(data, path.name)


def decode_records(data: bytes, where: str = RESULTS_NAME) -> list[Record]:
    """The rows in the bytes of a results.jsonl; see :func:`read_records`.

    Raises:
        BundleError: a line is not one of the known rows.
    """
    *lines, _unfinished = data.split(b"\n")
    decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(decoder.decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BundleError(
                "a row of the results can't be read",
                got=f"{where}, line {number}: {error}",
                fix="upgrade xexport if a newer version wrote it, or delete the file and validate again",
            ) from error
    return records


def _cut_unfinished(path: Path) -> None:
    """Truncate after the last newline, so that the next row begins a line of its own."""
    with path.open("r+b") as handle:
        data = handle.read()
        end = data.rfind(b"\n") + 1
        if end != len(data):
            handle.truncate(end)
