"""Static INT8: ranges from running histograms, pairs around the products, and what the manifest records."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from tolerances import TOLERANCES

import xexport
from xexport.core.errors import QuantError
from xexport.quant.formats.dequantize import QDQ_SUFFIX
from xexport.quant.qdq import insert, places
from xexport.quant.ranges import METHODS, Histogram, Range, choose
from xexport.quant.scheme import Activations, get_scheme
from xexport.runtimes.bundle import Bundle


def seen(*arrays: Any) -> Histogram:
    histogram = Histogram()
    for array in arrays:
        histogram.add(np.asarray(array, np.float32))
    return histogram


def rounded(values: Any, chosen: Range) -> Any:
    codes = np.clip(np.rint(values / chosen.scale) + chosen.zero, 0, 2**chosen.bits - 1)
    return (codes - chosen.zero) * chosen.scale


def test_a_histogram_does_not_depend_on_the_pieces() -> None:
    """Small values first, so that the range doubles many times, or the largest first."""
    values = np.random.default_rng(0).standard_t(3, 20000).astype(np.float32)
    rising = values[np.argsort(np.abs(values))]
    one, other = seen(*np.array_split(rising, 40)), seen(*np.array_split(rising[::-1], 7))
    for found in (one, other):
        assert found.counts.sum() == values.size
        assert (found.low, found.high) == (values.min(), values.max())
        cumulated = np.interp(np.linspace(-5, 5, 21), found.edges[1:], np.cumsum(found.counts) / values.size)
        exact = [(values <= x).mean() for x in np.linspace(-5, 5, 21)]
        assert np.abs(cumulated - exact).max() < 0.02


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [8, 16])
def test_a_range_rounds_what_was_seen(method: str, bits: int) -> None:
    values = np.random.default_rng(1).normal(0.3, 1.0, 50000).astype(np.float32)
    chosen = choose(seen(values), method, bits)
    error = np.sqrt(np.mean((rounded(values, chosen) - values) ** 2))
    assert error < {8: 0.02, 16: 0.004}[bits]
    assert rounded(0.0, chosen) == 0.0


def test_outliers_are_cut_off_by_all_but_min_max() -> None:
    rng = np.random.default_rng(2)
    values = np.concatenate([rng.normal(0, 1, 100000), [80.0, -60.0]])
    found = {m: choose(seen(values), m, 8) for m in METHODS}
    assert (found["min-max"].low, found["min-max"].high) == (-60.0, 80.0)
    for method in ("percentile", "entropy"):
        assert found[method].high < 30
        bulk = values[np.abs(values) < 4]
        coarse = np.std(rounded(bulk, found["min-max"]) - bulk)
        assert np.std(rounded(bulk, found[method]) - bulk) < coarse / 2


def test_odd_tensors_have_a_range() -> None:
    assert choose(seen(), "percentile", 8).scale > 0
    assert choose(seen(np.zeros(9)), "entropy", 8).scale > 0
    positive = choose(seen(np.linspace(2, 3, 50)), "min-max", 8)
    assert (positive.low, positive.zero) == (0.0, 0)
    assert choose(seen([np.nan, np.inf, 1.0, -1.0]), "min-max", 8).high == 1.0


@pytest.fixture(scope="module")
def bundle(exporter: Any) -> Bundle:
    return xexport.load(exporter("rwkv", "cpu-qdq-int8"))


def test_every_big_product_has_its_pairs(bundle: Bundle) -> None:
    import onnx

    graph = onnx.load(bundle.path / "model.onnx", load_external_data=False).graph
    made = {o: n for n in graph.node for o in n.output}
    products = [n for n in graph.node if n.op_type == "MatMul" and n.input[1].endswith("/dequantized")]
    assert len(products) == 2 * 6 + 1
    for node in products:
        assert made[node.input[0]].op_type == "DequantizeLinear"
        assert made[node.input[1]].op_type == "DequantizeLinear"
        assert [n.op_type for n in graph.node if node.output[0] in n.input] == ["QuantizeLinear"]
    outputs = {o.name for o in graph.output}
    states = {s.output for s in bundle.manifest.state}
    assert not any(made[o].op_type == "DequantizeLinear" for o in states & outputs)


def test_the_manifest_records_every_range(bundle: Bundle) -> None:
    rows = bundle.manifest.activations
    assert len(rows) == len({r.value for r in rows}) > 20
    assert {(r.bits, r.method) for r in rows} == {(8, "min-max")}
    assert all(r.seen_low <= r.seen_high and r.low <= 0 <= r.high for r in rows)
    formats = {d.role: d.format for d in bundle.manifest.decisions}
    assert formats["projection"] == formats["head"] == "int8 per channel"
    assert formats["decay"] == "float32"


def test_noise_is_that_of_rounding() -> None:
    values = np.random.default_rng(3).standard_normal(200_000).astype(np.float32)
    chosen = choose(seen(values), "min-max", 8)
    off = np.sqrt(np.mean((rounded(values, chosen) - values) ** 2) / np.mean(values**2))
    assert chosen.noise(seen(values)) == pytest.approx(off, rel=0.05)


def test_a_product_with_outliers_has_16_bits_on_both_sides_and_no_other() -> None:
    """The second product alone has a coarse input; the third's input is its output."""
    rng = np.random.default_rng(4)
    ordinary = rng.standard_normal(5000)
    heavy = np.concatenate([0.05 * ordinary, [30.0]])
    x, z = (ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT)) for n in "xz")
    made, inputs = [], {"a": x, "b": z, "c": None}
    for name, value in inputs.items():
        weight = ir.node("Identity", [], name=f"{name}{QDQ_SUFFIX}")
        source = value if value is not None else made[-1].outputs[0]
        product = ir.node("MatMul", [source, weight.outputs[0]], name=name)
        product.outputs[0].name = f"{name}/out"
        made += [weight, product]
    ends = [node.outputs[0] for node in made[1::2]]
    graph = ir.Graph([x, z], ends, nodes=made, opset_imports={"": 23}, name="g")
    model = ir.Model(graph, ir_version=10)
    values = places(model)
    assert [v.name for v in values] == ["x", "a/out", "z", "b/out", "c/out"]
    ranges = {str(v.name): seen(heavy if v.name == "z" else ordinary) for v in values}
    rows = insert(model, values, ranges, Activations(8, "min-max", 0.05))
    assert {r.value: r.bits for r in rows} == {"x": 8, "a/out": 8, "z": 16, "b/out": 16, "c/out": 16}
    assert not {n.inputs[2].dtype for n in graph if n.op_type == "QuantizeLinear"} - {
        ir.DataType.UINT8,
        ir.DataType.UINT16,
    }


def test_it_is_near_the_exact_model(bundle: Bundle, exporter: Any) -> None:
    tokens = np.array([int(x) for x in exporter.ids.read_text().split()][:60])
    want = xexport.load(exporter("rwkv", "cpu-fp32")).stream().feed(tokens)
    whole, parts = bundle.stream(), bundle.stream()
    got = whole.feed(tokens)
    cut = np.concatenate([parts.feed(part) for part in np.split(tokens, [1, 20])], 1)
    for found in (got, cut):
        assert np.sqrt(np.mean((found - want) ** 2) / np.mean(want**2)) < TOLERANCES["qdq_int8"]
    assert np.sqrt(np.mean((cut - got) ** 2) / np.mean(want**2)) < TOLERANCES["qdq_int8"]


def test_a_bad_row_is_refused() -> None:
    from xexport.quant.scheme import _parse

    row: dict[str, object] = {
        "description": "x",
        "default": "float32",
        "why": {"default": "x"},
        "activations": {"bits": 12, "method": "min-max"},
    }
    with pytest.raises(QuantError, match="bad activations"):
        _parse("odd", row)
    assert get_scheme("int8").activations is None
