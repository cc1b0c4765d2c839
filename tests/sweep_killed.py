"""A sweep of stand-in cells in a process of its own, for a test to kill: ``python sweep_killed.py OUT``."""

from __future__ import annotations

import sys
from pathlib import Path

import sweep_work

from xexport.core.progress import PlainProgress
from xexport.sweep import parcel
from xexport.sweep.cluster import embedded
from xexport.sweep.drive import Work, drive
from xexport.sweep.machine import EXPORT, PROFILE
from xexport.sweep.plan import make_plan
from xexport.sweep.store import open_store


def main() -> None:
    """Two models on two targets; every measurement takes a second."""
    out = Path(sys.argv[1])
    parcel.same_bundle = lambda folder, _fingerprint: folder.is_dir()
    cells = make_plan(["rwkv", "retnet"], ["cpu-fp32", "cpu-int8"], preset="tiny")
    work = Work(sweep_work.export, sweep_work.measure_slowly, sweep_work.pack)
    with open_store(out) as store, embedded([{EXPORT: 1.0, PROFILE: 1.0, "xexport-cpu": 1.0}]) as client:
        store.plan(cells)
        drive(client, cells, store, out, PlainProgress(), work=work)


if __name__ == "__main__":
    main()
