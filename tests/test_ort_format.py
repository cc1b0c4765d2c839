"""The mobile targets: ORT format computes what ONNX did; what it needs, and what CoreML and NNAPI lack."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from chunk_form import check_export
from onnx import TensorProto, helper

import xexport
from xexport.core.errors import ExportError
from xexport.exporter import ort_format
from xexport.exporter.ort_format import CONFIG_NAME, ORT_NAME, convert, usability


@pytest.mark.parametrize("target", ["mobile-fp32", "mobile-int8"])
def test_the_bundle_is_one_file_that_agrees(exporter: Any, target: str) -> None:
    bundle = xexport.load(exporter("rwkv", target))
    manifest = bundle.manifest
    assert manifest.graph == ORT_NAME
    assert {e.path for e in manifest.files} >= {ORT_NAME, CONFIG_NAME}
    assert not list(bundle.path.glob("*.onnx*"))
    assert bundle.bytes_of_weights == (bundle.path / ORT_NAME).stat().st_size
    assert manifest.checks["ORT format"]["error"] < 1e-5
    needed = (bundle.path / CONFIG_NAME).read_text()
    assert needed.startswith("# Generated from model.ort\nai.onnx;")
    assert str(bundle.path.parent) not in needed
    assert "".join(bundle.stream().generate([1, 2, 3], max_tokens=4, temperature=0))


def test_bundle_is_pytorch(exporter: Any) -> None:
    check_export(exporter, "rwkv", "mobile-fp32")


def test_the_report_says_what_the_providers_lack(exporter: Any, tmp_path: Path) -> None:
    bundle = exporter("rwkv", "mobile-int8")
    manifest = xexport.load(bundle).manifest
    said = {(r.pass_, r.reason) for r in manifest.refusals}
    for provider in ("NNAPI", "CoreML (NeuralNetwork)", "CoreML (ML Program)"):
        assert manifest.checks["usability"][provider]["suits"] == "no"
        assert (provider, "it has no ai.onnx:If") in said
    out = tmp_path / "report.md"
    xexport.pipeline.report([bundle], out)
    text = out.read_text()
    assert "it has no ai.onnx:If" in text
    assert "CoreML (ML Program)" in text


def _graph(folder: Path, nodes: list[Any], shape: list[Any]) -> Path:
    """Nodes from ``x`` to ``y``, two tensors of that shape."""
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in "xy"]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def test_usability_is_counted(tmp_path: Path) -> None:
    """relu - erf - tanh: NNAPI has no Erf, which cuts the graph in two; nothing runs with a symbolic size."""
    node = helper.make_node
    nodes = [
        node("Relu", ["x"], ["a"], "one"),
        node("Erf", ["a"], ["b"], "two"),
        node("Tanh", ["b"], ["y"], "three"),
    ]
    found, refusals = usability(_graph(tmp_path, nodes, [2, 3]))
    assert found["NNAPI"] == {
        "suits": "no",
        "as it is": {"nodes": 3, "supported": 2, "partitions": 2, "dynamic": 0},
        "with fixed shapes": {"nodes": 3, "supported": 2, "partitions": 2, "dynamic": 0},
    }
    assert ("NNAPI", "two", "it has no ai.onnx:Erf") in [(r.pass_, r.node, r.reason) for r in refusals]
    found, _ = usability(_graph(tmp_path, [nodes[0], node("Tanh", ["a"], ["y"], "three")], ["N", 3]))
    assert (found["NNAPI"]["suits"], found["NNAPI"]["with fixed shapes"]["partitions"]) == ("no", 1)
    assert found["NNAPI"]["as it is"] == {"nodes": 2, "supported": 0, "partitions": 0, "dynamic": 2}


def test_products_of_eight_bits_stay_and_are_named(tmp_path: Path) -> None:
    """A matrix that is large enough is no constant that ONNX Runtime folds into floats."""
    rng = np.random.default_rng(0)
    tensors = {
        "w": rng.integers(0, 256, (8, 1, 32), dtype=np.uint8),
        "s": rng.random((8, 1), dtype=np.float32),
    }
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], "big", domain="com.microsoft", K=32, N=8, bits=8, block_size=32
    )
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, d]) for n, d in (("x", 32), ("y", 8))]
    stored = [onnx.numpy_helper.from_array(a, n) for n, a in tensors.items()]
    graph = helper.make_graph([node], "g", values[:1], values[1:], stored)
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=10), tmp_path / "model.onnx")
    made = convert(tmp_path)
    assert "com.microsoft;1;MatMulNBits" in (tmp_path / CONFIG_NAME).read_text()
    assert [r.node for r in made.refusals if r.reason == "it has no com.microsoft:MatMulNBits"] == ["big"] * 3


def test_conversion_leaves_logging_alone_and_refuses_what_is_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = list(logging.getLogger().handlers)
    node = helper.make_node("Tanh", ["x"], ["y"], "one")
    path = _graph(tmp_path, [node], [2, 3])
    made = convert(tmp_path)
    assert [e.path for e in made.files] == [ORT_NAME, CONFIG_NAME]
    assert list(logging.getLogger().handlers) == before
    assert "".join(capfd.readouterr()) == ""
    import onnxruntime as ort

    x = np.ones((2, 3), np.float32)
    (y,) = ort.InferenceSession(str(tmp_path / ORT_NAME)).run(None, {"x": x})
    np.testing.assert_allclose(y, np.tanh(x), rtol=1e-6)
    monkeypatch.setattr(ort_format, "LIMIT", path.stat().st_size - 1)
    with pytest.raises(ExportError, match="too large for the ORT format") as caught:
        convert(tmp_path)
    assert "mobile-int8" in str(caught.value.fix)
