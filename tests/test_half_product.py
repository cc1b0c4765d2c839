"""fp16 products: what is rounded, what is not, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from xexport.quant.formats import Context, Refusal, Stored
from xexport.quant.formats.half_product import apply
from xexport.quant.spool import Spool

_WIDTH = 24


def _model(weight: np.ndarray, *, also: str = "") -> ir.Model:
    """``y = (x W) W' + x`` with two products of one activation; ``also`` reads the weight otherwise."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
        helper.make_node("MatMul", ["x", "v"], ["b"], name="second"),
        helper.make_node("Mul", ["a", "b"], ["c"], name="mul"),
        helper.make_node("MatMul", ["c", "w"], ["d"], name="third"),
        helper.make_node("Add", ["d", "x"], ["y"], name="add"),
    ]
    if also:
        nodes[-1] = helper.make_node("Add", ["d", "w"], ["y"], name="add")
    rng = np.random.default_rng(0)
    other = rng.standard_normal((_WIDTH, _WIDTH)).astype(np.float32)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", _WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", _WIDTH])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(other, "v")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return ir.from_proto(proto)


def _run(model: ir.Model, x: np.ndarray, folder: Path) -> np.ndarray:
    ir.save(model, folder / "model.onnx")  # beside the spool that its weights are in
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"x": x})[0]
    return found


def test_products_are_rounded_and_sums_are_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    weight = (rng.standard_normal((_WIDTH, _WIDTH)) / 5).astype(np.float32)
    x = rng.standard_normal((3, _WIDTH)).astype(np.float32)
    model = _model(weight)
    want = _run(model, x, tmp_path)
    context = Context(model, Spool(tmp_path))
    for name in ("w", "v"):
        result = apply(context, model.graph.initializers[name])
        assert isinstance(result, Stored)
        assert result.bytes == 2 * _WIDTH * _WIDTH
        assert 0 < result.error < 2**-11
    got = _run(model, x, tmp_path)
    error = np.abs(got - want).max() / np.sqrt(np.mean(want**2))
    assert 1e-5 < error < 1e-2, "fp16 must show, and not more than its 11 bits"
    kinds = {n.name: n.outputs[0].dtype for n in model.graph if n.op_type == "MatMul"}
    assert set(kinds.values()) == {ir.DataType.FLOAT16}
    shared = [n for n in model.graph if n.op_type == "Cast" and n.inputs[0] is model.graph.inputs[0]]
    assert len(shared) == 1, "two products of one activation share its rounding"


@pytest.mark.parametrize(("change", "reason"), [("large", "beyond"), ("read", "something else")])
def test_what_fp16_cannot_hold_is_refused(tmp_path: Path, change: str, reason: str) -> None:
    weight = np.eye(_WIDTH, dtype=np.float32)
    if change == "large":
        weight[0, 0] = 1e6
    model = _model(weight, also="sum" if change == "read" else "")
    result = apply(Context(model, Spool(tmp_path)), model.graph.initializers["w"])
    assert isinstance(result, Refusal)
    assert reason in result.reason
