"""The benchmarks run and say what they measured. Smoke tests: nothing here looks at a time."""

from __future__ import annotations

import json
import math
import runpy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
NAMES = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem != "common")


Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(exporter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run(name)`` runs ``benchmarks/NAME.py --quick`` as a script, in this process, and reads its JSON."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def run(name: str) -> dict[str, Any]:
        out = tmp_path / f"{name}.json"
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quick", "--json", str(out)])
        with exporter.traced_once():
            runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        assert not list(tmp_path.glob("xexport-bench-*")), "the scratch folder was left behind"
        result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        assert result["machine"]["cpu"], "the configuration is repeated"
        assert result["rows"]
        return result

    return run


def test_every_benchmark_is_described_in_the_readme() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if f"{name}.py" not in text] == []


def test_ops_compares_every_implementation_with_the_reference(run: Run) -> None:
    rows = run("ops")["rows"]
    assert {r["op"] for r in rows} == {"wkv7", "selective_scan", "fft_conv", "linear_attention"}
    assert max(r["error"] for r in rows) < 1e-5
    assert all(r["us"] > 0 and len(r["seconds"]) == 3 for r in rows)


def test_int8_formats_show_which_keep_the_chunk_law(run: Run) -> None:
    result = run("int8_formats")
    law = {r["format"]: r["chunk_error"] for r in result["rows"]}
    assert law["8 bit block 128"] < 1e-5
    assert law["per row s7"] < 1e-5
    assert law["per tensor s8"] > 1e-2, "one scale for a whole chunk must show"
    assert result["verdict"]


def test_hyena_prefill_computes_the_same_everywhere(run: Run) -> None:
    rows = {r["candidate"]: r for r in run("hyena_prefill")["rows"]}
    assert set(rows) == {"cpu-fp32", "cpu-int8", "training form", "filters kept", "chunk form", "products"}
    assert rows["cpu-fp32"]["difference"] < 1e-5
    assert 1e-5 < rows["cpu-int8"]["difference"] < 0.1
    assert all(len(r["seconds"]) == 3 for r in rows.values())


@pytest.mark.slow
def test_export_size_reports_every_stage(run: Run) -> None:
    (row,) = run("export_size")["rows"]
    titles = [stage["stage"] for stage in row["stages"]]
    assert {"check weights", "trace", "write weights", "verify"} <= set(titles)
    assert max(row["compared"].values()) < 1e-4
    assert max(row["checks"]["parity"].values()) < 1e-4
    assert row["peak_anon_bytes"] > 0


@pytest.mark.slow
def test_step_times_torch_and_bundle_in_the_same_rounds(run: Run) -> None:
    rows = run("step")["rows"]
    assert {r["runner"] for r in rows} == {"torch eager", "cpu-int8"}
    assert {r["tokens"] for r in rows} == {1, 8}
    assert all(math.isfinite(r["speedup"]) and len(r["seconds"]) == 3 for r in rows)


@pytest.mark.slow
def test_long_stream_reads_memory_and_times_both_places(run: Run) -> None:
    (row,) = run("long_stream")["rows"]
    assert (row["near"], row["far"], row["model"]) == (100, 2000, "rwkv")
    assert len(row["seconds"]["near"]) == len(row["seconds"]["far"]) == 5
    assert [place for place, _ in row["rss"]][::10] == [100, 2000]
    assert 0 <= row["rss_late_growth"] <= row["rss_growth"] < 16 << 20, "the state has a constant size"
    assert math.isfinite(row["state_max"])


def test_products_measure_every_format_at_one_token_and_at_many(run: Run) -> None:
    rows = run("products")["rows"]
    assert {(r["format"], r["tokens"]) for r in rows} == {
        (f, t) for f in ("fp32", "fp16", "int8", "int6", "int4") for t in (1, 16)
    }
    assert all(r["body_gb_per_s"] > 0 and len(r["samples"]["body"]) == 2 for r in rows)
    assert all(r["weight_bytes"] >= 1 << 20 for r in rows if r["tokens"] == 1)
