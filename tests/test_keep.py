"""``logits_to_keep``: which part of a graph runs on the last positions only, and what a stream returns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from tolerances import TOLERANCES

import xexport
from xexport.core.errors import InputError
from xexport.core.manifest import KEEP_INPUT
from xexport.core.state import StateSpec
from xexport.exporter.passes import keep
from xexport.runtimes.torch_eager import TorchStream

Array = np.ndarray[Any, Any]
node = helper.make_node
GOLDEN = Path(__file__).parent / "golden" / "bundle"
RNG = np.random.default_rng(3)
CONSTANTS: dict[str, Array] = {
    "w": RNG.normal(size=(6, 6)).astype(np.float32),
    "v": RNG.normal(size=(6, 9)).astype(np.float32),
    "g": RNG.normal(size=6).astype(np.float32),
    "row": RNG.normal(size=(1, 6)).astype(np.float32),
    "zero": np.array([0], np.int64),
    "one": np.array(1, np.int64),
    "minus": np.array([-1], np.int64),
    "heads": np.array([0, 0, 2, 3], np.int64),
    "flat": np.array([0, 0, 6], np.int64),
}


def graph(nodes: Sequence[NodeProto], outputs: Sequence[str] = ()) -> ir.Model:
    """A graph from ``x`` [B,T,6] to ``logits`` and further outputs, with the shapes that torch would give."""
    info = helper.make_tensor_value_info
    made = helper.make_graph(
        list(nodes),
        "g",
        [info("x", TensorProto.FLOAT, ["B", "T", 6])],
        [info(n, TensorProto.FLOAT, None) for n in ("logits", *outputs)],
        [numpy_helper.from_array(a, n) for n, a in CONSTANTS.items()],
    )
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def session(model: ir.Model) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def kept_values(model: ir.Model) -> list[str]:
    """The values that are sliced."""
    return [str(n.inputs[0].name) for n in model.graph if n.op_type == "Slice" and n.inputs[0] is not None]


RUNNING = node("CumSum", ["x", "one"], ["sum"])
NORM = node("RMSNormalization", ["sum", "g"], ["n"], axis=-1, epsilon=1e-5)
HEAD = node("MatMul", ["n", "v"], ["logits"])

#: name -> (nodes, further outputs, what is sliced)
CASES: dict[str, tuple[list[NodeProto], tuple[str, ...], list[str]]] = {
    "norm and head": ([RUNNING, NORM, HEAD], (), ["sum"]),
    "norm is a state too": ([RUNNING, NORM, HEAD], ("n",), ["n"]),
    "feed-forward network beside a residual": (
        [
            RUNNING,
            node("MatMul", ["sum", "w"], ["a"]),
            node("Relu", ["a"], ["b"]),
            node("MatMul", ["b", "w"], ["c"]),
            node("Add", ["sum", "c"], ["d"]),
            node("LayerNormalization", ["d", "g", "g"], ["n"], axis=-1),
            HEAD,
        ],
        (),
        ["sum"],
    ),
    "a norm's weight of the input's full shape": (
        [
            RUNNING,
            node("Shape", ["sum"], ["size"]),
            node(
                "ConstantOfShape", ["size"], ["ones"], value=numpy_helper.from_array(np.ones(1, np.float32))
            ),
            node("RMSNormalization", ["sum", "ones"], ["n"], axis=-1, epsilon=1e-5),
            HEAD,
        ],
        (),
        ["n"],
    ),
    "residual and branch": (
        [
            RUNNING,
            node("CumSum", ["sum", "one"], ["branch"]),
            node("MatMul", ["branch", "w"], ["c"]),
            node("Add", ["sum", "c"], ["n"]),
            HEAD,
        ],
        (),
        ["sum", "branch"],
    ),
    "one slice rather than two where no product is saved": (
        [
            RUNNING,
            node("Sub", ["sum", "x"], ["a"]),
            node("Mul", ["a", "g"], ["b"]),
            node("Add", ["x", "b"], ["n"]),
            HEAD,
        ],
        (),
        ["n"],
    ),
    "a row for each position ends it": (
        [
            RUNNING,
            node("ReduceMax", ["x", "zero"], ["places"], keepdims=0),
            node("Add", ["sum", "places"], ["n"]),
            HEAD,
        ],
        (),
        ["n"],
    ),
    "a row for all positions does not": (
        [RUNNING, node("Add", ["sum", "row"], ["n"]), HEAD],
        (),
        ["sum"],
    ),
    "views of heads": (
        [
            RUNNING,
            node("Reshape", ["sum", "heads"], ["a"]),
            node("ReduceMean", ["a", "minus"], ["m"], keepdims=1),
            node("Sub", ["a", "m"], ["b"]),
            node("Softmax", ["b"], ["c"], axis=-1),
            node("Transpose", ["c"], ["d"], perm=[0, 1, 3, 2]),
            node("Transpose", ["d"], ["e"], perm=[0, 1, 3, 2]),
            node("Reshape", ["e", "flat"], ["f"]),
            node("MatMul", ["f", "w"], ["n"]),
            HEAD,
        ],
        (),
        ["b"],
    ),
    "softmax over the positions ends it": (
        [RUNNING, node("Softmax", ["sum"], ["n"], axis=1), HEAD],
        (),
        ["n"],
    ),
    "the whole graph": ([node("MatMul", ["x", "v"], ["logits"])], (), ["x"]),
}


@pytest.mark.parametrize("name", CASES)
def test_last_logits_are_those_of_the_whole(name: str) -> None:
    nodes, outputs, sliced = CASES[name]
    x = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    whole, *others = session(graph(nodes, outputs)).run(None, {"x": x})
    model = graph(nodes, outputs)
    assert keep.rewrite(model) == []
    assert kept_values(model) == sliced
    run = session(model)
    for count in (None, 0, 1, 2, 4, 5, 9):
        feeds = {"x": x} | ({} if count is None else {KEEP_INPUT: np.array([count], np.int64)})
        logits, *rest = run.run(None, feeds)
        np.testing.assert_allclose(logits, whole[:, -count:] if count else whole, rtol=1e-5, atol=1e-6)
        for got, want in zip(rest, others, strict=True):
            np.testing.assert_array_equal(got, want)


def test_products_and_logits_are_of_the_kept_positions() -> None:
    model = graph(CASES["feed-forward network beside a residual"][0])
    keep.rewrite(model)
    for made in model.graph:
        if made.op_type == "MatMul":
            assert made.inputs[0] is not None
            assert [str(d) for d in made.inputs[0].shape or ()] == ["B", "kept", "6"]
    assert [str(d) for d in model.graph.outputs[0].shape or ()] == ["B", "kept", "9"]
    assert model.graph.inputs[-1].name == KEEP_INPUT
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.parametrize(
    ("nodes", "outputs", "reason"),
    [
        ([node("CumSum", ["x", "one"], ["logits"])], (), "CumSum"),
        ([node("Add", ["x", "g"], ["logits"])], (), "no product"),
        (
            [node("MatMul", ["x", "v"], ["logits"]), node("ReduceMax", ["logits", "minus"], ["top"])],
            ("top",),
            "reads the logits of every position",
        ),
        (
            [node("Transpose", ["x"], ["t"], perm=[0, 2, 1]), node("MatMul", ["x", "t"], ["logits"])],
            (),
            "MatMul",
        ),
    ],
    ids=["mixes positions", "nothing to save", "logits are read", "attention"],
)
def test_why_not(nodes: list[NodeProto], outputs: tuple[str, ...], reason: str) -> None:
    model = graph(nodes, outputs)
    before = ir.to_proto(model).SerializeToString()
    (refusal,) = keep.rewrite(model)
    assert refusal.pass_ == "keep"
    assert reason in refusal.reason
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize("family", ["hyena", "mamba", "retnet", "rwkv"])
def test_bundles_return_the_last_logits(exporter: Any, family: str) -> None:
    bundle = xexport.load(exporter(family, "cpu-int8"))
    inputs = {t.name: (t.dtype, t.shape) for t in bundle.manifest.inputs}
    assert inputs[KEEP_INPUT] == ("int64", (1,))
    assert bundle.manifest.outputs[0].shape[:2] == ("B", "kept")
    assert bundle.manifest.checks["kept_error"] < TOLERANCES["model_fp32"]
    tokens = np.random.default_rng(1).integers(0, bundle.manifest.model.vocab_size, (2, 11))
    stream = bundle.stream(batch=2, threads=1)
    assert stream.keeps
    whole = stream.feed(tokens)
    state = stream.state()
    for count in (1, 3, 11, 40):
        stream.reset()
        got = stream.feed(tokens, keep=count)
        assert got.shape == (2, min(count, 11), whole.shape[2])
        scale = np.abs(whole).max()
        assert np.abs(got - whole[:, -count:]).max() < TOLERANCES["model_int8_cut"] * max(1.0, scale)
        assert all(np.array_equal(a, state[n]) for n, a in stream.state().items())
        assert stream.position == 11
    assert stream.feed(tokens[:, :1], keep=1).shape == (2, 1, whole.shape[2])
    assert stream.feed(tokens[:, :1], keep=0).shape == (2, 1, whole.shape[2])


def test_a_bundle_from_before_gives_the_same_by_computing_all() -> None:
    bundle = xexport.load(GOLDEN)
    stream = bundle.stream(threads=1)
    assert not stream.keeps
    tokens = np.arange(9) % bundle.manifest.model.vocab_size
    whole = stream.feed(tokens)
    stream.reset()
    np.testing.assert_array_equal(stream.feed(tokens, keep=2), whole[:, -2:])


def test_a_negative_number_is_refused(toy_bundle: Path) -> None:
    stream = xexport.load(toy_bundle).stream(threads=1)
    with pytest.raises(InputError, match="positions to keep"):
        stream.feed([1, 2], keep=-1)
    assert stream.position == 0


class Sum(torch.nn.Module):
    """A running sum and a head that notes how many positions it was given."""

    vocab_size = 7

    def __init__(self) -> None:
        super().__init__()
        self.max_tokens = None
        self.embed = torch.nn.Embedding(7, 4)
        self.head = torch.nn.Linear(4, 7)
        self.head.register_forward_hook(lambda _m, inputs, _y: self.given.append(inputs[0].shape[1]))
        self.given: list[int] = []

    def state_spec(self) -> list[StateSpec]:
        return [StateSpec("s", ("B", 4))]

    def forward(self, tokens: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = torch.cumsum(self.embed(tokens), 1) + s[:, None]
        return self.head(h), h[:, -1]


@pytest.mark.parametrize(("head", "given"), [("head", 2), (None, 6)])
def test_torch_is_spared_the_same_products(head: str | None, given: int) -> None:
    module: Any = Sum()
    stream = TorchStream(module, head=head)
    assert stream.keeps == (head is not None)
    whole = stream.feed(range(6))
    stream.reset()
    got = stream.feed(range(6), keep=2)
    assert module.given == [6, given]
    np.testing.assert_allclose(got, whole[:, -2:], rtol=1e-6, atol=1e-6)
    assert stream.feed([1]).shape == (1, 1, 7)


def test_the_head_of_a_family_is_found() -> None:
    from xexport.models._resolve import resolve

    for family, path in (("rwkv", "head"), ("mamba", "lm_head"), ("retnet", "head")):
        source = resolve(family, preset="tiny")
        assert source.head == path
