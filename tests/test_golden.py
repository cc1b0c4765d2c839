"""A bundle that an older xexport wrote (tests/golden/) is read by this one, with the same results."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from tolerances import TOLERANCES

import xexport
from xexport import pipeline
from xexport.core.manifest import SCHEMA_VERSION, Manifest
from xexport.core.records import Fidelity
from xexport.core.results import read_records

GOLDEN = Path(__file__).parent / "golden"
BUNDLE = GOLDEN / "bundle"


@pytest.fixture
def expected() -> dict[str, Any]:
    with np.load(GOLDEN / "expected.npz") as table:
        return dict(table)


def tokens() -> Any:
    spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TOKENS


def relative(got: Any, want: Any) -> float:
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / max(1.0, float(np.abs(want).max())))


def test_it_is_small_and_whole() -> None:
    names = {p.name for p in BUNDLE.iterdir()}
    assert names == {"manifest.json", "model.onnx", "model.onnx.data", "reference.npz", "results.jsonl"}
    assert sum(p.stat().st_size for p in BUNDLE.iterdir()) < 200_000
    assert all(p.stat().st_size < 80_000 for p in GOLDEN.rglob("*") if p.is_file())
    assert xexport.load(BUNDLE).manifest.schema_version == SCHEMA_VERSION


@pytest.mark.parametrize("cut", [[], [1], [2, 3, 8], list(range(1, 9))], ids=str)
def test_logits_and_state_are_those_recorded(expected: dict[str, Any], cut: list[int]) -> None:
    stream = xexport.load(BUNDLE).stream(batch=2)
    logits = np.concatenate([stream.feed(part) for part in np.split(tokens(), cut, axis=1)], 1)
    assert relative(logits, expected["logits"]) < TOLERANCES["model_fp32"]
    state = stream.state()
    assert {f"state {name}" for name in state} == set(expected) - {"logits"}
    for name, value in state.items():
        assert relative(value, expected[f"state {name}"]) < TOLERANCES["model_fp32"], name


def test_its_manifest_says_what_it_said() -> None:
    manifest = xexport.load(BUNDLE).manifest
    assert (manifest.model.family, manifest.target, manifest.precision) == ("rwkv", "cpu-int8", "int8")
    assert (manifest.opset, manifest.ir_version) == (23, 10)
    assert manifest.model.parameters == 26464
    assert len(manifest.state) == 6
    assert len(manifest.decisions) > 50
    assert [low.op for low in manifest.lowerings] == ["wkv7"]
    assert manifest.figures["bits_per_byte"]["bundle"] > 1
    # a field that was there may not be dropped: what is read and written again is the same
    again = msgspec.json.decode(msgspec.json.encode(manifest), type=Manifest)
    assert again == manifest


def test_its_results_are_read(tmp_path: Path) -> None:
    rows = read_records(BUNDLE / "results.jsonl")
    assert any(isinstance(r, Fidelity) for r in rows)
    summary = pipeline.summary(xexport.load(BUNDLE))
    assert summary["kl"]["mean"] < TOLERANCES["tiny_kl_int8"]
    written = pipeline.report([BUNDLE], tmp_path / "report.json")
    assert written.stat().st_size > 1000


def test_it_is_valid_today(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(BUNDLE, folder)
    text = tmp_path / "ids.txt"
    text.write_text(" ".join(str(i * i % 61) for i in range(48)), encoding="utf-8")
    result = pipeline.validate(folder, eval_text=text)
    assert result["ok"], result["problems"]
