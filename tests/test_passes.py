"""Graph passes on small graphs: what each changes, what it must leave alone, and that results stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper

from xexport.exporter.passes import cse, fold, names, noop, optimize, plain_norms, shapes, transposes
from xexport.exporter.weights import CheckpointTensor

Array = np.ndarray[Any, Any]
node = helper.make_node
REAL, WHOLE = TensorProto.FLOAT, TensorProto.INT64


def build(
    nodes: Sequence[NodeProto],
    *,
    constants: dict[str, Any] | None = None,
    weights: dict[str, Array] | None = None,
    x: tuple[int | str, ...] = ("B", "T", 6),
    outputs: Sequence[str] = ("y",),
) -> ir.Model:
    """A graph of ``x`` with constants, and weights that are lazy views of a checkpoint."""
    held = {n: np.asarray(v) for n, v in (constants or {}).items()} | (weights or {})
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", REAL, x)],
        [helper.make_tensor_value_info(o, REAL, None) for o in outputs],
        [numpy_helper.from_array(a, n) for n, a in held.items()],
    )
    model = ir.from_proto(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    )
    for name, array in (weights or {}).items():
        value = model.graph.initializers[name]
        value.const_value = CheckpointTensor(torch.from_numpy(array), ir.DataType.FLOAT, name)
    return model


def kinds(model: ir.Model) -> list[str]:
    return [n.op_type for n in model.graph]


def run(model: ir.Model, x: Array) -> list[Array]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [np.asarray(r) for r in session.run(None, {"x": x})]


def check(model: ir.Model, step: Any, x: Array | None = None) -> int:
    """Run a pass; the results must stay as they were at two shapes. What the pass returned."""
    rng = np.random.default_rng(0)
    inputs = [x] if x is not None else [rng.normal(size=s).astype(np.float32) for s in ((2, 3, 6), (1, 1, 6))]
    before = [run(model, i) for i in inputs]
    count = int(step(model))
    for i, want in zip(inputs, before, strict=True):
        for a, b in zip(run(model, i), want, strict=True):
            assert a.shape == b.shape
            assert np.allclose(a, b, rtol=1e-6, atol=1e-6)
    return count


W = np.arange(24, dtype=np.float32).reshape(4, 6) / 10


# transposes


def test_transpose_of_a_weight_goes_into_the_weight() -> None:
    model = build(
        [node("Transpose", ["w"], ["t"], perm=[1, 0]), node("MatMul", ["x", "t"], ["y"])], weights={"w": W}
    )
    assert check(model, transposes.run) == 1
    assert kinds(model) == ["MatMul"]
    weight = model.graph.initializers["w"]
    assert weight.shape == ir.Shape((6, 4))
    assert isinstance(weight.const_value, CheckpointTensor), "it must not have been read"
    assert np.array_equal(weight.const_value.numpy(), W.T)


def test_transpose_without_perm_is_the_same() -> None:
    model = build([node("Transpose", ["w"], ["t"]), node("MatMul", ["x", "t"], ["y"])], weights={"w": W})
    assert check(model, transposes.run) == 1


def test_weight_that_is_also_read_as_it_is_keeps_its_transpose() -> None:
    nodes = [
        node("Transpose", ["w"], ["t"], perm=[1, 0]),
        node("MatMul", ["x", "t"], ["a"]),
        node("MatMul", ["a", "w"], ["y"]),
    ]
    model = build(nodes, weights={"w": W})
    assert check(model, transposes.run) == 0
    assert kinds(model) == ["Transpose", "MatMul", "MatMul"]


def test_transpose_of_a_value_stays() -> None:
    model = build([node("Transpose", ["x"], ["y"], perm=[1, 0, 2])])
    assert check(model, transposes.run) == 0


# fold


def test_constants_are_folded_and_weights_are_not_read() -> None:
    nodes = [
        node("Add", ["one", "two"], ["three"]),
        node("Mul", ["x", "three"], ["a"]),
        node("Neg", ["w"], ["minus"]),
        node("Mul", ["a", "minus"], ["y"]),
    ]
    vector = np.arange(6, dtype=np.float32)
    model = build(nodes, constants={"one": np.float32(1), "two": np.float32(2)}, weights={"w": vector})
    assert check(model, fold.run) == 1
    assert kinds(model) == ["Mul", "Neg", "Mul"]
    assert isinstance(model.graph.initializers["w"].const_value, CheckpointTensor)


def test_nodes_that_nothing_reads_go() -> None:
    model = build([node("Neg", ["x"], ["unread"]), node("Abs", ["x"], ["y"])])
    assert check(model, fold.run) == 1
    assert kinds(model) == ["Abs"]


def test_large_constants_are_not_made() -> None:
    nodes = [node("Expand", ["one", "shape"], ["big"]), node("Add", ["x", "big"], ["y"])]
    constants = {"one": np.float32(1), "shape": np.array([1, 1000, 6], np.int64)}
    model = build(nodes, constants=constants)
    assert check(model, fold.run, np.ones((1, 1, 6), np.float32)) == 0
    assert kinds(model) == ["Expand", "Add"]


# noop

_FULL = {
    "starts": np.array([0], np.int64),
    "ends": np.array([2**63 - 1], np.int64),
    "axes": np.array([1], np.int64),
    "steps": np.array([1], np.int64),
}


@pytest.mark.parametrize(
    ("middle", "gone"),
    [
        (node("Identity", ["x"], ["m"]), True),
        (node("Cast", ["x"], ["m"], to=REAL), True),
        (node("Slice", ["x", "starts", "ends", "axes", "steps"], ["m"]), True),
        (node("Slice", ["x", "starts", "ends", "axes"], ["m"]), True),
        (node("Slice", ["x", "one", "ends", "axes", "steps"], ["m"]), False),
        (node("Slice", ["x", "starts", "one", "axes", "steps"], ["m"]), False),
        (node("Slice", ["x", "starts", "ends", "axes", "two"], ["m"]), False),
        (node("Cast", ["x"], ["m"], to=TensorProto.DOUBLE), False),
    ],
    ids=["identity", "same cast", "full slice", "full slice, no steps", "start", "end", "step", "other cast"],
)
def test_only_what_does_nothing_is_bypassed(middle: NodeProto, gone: bool) -> None:
    constants = _FULL | {"one": np.array([1], np.int64), "two": np.array([2], np.int64)}
    last = node("Cast", ["m"], ["back"], to=REAL) if middle.op_type == "Cast" and not gone else None
    nodes = [middle, *([last] if last else []), node("Abs", ["back" if last else "m"], ["y"])]
    model = build(nodes, constants=constants)
    x = np.random.default_rng(0).normal(size=(2, 3, 6)).astype(np.float32)
    assert (check(model, noop.run, x) > 0) == gone
    assert (kinds(model) == ["Abs"]) == gone


def test_a_graph_output_keeps_its_name() -> None:
    model = build([node("Identity", ["x"], ["y"])])
    assert check(model, noop.run) == 0
    assert [o.name for o in model.graph.outputs] == ["y"]


# shapes


def _reshape(x: tuple[int | str, ...], to: Sequence[int | str]) -> ir.Model:
    """``Reshape(x, Concat(Shape(x)[0], ...))`` as torch writes a view, to dimensions known symbolically."""
    nodes, parts = [], []
    for at, dim in enumerate(to):
        if isinstance(dim, str):
            axis = x.index(dim)
            nodes.append(node("Shape", ["x"], [f"d{at}"], start=axis, end=axis + 1))
            parts.append(f"d{at}")
        else:
            parts.append(f"c{at}")
    nodes += [
        node("Concat", parts, ["target"], axis=0),
        node("Reshape", ["x", "target"], ["r"], allowzero=1),
        node("Abs", ["r"], ["y"]),
    ]
    constants = {f"c{i}": np.array([d], np.int64) for i, d in enumerate(to) if isinstance(d, int)}
    model = build(nodes, constants=constants, x=x)
    value = next(n for n in model.graph if n.op_type == "Reshape").outputs[0]
    value.shape = ir.Shape(to)
    value.type = ir.TensorType(ir.DataType.FLOAT)
    return model


@pytest.mark.parametrize(
    ("to", "target"),
    [(("B", "T", 2, 3), [0, 0, 2, 3]), (("B", "T", 6), [0, 0, 6]), (("T", "B", 6), None)],
    ids=["split", "same", "swapped"],
)
def test_target_of_a_reshape_is_constant_where_that_is_exact(
    to: tuple[int | str, ...], target: list[int] | None
) -> None:
    model = _reshape(("B", "T", 6), to)
    assert check(model, shapes.run) == (1 if target else 0)
    assert kinds(model) == (["Reshape", "Abs"] if target else ["Shape", "Shape", "Concat", "Reshape", "Abs"])
    if target:
        reshape = model.graph[0]
        assert reshape.inputs[1] is not None
        assert reshape.inputs[1].const_value is not None
        assert reshape.inputs[1].const_value.numpy().tolist() == target
        assert reshape.attributes["allowzero"].as_int() == 0


def test_one_unknown_dimension_is_inferred() -> None:
    model = _reshape(("B", "T", 6), ("T", 6))
    # at B = 1 only is this view legal; the pass may infer T but not guess
    x = np.ones((1, 4, 6), np.float32)
    assert check(model, shapes.run, x) == 1


# cse


def test_the_same_expression_is_computed_once() -> None:
    nodes = [
        node("Exp", ["x"], ["a"]),
        node("Exp", ["x"], ["b"]),
        node("Abs", ["x"], ["c"]),
        node("Add", ["a", "b"], ["d"]),
        node("Add", ["d", "c"], ["y"]),
    ]
    model = build(nodes)
    assert check(model, cse.run) == 1
    assert sorted(kinds(model)) == ["Abs", "Add", "Add", "Exp"]


def test_different_attributes_are_different_expressions() -> None:
    nodes = [
        node("LeakyRelu", ["x"], ["a"], alpha=0.1),
        node("LeakyRelu", ["x"], ["b"], alpha=0.2),
        node("Add", ["a", "b"], ["y"]),
    ]
    model = build(nodes)
    assert check(model, cse.run) == 0


def test_two_outputs_of_one_expression_both_stay() -> None:
    model = build([node("Exp", ["x"], ["y"]), node("Exp", ["x"], ["z"])], outputs=("y", "z"))
    check(model, cse.run)
    assert [o.name for o in model.graph.outputs] == ["y", "z"]


# names


def _traced(op: str, given: str, made: str, *scopes: str) -> NodeProto:
    made_node = node(op, [given], [made], name=f"node_{made}", doc_string="long")
    for key, value in (
        (names.SCOPE, repr(["", *scopes, "a.b.torch_op"])),
        ("pkg.torch.onnx.stack_trace", "File '/home/me/secret.py'"),
    ):
        made_node.metadata_props.add(key=key, value=value)
    return made_node


def test_nodes_and_values_are_called_after_their_module() -> None:
    nodes = [
        _traced("Exp", "x", "val_1", "module", "module.blocks.0", "module.blocks.0.att"),
        _traced("Exp", "val_1", "val_2", "module", "module.blocks.0", "module.blocks.0.att"),
        _traced("Abs", "val_2", "y"),
    ]
    model = build(nodes)
    model.metadata_props["pytorch"] = "2.13"
    assert check(model, names.run) == 3
    assert [n.name for n in model.graph] == ["blocks.0.att/Exp", "blocks.0.att/Exp_1", "Abs"]
    assert [n.outputs[0].name for n in model.graph] == ["blocks.0.att/Exp", "blocks.0.att/Exp_1", "y"]
    proto = ir.to_proto(model)
    assert b"secret" not in proto.SerializeToString()
    assert not proto.metadata_props
    assert not any(n.metadata_props or n.doc_string for n in proto.graph.node)
    assert (proto.producer_name, proto.producer_version) == ("xexport", "")


# all


def test_all_passes_together_keep_weights_names_and_results() -> None:
    nodes = [
        node("Identity", ["x"], ["x1"]),
        node("Transpose", ["layer.weight"], ["t1"], perm=[1, 0]),
        node("MatMul", ["x1", "t1"], ["a"]),
        node("Add", ["one", "one"], ["two"]),
        node("Mul", ["a", "two"], ["b"]),
        node("Mul", ["a", "two"], ["c"]),
        node("Add", ["b", "c"], ["d"]),
        node("Add", ["d", "layer.bias"], ["y"]),
    ]
    model = build(
        nodes,
        constants={"one": np.float32(1)},
        weights={"layer.weight": W, "layer.bias": np.arange(4, dtype=np.float32)},
    )
    counts: dict[str, int] = {}

    def step(m: ir.Model) -> int:
        counts.update(optimize(m))
        return 0

    check(model, step)
    assert kinds(model) == ["MatMul", "Mul", "Add", "Add"]
    assert {"layer.weight", "layer.bias"} <= set(model.graph.initializers)
    assert (counts["transposes"], counts["cse"], counts["names"]) == (1, 1, 4)


# plain norms


def test_rms_norms_become_older_operators() -> None:
    scale = np.linspace(0.5, 2, 6, dtype=np.float32)
    norm = node("RMSNormalization", ["x", "s"], ["n"], axis=-1, epsilon=1e-3)
    model = build([norm, node("Mul", ["n", "n"], ["y"])], weights={"s": scale})
    assert check(model, lambda m: len(plain_norms.rewrite(m))) == 0
    assert kinds(model) == ["Mul", "ReduceMean", "Add", "Sqrt", "Div", "Mul", "Mul"]


def test_a_norm_over_two_axes_stays_and_says_why() -> None:
    scale = np.ones((3, 6), np.float32)
    model = build([node("RMSNormalization", ["x", "s"], ["y"], axis=-2)], weights={"s": scale})
    (refusal,) = plain_norms.rewrite(model)
    assert "several axes" in refusal.reason
    assert kinds(model) == ["RMSNormalization"]
