"""Graphs of fixed shape: the same numbers as the dynamic graph, in any cut, from weights stored once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from tolerances import TOLERANCES

import xexport
from xexport.core import target as targets
from xexport.core.errors import BundleError, ExportError, InputError
from xexport.core.manifest import read_manifest
from xexport.runtimes.bundle import Bundle

_TARGET = """
description = "graphs of fixed shape on the CPU"
runtime = "onnxruntime"
provider = "CPUExecutionProvider"
precision = "{precision}"
graph_form = "static"
inline = true
unroll = {unroll}
lengths = [1, 8]
"""


@pytest.fixture(scope="module")
def made(exporter: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``made(family, unroll, precision)`` exports for a target that no TOML has."""
    known: dict[Any, Bundle] = {}
    real = targets.get_target

    def make(family: str, unroll: bool = True, precision: str = "fp32") -> Bundle:
        key = family, unroll, precision
        if key not in known:
            text = _TARGET.format(unroll=str(unroll).lower(), precision=precision)
            row = targets.parse_target("static", text)

            def found(name: str) -> targets.Target:
                return row if name == "static" else real(name)

            out = tmp_path_factory.mktemp("static") / family
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("xexport.pipeline.get_target", found)
                exporter.export(family, "static", out, preset="tiny")
            known[key] = xexport.load(out)
        return known[key]

    return make


def error(got: Any, want: Any) -> float:
    return float(np.abs(got - want).max() / max(1.0, np.abs(want).max()))


@pytest.mark.parametrize("family", ["rwkv", "mamba", "retnet"])
def test_any_cut_is_the_dynamic_graph(made: Any, exporter: Any, family: str) -> None:
    """35 tokens in pieces that use both lengths in turn, against the dynamic bundle fed at once."""
    bundle = made(family)
    dynamic = xexport.load(exporter(family, "cpu-fp32")).stream()
    tokens = np.random.default_rng(3).integers(0, 29, 35)
    want = dynamic.feed(tokens)
    whole = bundle.stream()
    assert error(whole.feed(tokens), want) < TOLERANCES["model_fp32"]
    stream = bundle.stream()
    parts = [stream.feed(part) for part in np.split(tokens, [1, 10, 18, 34])]
    assert error(np.concatenate(parts, 1), want) < TOLERANCES["model_fp32"]
    for name, value in dynamic.state().items():
        assert error(stream.state()[name], value) < TOLERANCES["model_fp32"]
        assert error(whole.state()[name], value) < TOLERANCES["model_fp32"]


def test_nothing_is_left_to_decide_at_run_time(made: Any) -> None:
    bundle = made("rwkv")
    assert bundle.manifest.graphs == {1: "model.t1.onnx", 8: "model.t8.onnx"}
    for length, name in bundle.manifest.graphs.items():
        model = onnx.load(bundle.path / name, load_external_data=False)
        assert not model.functions
        kinds = {n.op_type for n in model.graph.node}
        assert not kinds & {"If", "Scan", "Loop", "Shape", "Identity", "ConstantOfShape", "Range"}
        assert all(d.dim_value for i in model.graph.input for d in i.type.tensor_type.shape.dim)
        onnx.checker.check_model(str(bundle.path / name), full_check=True)
        logits = model.graph.output[0].type.tensor_type.shape.dim
        assert [d.dim_value for d in logits] == [1, length, bundle.manifest.model.vocab_size]


def test_weights_are_stored_once(made: Any) -> None:
    bundle = made("rwkv")
    sizes = {f.path: f.bytes for f in bundle.manifest.files}
    assert sizes["model.onnx.data"] < 4.5 * bundle.manifest.model.parameters  # float32, padded
    used = {}
    for name in bundle.manifest.graphs.values():
        model = onnx.load(bundle.path / name, load_external_data=False)
        used[name] = {
            tuple(sorted((e.key, e.value) for e in t.external_data if e.key in ("offset", "length")))
            for t in model.graph.initializer
            if t.external_data
        }
    first, second = used.values()
    assert first
    assert first == second
    assert bundle.bytes_of_weights == sum(sizes[n] for n in ("model.onnx.data", *used))


def test_a_loop_stays_where_it_may(made: Any) -> None:
    model = onnx.load(made("mamba", unroll=False).path / "model.t8.onnx", load_external_data=False)
    assert "Scan" in {n.op_type for n in model.graph.node}


def test_only_the_last_positions_are_returned_if_asked(made: Any) -> None:
    tokens = np.arange(11)
    whole = made("mamba").stream().feed(tokens)
    assert np.array_equal(made("mamba").stream().feed(tokens, keep=2), whole[:, -2:])


def test_a_failed_piece_leaves_the_state(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from xexport.runtimes.static import StaticCell

    stream = made("mamba").stream()
    stream.feed([1, 2, 3])
    before, real = stream.state(), StaticCell._call

    def broken(cell: Any, part: Any) -> Any:
        if part.shape[1] == 1:
            raise RuntimeError("broken")
        return real(cell, part)

    monkeypatch.setattr(StaticCell, "_call", broken)
    with pytest.raises(RuntimeError, match="broken"):
        stream.feed(np.arange(9))
    assert all(np.array_equal(before[n], v) for n, v in stream.state().items())


def test_one_sequence_a_stream(made: Any) -> None:
    with pytest.raises(InputError, match="fixed batch size"):
        made("mamba").stream(2)


def test_whole_sequences_have_their_one_length(made: Any, exporter: Any) -> None:
    bundle = made("linformer")
    length = bundle.manifest.model.fixed_length
    assert list(bundle.manifest.graphs) == [length]
    tokens = np.random.default_rng(3).integers(0, 29, length)
    want = xexport.load(exporter("linformer", "cpu-fp32")).stream().feed(tokens)
    assert error(bundle.stream().feed(tokens), want) < TOLERANCES["model_fp32"]


def test_whole_sequences_of_any_length_are_refused(tmp_path: Path) -> None:
    import onnx_ir as ir

    from xexport.core.contract import Contract
    from xexport.core.progress import Silent
    from xexport.exporter.graph import write_static

    model = ir.Model(ir.Graph([], [], nodes=[]), ir_version=10)
    target = targets.parse_target("static", _TARGET.format(unroll="true", precision="fp32"))
    with pytest.raises(ExportError, match="whole sequences of any length"):
        write_static(model, tmp_path, target, Contract("whole"), Silent())


def test_a_graph_outside_the_folder_is_refused(made: Any, tmp_path: Path) -> None:
    manifest = msgspec.structs.replace(made("mamba").manifest, graphs={1: "../model.onnx"})
    (tmp_path / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    with pytest.raises(BundleError, match="leaves the bundle's folder"):
        read_manifest(tmp_path)
