"""OpenVINO: streams equal ONNX Runtime's, state moves between lengths, wrong numbers are refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chunk_form import check_export
from tolerances import TOLERANCES

import xexport
from xexport.core.errors import ExportError, RuntimeFailure
from xexport.core.manifest import read_manifest
from xexport.core.target import get_target
from xexport.runtimes.bundle import Bundle
from xexport.runtimes.openvino import open_engine

pytest.importorskip("openvino", reason="openvino is not installed")


@pytest.fixture(scope="module")
def mamba(exporter: Any) -> Bundle:
    """Lengths of 1, 8 and 64 are prepared."""
    return xexport.load(exporter("mamba", "openvino-fp32"))


def tokens(count: int, batch: int = 1) -> Any:
    return np.random.default_rng(5).integers(0, 29, (batch, count))


def near(got: Any, want: Any) -> bool:
    return bool(np.abs(got - want).max() < TOLERANCES["model_fp32"] * max(1.0, np.abs(want).max()))


@pytest.fixture(scope="module")
def retnet(exporter: Any) -> Bundle:
    return xexport.load(exporter("retnet", "openvino-fp32"))


@pytest.mark.parametrize("family", ["mamba", "retnet", "rwkv4"])
def test_bundle_is_pytorch(exporter: Any, family: str) -> None:
    check_export(exporter, family, "openvino-fp32")


def test_any_cut_is_onnxruntime(mamba: Bundle) -> None:
    """Two sequences, cut so that every length is used and the state goes from one to another and back."""
    x = tokens(150, batch=2)
    want, got = mamba.stream(2, runtime="onnxruntime"), mamba.stream(2)
    whole = want.feed(x)
    for part in np.split(x, [1, 74, 75, 84, 149], axis=1):
        at = got.position
        piece = got.feed(part)
        assert (
            np.abs(piece - whole[:, at : at + part.shape[1]]).max()
            < TOLERANCES["model_fp32"] * np.abs(whole).max()
        )
    for name, value in want.state().items():
        assert np.abs(got.state()[name] - value).max() < TOLERANCES["model_fp32"] * max(
            1.0, np.abs(value).max()
        )


def test_a_saved_state_goes_on_in_another_stream(mamba: Bundle) -> None:
    x = tokens(30)
    one, other = mamba.stream(), mamba.stream()
    one.feed(x[:, :13])
    saved = one.save()
    want = one.feed(x[:, 13:])
    other.feed(x[:, 5:9])
    other.restore(saved)
    assert np.array_equal(other.feed(x[:, 13:]), want)
    one.reset()
    assert all(not value.any() for value in one.state().values())


def test_only_the_last_positions_are_returned_if_asked(mamba: Bundle) -> None:
    x = tokens(11)
    whole = mamba.stream().feed(x)
    assert np.array_equal(mamba.stream().feed(x, keep=2), whole[:, -2:])


def test_the_graph_has_no_local_functions(mamba: Bundle) -> None:
    import onnx

    graph = onnx.load(mamba.path / "model.onnx", load_external_data=False)
    assert not graph.functions
    assert {n.domain for n in graph.graph.node} <= {"", "ai.onnx"}
    assert mamba.manifest.checks["openvino"]["error"] < TOLERANCES["model_fp32"] * 10


def test_positions_far_away(retnet: Bundle) -> None:
    """The angle of token 1 000 000 needs more than 32 bits, which the plugin does not have."""
    x = tokens(9)
    found = {}
    for runtime in ("onnxruntime", "openvino"):
        stream = retnet.stream(runtime=runtime)
        stream.feed(tokens(3))
        cell = retnet.engine(runtime=runtime).cell(1)
        cell.write({**stream.state(), "position": np.array([1_000_000])})
        found[runtime] = cell.run(x)
        assert cell.read()["position"] == 1_000_009
    assert near(found["openvino"], found["onnxruntime"])


def test_other_numbers_are_refused(exporter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin computes int64 as int32, which rotations in fixed-point arithmetic do not survive."""
    target = get_target("openvino-fp32")
    wrong = replace(target, bodies={**target.bodies, "rotary_angles": "int64"})
    monkeypatch.setattr("xexport.pipeline.get_target", lambda name: wrong)
    with pytest.raises(ExportError, match="something else than ONNX Runtime") as caught:
        exporter.export("retnet", "openvino-fp32", tmp_path / "out", preset="tiny")
    assert "layers." in str(caught.value.got)
    assert not (tmp_path / "out").exists()


def test_eight_bits_stay_eight_bits_in_memory(exporter: Any) -> None:
    """Weights are multiplied as they are read: no float copy, and activations are not rounded."""
    check_export(exporter, "rwkv", "openvino-int8")
    bundle = xexport.load(exporter("rwkv", "openvino-int8"))
    formats = {d.format for d in bundle.manifest.decisions if d.role == "projection"}
    assert formats == {"int8 per channel, float products"}
    cell = open_engine(bundle.path, bundle.manifest, profile=True).cell(1)
    cell.run(tokens(1))
    kinds = Counter(kind for _, kind, _ in cell.node_times())
    assert kinds["FullyConnectedCompressed"] >= len(
        [d for d in bundle.manifest.decisions if d.format == "int8 per channel, float products"]
    )


def test_without_openvino_the_bundle_is_written_and_says_that_it_was_not_run(
    exporter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "xexport.runtimes.opening.find_spec", lambda name: None if name == "openvino" else True
    )
    path = exporter.export("mamba", "openvino-fp32", tmp_path / "out", preset="tiny")
    said = [w for w in read_manifest(path).warnings if "not run by openvino" in w]
    assert len(said) == 1
    assert "xexport profile" in said[0]


def test_run_takes_another_runtime(mamba: Bundle) -> None:
    from click.testing import CliRunner

    from xexport.cli import cli

    said = {}
    for runtime in ("openvino", "onnxruntime"):
        arguments = [
            "run",
            str(mamba.path),
            "--ids",
            "--prompt",
            "3 4 5",
            "--temperature",
            "0",
            "--runtime",
            runtime,
        ]
        result = CliRunner().invoke(cli, [*arguments, "--max-tokens", "6", "--quiet"])
        assert result.exit_code == 0, result.output
        said[runtime] = result.stdout
    assert said["openvino"] == said["onnxruntime"]
    assert len(said["openvino"].split()) == 6


def test_a_device_that_is_not_there(mamba: Bundle, tmp_path: Path) -> None:
    import msgspec

    manifest = msgspec.structs.replace(mamba.manifest, provider="NPU9")
    with pytest.raises(RuntimeFailure, match="NPU9"):
        Bundle(mamba.path, manifest).stream()
