"""QNN: the whole graph on the HTP simulator, near ONNX Runtime's CPU in any cut, compiled once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass
from tolerances import TOLERANCES

import xexport
from xexport.core.errors import RuntimeFailure
from xexport.core.manifest import read_manifest
from xexport.evaluate.suite import Sizes
from xexport.exporter.lower import htp_rows
from xexport.runtimes import qnn
from xexport.runtimes.bundle import Bundle
from xexport.runtimes.opening import CPU

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

#: a call is 20 to 300 ms here
_SIZES = Sizes(16, 16, chunk_tokens=4, steps=2, prefill=(4,), positions=(), timed=False)


@pytest.fixture(scope="module")
def made(exporter: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``made(family)`` is its tiny preset for qnn-fp16."""
    pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn is not installed")
    known: dict[str, Bundle] = {}

    def make(family: str) -> Bundle:
        if family not in known:
            out = tmp_path_factory.mktemp("qnn") / family
            known[family] = xexport.load(
                exporter.export(family, "qnn-fp16", out, preset="tiny", sizes=_SIZES)
            )
        return known[family]

    return make


def apart(got: Any, want: Any) -> float:
    """RMS of the difference over the RMS."""
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


@pytest.mark.parametrize("family", ["rwkv", "mamba2", "transformer"])
def test_any_cut_is_near_the_cpu(made: Any, family: str) -> None:
    """At once (16 and 1 and 1), and with the long piece in another place."""
    bundle = made(family)
    tokens = np.random.default_rng(4).integers(0, 29, 18)
    cpu = bundle.stream(runtime=CPU)
    want = cpu.feed(tokens)
    whole, parts = bundle.stream(), bundle.stream()
    at_once = whole.feed(tokens)
    cut = np.concatenate([parts.feed(part) for part in np.split(tokens, [2])], 1)
    assert apart(at_once, want) < TOLERANCES["qnn_fp16"]
    assert apart(cut, want) < TOLERANCES["qnn_fp16"]
    assert apart(cut, at_once) < TOLERANCES["qnn_fp16"]
    for name, value in cpu.state().items():
        assert apart(parts.state()[name], value) < TOLERANCES["qnn_fp16"], name


def _product_behind_a_norm(rows: int) -> ir.Model:
    """LayerNormalization, 16-bit codes, a product with 8-bit weights of a scale a column, 16-bit codes."""
    rng = np.random.default_rng(0)
    weights = {
        "gamma": np.ones(32, np.float32),
        "codes": rng.integers(-127, 128, (32, 48)).astype(np.int8),
        "scales": rng.uniform(1e-3, 3e-3, 48).astype(np.float32),
        "step": np.array(1e-4, np.float32),
        "middle": np.array(33000, np.uint16),
    }
    text = f"""
      <ir_version: 10, opset_import: ["" : 23]>
      g (float[1,{rows},32] x) => (float[1,{rows},48] y) {{
        normed = LayerNormalization <axis = -1> (x, gamma)
        q = QuantizeLinear (normed, step, middle)
        d = DequantizeLinear (q, step, middle)
        w = DequantizeLinear <axis = 1> (codes, scales)
        product = MatMul (d, w)
        r = QuantizeLinear (product, step, middle)
        y = DequantizeLinear (r, step, middle)
      }}"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in weights.items())
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def test_sixteen_rows_behind_a_norm_are_wrong_and_two_blocks_of_eight_are_right() -> None:
    """The fault of the simulator for which exporter/lower/htp_rows.py is there, and that it avoids it."""
    pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn is not installed")
    x = np.random.default_rng(1).normal(size=(1, 16, 32)).astype(np.float32)
    model = _product_behind_a_norm(16)
    want, plain = (_run(model, x, on_npu=on) for on in (False, True))
    assert htp_rows.rewrite(model) == 1
    RemoveUnusedNodesPass()(model)
    assert np.array_equal(_run(model, x, on_npu=False), want)
    assert apart(_run(model, x, on_npu=True), want) < TOLERANCES["qnn_fp16"]
    assert apart(plain, want) > 0.5, "the fault is gone: htp_rows.py is not needed any more"


def test_other_numbers_of_rows_are_left_alone() -> None:
    assert [htp_rows.rewrite(_product_behind_a_norm(rows)) for rows in (1, 15, 17, 32)] == [0] * 4


def _run(model: ir.Model, x: Any, *, on_npu: bool) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1" if not on_npu else "0")
    if on_npu:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        qnn.add_provider(options, {"soc_model": "60"})
    with qnn.quiet_stdout():
        session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return session.run(None, {"x": x})[0]


def test_what_the_manifest_says(made: Any) -> None:
    manifest = made("rwkv").manifest
    assert manifest.graphs == {1: "model.t1.onnx", 16: "model.t16.onnx"}
    assert manifest.checks["QNN"]["error"] < manifest.target_row["agreement"]
    assert any("simulator" in w for w in manifest.warnings)
    assert {low.op for low in manifest.lowerings} == {"wkv7"}


def test_every_node_is_on_the_device(made: Any, tmp_path: Path) -> None:
    """Of the graphs, not of the contexts, which are one node."""
    from xexport.runtimes.opening import open_engine

    bundle = made("rwkv")
    plain = msgspec.structs.replace(bundle.manifest, contexts={}, graphs={1: bundle.manifest.graphs[1]})
    engine: Any = open_engine(bundle.path, plain, profile_prefix=tmp_path / "p")
    placed = {node.provider for node in engine.assigned()}
    engine.end_profiling()
    assert placed == {qnn.PROVIDER}


def test_the_context_is_what_is_opened(made: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The compiled files give the graphs' numbers; without them the graphs are compiled."""
    from xexport.runtimes import onnxruntime as module

    bundle = made("rwkv")
    opened: list[str] = []
    real = module._session

    def session(path: Path, *rest: Any) -> Any:
        opened.append(path.name)
        return real(path, *rest)

    monkeypatch.setattr(module, "_session", session)
    got = xexport.load(bundle.path).stream().feed([5])
    assert opened == ["model.t16.context.onnx", "model.t1.context.onnx"]
    broken = msgspec.structs.replace(
        bundle.manifest, graphs={1: "model.t1.onnx"}, contexts={1: "reference.npz"}
    )
    opened.clear()
    assert np.array_equal(Bundle(bundle.path, broken).stream().feed([5]), got)
    assert opened == ["reference.npz", "model.t1.onnx"]


def test_a_node_that_would_fall_back_is_named(made: Any, tmp_path: Path) -> None:
    from onnx import helper

    bundle = made("rwkv")
    model = onnx.load(bundle.path / "model.t1.onnx", load_external_data=False)
    logits = model.graph.output[0].name
    made_by = next(n for n in model.graph.node if logits in n.output)
    made_by.output[list(made_by.output).index(logits)] = "before"
    model.graph.node.append(helper.make_node("Det", ["square"], ["det"], name="odd"))
    model.graph.node.insert(
        len(model.graph.node) - 1, helper.make_node("MatMul", ["column", "before"], ["square"], name="outer")
    )
    model.graph.node.append(helper.make_node("Add", ["before", "det"], [logits], name="sum"))
    model.graph.initializer.append(
        onnx.numpy_helper.from_array(np.ones((1, bundle.manifest.model.vocab_size, 1), np.float32), "column")
    )
    for entry in bundle.manifest.files:
        (tmp_path / entry.path).write_bytes((bundle.path / entry.path).read_bytes())
    onnx.save(model, tmp_path / "model.t1.onnx")
    manifest = msgspec.structs.replace(bundle.manifest, contexts={}, graphs={1: "model.t1.onnx"})
    with pytest.raises(RuntimeFailure, match="promises that QNN") as caught:
        Bundle(tmp_path, manifest).stream()
    assert "Det 'odd'" in str(caught.value.got)


def test_without_the_package_the_bundle_is_written_and_says_that_it_was_not_run(
    exporter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qnn, "find_spec", lambda _: None)
    path = exporter.export("rwkv", "qnn-fp16", tmp_path / "out", preset="tiny", sizes=_SIZES)
    manifest = read_manifest(path)
    said = [w for w in manifest.warnings if "not run by QNN" in w]
    assert len(said) == 1
    assert "xexport[qnn]" in said[0]
    assert manifest.contexts == {}
    with pytest.raises(RuntimeFailure, match="can't run here"):
        xexport.load(path).stream()
    assert xexport.load(path).stream(runtime=CPU).feed([1, 2]).shape[1] == 2
