"""Sweeps: the grid, the store, killed workers and killed sweeps, workers that can't, the report."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sweep_work
from click.testing import CliRunner

from xexport.cli import cli
from xexport.core.errors import BundleError, CheckpointError, InputError, OutputError, UnknownNameError
from xexport.core.progress import Silent
from xexport.sweep import parcel
from xexport.sweep.machine import EXPORT, PROFILE, announcement, machine_label, use
from xexport.sweep.plan import Cell, make_plan, match_targets
from xexport.sweep.run import sweep
from xexport.sweep.store import STORE_NAME, Row, Store, open_store
from xexport.sweep.work import error_fields, measure_cell

pytest.importorskip("distributed", reason="dask[distributed] is not installed")
# what distributed leaves behind when its processes are killed is not ours to close
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)

ToyMaker = Callable[..., Path]


def plan(*targets: str, models: tuple[str, ...] = ("rwkv",)) -> list[Cell]:
    return make_plan(models, targets or ("cpu-fp32", "cpu-int8"), preset="tiny")


def statuses(store: Store) -> dict[str, str]:
    return {row.id: row.status for row in store.rows()}


# --- the grid


def test_patterns_name_targets_once_and_in_order() -> None:
    found = match_targets(["cpu-int8", "cpu-*", " "])
    assert found == ["cpu-int8", "cpu-fp16", "cpu-fp32", "cpu-int4", "cpu-qdq-int8"]


@pytest.mark.parametrize(
    ("models", "targets", "error", "message"),
    [
        (["rvkw"], ["cpu-*"], UnknownNameError, "unknown model 'rvkw'"),
        (["rwkv"], ["gpu-*"], UnknownNameError, "unknown target 'gpu-\\*'"),
        (["rwkv"], [""], InputError, "at least one target"),
        ([], ["cpu-*"], InputError, "at least one model"),
        (["./no.pth"], ["cpu-*"], CheckpointError, "does not exist"),
    ],
)
def test_what_is_not_there_is_refused_first(
    models: list[str], targets: list[str], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        sweep(models, targets, out=tmp_path / "s", preset="tiny")
    assert not (tmp_path / "s").exists()


def test_two_checkpoints_of_one_name_and_one_without_weights(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.pth").touch()
    paths = [str(tmp_path / f / "x.pth") for f in "ab"]
    with pytest.raises(InputError, match="same name"):
        make_plan(paths, ["cpu-fp32"])
    with pytest.raises(InputError, match="--preset is for families"):
        make_plan(paths[:1], ["cpu-fp32"], preset="tiny")
    (cell,) = make_plan(paths[:1], ["cpu-fp32"])
    assert cell.id == "x-cpu-fp32"
    (tmp_path / "a" / "x.pth").write_bytes(b"other weights")
    assert make_plan(paths[:1], ["cpu-fp32"])[0].digest != cell.digest


def test_a_cell_says_all_that_its_figures_depend_on() -> None:
    first, second = plan()
    assert (first.id, first.group) == ("rwkv-tiny-cpu-fp32", "cpu")
    assert first.digest != second.digest
    assert make_plan(["rwkv"], ["cpu-fp32"], preset="tiny", steps=7)[0].digest != first.digest


# --- the store


def test_a_row_survives_and_a_changed_cell_begins_anew(tmp_path: Path) -> None:
    cells = plan()
    with open_store(tmp_path) as store:
        store.plan(cells)
        store.update(cells[0].id, status="done", figures={"x": 1}, records=b"\x00")
        store.began(cells[0].id, "export", 1.5)
    with open_store(tmp_path) as store:
        store.plan(cells)
        row = store.get(cells[0].id)
        assert isinstance(row, Row)
        assert (row.status, row.figures, row.records, row.exports, row.seconds) == (
            "done",
            {"x": 1},
            b"\x00",
            1,
            1.5,
        )
        store.plan(make_plan(["rwkv"], ["cpu-fp32"], preset="tiny", steps=7))
        row = store.get(cells[0].id)
        assert row is not None
        assert (row.status, row.figures) == ("planned", None)


def test_the_store_can_be_read_while_a_sweep_writes(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.plan(plan())
        other = sqlite3.connect(tmp_path / STORE_NAME)
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert other.execute("SELECT count(*) FROM cells WHERE status = 'planned'").fetchone() == (2,)
        other.close()


def test_a_bad_store_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OutputError, match="folder can't be made"):
        open_store(file)
    corrupt = tmp_path / "corrupt"
    corrupt.mkdir()
    (corrupt / STORE_NAME).write_bytes(b"this is no database, whatever its name says" * 99)
    with pytest.raises(OutputError, match="can't be read") as caught:
        open_store(corrupt)
    assert "move it away" in str(caught.value.fix)
    with open_store(tmp_path / "newer") as store:
        store._connection.execute("PRAGMA user_version = 9")
    with pytest.raises(OutputError, match="another version"):
        open_store(tmp_path / "newer")


def test_bad_places_are_said_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    command = ["sweep", "rwkv", "--preset", "tiny", "--targets", "cpu-fp32", "--json", "--quiet", "--out"]
    result = CliRunner().invoke(cli, [*command, str(file)])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["what"] == "the sweep's folder can't be made"
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "busy").mkdir()
    with (tmp_path / "busy" / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = CliRunner().invoke(cli, [*command, str(tmp_path / "busy")])
    assert json.loads(result.stdout)["error"]["what"] == "another sweep is at work in this folder"


# --- machines


def test_a_worker_announces_what_doctor_finds() -> None:
    found = announcement()
    assert {EXPORT, PROFILE, "xexport-cpu"} <= set(found)
    assert machine_label(found)
    assert set(announcement(profile=False)) == {EXPORT}


def test_exports_share_a_machine_and_a_profile_has_it_alone(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("fcntl")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    log: list[str] = []

    def profile() -> None:
        with use(alone=True):
            log.append("profile")

    def export() -> None:
        with use(alone=False):
            log.append("late export")

    with use(alone=False), use(alone=False):
        first = threading.Thread(target=profile)
        first.start()
        time.sleep(0.2)
        second = threading.Thread(target=export)  # comes after the profile: the gate is closed
        second.start()
        time.sleep(0.2)
        log.append("exports")
    first.join(10)
    second.join(10)
    assert log == ["exports", "profile", "late export"]


def test_a_bundle_travels_whole_or_not_at_all(toy_bundle: Path, tmp_path: Path) -> None:
    from xexport.runtimes.bundle import load

    data = parcel.pack(toy_bundle)
    assert data is not None
    there = parcel.unpack(data, tmp_path / "there")
    assert parcel.same_bundle(there, load(toy_bundle).fingerprint)
    assert not parcel.same_bundle(there, "another")
    with pytest.raises(BundleError, match="whole"):
        parcel.unpack(data[:100], tmp_path / "half")
    import io
    import zipfile

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("../escaped", "x")
    with pytest.raises(BundleError, match="leaves"):
        parcel.unpack(out.getvalue(), tmp_path / "bad")
    assert not (tmp_path / "escaped").exists()


def test_a_bundle_that_came_along_is_measured_and_one_that_did_not_is_said(toy_bundle: Path) -> None:
    from xexport.runtimes.bundle import load

    cell = Cell("toy", "cpu-fp32", steps=4, prefill=(8,), threads=1)
    fingerprint = load(toy_bundle).fingerprint
    assert measure_cell(cell, "/no/such/place", fingerprint, None).absent
    done = measure_cell(cell, "/no/such/place", fingerprint, parcel.pack(toy_bundle))
    assert done.error is None
    assert done.figures["latency"]["step_ms"]["p50"] > 0
    assert done.figures["placement"][0]["provider"] == "CPUExecutionProvider"
    assert not (toy_bundle / "results.jsonl").exists()
    assert b"latency" in done.records
    (toy_bundle / "model.onnx.data").write_bytes(b"")
    refused = measure_cell(cell, str(toy_bundle), fingerprint, None)
    assert refused.absent or refused.error


# --- workers


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Two processes that can export, and measure what is for cpu-* targets."""
    from xexport.sweep.cluster import embedded

    can = {EXPORT: 1.0, PROFILE: 1.0, "xexport-cpu": 1.0}
    with embedded([can, can]) as client:
        yield client


def run(
    client: Any, out: Path, cells: list[Cell], measure: Any = sweep_work.measure, **options: Any
) -> Store:
    from xexport.sweep.drive import Work, drive

    store = open_store(out)
    store.plan(cells)
    drive(
        client, cells, store, out, Silent(), work=Work(sweep_work.export, measure, sweep_work.pack), **options
    )
    return store


def test_a_killed_workers_cell_is_done_by_another_and_a_deadly_one_is_reported(
    cluster: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """One cluster for all, since starting it is what takes time."""
    monkeypatch.setattr("xexport.sweep.parcel.same_bundle", lambda folder, _: folder.is_dir())
    cells = plan("cpu-fp32", "cpu-int8", "openvino-fp32")
    with run(cluster, tmp_path / "once", cells, sweep_work.measure_killed_once) as store:
        assert statuses(store) == {
            "rwkv-tiny-cpu-fp32": "done",
            "rwkv-tiny-cpu-int8": "done",
            "rwkv-tiny-openvino-fp32": "not run",
        }
        row = store.get("rwkv-tiny-openvino-fp32")
        assert row is not None
        assert row.error is not None
        assert "no worker here can run openvino-* targets" in row.error["what"]
        assert (tmp_path / "once" / "bundles" / "rwkv-tiny-cpu-int8" / "killed").exists()
        before = (tmp_path / "once" / "log.txt").read_text()
    with run(cluster, tmp_path / "once", cells) as store:  # again: nothing is repeated
        assert (tmp_path / "once" / "log.txt").read_text() == before
    with run(cluster, tmp_path / "deadly", cells[:2], sweep_work.measure_always_killed) as store:
        assert statuses(store) == {"rwkv-tiny-cpu-fp32": "done", "rwkv-tiny-cpu-int8": "failed"}
        row = store.get("rwkv-tiny-cpu-int8")
        assert row is not None
        assert row.error is not None
        assert row.error["kind"] == "crashed"
        assert "died" in row.error["what"]
    cluster.wait_for_workers(2, timeout=60)
    with run(cluster, tmp_path / "deadly", cells[:2]) as store:  # a crash is worth another try, no new export
        assert set(statuses(store).values()) == {"done"}
        row = store.get("rwkv-tiny-cpu-int8")
        assert row is not None
        assert row.exports == 1
    with monkeypatch.context() as patch:
        _give_up_the_first_measurement(patch)
        with run(cluster, tmp_path / "given up", cells[:1]) as store:
            assert set(statuses(store).values()) == {"done"}
    with run(cluster, tmp_path / "crash", cells[:1], sweep_work.measure_crashing) as store:
        row = store.get("rwkv-tiny-cpu-fp32")
        assert row is not None
        assert row.error is not None
        assert row.error["got"] == "ZeroDivisionError: by nothing"


def _give_up_the_first_measurement(patch: pytest.MonkeyPatch) -> None:
    """The scheduler cancels it, as it does when a bundle that was sent is lost with a worker."""
    from xexport.sweep import drive as module

    real, given_up = module._Drive._submit, []

    def submit(self: Any, cell: Cell, stage: str) -> None:
        real(self, cell, stage)
        if stage == "measure" and not given_up:
            given_up.append(cell.id)
            list(self._pending)[-1].cancel()

    patch.setattr(module._Drive, "_submit", submit)


def test_cells_of_a_machine_that_went_away_are_reported(tmp_path: Path, monkeypatch: Any) -> None:
    from xexport.sweep.cluster import embedded

    monkeypatch.setattr("xexport.sweep.parcel.same_bundle", lambda folder, _: folder.is_dir())
    with embedded([{EXPORT: 1.0}, {PROFILE: 1.0, "xexport-cpu": 1.0}]) as client:
        from xexport.sweep import drive as module

        real = module._Drive._submit

        def submit(self: Any, cell: Cell, stage: str) -> None:
            if stage == "measure" and len(client.cluster.worker_spec) == 2:
                client.cluster.scale(1)  # before its cell arrives: nobody is left for it
                end = time.monotonic() + 30
                while len(client.scheduler_info(n_workers=-1)["workers"]) == 2 and time.monotonic() < end:
                    time.sleep(0.1)
            real(self, cell, stage)

        monkeypatch.setattr(module._Drive, "_submit", submit)
        with run(client, tmp_path, plan("cpu-fp32"), grace=0.5) as store:
            assert statuses(store) == {"rwkv-tiny-cpu-fp32": "not run"}


# --- the whole


def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    """The process is killed after its first cell; the second one does the rest and nothing again."""
    command = [sys.executable, str(Path(__file__).with_name("sweep_killed.py")), str(tmp_path)]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        finished = _wait_for_one(tmp_path / STORE_NAME, first)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert second.returncode == 0, second.stderr
    with open_store(tmp_path) as store:
        rows = {row.id: row for row in store.rows()}
    assert len(rows) == 4
    assert {row.status for row in rows.values()} == {"done"}
    assert {key: rows[key].updated for key in finished} == finished
    assert all(rows[key].measurements == 1 for key in finished)
    assert f"[1/{4 - len(finished)}]" in second.stderr


def _wait_for_one(path: Path, process: subprocess.Popen[bytes]) -> dict[str, str]:
    """Cells that are done, as soon as there is one: id -> when it was written."""
    end = time.monotonic() + 200
    while time.monotonic() < end and process.poll() is None:
        if path.is_file():
            reader = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
            try:
                rows = reader.execute("SELECT id, updated FROM cells WHERE status = 'done'").fetchall()
            except sqlite3.OperationalError:  # the table is not there yet
                rows = []
            finally:
                reader.close()
            if rows:
                return dict(rows)
        time.sleep(0.1)
    raise AssertionError(f"no cell was finished; the sweep ended with {process.poll()}")


def test_an_error_is_kept_in_its_parts() -> None:
    found = error_fields(InputError("bad", got=3, fix="mend it"))
    assert found == {"what": "bad", "got": "3", "allowed": None, "fix": "mend it"}


def test_a_scheduler_that_is_not_there(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("xexport.sweep.cluster._PATIENCE", 1.0)
    monkeypatch.setattr("xexport.sweep.worker._PATIENCE", 1.0)
    command = ["sweep", "rwkv", "--preset", "tiny", "--targets", "cpu-fp32", "--json", "--quiet"]
    result = CliRunner().invoke(cli, [*command, "--out", str(tmp_path), "--scheduler", "tcp://127.0.0.1:9"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["what"] == "the scheduler can't be reached"
    result = CliRunner().invoke(cli, ["worker", "tcp://127.0.0.1:9", "--quiet"])
    assert result.exit_code == 1
    assert "can't be reached" in result.stderr
    assert os.environ.get("HOME") is not None
