"""What the workers of a test's sweep do instead of exporting: quick, and able to die."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from xexport.sweep.plan import Cell
from xexport.sweep.work import Outcome

FIGURES = {"latency": {"step_ms": {"p50": 1.0}}, "bits_per_byte": {"bundle": 2.0}}


def _log(out: Path, line: str) -> None:
    with (out / "log.txt").open("a") as log:
        log.write(f"{line}\n")


def export(cell: Cell, out: str) -> Outcome:
    """A folder with the cell's name in it."""
    folder = Path(out) / "bundles" / cell.id
    folder.mkdir(parents=True, exist_ok=True)
    _log(Path(out), f"export {cell.id} {os.getpid()}")
    return Outcome("here", 0.1, bundle=str(folder), fingerprint=cell.id, figures=dict(FIGURES))


def measure(cell: Cell, bundle: str, fingerprint: str, data: bytes | None) -> Outcome:
    """Figures that are always the same."""
    assert Path(bundle).is_dir()
    assert (fingerprint, data) == (cell.id, None)
    _log(Path(bundle).parents[1], f"measure {cell.id} {os.getpid()}")
    return Outcome("here", 0.1, bundle=bundle, figures=dict(FIGURES))


def measure_slowly(cell: Cell, bundle: str, fingerprint: str, data: bytes | None) -> Outcome:
    """Long enough to be interrupted."""
    time.sleep(1)
    return measure(cell, bundle, fingerprint, data)


def measure_killed_once(cell: Cell, bundle: str, fingerprint: str, data: bytes | None) -> Outcome:
    """The first time that the cell for cpu-int8 is measured, the process is killed."""
    marker = Path(bundle) / "killed"
    if cell.target == "cpu-int8" and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(cell, bundle, fingerprint, data)


def measure_always_killed(cell: Cell, bundle: str, fingerprint: str, data: bytes | None) -> Outcome:
    """The cell for cpu-int8 kills every process that takes it."""
    if cell.target == "cpu-int8":
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(cell, bundle, fingerprint, data)


def measure_crashing(cell: Cell, bundle: str, fingerprint: str, data: bytes | None) -> Outcome:
    """An error that nobody expected."""
    raise ZeroDivisionError("by nothing")


def pack(bundle: str) -> bytes | None:
    """Never asked for: everything is on one disk."""
    raise AssertionError(bundle)
