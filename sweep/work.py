"""What a worker does for a cell: export it, or measure it. Both give plain data back.

An error that xexport raises on purpose is an outcome (a refusal is a result); any other exception goes to the
scheduler and is reported as a crash.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from xexport.core.errors import XexportError
from xexport.core.manifest import Manifest, decode_manifest, encode_manifest
from xexport.core.records import Record
from xexport.core.results import RESULTS_NAME, read_records
from xexport.sweep import machine, parcel
from xexport.sweep.plan import Cell

__all__ = ["Outcome", "error_fields", "export_cell", "measure_cell", "pack_bundle"]

_BUNDLES = "bundles"
_UNRUN = "not run by "


class Outcome(msgspec.Struct, frozen=True):
    """What came of one stage of a cell.

    Attributes:
        machine: host name.
        seconds: of work, without waiting for the machine.
        error: what, got, allowed, fix; None if it went well.
        bundle: where the bundle is, on that machine.
        fingerprint: of the bundle.
        manifest, records: manifest.json and results.jsonl as they are now.
        figures: what a table of the sweep shows.
        absent: the bundle is not on this machine, and did not come along.
    """

    machine: str
    seconds: float = 0.0
    error: dict[str, str | None] | None = None
    bundle: str = ""
    fingerprint: str = ""
    manifest: bytes = b""
    records: bytes = b""
    figures: dict[str, Any] = {}
    absent: bool = False


def export_cell(cell: Cell, out: str) -> Outcome:
    """Export into ``OUT/bundles/ID`` with accuracy measured and nothing timed; what is there is replaced."""
    from xexport import pipeline

    folder = Path(out) / _BUNDLES / cell.id

    def work() -> Outcome:
        bundle = pipeline.export(
            cell.model,
            target=cell.target,
            out=folder,
            preset=cell.preset,
            seed=cell.seed,
            eval_text=cell.eval_text,
            force=True,
            timed=False,
        )
        return Outcome(
            machine.host(), bundle=str(folder), fingerprint=bundle.fingerprint, **_contents(folder)
        )

    with machine.use(alone=False):
        return _timed(work)


def measure_cell(cell: Cell, bundle: str, fingerprint: str, data: bytes | None) -> Outcome:
    """Validate and profile a bundle with nothing else of a sweep on this machine.

    Args:
        cell: whose.
        bundle: where it was exported, also here if the disk is shared.
        fingerprint: which bundle must be there.
        data: its files, for a machine that does not have them.
    """
    if parcel.same_bundle(Path(bundle), fingerprint):
        with machine.use(alone=True):
            return _timed(lambda: _measured(cell, Path(bundle), kept=True))
    if data is None:
        return Outcome(machine.host(), absent=True)
    with tempfile.TemporaryDirectory(prefix="xexport-sweep-") as scratch, machine.use(alone=True):
        folder = Path(scratch) / cell.id
        return _timed(lambda: _measured(cell, parcel.unpack(data, folder), kept=False))


def pack_bundle(bundle: str) -> bytes | None:
    """The files of a bundle that lies on the worker which exported it; None if there are too many bytes."""
    return parcel.pack(bundle)


def error_fields(error: XexportError) -> dict[str, str | None]:
    """An error as the store keeps it."""
    parts = {"what": error.what, "got": error.got, "allowed": error.allowed, "fix": error.fix}
    return {key: None if value is None else str(value) for key, value in parts.items()}


def _measured(cell: Cell, folder: Path, *, kept: bool) -> Outcome:
    """Validation, then times; where times say nothing about the device, validation alone."""
    from xexport import pipeline
    from xexport.core.target import get_target
    from xexport.runtimes.environments import simulated

    found = pipeline.validate(folder, eval_text=cell.eval_text)
    if not found["ok"]:
        said = {"what": "the bundle is not valid here", "got": "; ".join(found["problems"])}
        return Outcome(machine.host(), error={**said, "allowed": None, "fix": None}, bundle=str(folder))
    reason = simulated(get_target(cell.target).environment)
    if not reason:
        prefill = cell.prefill or None
        pipeline.profile(folder, threads=cell.threads, steps=cell.steps, prefill=prefill)
    if kept:
        pipeline.report([folder], folder / "report.html")
    contents = _contents(folder)
    contents["figures"]["not_timed"] = reason or None
    return Outcome(machine.host(), bundle=str(folder), **contents)


def _contents(folder: Path) -> dict[str, Any]:
    """Manifest, records and figures of a bundle that was run: what said that it was not is left out."""
    manifest = decode_manifest((folder / "manifest.json").read_bytes())
    results = folder / RESULTS_NAME
    records = read_records(results)
    timed = any(getattr(r, "step_ns", ()) or getattr(r, "passes", ()) for r in records)
    if timed:
        said = tuple(w for w in manifest.warnings if not w.startswith(_UNRUN))
        manifest = msgspec.structs.replace(manifest, warnings=said)
    return {
        "manifest": encode_manifest(manifest),
        "records": results.read_bytes() if results.is_file() else b"",
        "figures": _figures(manifest, records),
    }


def _figures(manifest: Manifest, records: list[Record]) -> dict[str, Any]:
    """Accuracy, speed, sizes and placement: what a row of the store shows."""
    from xexport.report.jsonout import summary
    from xexport.report.profile import profile_summary

    whole = summary(manifest, records, "")
    placed = profile_summary(manifest, records, "") if records else {}
    kept = ("bytes", "bits_per_byte", "bits_lost", "kl", "same_top1", "chunk_error", "latency", "passes")
    return {
        **{key: whole[key] for key in kept if key in whole},
        "peak_rss": whole["peak_rss"],
        "placement": placed.get("placement", []),
        "fallbacks": placed.get("fallbacks", []),
        "warnings": whole["warnings"],
    }


def _timed(work: Callable[[], Outcome]) -> Outcome:
    """What the work gives, or the error that it raised, with the seconds it took."""
    began = time.perf_counter()
    try:
        outcome = work()
    except XexportError as error:
        outcome = Outcome(machine.host(), error=error_fields(error))
    return msgspec.structs.replace(outcome, seconds=time.perf_counter() - began)
