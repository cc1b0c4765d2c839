"""What decides the comparison with llama.cpp, without llama.cpp: figures, refusals, cached files.

The whole benchmark runs where XEXPORT_LLAMA_CACHE names a cache folder in which it was built.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
CACHE = os.environ.get("XEXPORT_LLAMA_CACHE")


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of benchmarks/llamacpp by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return lambda name: importlib.import_module(f"llamacpp.{name}")


def row(work: str, llama: list[float], ours: list[float], **more: Any) -> dict[str, Any]:
    return {
        "shape": "s",
        "format": "int8",
        "threads": 1,
        "work": work,
        "clock": "wall",
        "llama_tokens_per_s": llama,
        "ours_tokens_per_s": ours,
        "read_bytes_per_s": [1e9] * len(ours),
        "llama_bytes_per_token": 2_000_000,
        "ours_bytes_per_token": 1_000_000,
        **more,
    }


def test_samples_of_several_runs_are_joined_and_derived_anew(part: Any) -> None:
    rows = [row("decode", [100.0], [150.0]), row("decode", [100.0, 50.0], [300.0, 200.0], ratio=77)]
    (found,) = part("rounds").pooled(rows)
    assert found["rounds"] == 3
    assert found["ratio"] == 3.0, "the median of 1.5, 3 and 4: rounds are paired"
    assert found["ours"] == 200.0
    assert found["ours_of_bandwidth"] == pytest.approx(0.2)
    assert found["llama_of_bandwidth"] == pytest.approx(0.2)


def test_works_are_kept_apart(part: Any) -> None:
    found = part("rounds").pooled([row("decode", [1.0], [2.0]), row("prefill", [1.0], [3.0])])
    assert {r["work"]: r["ratio"] for r in found} == {"decode": 2.0, "prefill": 3.0}
    assert "ours_of_bandwidth" not in found[1], "a prefill is not bound by reading weights"


def test_other_logits_are_refused(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    same = part("same")
    logits = np.random.default_rng(0).normal(size=(5, 40))
    tokens = np.arange(5)
    stream = SimpleNamespace(feed=lambda ids: logits[None].astype(np.float32))

    def answer(wrong: float) -> Any:
        return lambda path, tools, ubatch=512: (tokens, logits + wrong * np.eye(5, 40) * (ubatch == 1))

    monkeypatch.setattr(same, "llama_logits", answer(1e-4))
    _, _, figures = same.require_same(Path("x.gguf"), stream, None)
    assert figures["steps"]["top1"] == 1.0
    assert 0 < figures["steps"]["rms"] < 1e-3
    monkeypatch.setattr(same, "llama_logits", answer(0.5))
    with pytest.raises(part("build").BenchmarkError, match=r"x\.gguf.*steps.*not those of the PyTorch"):
        same.require_same(Path("x.gguf"), stream, None)


def test_llama_bench_is_read_by_work(part: Any, tmp_path: Path) -> None:
    said = [
        {"n_prompt": 512, "n_gen": 0, "samples_ns": [2_000_000_000]},
        {"n_prompt": 0, "n_gen": 64, "samples_ns": [500_000_000]},
    ]
    tools = fake_program(part, tmp_path, f"print({json.dumps(json.dumps(said))})")
    assert part("rounds").llama_bench(tmp_path / "m", tools, 1, 512, 64) == {
        "prefill": 256.0,
        "decode": 128.0,
    }


def test_processor_time_leaves_out_loading(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds, used = part("rounds"), [0.0]

    def run(command: list[str], what: str, timeout: float) -> str:
        work = 0.5 if command[command.index("-n") + 1] == "0" else 0.25
        used[0] += 7.0 + work * int(command[command.index("-r") + 1])
        return ""

    monkeypatch.setattr(rounds, "run", run)
    monkeypatch.setattr(rounds, "_children_seconds", lambda: used[0])
    tools = part("build").Tools(Path(), Path(), "fake")
    assert rounds.llama_cpu(Path("m"), tools, 512, 64) == {"prefill": 1024.0, "decode": 256.0}


def test_a_failing_program_is_quoted(part: Any, tmp_path: Path) -> None:
    tools = fake_program(part, tmp_path, "import sys; sys.exit('cannot load the model')")
    with pytest.raises(part("build").BenchmarkError, match=r"(?s)llama-bench failed.*cannot load the model"):
        part("rounds").llama_bench(tmp_path / "m", tools, 1, 512, 64)


def fake_program(part: Any, folder: Path, text: str) -> Any:
    program = folder / "llama-bench"
    program.write_text(f"#!{sys.executable}\n{text}\n", encoding="utf-8")
    program.chmod(0o755)
    return part("build").Tools(folder, folder, "fake")


def test_newest_archive_wins_and_a_wrong_tree_is_refused(part: Any, tmp_path: Path) -> None:
    build = part("build")
    names = ["llama_cpp_python-0.3.9", "llama_cpp_python-0.3.10"]
    for name in names:
        (tmp_path / name / "vendor" / "llama.cpp").mkdir(parents=True)
        (tmp_path / name / "vendor" / "llama.cpp" / "CMakeLists.txt").touch()
    with pytest.raises(build.BenchmarkError, match=r"0\.3\.10.*is not a llama\.cpp source tree"):
        build.get_tools(tmp_path, print)


def test_a_step_reads_one_row_of_the_embedding(part: Any) -> None:
    kinds = [("embedding", (100, 8), 1600), ("projection", (8, 8), 64), ("norm", (8,), 32)]
    decisions = [SimpleNamespace(role=r, shape=s, bytes=b) for r, s, b in kinds]
    assert part("ours").stored_bytes_per_token(SimpleNamespace(decisions=decisions)) == 16 + 64 + 32


@pytest.mark.skipif(CACHE is None, reason="XEXPORT_LLAMA_CACHE names no folder with a built llama.cpp")
@pytest.mark.slow
def test_the_whole_comparison(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = [
        sys.executable,
        str(FOLDER / "llama_cpp.py"),
        "--quick",
        "--json",
        str(out),
        "--cache",
        str(CACHE),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert {(r["format"], r["work"]) for r in rows} == {
        (f, w) for f in ("fp32", "int8") for w in ("decode", "prefill")
    }
    for r in rows:
        assert r["fp32_against_torch"]["steps"]["top1"] == 1.0
        assert len(r["llama_tokens_per_s"]) == len(r["ours_tokens_per_s"]) == 2
