"""A sweep on several machines: `dask scheduler` and `xexport worker` are processes with an address.

What the worker does for a cell is a stand-in (sweep_work.py); docs/sweep.md says what was run for real.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sweep_work
from click.testing import CliRunner

from xexport.cli import cli
from xexport.core.errors import RuntimeFailure
from xexport.core.progress import Silent
from xexport.sweep.plan import make_plan
from xexport.sweep.store import open_store

pytest.importorskip("distributed", reason="dask[distributed] is not installed")
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@contextmanager
def running(log: Path, *words: str, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Python program; it and what it started are killed at the end. What it says is in ``log``."""
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *words],
            stdout=out,
            stderr=out,
            start_new_session=True,
            env={**os.environ, **variables},
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _address(told: Path) -> str:
    """Of the scheduler, once it is up."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        text = told.read_text() if told.is_file() else ""
        if text.rstrip().endswith("}"):
            return str(json.loads(text)["address"])
        time.sleep(0.05)
    raise AssertionError(told.with_suffix(".log").read_text())


def test_a_scheduler_and_a_worker_as_processes(tmp_path: Path, monkeypatch: Any) -> None:
    """No worker yet; one that is killed at a cell and starts again; a target that it can't run; the end."""
    from xexport.sweep.cluster import connect, worker_resources
    from xexport.sweep.drive import Work, drive

    monkeypatch.setattr("xexport.sweep.parcel.same_bundle", lambda folder, _: folder.is_dir())
    told, out, log = tmp_path / "scheduler.json", tmp_path / "grid", tmp_path / "worker.log"
    words = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(told)]
    # both must be able to import what they are sent: the scheduler reads the tasks too
    tests = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    with running(told.with_suffix(".log"), "dask", "scheduler", *words, **tests) as scheduler:
        address = _address(told)
        with monkeypatch.context() as patch:
            patch.setattr("xexport.sweep.cluster._PATIENCE", 1.0)
            command = ["sweep", "rwkv", "--preset", "tiny", "--targets", "cpu-fp32", "--json", "--quiet"]
            alone = CliRunner().invoke(cli, [*command, "--out", str(out), "--scheduler", address])
        error = json.loads(alone.stdout)["error"]
        assert (alone.exit_code, error["what"]) == (1, "no worker is connected to the scheduler")
        assert f"xexport worker {address}" in error["fix"]

        # no isolated environments: it can't run web-* targets
        variables = {"XEXPORT_ENVIRONMENTS": str(tmp_path), **tests}
        with running(log, "xexport.cli", "worker", address, **variables) as worker:
            monkeypatch.setattr("xexport.sweep.cluster._PATIENCE", 60.0)
            cells = make_plan(["rwkv"], ["cpu-fp32", "cpu-int8", "web-fp32"], preset="tiny")
            work = Work(sweep_work.export, sweep_work.measure_killed_once, sweep_work.pack)
            with open_store(out) as store:
                store.plan(cells)
                with connect(address, None) as client:
                    drive(client, cells, store, out, Silent(), work=work)
                    rows = {row.target: row for row in store.rows()}
                    assert {t: r.status for t, r in rows.items()} == {
                        "cpu-fp32": "done",
                        "cpu-int8": "done",
                        "web-fp32": "not run",
                    }
                    assert "no worker here can run web-* targets" in str(rows["web-fp32"].error)
                    assert (out / "bundles" / "rwkv-tiny-cpu-int8" / "killed").exists()
                    scheduler.kill()
                    with pytest.raises(RuntimeFailure, match="the scheduler is gone"):
                        _until_gone(client, worker_resources)
            assert worker.wait(60) == 0
    assert "xexport-cpu" in log.read_text()
    assert "xexport-web" not in log.read_text()


def _until_gone(client: Any, ask: Any) -> None:
    """Ask until the client has seen that the connection is closed."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        ask(client)
        time.sleep(0.05)
