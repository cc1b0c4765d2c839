"""Products joined in one node: the bits they had, bodies, what is not joined, and what is refused."""
# ruff: noqa: F811, F401  (fixtures that another file has)

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_native import _options, isa, library
from test_products import Case, activations, error

from xexport.core.op import DOMAIN
from xexport.exporter.functions import attach_functions
from xexport.exporter.passes.together import MOST, NAMES, rewrite

Array = np.ndarray[Any, Any]
ROW = (
    ("int4", 96, 40),
    ("int8-64", 96, 33),
    ("float32", 70, 21),
    ("float16", 96, 5),
    ("int4", 96, 13),
    ("int6", 96, 19),
)
INPUTS = ["a", "b", "c", "b", "a", "b"]


def model_of(products: Sequence[tuple[str, int, int]], inputs: Sequence[str]) -> ir.Model:
    """Products with an input each, which several may share; outputs y0, y1 ..."""
    nodes, inits, infos, outputs = [], [], {}, []
    for i, ((kind, K, N), x) in enumerate(zip(products, inputs, strict=True)):
        case = Case(kind, K, N, seed=i)
        named = {f"w{i}.{k}": a for k, a in enumerate(case.tensors)}
        inits += [numpy_helper.from_array(a, n) for n, a in named.items()]
        infos[x] = helper.make_tensor_value_info(x, TensorProto.FLOAT, [f"{x}.T", K])
        node = helper.make_node(case.op, [x, *named], [f"y{i}"], f"p{i}", domain=DOMAIN, **case.attributes)
        nodes.append(node)
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [f"{x}.T", N]))
    graph = helper.make_graph(nodes, "g", list(infos.values()), outputs, inits)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def run(
    model: ir.Model, feeds: dict[str, Array], library: Path | None, isa: str = "", threads: int = 1
) -> list[Array]:
    attach_functions(model, {}, {})
    options = _options(library, isa, threads)
    data = ir.to_proto(model).SerializeToString()
    return list(ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, feeds))


@pytest.mark.parametrize("tokens", [(1, 1, 1), (3, 1, 0), (11, 40, 2), (33, 5, 12)])
@pytest.mark.parametrize("threads", [1, 2])
def test_joined_products_have_the_bits_they_had(
    library: Path, isa: str, tokens: tuple[int, int, int], threads: int
) -> None:
    """Inputs of their own lengths, of which products of one format share one."""
    inputs = INPUTS
    feeds = {x: activations(n, K) for x, n, K in zip("abc", tokens, (96, 96, 70), strict=True)}
    joined = model_of(ROW, inputs)
    assert rewrite(joined) == []
    (node,) = joined.graph
    assert node.op_type == "linear_group_0"
    apart = run(model_of(ROW, inputs), feeds, library, isa)
    for want, got in zip(apart, run(joined, feeds, library, isa, threads), strict=True):
        np.testing.assert_array_equal(got, want)


def test_large_products_are_shared_by_threads(library: Path) -> None:
    """Several jobs a product."""
    row = (("int4", 768, 1000), ("int8-128", 768, 500), ("float16", 768, 64), ("int4", 64, 768))
    feeds = {"a": activations(2, 768), "b": activations(1, 64)}
    joined, inputs = model_of(row, "aaab"), "aaab"
    rewrite(joined)
    apart = run(model_of(row, inputs), feeds, library)
    for want, got in zip(apart, run(joined, feeds, library, "", 2), strict=True):
        np.testing.assert_array_equal(got, want)


def test_without_the_kernel_the_body_calls_the_operators(library: Path) -> None:
    joined = model_of(ROW, INPUTS)
    rewrite(joined)
    feeds = {"a": activations(3, 96), "b": activations(2, 96), "c": activations(1, 70)}
    for want, got in zip(run(joined, feeds, library), run(joined, feeds, None), strict=True):
        assert error(got, want) <= 0.02
    lowerings = {low.op: low.nodes for low in attach_functions(joined, {}, {})}
    apart = {"linear": 2, "linear_int4x8": 2, "linear_int6x8": 1, "linear_int8": 1}
    assert lowerings == {**apart, "linear_group_*": 1}


def graph_of(nodes: Sequence[Any]) -> ir.Model:
    """Nodes of ``x`` [T,8] and ``c`` to ``y``; products read ``w`` [8,8]."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", 8])
    c = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    w = numpy_helper.from_array(np.full((8, 8), 0.5, np.float32), "w")
    graph = helper.make_graph(list(nodes), "g", [x, c], [y], [w])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def product(x: str, y: str) -> Any:
    return helper.make_node("linear", [x, "w"], [y], f"of_{y}", domain=DOMAIN)


def branch(value: str) -> Any:
    """A subgraph that reads a value of the graph around it."""
    out = helper.make_tensor_value_info(f"{value}.same", TensorProto.FLOAT, None)
    return helper.make_graph([helper.make_node("Identity", [value], [f"{value}.same"])], value, [], [out])


def chosen(one: str, other: str, out: str) -> Any:
    return helper.make_node("If", ["c"], [out], then_branch=branch(one), else_branch=branch(other))


@pytest.mark.parametrize(
    ("nodes", "types"),
    [
        ([product("x", "a"), product("a", "b"), product("b", "y")], ["linear"] * 3),
        (
            [
                product("x", "a"),
                product("x", "b"),
                helper.make_node("Add", ["a", "b"], ["d"]),
                product("d", "y"),
            ],
            ["linear_group_0", "Add", "linear"],
        ),
        (
            [
                product("x", "a"),
                product("a", "b"),
                chosen("b", "x", "d"),
                product("d", "e"),
                product("x", "f"),
                helper.make_node("Add", ["e", "f"], ["y"]),
            ],
            ["linear_group_0", "linear", "If", "linear", "Add"],
        ),
    ],
    ids=["one after another", "side by side", "through a branch"],
)
def test_only_what_is_independent_is_joined(nodes: list[Any], types: list[str], library: Path) -> None:
    feeds = {"x": activations(3, 8), "c": np.array(True)}
    (want,) = run(graph_of(nodes), feeds, library)
    joined = graph_of(nodes)
    assert rewrite(joined) == []
    assert sorted(n.op_type for n in joined.graph) == sorted(types)
    np.testing.assert_array_equal(run(joined, feeds, library)[0], want)


def test_a_node_has_so_many_products_and_a_graph_so_many_groups() -> None:
    wide = [product("x", f"a{i}") for i in range(MOST + 2)]
    names = [n.outputs[0].name for n in graph_of([*wide, product("x", "y")]).graph]
    model = graph_of([*wide, product("x", "y")])
    rewrite(model)
    assert [len(n.outputs) for n in model.graph] == [MOST, len(names) - MOST]
    products = [("float32", 8 + i, 8) for i in range(2 * NAMES + 2) for _ in range(2)]
    assert len(products) > MOST
    model = model_of(products, [f"x{i}" for i in range(len(products))])
    refusals = rewrite(model)
    assert refusals == [] or all("different groups" in r.reason for r in refusals)


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ([], "four numbers of each of 1 to 16 products"),
        ([0, 8, 8], "four numbers"),
        ([9, 8, 8, 0, 0, 8, 8, 0], "no format of a product has the number 9"),
        ([0, 8, 7, 0, 0, 8, 8, 0], r"K 8 and N 7 disagree with the weight, float32 \[8,8\]"),
        ([0, 8, 8, 0], "its products have 2 inputs, got 4"),
    ],
)
def test_wrong_attributes_are_refused_by_name(library: Path, numbers: list[int], says: str) -> None:
    model = graph_of([product("x", "a"), product("x", "b"), helper.make_node("Add", ["a", "b"], ["y"])])
    rewrite(model)
    model.graph[0].attributes["products"] = ir.AttrInt64s("products", numbers)
    with pytest.raises(Exception, match=says) as caught:
        run(model, {"x": activations(3, 8), "c": np.array(True)}, library)
    assert "xexport linear_group node 'of_a/linear_group_0'" in str(caught.value)


def test_wrong_shapes_are_refused_by_name(library: Path) -> None:
    model = model_of(ROW[:2], "ab")
    rewrite(model)
    model.graph.inputs[0].shape = ir.Shape(["T", None])
    with pytest.raises(Exception, match=r"x must be float32 \[...,96\], got float32 \[2,95\]"):
        run(model, {"a": activations(2, 95), "b": activations(2, 96)}, library)
