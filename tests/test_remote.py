"""A bundle in a worker process: the same numbers, the same errors, and no process left behind."""

from __future__ import annotations

import gc
import io
import json
import shutil
import struct
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest

from xexport.core.errors import RuntimeFailure, UnknownNameError
from xexport.core.target import get_target
from xexport.evaluate.agree import require_agreement
from xexport.evaluate.memory import measure_memory
from xexport.evaluate.optimes import profile_ops
from xexport.evaluate.suite import setup_for
from xexport.runtimes import environments
from xexport.runtimes.bundle import Bundle, load
from xexport.runtimes.opening import CPU
from xexport.runtimes.wire import read_frame, write_frame
from xexport.runtimes.worker import Worker

from .exported import Exporter

_HERE = replace(get_target("cpu-int8"), environment="here")


@pytest.fixture(scope="module")
def bundle(exporter: Exporter) -> Bundle:
    """A bundle whose target names the environment ``here``."""
    return _elsewhere(load(exporter("rwkv", "cpu-int8")), "here")


def _elsewhere(bundle: Bundle, environment: str) -> Bundle:
    row = {**bundle.manifest.target_row, "environment": environment}
    return Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, target_row=row))


def test_a_worker_gives_the_same_bits(bundle: Bundle) -> None:
    here, there = bundle.stream(batch=2, runtime=CPU), bundle.stream(batch=2)
    tokens = np.random.default_rng(0).integers(0, here.vocab_size, (2, 9))
    for part in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:]):
        np.testing.assert_array_equal(here.feed(part), there.feed(part))
    assert there.inside_ns is not None
    assert there.inside_ns > 0
    assert here.inside_ns is None
    for name, want in here.state().items():
        np.testing.assert_array_equal(there.state()[name], want)
    saved = there.save()
    after = there.feed(tokens[:, :3], keep=1)
    there.restore(saved)
    np.testing.assert_array_equal(there.feed(tokens[:, :3])[:, -1:], after)
    there.reset()
    here.reset()
    np.testing.assert_array_equal(here.feed(tokens), there.feed(tokens))
    assert require_agreement(bundle, _HERE)["error"] == 0


def test_two_cells_of_one_worker_do_not_mix(bundle: Bundle) -> None:
    one, other = bundle.stream(), bundle.stream()
    first = one.feed([1, 2, 3])
    other.feed([7])
    np.testing.assert_array_equal(one.feed([4]), bundle.stream(runtime=CPU).feed([1, 2, 3, 4])[:, -1:])
    one.reset()
    np.testing.assert_array_equal(one.feed([1, 2, 3]), first)


def test_memory_and_operators_are_the_workers(bundle: Bundle, tmp_path: Path) -> None:
    for entry in bundle.manifest.files:
        shutil.copy(bundle.path / entry.path, tmp_path / entry.path)
    (tmp_path / "manifest.json").write_bytes(msgspec.json.encode(bundle.manifest))
    setup = setup_for(bundle.manifest, "x", None)
    memory = measure_memory(tmp_path, setup=setup, weights_bytes=1, state_bytes=1, tokens=8)
    assert 0 < memory.start_rss < memory.loaded_rss <= memory.peak_rss
    ops = profile_ops(tmp_path, [1, 2, 3], setup=setup, steps=3, warmup=1)
    assert ops.calls == 3
    assert sum(op.calls for op in ops.ops) > 0


def test_the_process_ends_with_the_engine(bundle: Bundle) -> None:
    fresh = _elsewhere(load(bundle.path), "here")
    before = {p.pid for p in psutil.Process().children()}
    stream = fresh.stream()
    (pid,) = {p.pid for p in psutil.Process().children()} - before
    del stream, fresh
    gc.collect()
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the worker lives on"
        time.sleep(0.05)


def test_a_worker_that_dies_is_told(bundle: Bundle) -> None:
    fresh = _elsewhere(load(bundle.path), "here")
    before = {p.pid for p in psutil.Process().children()}
    stream = fresh.stream()
    (pid,) = {p.pid for p in psutil.Process().children()} - before
    psutil.Process(pid).kill()
    with pytest.raises(RuntimeFailure, match="'here' ended") as caught:
        stream.feed([1])
    assert "signal 9" in str(caught.value)


def test_errors_of_the_runtime_come_through(bundle: Bundle, tmp_path: Path) -> None:
    for entry in bundle.manifest.files:
        (tmp_path / entry.path).write_bytes(b"not a graph")
    (tmp_path / "manifest.json").write_bytes(msgspec.json.encode(bundle.manifest))
    with pytest.raises(RuntimeFailure, match="refused the graph") as caught:
        Bundle(tmp_path, bundle.manifest).stream()
    assert caught.value.fix


@pytest.mark.parametrize("name", ["nowhere", "../here", ""])
def test_an_unknown_environment(bundle: Bundle, name: str) -> None:
    if not name:
        assert _elsewhere(bundle, name).stream().inside_ns is None
        return
    with pytest.raises(UnknownNameError, match="unknown environment"):
        _elsewhere(bundle, name).stream()


def test_an_absent_environment_says_how_to_get_it(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XEXPORT_ENVIRONMENTS", str(tmp_path))
    with pytest.raises(RuntimeFailure) as caught:
        _elsewhere(bundle, "webgpu").stream()
    assert "install webgpu" in str(caught.value)
    half = tmp_path / "webgpu"
    half.mkdir()
    assert "not installed" in str(environments.why_not("webgpu"))
    (half / "environment.json").write_text(json.dumps({"packages": ["other==1"]}), encoding="utf-8")
    assert "another xexport" in str(environments.why_not("webgpu"))


def test_a_failed_installation_leaves_no_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XEXPORT_ENVIRONMENTS", str(tmp_path))
    row = replace(environments.get_environment("webgpu"), packages=["./no-such-wheel.whl"])
    monkeypatch.setattr(environments, "_rows", lambda: {"webgpu": row})
    assert environments.main(["install", "webgpu"]) == 1
    assert "no-such-wheel.whl" in capsys.readouterr().err
    assert environments.why_not("webgpu") is not None
    assert environments.main(["install", "elsewhere"]) == 1


def test_frames_survive_the_way() -> None:
    pipe = io.BytesIO()
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "none": np.zeros((0, 4), np.int64),
        "half": np.ones((), np.float16),
    }
    write_frame(pipe, {"op": "x"}, tensors)
    write_frame(pipe, {"op": "y"}, {})
    pipe.seek(0)
    header, found = read_frame(pipe) or ({}, {})
    assert header == {"op": "x"}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor)
        assert found[name].shape == tensor.shape
        assert found[name].dtype == tensor.dtype
    assert read_frame(pipe) == ({"op": "y"}, {})
    assert read_frame(pipe) is None


@pytest.mark.parametrize(
    "data",
    [
        b"\x05",
        struct.pack("<I", 1 << 30),
        struct.pack("<I", 4) + b"{}",
        struct.pack("<I", 4) + b"oops",
        struct.pack("<I", 2) + b"[]",
        b'\x3a\0\0\0{"tensors":[{"name":"a","dtype":"object","shape":[9,9]}]}',
        b'\x3c\0\0\0{"tensors":[{"name":"a","dtype":"float32","shape":[9, 9]}]}' + b"123",
        b'\x3b\0\0\0{"tensors":[{"name":"a","dtype":"float32","shape":[-1]}]}',
    ],
)
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    with pytest.raises(RuntimeFailure, match="no frame"):
        read_frame(io.BytesIO(data))


def test_an_object_array_is_not_sent() -> None:
    with pytest.raises(RuntimeFailure, match="can't be sent"):
        write_frame(io.BytesIO(), {}, {"a": np.array([object()])})


@pytest.mark.parametrize("row", [{"op": "exec"}, {"op": "run", "cell": 3}, {}, {"op": "cell", "batch": 1}])
def test_a_worker_outlives_bad_requests(row: dict[str, object]) -> None:
    header, tensors = Worker().answer(row, {})
    assert header["ok"] is False
    assert header["error"]
    assert not tensors
