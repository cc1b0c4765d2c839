"""The loop of a sweep: hand out cells, write down what came of them, lose none.

A cell is exported, then measured; each stage is a task with the resources that it needs. The task of a
worker that dies is given to another by Dask, a few times, and then once more with nothing beside it; one that
kills that worker too, or that no worker is left for, is reported in its row.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from xexport.core.errors import XexportError
from xexport.core.progress import Progress
from xexport.sweep import parcel
from xexport.sweep.cluster import worker_resources
from xexport.sweep.machine import EXPORT, PROFILE, machine_label, resource_of
from xexport.sweep.plan import Cell
from xexport.sweep.store import Row, Store
from xexport.sweep.work import Outcome, export_cell, measure_cell, pack_bundle

__all__ = ["GRACE", "Work", "drive", "stage_of"]

#: seconds that a worker which is gone has to come back before its cells are given to others, or up
GRACE = 60.0


class Work(NamedTuple):
    """The functions that workers run; they must be importable there."""

    export: Callable[[Cell, str], Outcome] = export_cell
    measure: Callable[[Cell, str, str, bytes | None], Outcome] = measure_cell
    pack: Callable[[str], bytes | None] = pack_bundle


class _Task(NamedTuple):
    cell: Cell
    stage: str
    needs: frozenset[str]


def stage_of(row: Row, *, retry: bool) -> str | None:
    """What a row still lacks: ``export``, ``measure``, or None if it is finished.

    A refusal is finished unless ``retry``; a crash, and a cell that no worker could run, are tried again.
    """
    if row.status == "done":
        return None
    if row.status == "failed" and not retry and (row.error or {}).get("kind") == "refused":
        return None
    there = row.bundle is not None and parcel.same_bundle(Path(row.bundle), _fingerprint(row))
    return "measure" if there else "export"


def drive(
    client: Any,
    cells: Sequence[Cell],
    store: Store,
    out: Path,
    progress: Progress,
    *,
    retry: bool = False,
    work: Work | None = None,
    grace: float = GRACE,
) -> None:
    """Work on every cell that is not finished until none is left.

    Args:
        client: of a cluster (cluster.py).
        cells: the grid; all of them are in the store.
        store: where every outcome is committed as it comes.
        out: the sweep's folder; bundles go into ``bundles`` in it.
        progress: one step a cell.
        retry: also what was refused before.
        work: what the workers run.
        grace: seconds to wait for a worker that is gone.

    Raises:
        RuntimeFailure: the scheduler is gone. Rows are as they were committed.
    """
    _Drive(client, store, out, progress, work or Work(), grace).run(cells, retry=retry)


class _Drive:
    def __init__(
        self, client: Any, store: Store, out: Path, progress: Progress, work: Work, grace: float
    ) -> None:
        self._client, self._store, self._out, self._progress = client, store, out, progress
        self._work, self._grace = work, grace
        self._pending: dict[Any, _Task] = {}
        self._gone: dict[Any, float] = {}  # task whose workers are gone -> since when
        #: address -> resources: now, and of those that may come back too
        self._workers = worker_resources(client)
        self._known = dict(self._workers)
        self._accused: list[tuple[Cell, str]] = []  # to be tried once more with nothing beside them
        self._alone: set[tuple[str, str]] = set()  # what was tried so, or is about to be
        self._tries: Counter[str] = Counter()
        self._finished = 0

    def run(self, cells: Sequence[Cell], *, retry: bool) -> None:
        stages = [(cell, stage_of(self._row(cell), retry=retry)) for cell in cells]
        todo = [(cell, stage) for cell, stage in stages if stage is not None]
        self._progress.stage(f"sweep {len(todo)} of {len(cells)} cells", total=len(todo) or None)
        self._total = len(todo)
        try:
            with self._client.as_current():
                for cell, stage in todo:
                    self._submit(cell, stage)
                while self._pending or self._accused:
                    if not self._pending:
                        self._submit(*self._accused.pop(0))
                    for future in self._wait():
                        self._take(future)
                    self._look_for_the_gone()
        finally:
            for future in self._pending:
                future.cancel()

    def _row(self, cell: Cell) -> Row:
        row = self._store.get(cell.id)
        assert row is not None, cell.id
        return row

    def _submit(self, cell: Cell, stage: str) -> None:
        """Give a stage to the workers that can do it, or write down that there is none."""
        needs = self._export_needs(cell) if stage == "export" else self._measure_needs(cell)
        if needs is None:
            self._no_worker(cell, stage)
            return
        self._tries[cell.id] += 1
        options = {
            "key": f"{stage}-{cell.id}-{self._tries[cell.id]}-{time.time_ns():x}",
            "resources": dict.fromkeys(needs, 1),
            "priority": 10 if stage == "measure" else 0,
            "pure": False,
        }
        if stage == "export":
            future = self._client.submit(self._work.export, cell, str(self._out), **options)
        else:
            row = self._row(cell)
            future = self._client.submit(
                self._work.measure, cell, row.bundle, _fingerprint(row), self._parcel(row), **options
            )
        self._pending[future] = _Task(cell, stage, needs)

    def _export_needs(self, cell: Cell) -> frozenset[str] | None:
        """A worker that can export, and if there is such a one, that can also run the target."""
        own = frozenset({EXPORT, resource_of(cell.group)})
        return next((n for n in (own, frozenset({EXPORT})) if self._able(n)), None)

    def _measure_needs(self, cell: Cell) -> frozenset[str] | None:
        """A worker that runs the target and may time it, of the kind of machine of which there are most."""
        needs = frozenset({PROFILE, resource_of(cell.group)})
        able = self._able(needs)
        if not able:
            return None
        labels = Counter(machine_label(self._known[address]) for address in able)
        label = max(sorted(labels), key=lambda name: labels[name])
        return needs | ({label} if label else set())

    def _able(self, needs: frozenset[str]) -> list[str]:
        """Workers that have what is needed; one that has just died counts, since it may be started again."""
        return [a for a, has in self._known.items() if _has(has, needs)]

    def _parcel(self, row: Row) -> Any:
        """The bundle's files for workers on other disks; None if all of them are on this machine."""
        hosts = {address.rpartition(":")[0] for address in self._workers}
        if len(hosts) < 2 and all("127.0.0.1" in h or "inproc" in h for h in hosts):
            return None
        folder = Path(row.bundle or "")
        data = parcel.pack(folder) if (folder / "manifest.json").is_file() else None
        return None if data is None else self._client.scatter(data, hash=False)

    def _wait(self) -> list[Any]:
        """Futures that are over, after a second at most."""
        from distributed import CancelledError, wait

        try:
            wait(list(self._pending), timeout=1.0, return_when="FIRST_COMPLETED")
        except TimeoutError:
            return []
        except CancelledError:
            worker_resources(self._client)  # says so if the scheduler is gone: nothing is tried again then
        return [f for f in self._pending if f.status != "pending"]

    def _take(self, future: Any) -> None:
        """Write down what came of a task, and go on with its cell."""
        task = self._pending.pop(future)
        self._gone.pop(future, None)
        outcome, crash = _outcome(future)
        if outcome is None and crash.pop("died", False) and (task.cell.id, task.stage) not in self._alone:
            # a dead worker is blamed on every cell that it had: alone it shows which one it was
            self._alone.add((task.cell.id, task.stage))
            self._accused.append((task.cell, task.stage))
            return
        if outcome is None:
            self._failed(task.cell, {**crash, "kind": "crashed", "stage": task.stage})
            return
        self._store.began(task.cell.id, task.stage, outcome.seconds)
        if outcome.error is not None:
            self._failed(
                task.cell, {**outcome.error, "kind": "refused", "stage": task.stage}, outcome.machine
            )
        elif task.stage == "export":
            self._exported(task.cell, outcome, future)
        else:
            self._measured(task.cell, outcome)

    def _exported(self, cell: Cell, outcome: Outcome, future: Any) -> None:
        bundle = self._fetched(cell, outcome, future)
        self._store.update(
            cell.id,
            status="exported",
            error=None,
            bundle=bundle,
            exported_on=outcome.machine,
            figures={**outcome.figures, "fingerprint": outcome.fingerprint},
            manifest=outcome.manifest,
            records=outcome.records,
        )
        self._progress.note(f"{cell.id}: exported in {outcome.seconds:.0f} s")
        self._submit(cell, "measure")

    def _fetched(self, cell: Cell, outcome: Outcome, future: Any) -> str:
        """Where the bundle is: here, brought here, or if it is too large, where it was exported."""
        here = self._out / "bundles" / cell.id
        if parcel.same_bundle(Path(outcome.bundle), outcome.fingerprint):
            return outcome.bundle
        homes = self._client.who_has([future]).get(future.key, ())
        try:
            data = self._client.submit(
                self._work.pack, outcome.bundle, workers=list(homes), pure=False
            ).result(timeout=600)
            return outcome.bundle if data is None else str(parcel.unpack(data, here))
        except (XexportError, OSError, TimeoutError, RuntimeError) as error:
            self._progress.note(f"{cell.id}: the bundle stays on {outcome.machine}: {error}")
            return outcome.bundle

    def _measured(self, cell: Cell, outcome: Outcome) -> None:
        row = self._row(cell)
        if outcome.absent:
            self._failed(
                cell,
                {
                    "what": "the machine that can run it does not have the bundle",
                    "got": f"{row.bundle} of {row.exported_on} is not on {outcome.machine}",
                    "fix": "put --out on a disk that all machines share: the bundle is too large to be sent",
                    "kind": "crashed",
                    "stage": "measure",
                },
                outcome.machine,
            )
            return
        self._store.update(
            cell.id,
            status="done",
            error=None,
            machine=outcome.machine,
            figures={**outcome.figures, "fingerprint": _fingerprint(row)},
            manifest=outcome.manifest,
            records=outcome.records,
        )
        self._keep_records(row, outcome)
        self._finish(cell, "done", _brief(outcome.figures))

    def _keep_records(self, row: Row, outcome: Outcome) -> None:
        """What was measured on another disk goes into this one's bundle too."""
        folder = Path(row.bundle or "")
        if outcome.bundle != row.bundle and parcel.same_bundle(folder, _fingerprint(row)):
            (folder / "results.jsonl").write_bytes(outcome.records)

    def _failed(self, cell: Cell, error: dict[str, Any], machine: str | None = None) -> None:
        self._store.update(cell.id, status="failed", error=error, machine=machine)
        self._finish(cell, "failed", str(error.get("what")))

    def _no_worker(self, cell: Cell, stage: str) -> None:
        able = f"no worker here can run {cell.group}-* targets"
        what = f"not run: {able}" if stage == "measure" else "not exported: no worker here can export"
        fix = f"`xexport worker` on a machine that can ({resource_of(cell.group)}), and run the sweep again"
        if stage == "export":
            fix = "connect a machine with pip install 'xexport[export]', and run the sweep again"
        self._store.update(cell.id, status="not run", error={"what": what, "fix": fix, "kind": "no worker"})
        self._finish(cell, "not run", what)

    def _finish(self, cell: Cell, status: str, said: str) -> None:
        self._finished += 1
        self._progress.advance()
        self._progress.note(f"[{self._finished}/{self._total}] {cell.id}: {status}, {said}")

    def _look_for_the_gone(self) -> None:
        """Take back tasks whose workers have all been gone for a while: to others, or into the row."""
        self._workers = worker_resources(self._client)
        self._known |= self._workers
        now = time.monotonic()
        for future, task in list(self._pending.items()):
            if any(_has(has, task.needs) for has in self._workers.values()):
                self._gone.pop(future, None)
            elif now - self._gone.setdefault(future, now) > self._grace:
                del self._pending[future], self._gone[future]
                future.cancel()
                self._known = dict(self._workers)
                self._submit(task.cell, task.stage)


def _outcome(future: Any) -> tuple[Outcome | None, dict[str, Any]]:
    """The result of a task; or None and what killed it."""
    if future.status == "finished":
        try:
            found: Outcome = future.result()
        except Exception as error:  # the worker died between the end of the task and the transfer
            return None, {"what": "the result was lost with its worker", "got": str(error), "died": True}
        return found, {}
    if future.status != "error":
        # what it was sent is lost with the worker that kept it, or a worker was told to leave
        return None, {"what": "the scheduler gave the task up", "got": future.status, "died": True}
    raised = future.exception()
    if type(raised).__name__ == "KilledWorker":
        return None, {
            "died": True,
            "what": "every worker that took this cell died",
            "got": str(raised).split(". ", 1)[0],
            "fix": "too little memory, or a fault in the runtime: try the cell alone with `xexport`",
        }
    if "deserializ" in str(raised) and isinstance(raised, RuntimeError):
        return None, {
            "what": "the scheduler, or a worker, can't read what this machine sent",
            "got": str(raised).split(". ", 1)[0],
            "fix": "install the same versions of xexport, Python and Dask there and beside the scheduler",
        }
    return None, {"what": "the cell crashed", "got": f"{type(raised).__name__}: {raised}"}


def _has(resources: Mapping[str, float], needs: frozenset[str]) -> bool:
    return all(resources.get(name, 0) >= 1 for name in needs)


def _fingerprint(row: Row) -> str:
    return str((row.figures or {}).get("fingerprint", ""))


def _brief(figures: dict[str, Any]) -> str:
    """Step time and bits per byte in a few words."""
    step = ((figures.get("latency") or {}).get("step_ms") or {}).get("p50")
    bits = (figures.get("bits_per_byte") or {}).get("bundle")
    said = [f"{step:.3g} ms a step"] if step else []
    said += [f"{bits:.4g} bits per byte"] if bits else []
    return ", ".join(said) or "validated"
