"""Which provider ran which node and why not the target's: a provider that takes nothing, and a promise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from xexport.cli import cli
from xexport.core.errors import RuntimeFailure, TargetError
from xexport.core.manifest import read_manifest
from xexport.core.records import Setup
from xexport.core.results import append_records
from xexport.core.target import get_target, parse_target
from xexport.evaluate import optimes
from xexport.evaluate.optimes import profile_ops
from xexport.report.html import render_html
from xexport.report.markdown import render_markdown
from xexport.runtimes import placement
from xexport.runtimes.bundle import load

ToyMaker = Callable[..., Path]
#: in every wheel of onnxruntime for Linux, and takes no node of any graph: everything falls back
IDLE = "AzureExecutionProvider"
TOML = 'description = "x"\nruntime = "onnxruntime"\nprecision = "fp32"\nfull_placement = true\nprovider = '


@pytest.fixture
def idle(make_toy_bundle: ToyMaker) -> Path:
    import onnxruntime

    if IDLE not in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime has no {IDLE}")
    return make_toy_bundle("idle", provider=IDLE, target="idle-fp32")


def test_all_on_the_cpu_is_no_fallback_for_a_cpu_target(toy_bundle: Path, setup: Setup) -> None:
    row = profile_ops(toy_bundle, range(99), setup=setup, steps=3, warmup=1, threads=1)
    assert not row.fallbacks
    assert not row.warnings
    (placed,) = row.placed
    assert placed.provider == row.wanted == "CPUExecutionProvider"
    assert placed.nodes == 24
    assert placed.share == 1
    assert placed.us_per_call * row.calls == pytest.approx(sum(o.ns for o in row.ops) / 1e3)


def test_every_node_that_fell_back_is_told_with_its_reason(idle: Path, setup: Setup) -> None:
    row = profile_ops(idle, range(99), setup=setup, steps=3, warmup=1, threads=1)
    assert row.wanted == IDLE
    assert [p.provider for p in row.placed] == ["CPUExecutionProvider"]
    assert sum(len(f.nodes) for f in row.fallbacks) == row.placement["CPUExecutionProvider"]
    reasons = {(f.op, f.why) for f in row.fallbacks}
    assert ("MatMul", f"{IDLE} takes none of it") in reasons
    assert ("Sub", "it works on integers of shapes, which ONNX Runtime keeps on the CPU") in reasons
    said = next(w for w in row.warnings if "MatMul" in w)
    assert said.startswith(f"1 MatMul node ran on CPUExecutionProvider instead of {IDLE} (")


def test_a_fallback_is_loud_in_the_terminal_the_json_and_the_report(idle: Path) -> None:
    brief = [str(idle), "--steps", "4", "--prefill", "8", "--position", "0", "--threads", "1", "--quiet"]
    result = CliRunner().invoke(cli, ["profile", *brief, "--json"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["placement"][0]["provider"] == "CPUExecutionProvider"
    assert {"op", "nodes", "provider", "us_per_step", "why"} == set(record["fallbacks"][0])
    assert any("MatMul" in w for w in record["warnings"])
    shown = CliRunner().invoke(cli, ["profile", *brief])
    assert "fallen back to another provider" in shown.output
    assert "warning" in shown.output
    manifest = read_manifest(idle)
    from xexport.report.entries import read_entry

    for text in (render_html([read_entry(idle)]), render_markdown([read_entry(idle)])):
        assert "takes none of it" in text
        assert "allen back" in text
    assert manifest.provider == IDLE


def test_a_promise_is_kept_or_refused_with_the_nodes(make_toy_bundle: ToyMaker, idle: Path) -> None:
    row = {"session_options": {}, "provider_options": {}, "full_placement": True}
    promised = make_toy_bundle("promised", provider=IDLE, target_row=row)
    with pytest.raises(RuntimeFailure, match=f"promises that {IDLE} runs every node") as caught:
        load(promised).stream()
    assert "24 of 24 nodes would fall back" in str(caught.value.got)
    assert "takes none of it" in str(caught.value.got)
    load(idle).stream().feed([1, 2])  # without the promise it runs


def test_a_promise_of_another_runtime_is_none_of_onnxruntimes(make_toy_bundle: ToyMaker) -> None:
    row = {"session_options": {}, "provider_options": {}, "full_placement": True}
    bundle = make_toy_bundle("other", runtime="openvino", provider="CPU", target_row=row)
    load(bundle).stream(runtime="onnxruntime").feed([1, 2])


def test_the_key_is_for_providers_that_are_not_the_cpu() -> None:
    assert parse_target("x", f'{TOML}"QNNExecutionProvider"').full_placement
    with pytest.raises(TargetError, match="is for the CPU"):
        parse_target("x", f'{TOML}"CPUExecutionProvider"')
    assert not get_target("cpu-int8").full_placement


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime-web"])
def test_a_promise_that_nothing_would_enforce_is_refused(runtime: str) -> None:
    row = TOML.replace('"onnxruntime"', f'"{runtime}"')
    with pytest.raises(TargetError, match="holds no provider to that") as caught:
        parse_target("x", f'{row}"X"')
    assert caught.value.got == f'full_placement = true, runtime = "{runtime}"'
    assert caught.value.allowed == 'runtime = "onnxruntime"'


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    why = placement.why_on_cpu
    assert why("wkv7", "xexport", "X", 0) == "our native kernel runs on the CPU alone"
    assert why("Scan", "", "X", 0) == "X takes none of it"
    assert why("If", "", "X", 0, ["bool"]).startswith("its branch is chosen on the CPU")
    assert why("Cast", "", "X", 3, ["float16"]) == "X took 3 others of it, but not this one of float16"
    monkeypatch.setattr(placement, "_kernels", lambda _: frozenset({"MatMul"}))
    assert why("Scan", "", "X", 0) == "X has no kernel of it"
    assert why("MatMul", "", "X", 0, ["float", "int64"]) == (
        "X has a kernel of it, but not for this node of float, int64"
    )


def test_a_worker_that_names_the_provider_of_every_node(setup: Setup) -> None:
    """Cells of other processes tell (name, type, provider, ns)."""
    cell: Any = SimpleNamespace(
        node_times=lambda: [("a", "Conv", "GPU", 5000), ("b", "Loop", "CPUExecutionProvider", 1000)]
    )
    row = optimes._node_times(cell, lambda _: iter([9000, 9000]), "GPU", setup, "step", 1)
    assert row.placement == {"GPU": 1, "CPUExecutionProvider": 1}
    (fallback,) = row.fallbacks
    assert (fallback.op, fallback.nodes, fallback.ns) == ("Loop", ("b",), 2000)
    assert [p.provider for p in row.placed] == ["GPU", "CPUExecutionProvider"]


def test_rows_from_before_are_read(tmp_path: Path, setup: Setup, toy_bundle: Path) -> None:
    from xexport.core.results import read_records

    row = profile_ops(toy_bundle, range(99), setup=setup, steps=2, warmup=1, threads=1)
    path = tmp_path / "r.jsonl"
    append_records(path, [row])
    old = json.loads(path.read_text())
    for key in ("wanted", "assigned", "fallbacks"):
        del old[key]
    path.write_text(json.dumps(old) + "\n")
    (read,) = read_records(path)
    assert isinstance(read, type(row))
    assert read.placed[0].nodes == row.placement["CPUExecutionProvider"]


def test_profile_and_validate_take_another_runtime_and_keep_its_rows_apart(make_toy_bundle: ToyMaker) -> None:
    from xexport.report.entries import latency_of, read_entry
    from xexport.report.tables import latency

    bundle = make_toy_bundle("other", runtime="openvino", provider="CPU", target="openvino-fp32")
    run = ["--runtime", "cpu", "--json", "--quiet"]
    brief = ["--steps", "4", "--prefill", "8", "--position", "0"]
    done = CliRunner().invoke(cli, ["profile", str(bundle), *brief, *run])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["runtime"] == "cpu"
    assert record["placement"][0]["provider"] == "CPUExecutionProvider"
    assert not record["fallbacks"]
    _, records = read_entry(bundle)
    assert latency_of(records) is None  # of its own runtime nothing was measured
    assert "This bundle with cpu" in {row[0] for row in latency(records).rows}
    checked = CliRunner().invoke(cli, ["validate", str(bundle), *run])
    assert checked.exit_code == 0, checked.output
    assert json.loads(checked.stdout)["runtime"] == "cpu"
    wrong = CliRunner().invoke(cli, ["validate", str(bundle), "--runtime", "nowhere", "--json", "--quiet"])
    assert wrong.exit_code == 1
    assert json.loads(wrong.stdout)["error"]["got"] == "nowhere"
