"""``xexport sweep``: plan the grid, work on what is not finished, write one report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xexport.core.errors import InputError, OutputError
from xexport.core.extras import require
from xexport.core.progress import Progress, Silent
from xexport.sweep.plan import Cell, make_plan
from xexport.sweep.store import Store, open_store

__all__ = ["sweep"]


def sweep(
    models: Sequence[str],
    targets: Sequence[str],
    *,
    out: str | Path = "xexport-sweep",
    preset: str | None = None,
    seed: int = 0,
    eval_text: str | Path | None = None,
    steps: int | None = None,
    prefill: Sequence[int] = (),
    threads: int | None = None,
    scheduler: str | None = None,
    workers: int | None = None,
    retry: bool = False,
    report_path: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Export, validate and profile every model on every target, and write one report about all of them.

    What is finished is in the store in ``out`` and is not repeated: after an interruption the same call goes
    on where it was.

    Args:
        models: families, or paths of checkpoints.
        targets: names or patterns (``cpu-*``).
        out: the folder of the store, the bundles and the report.
        preset, seed: random weights of a size that every family has.
        eval_text: text to judge on instead of the built-in one.
        steps, prefill, threads: what is timed; as ``xexport profile`` by default.
        scheduler: address of a Dask scheduler; by default processes of this machine do the work.
        workers: how many of them; from cores and memory by default.
        retry: also try again what was refused.
        report_path: the report, ``OUT/report.html`` by default; the suffix picks the form.
        progress: told what is going on; silent by default.

    Returns:
        What ``--json`` prints (summary.py).

    Raises:
        MissingDependencyError: Dask is not installed (the extra ``sweep``).
        InputError, UnknownNameError, CheckpointError: something named is not there; nothing has begun then.
        OutputError: the folder, the store or the report can't be written, or another sweep is at work there.
        RuntimeFailure: no scheduler, or no worker.
    """
    from xexport.report.write import check_suffix

    progress = progress or Silent()
    folder = Path(out).absolute()
    written = Path(report_path) if report_path is not None else folder / "report.html"
    check_suffix(written)
    if workers is not None and (workers < 1 or scheduler is not None):
        raise InputError("bad --workers", got=workers, allowed="1 or more, without --scheduler")
    cells = make_plan(
        models,
        targets,
        preset=preset,
        seed=seed,
        eval_text=eval_text,
        steps=steps,
        prefill=prefill,
        threads=threads,
    )
    try:
        with open_store(folder) as store, _only_one(folder):
            store.plan(cells)
            _work(cells, store, folder, scheduler, workers, retry, progress)
            return _report(cells, store, written, progress)
    finally:
        progress.close()


def _work(
    cells: Sequence[Cell],
    store: Store,
    folder: Path,
    scheduler: str | None,
    workers: int | None,
    retry: bool,
    progress: Progress,
) -> None:
    """Drive the cells that are not finished; no cluster is started if there is none."""
    rows = {row.id: row for row in store.rows()}
    from xexport.sweep.drive import drive, stage_of

    if all(stage_of(rows[cell.id], retry=retry) is None for cell in cells):
        return
    require("distributed", extra="sweep", why="to sweep")
    from xexport.sweep.cluster import connect

    progress.stage("connect the workers" if scheduler else "start the workers")
    with connect(scheduler, workers) as client:
        drive(client, cells, store, folder, progress, retry=retry)


def _report(cells: Sequence[Cell], store: Store, written: Path, progress: Progress) -> dict[str, Any]:
    from xexport.report.write import write_report
    from xexport.sweep.summary import DETAILED, entries_of, sections, summary

    progress.stage("report")
    order = {cell.id: index for index, cell in enumerate(cells)}
    rows = sorted(store.rows(order), key=lambda row: order[row.id])
    entries = [entry for _, entry in entries_of(rows)]
    if entries:
        try:
            written.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError("the report can't be written", got=f"{written}: {error.strerror}") from error
        write_report(written, entries, sections=sections(rows), details=len(entries) <= DETAILED)
    return summary(rows, store.path, written if entries else None)


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Refuse a second sweep in the same folder; the system lets go of the lock when a sweep dies."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (folder / ".lock").open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(
                "another sweep is at work in this folder",
                got=folder,
                fix="wait for it, or name another --out",
            ) from error
        yield
