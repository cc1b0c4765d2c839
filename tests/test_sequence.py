"""Operators in a row as one node: the bits they had, memory used again, profiles, and what is refused."""
# ruff: noqa: F811, F401  (fixtures that another file has)

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from chunk_form import random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from test_native import _options, isa, library
from tolerances import TOLERANCES

import xexport
from xexport.core.op import DOMAIN
from xexport.core.registry import get_family
from xexport.evaluate.suite import Sizes
from xexport.exporter.functions import attach_functions
from xexport.exporter.passes.sequence import FEWEST, NAMES, rewrite
from xexport.models.rwkv import RwkvConfig

Array = np.ndarray[Any, Any]
WIDTH = 8
BRIEF = Sizes(16, 16, chunk_tokens=8, steps=2, prefill=(4,), positions=(), timed=False)


@pytest.fixture(scope="module", params=["rwkv", "mamba"])
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph of a tiny model; products are float32, so that all of them are our operators."""
    out = tmp_path_factory.mktemp("sequence") / request.param
    xexport.export(request.param, preset="tiny", target="cpu-fp32", out=out, sizes=BRIEF)
    return out / "model.onnx"


def session(graph: Path | bytes, library: Path | None, *, apart: bool = False, **options: Any) -> Any:
    made = _options(None, options.get("isa", ""), options.get("threads", 1))
    if apart:
        made.add_session_config_entry("xexport.sequences", "0")
    if library is not None:
        made.register_custom_ops_library(str(library))
    if "profile" in options:
        made.enable_profiling, made.profile_file_prefix = True, str(options["profile"])
    data = str(graph) if isinstance(graph, Path) else graph
    return ort.InferenceSession(data, made, providers=["CPUExecutionProvider"])


def feeds(found: Any, tokens: int, seed: int = 0) -> dict[str, Array]:
    """Tokens, and a state that is not its first value."""
    rng = np.random.default_rng(seed)
    made: dict[str, Array] = {}
    for i in found.get_inputs():
        shape = [d if isinstance(d, int) else {"B": 2, "T": tokens}[d] for d in i.shape]
        floats = i.type == "tensor(float)"
        made[i.name] = rng.random(shape, np.float32) if floats else rng.integers(0, 20, shape)
    return made


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_sequence_has_the_bits_of_its_operators(
    graph: Path, library: Path, isa: str, tokens: int, threads: int
) -> None:
    one, many = (session(graph, library, apart=a, isa=isa, threads=threads) for a in (False, True))
    x = feeds(one, tokens)
    for got, want in zip(one.run(None, x), many.run(None, x), strict=True):
        np.testing.assert_array_equal(got, want)


def test_without_kernels_the_bodies_run(graph: Path, library: Path) -> None:
    one, plain = session(graph, library), session(graph, None)
    x = feeds(one, 5)
    for got, want in zip(one.run(None, x), plain.run(None, x), strict=True):
        assert np.abs(got - want).max() <= TOLERANCES["model_fp32"] * max(1.0, np.abs(want).max())


def types_that_ran(graph: Path, library: Path, folder: Path, apart: bool) -> set[str]:
    made = session(graph, library, apart=apart, profile=folder / "p")
    made.run(None, feeds(made, 1))
    events = json.loads(Path(made.end_profiling()).read_text())
    return {e["args"]["op_name"] for e in events if e.get("cat") == "Node" and "op_name" in e.get("args", {})}


def test_a_profile_tells_which_of_the_two_ran(graph: Path, library: Path, tmp_path: Path) -> None:
    one = types_that_ran(graph, library, tmp_path, apart=False)
    many = types_that_ran(graph, library, tmp_path, apart=True)
    assert "sequence_0" in one
    assert not any(t.startswith("sequence") for t in many)
    assert any(t.startswith("fused_rows") for t in many - one)


def test_one_session_serves_many_threads(graph: Path, library: Path) -> None:
    """Memory between parts belongs to a thread; lengths differ, so it grows while others run."""
    shared = session(graph, library)
    same_for_many_callers(shared, [feeds(shared, 1 + 13 * (i % 4), i) for i in range(24)])


def same_for_many_callers(shared: Any, asked: Sequence[dict[str, Array]]) -> None:
    wanted = [shared.run(None, x) for x in asked]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda x: shared.run(None, x), asked))
    for got, want in zip(found, wanted, strict=True):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)


WIDE = 384  # a product of one token is work that a team shares


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph of a model whose steps are worth several threads."""
    out = tmp_path_factory.mktemp("wide") / "rwkv"
    text = out.with_name("ids.txt")
    text.write_text(" ".join(str(i % 256) for i in range(64)), encoding="utf-8")
    module = random_model(get_family("rwkv"), RwkvConfig(2, WIDE, 256), seed=0)
    xexport.export(module, target="cpu-int8", out=out, eval_text=text, sizes=BRIEF, name="rwkv")
    return out / "model.onnx"


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_team_has_the_bits_of_one_thread(wide: Path, library: Path, threads: int) -> None:
    """More threads than cores too: nobody may wait for one that never comes."""
    one, many = session(wide, library), session(wide, library, threads=threads)
    for i in range(20):
        x = feeds(one, 1 + i % 3, i)
        for got, want in zip(many.run(None, x), one.run(None, x), strict=True):
            np.testing.assert_array_equal(got, want)


def test_teams_of_many_callers_share_the_threads(wide: Path, library: Path) -> None:
    shared = session(wide, library, threads=3)
    same_for_many_callers(shared, [feeds(shared, 1 + i % 2, i) for i in range(40)])


def test_what_a_part_refuses_comes_out_of_a_team(wide: Path, library: Path) -> None:
    """The leader may be any of the session's threads; the caller gets its error, and the session goes on."""
    proto = onnx.load(wide, load_external_data=False)
    state = next(i for i in proto.graph.input if len(i.type.tensor_type.shape.dim) == 4)
    state.type.tensor_type.shape.dim[3].dim_param = "M"  # so that ONNX Runtime doesn't refuse it itself
    path = wide.with_name("open.onnx")
    onnx.save(proto, path)
    made = session(path, library, threads=2)
    right = feeds(session(wide, library), 1)
    heads, size = right[state.name].shape[1:3]
    wrong = {**right, state.name: np.zeros((2, heads, size, size + 1), np.float32)}
    for _ in range(20):
        with pytest.raises(Exception, match=rf"state must be float32 \[2,{heads},{size},{size}\]"):
            made.run(None, wrong)
        assert np.isfinite(made.run(None, right)[0]).all()


# Graphs of products and reshapes


def model_of(nodes: Sequence[Any], outputs: Sequence[str]) -> ir.Model:
    """Nodes that read ``x`` [T,8] and weights ``w0``, ``w1`` [8,8]."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.standard_normal((8, 8)).astype(np.float32) / 3, f"w{i}") for i in (0, 1)
    ]
    shapes = [
        numpy_helper.from_array(np.array(s, np.int64), n)
        for n, s in (("four", [0, 2, 4]), ("eight", [-1, 8]))
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", WIDTH])
    y = [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    made = helper.make_graph(list(nodes), "g", [x], y, [*weights, *shapes])
    return ir.from_proto(helper.make_model(made, opset_imports=opsets, ir_version=10))


def product(x: str, y: str, weight: int = 0) -> Any:
    return helper.make_node("linear", [x, f"w{weight}"], [y], f"layers.0.{y}/linear", domain=DOMAIN)


def through_four(x: str, y: str) -> list[Any]:
    return [
        helper.make_node("Reshape", [x, "four"], [f"{y}.4"], f"layers.0.{y}/four"),
        helper.make_node("Reshape", [f"{y}.4", "eight"], [y], f"layers.0.{y}/eight"),
    ]


def run(model: ir.Model, x: Array, library: Path | None) -> list[Array]:
    attach_functions(model, {}, {})
    made = session(ir.to_proto(model).SerializeToString(), library)
    return list(made.run(None, {"x": x}))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_memory_is_used_again_only_when_nothing_reads_it(library: Path, data: st.DataObject) -> None:
    """Any wiring of products and reshapes, any of them outputs."""
    count = data.draw(st.integers(FEWEST, 14))
    values, nodes = ["x"], []
    for i in range(count):
        source, name = data.draw(st.sampled_from(values[-6:])), f"v{i}"
        nodes += (
            [product(source, name, i % 2)]
            if i < FEWEST or data.draw(st.booleans())
            else through_four(source, name)
        )
        values.append(name)
    chosen = data.draw(st.lists(st.sampled_from(values[1:]), min_size=1, max_size=4, unique=True))
    x = np.random.default_rng(count).standard_normal((5, WIDTH)).astype(np.float32)
    want = run(model_of(nodes, chosen), x, library)
    joined = model_of(nodes, chosen)
    assert rewrite(joined) == []
    if {"v0", "v1", "v2"} & set(chosen):  # these are products
        assert any(n.op_type == "sequence_0" for n in joined.graph)
    for which in (library, None):
        for a, b in zip(run(joined.clone(), x, which), want, strict=True):
            np.testing.assert_allclose(a, b, rtol=0 if which else 1e-5, atol=0 if which else 1e-5)


def test_two_memories_serve_a_long_row() -> None:
    nodes = [product("x", "v0"), *(product(f"v{i}", f"v{i + 1}") for i in range(9))]
    joined = model_of(nodes, ["v9"])
    rewrite(joined)
    (node,) = joined.graph
    places = [p for p in node.attributes["plan"].as_ints() if p < 0]
    assert set(places) == {-1, -2}


def test_layers_of_one_structure_share_a_function() -> None:
    nodes, at = [], "x"
    for layer in range(3):
        for i in range(FEWEST):
            nodes.append(product(at, f"{layer}.{i}"))
            nodes[-1].name = f"layers.{layer}.v{i}/linear"
            at = f"{layer}.{i}"
    joined = model_of(nodes, [at])
    assert rewrite(joined) == []
    assert [n.op_type for n in joined.graph] == ["sequence_0"] * 3


def test_short_rows_stay_as_they_are() -> None:
    nodes = [product("x", "a"), product("a", "b"), helper.make_node("Neg", ["b"], ["c"]), product("c", "d")]
    joined = model_of(nodes, ["d"])
    assert rewrite(joined) == []
    assert [n.op_type for n in joined.graph] == ["linear", "linear", "Neg", "linear"]


def test_more_sequences_than_names_are_refused_with_the_reason() -> None:
    """Rows of different lengths, between them a node that ends a row."""
    nodes, at = [], "x"
    for i in range(NAMES + 1):
        for k in range(FEWEST + i):
            nodes.append(product(at, f"{i}.{k}"))
            at = f"{i}.{k}"
        nodes.append(helper.make_node("Neg", [at], [f"{i}.n"]))
        at = f"{i}.n"
    (refusal,) = rewrite(model_of(nodes, [at]))
    assert f"{NAMES} different sequences" in refusal.reason


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plan: plan[:-1], "ends in the middle"),
        (lambda plan: [plan[0], plan[1], *plan[2:8], 1, 99, *plan[10:]], "is allowed"),
        (lambda plan: [2, 4, *b"evil", 1, 0, 1, 0], "no such operator"),
        (lambda plan: [2, 8, *b"sequence", 1, 0, 1, 0], "no such operator"),
        (lambda plan: [2], "no parts"),
        (lambda plan: [2, 6, *b"linear", 1, 0, 1, 0], "no kernel reads"),
    ],
)
def test_a_bad_plan_is_an_error_that_names_the_node(library: Path, change: Any, words: str) -> None:
    joined = model_of([product("x", "a"), product("a", "b"), product("b", "c")], ["c"])
    rewrite(joined)
    (node,) = joined.graph
    plan = change(list(node.attributes["plan"].as_ints()))
    node.attributes["plan"] = ir.AttrInt64s("plan", plan)
    attach_functions(joined, {}, {})
    with pytest.raises(Exception, match=words) as caught:
        session(ir.to_proto(joined).SerializeToString(), library)
    assert "layers.0.a/linear" in str(caught.value)


def test_after_a_long_prompt_the_memory_goes_and_steps_go_on(library: Path) -> None:
    """128 MB between the parts."""
    joined = model_of([product("x", "a"), product("a", "b"), product("b", "c")], ["c"])
    rewrite(joined)
    attach_functions(joined, {}, {})
    made = session(ir.to_proto(joined).SerializeToString(), library)
    x = np.random.default_rng(1).standard_normal((2 << 20, WIDTH)).astype(np.float32)
    long = made.run(None, {"x": x})[0]
    for i in (0, 5, len(x) - 1):
        # many rows are summed in another order than one
        np.testing.assert_allclose(made.run(None, {"x": x[i : i + 1]})[0][0], long[i], atol=1e-6)
