"""A sweep as people run it on several machines: `dask scheduler`, `xexport worker`, `xexport sweep`.

The scheduler and the worker are processes of their own, known by an address alone; cells are real exports.
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
from click.testing import CliRunner

from xexport.cli import cli

pytest.importorskip("distributed", reason="dask[distributed] is not installed")
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@contextmanager
def running(*words: str, log: Path, **variables: str) -> Iterator[None]:
    """A program and what it starts; all of it is killed at the end, its words are in ``log``."""
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *words],
            stdout=out,
            stderr=out,
            start_new_session=True,
            env={**os.environ, **variables},
        )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[str]:
    """The address of a scheduler on this machine, at a port that is free."""
    told = tmp_path / "scheduler.json"
    words = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(told)]
    with running("-m", "dask", "scheduler", *words, log=tmp_path / "scheduler.log"):
        yield json.loads(_written(told))["address"]


def _written(path: Path) -> str:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        text = path.read_text() if path.is_file() else ""
        if text.endswith("}"):
            return text
        time.sleep(0.05)
    raise AssertionError(path.with_suffix(".log").read_text())


def test_a_grid_on_a_worker_that_can_run_one_of_two_groups(
    scheduler: str, tmp_path: Path, exporter: Any, monkeypatch: Any
) -> None:
    """Four cells are measured for real; of the fifth it is said that no worker can run it."""
    out, options = tmp_path / "grid", ["--preset", "tiny", "--eval-text", str(exporter.ids), "--steps", "5"]
    options += ["--prefill", "16", "--threads", "1", "--scheduler", scheduler, "--out", str(out), "--json"]
    monkeypatch.setattr("xexport.sweep.cluster._PATIENCE", 0.2)
    alone = CliRunner().invoke(cli, ["sweep", "rwkv", "--targets", "cpu-fp32", "--quiet", *options])
    error = json.loads(alone.stdout)["error"]
    assert (alone.exit_code, error["what"]) == (1, "no worker is connected to the scheduler")
    assert f"xexport worker {scheduler}" in error["fix"]

    log = tmp_path / "worker.log"
    with running("-m", "xexport.cli", "worker", scheduler, log=log, XEXPORT_ENVIRONMENTS=str(tmp_path)):
        monkeypatch.setattr("xexport.sweep.cluster._PATIENCE", 60.0)
        command = ["sweep", "rwkv", "mamba", "--targets", "cpu-fp32,cpu-int8"]
        done = CliRunner().invoke(cli, [*command, *options])
    assert "xexport-cpu" in log.read_text()
    assert "xexport-web" not in log.read_text()
    assert done.exit_code == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["counts"] == {"done": 4}
    assert "[4/4] " in done.stderr
    assert record["front"]
    for cell in record["cells"]:
        assert cell["figures"]["bits_per_byte"]["bundle"] > 0
        assert cell["figures"]["latency"]["step_ms"]["p50"] > 0
        assert cell["figures"]["placement"]
        assert Path(cell["bundle"], "manifest.json").is_file()
    page = Path(record["report"]).read_text()
    assert "The grid" in page
    assert "Pareto front" in page
