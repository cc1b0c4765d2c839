"""Quantization: the schemes' tables, the block quantizer, each format on a small graph, and its refusals."""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from exported import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from tolerances import TOLERANCES

from xexport.core.errors import UnknownNameError
from xexport.core.family import ROLES
from xexport.core.registry import get_family
from xexport.core.target import get_target, target_names
from xexport.exporter.functions import attach_functions
from xexport.quant.apply import quantize, unread
from xexport.quant.blocks import (
    block_size_for,
    quantize_blocks,
    quantize_rows,
    relative_error,
)
from xexport.quant.formats.channel import FASTER_ABOVE as CHANNEL_FASTER_ABOVE
from xexport.quant.formats.stored import FASTER_ABOVE
from xexport.quant.scheme import FORMATS, get_scheme, scheme_names

Array = np.ndarray[Any, Any]

# Schemes and roles


@pytest.mark.parametrize("name", scheme_names())
def test_scheme_says_for_every_role_what_and_why(name: str) -> None:
    scheme = get_scheme(name)
    assert set(scheme.formats) == set(scheme.why) == set(ROLES)
    assert set(scheme.formats.values()) <= set(FORMATS)
    assert all(len(why) > 20 for why in scheme.why.values())
    assert len(scheme.description) > 20


def test_every_target_has_a_scheme_and_fp32_changes_nothing() -> None:
    assert {get_target(t).precision for t in target_names()} <= set(scheme_names())
    assert set(get_scheme("fp32").formats.values()) == {"float32"}


def test_6_bits_are_for_targets_that_run_our_kernels() -> None:
    targets = [get_target(name) for name in target_names()]
    six = {t.name for t in targets if "int6-block" in get_scheme(t.precision).formats.values()}
    assert six == {"cpu-int4", "arm64-int4"}
    assert all("products" in t.fuse for t in targets if t.name in six)
    with_8 = get_scheme("int4-head8").formats
    # without our kernels activations have 8 bits: what steers a recurrence stays float
    steer = {"low_rank": "float16", "gate": "float32", "decay": "float32"}
    assert {**get_scheme("int4").formats, "head": "int8-block", **steer} == with_8


@pytest.mark.parametrize("name", ["int8", "int8-channel", "int4"])
@pytest.mark.parametrize("role", ["norm", "filter", "conv", "choice", "other"])
def test_what_is_small_or_sensitive_stays_float(name: str, role: str) -> None:
    assert get_scheme(name).formats[role] == "float32"


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize(
    ("role", "size", "stored"),
    [
        ("low_rank", (64, 768), "int8 block 64"),
        ("gate", (768, 80), "int8 block 128"),
        ("decay", (96, 256), "int8 block 32"),
        ("low_rank", (64, 256), "float16"),  # too small to gain
        ("low_rank", (48, 768), "float16"),  # no whole blocks
        ("gate", (64, 256), "float32"),
        ("decay", (48, 768), "float32"),
    ],
)
def test_what_steers_the_recurrence_has_8_bits_where_a_product_reads_it(
    name: str, role: str, size: tuple[int, int], stored: str, tmp_path: Path
) -> None:
    (row,) = decide(product(random(*size)), name, role, tmp_path)
    assert row.format == stored
    assert row.reason == get_scheme(name).why[role]
    assert row.error < 0.01


@pytest.mark.parametrize("role", ["gate", "decay"])
def test_a_gate_or_decay_that_is_a_parameter_stays_float(role: str, tmp_path: Path) -> None:
    """It multiplies the state itself, however large it is."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("Mul", ["a", "p"], ["y"])]
    model = graph({"w": random(20, 30_000), "p": random(1, 30_000)}, nodes, 20, 30_000)
    rows = quantize(model, get_scheme("int8"), [("p", role), ("w", "projection")], tmp_path)
    assert {r.tensor: r.format for r in rows}["p"] == "float32"


def test_unknown_scheme_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="unknown scheme 'int9'"):
        get_scheme("int9")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_large_matrix_has_a_role_on_purpose(family: str) -> None:
    found = get_family(family)
    for preset in ("zoo", sorted(set(found.presets) - {"tiny", "zoo"})[0]):
        with torch.device("meta"):
            module = found.build(found.presets[preset])
        for name, p in module.named_parameters():
            if p.dim() < 2 or min(p.shape[-2:]) < 16:
                continue
            roles = [role for pattern, role in found.roles if fnmatchcase(name, pattern)]
            assert roles, f"{preset}: no row for {name}"
            assert roles[0] in ROLES
            assert roles[0] != "other", f"{preset}: {name} {list(p.shape)} fell to the last row"
    names: set[str] = set()
    for preset in found.presets.values():  # options of a family have parameters of their own
        with torch.device("meta"):
            names |= set(found.build(preset).state_dict())
            if found.distill is not None:
                names |= set(found.build(dataclasses.replace(preset, distilled_order=4)).state_dict())
    unused = [
        pattern
        for pattern, role in found.roles
        if role != "other" and not any(fnmatchcase(n, pattern) for n in names)
    ]
    assert unused == [], f"rows that match nothing of {sorted(names)[:5]}"


# The block quantizer


def matrices() -> st.SearchStrategy[Array]:
    """Matrices with zero rows, outliers, tiny values and any depth."""

    def make(rows: int, depth: int, seed: int, kind: str) -> Array:
        rng = np.random.default_rng(seed)
        w = rng.normal(size=(rows, depth)).astype(np.float32)
        if kind == "zero rows":
            w[:: max(1, rows // 2)] = 0
        if kind == "outliers":
            w[rng.integers(rows), rng.integers(depth)] = 1e4
        if kind == "tiny":
            w *= np.float32(1e-42)
        if kind == "one sign":
            w = np.abs(w)
        return w

    kinds = st.sampled_from(["normal", "zero rows", "outliers", "tiny", "one sign"])
    return st.builds(make, st.integers(1, 9), st.integers(1, 70), st.integers(0, 999), kinds)


@settings(max_examples=80, deadline=None)
@given(w=matrices(), size=st.sampled_from([16, 32, 64]))
def test_8_bit_blocks_are_within_half_a_step(w: Array, size: int) -> None:
    blocks = quantize_blocks(w, 8, size)
    got = blocks.dequantize()[:, : w.shape[1]]
    assert blocks.codes.dtype == np.uint8
    assert blocks.codes.shape == (len(w), -(-w.shape[1] // size), size)
    step = np.repeat(blocks.scales, size, axis=1)[:, : w.shape[1]]
    assert np.all(np.abs(got - w) <= step * 0.5001 + 1e-44)
    assert np.all(got[:, :][w == 0] == 0)
    assert np.all(np.isfinite(blocks.scales))
    assert np.all(blocks.scales > 0)
    assert np.all(blocks.dequantize()[:, w.shape[1] :] == 0), "padding must stay zero"


@settings(max_examples=60, deadline=None)
@given(w=matrices())
def test_4_bit_blocks_are_never_worse_than_rounding_to_the_full_range(w: Array) -> None:
    blocks = quantize_blocks(w, 4, 32)
    assert blocks.codes.max() < 16
    got = blocks.dequantize()[:, : w.shape[1]].astype(np.float64)
    padded = np.pad(w, ((0, 0), (0, -w.shape[1] % 32))).reshape(len(w), -1, 32).astype(np.float64)
    largest = np.abs(padded).max(axis=2, keepdims=True)
    step = np.where(largest > 0, largest / 7, 1.0)
    plain = (np.rint(padded / step) * step - padded) ** 2
    mine = np.pad(got - w, ((0, 0), (0, -w.shape[1] % 32))).reshape(plain.shape) ** 2
    slack = 1e-12 * largest[..., 0] ** 2 + 1e-58  # float32 steps, and blocks too small to store
    assert np.all(mine.sum(2) <= plain.sum(2) * 1.001 + slack)


@settings(max_examples=40, deadline=None)
@given(w=matrices())
def test_rows_are_within_half_a_step(w: Array) -> None:
    codes, scales = quantize_rows(w)
    assert codes.dtype == np.int8
    assert np.all(np.abs(codes * scales - w) <= scales * 0.5001 + 1e-44)
    assert np.all(scales > 0)


def test_search_beats_rounding_where_there_is_an_outlier() -> None:
    w = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    w[:, 0] = 4.5
    step = np.abs(w).max(axis=1, keepdims=True) / 7
    plain = relative_error(w, np.rint(w / step) * step)
    assert relative_error(w, quantize_blocks(w, 4, 32).dequantize()) < 0.97 * plain


@pytest.mark.parametrize("bits", [4, 6])
def test_a_block_of_nearly_nothing_does_not_cost_a_matrix_its_half_scales(bits: int) -> None:
    """Checkpoints have such blocks: pruned rows, or weights that training has hardly moved from zero."""
    w = (np.random.default_rng(0).normal(size=(64, 256)) * 0.03).astype(np.float32)
    w[3, 32:64] *= 1e-3
    w[5] = 0
    blocks, exact = (quantize_blocks(w, bits, 32, half_scales=half) for half in (True, False))
    assert blocks.are_half
    assert not exact.are_half
    assert relative_error(w, blocks.dequantize()) < 1.001 * relative_error(w, exact.dequantize())
    assert np.abs(blocks.scales[3, 1]) >= 2.0**-14, "subnormal numbers are zeros on some devices"
    assert np.all(blocks.dequantize()[5] == 0)


@pytest.mark.parametrize("bits", [4, 6])
def test_a_matrix_of_small_numbers_keeps_its_own_scales(bits: int) -> None:
    w = (np.random.default_rng(0).normal(size=(64, 256)) * 1e-5).astype(np.float32)
    blocks, exact = (quantize_blocks(w, bits, 32, half_scales=half) for half in (True, False))
    assert not blocks.are_half
    np.testing.assert_array_equal(blocks.dequantize(), exact.dequantize())


@pytest.mark.parametrize(
    ("depth", "bits", "size"),
    [(256, 8, 128), (192, 8, 64), (96, 8, 32), (48, 8, 16), (40, 8, 32), (256, 4, 32), (48, 4, 16)],
)
def test_block_size_divides_the_depth_where_it_can(depth: int, bits: int, size: int) -> None:
    assert block_size_for(depth, bits) == size


def test_relative_error_of_nothing_is_zero() -> None:
    zeros = np.zeros((2, 2), np.float32)
    assert relative_error(zeros, zeros) == 0.0
    assert relative_error(np.ones((2, 2), np.float32), zeros) == 1.0


# Formats on small graphs


def graph(weights: dict[str, Array], nodes: list[onnx.NodeProto], vocab: int | None, width: int) -> ir.Model:
    """A model of ``x`` [T,width] (or ``ids`` [T]) to ``y``."""
    if vocab is None:
        given_ = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", width])
    else:
        given_ = helper.make_tensor_value_info("ids", TensorProto.INT64, ["T"])
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", None])
    tensors = [numpy_helper.from_array(w, n) for n, w in weights.items()]
    proto = helper.make_graph(nodes, "g", [given_], [made], tensors)
    return ir.from_proto(helper.make_model(proto, opset_imports=[helper.make_opsetid("", 23)], ir_version=10))


def product(w: Array) -> ir.Model:
    return graph({"w": w}, [helper.make_node("MatMul", ["x", "w"], ["y"], name="MatMul")], None, len(w))


def tied(w: Array) -> ir.Model:
    """An embedding that is also the head, as torch exports it."""
    nodes = [
        helper.make_node("Gather", ["w", "ids"], ["e"], name="Gather"),
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0], name="Transpose"),
        helper.make_node("MatMul", ["e", "t"], ["y"], name="MatMul"),
    ]
    return graph({"w": w}, nodes, len(w), w.shape[1])


def run(model: ir.Model, folder: Path, **feeds: Array) -> Array:
    path = folder / "model.onnx"
    ir.save(model, path)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rms_error(got: Array, want: Array) -> float:
    return float(np.sqrt(np.mean(np.square(got - want)) / np.mean(np.square(want))))


def decide(model: ir.Model, scheme: str, role: str, folder: Path) -> list[Any]:
    return quantize(model, get_scheme(scheme), [("*", role)], folder)


@pytest.mark.parametrize(("scheme", "bits", "block"), [("int8", 8, 128), ("int4", 4, 32)])
def test_large_product_is_an_n_bit_product(scheme: str, bits: int, block: int, tmp_path: Path) -> None:
    w, x = random(512, 260), random(7, 512, seed=1)
    assert w.size >= FASTER_ABOVE
    model = product(w)
    (decision,) = decide(model, scheme, "projection", tmp_path)
    *casts, node = model.graph
    assert (node.domain, node.op_type) == ("com.microsoft", "MatMulNBits")
    assert [n.op_type for n in casts] == (["Cast"] if bits == 4 else []), "4-bit scales are float16"
    wanted = {"K": 512, "N": 260, "bits": bits, "block_size": block, "accuracy_level": 4}
    assert {k: a.as_int() for k, a in node.attributes.items()} == wanted
    assert "w" not in model.graph.initializers
    assert decision.format == f"int{bits} block {block}"
    assert decision.bytes == w.size * bits // 8 + (4 if bits == 8 else 2) * w.size // block
    stored = quantize_blocks(np.ascontiguousarray(w.T), bits, block, half_scales=bits == 4).dequantize().T
    assert decision.error == pytest.approx(relative_error(w, stored))
    got = run(model, tmp_path, x=x)
    assert rms_error(got, x @ stored) < TOLERANCES["int8_products"], "int8 activations alone"
    assert rms_error(got, x @ w) < 1.5 * decision.error + TOLERANCES["int8_products"]


def test_a_tokens_product_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    w, x = random(512, 260), random(9, 512, seed=1)
    x[4] *= 1000
    model = product(w)
    decide(model, "int8", "projection", tmp_path)
    whole = run(model, tmp_path, x=x)
    for i in range(9):
        alone = run(model, tmp_path, x=x[i : i + 1])[0]
        assert np.abs(alone - whole[i]).max() <= TOLERANCES["model_int8_cut"] * np.abs(whole[i]).max()


def test_channels_round_every_row_alone(tmp_path: Path) -> None:
    """Integer products: exact under any chunking, beside rows of zeros and of much larger values."""
    w, x = random(520, 510), random(9, 520, seed=1)
    x[4] *= 1000
    x[6] = 0
    model = product(w)
    (decision,) = decide(model, "int8-channel", "projection", tmp_path)
    assert w.size >= CHANNEL_FASTER_ABOVE
    codes, scales = quantize_rows(np.ascontiguousarray(w.T))
    stored = (codes.astype(np.float32) * scales).T
    assert (decision.format, decision.bytes) == ("int8 per channel", w.size + 4 * 510)
    assert decision.error == pytest.approx(relative_error(w, stored))
    got = run(model, tmp_path, x=x)
    step = np.abs(x).max(axis=1, keepdims=True) / 127
    exact = np.rint(x / np.maximum(step, 1e-30)) * step
    assert rms_error(got, exact @ stored) < 1e-5, "nothing saturates"
    assert not got[6].any()
    for i in range(9):
        assert np.array_equal(run(model, tmp_path, x=x[i : i + 1])[0], got[i])


def test_products_that_read_the_same_rows_round_them_once(tmp_path: Path) -> None:
    """The second weight's product comes first in the graph: what both read must come before it."""
    shape = (512, 512)
    kind = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", type=kind, shape=ir.Shape(["N", 512]))
    pre = ir.Node("", "Neg", [x], name="pre")
    pre.outputs[0].name, pre.outputs[0].type, pre.outputs[0].shape = "p", kind, x.shape
    weights = [
        ir.Value(
            name=n, type=kind, shape=ir.Shape(shape), const_value=ir.Tensor(random(*shape, seed=i), name=n)
        )
        for i, n in enumerate("ab")
    ]
    nodes = [ir.Node("", "MatMul", [pre.outputs[0], w], name=f"{w.name}/MatMul") for w in reversed(weights)]
    total = ir.Node("", "Sub", [nodes[1].outputs[0], nodes[0].outputs[0]], name="sub")
    for node in (*nodes, total):
        node.outputs[0].name, node.outputs[0].type = f"{node.name}.out", kind
        node.outputs[0].shape = x.shape
    graph = ir.Graph(
        [x], [total.outputs[0]], nodes=[pre, *nodes, total], initializers=weights, opset_imports={"": 23}
    )
    model = ir.Model(graph, ir_version=10)
    decide(model, "int8-channel", "projection", tmp_path)
    assert [n.op_type for n in model.graph].count("QuantizeLinear") == 1
    assert [n.op_type for n in model.graph].count("MatMulIntegerToFloat") == 2
    values = random(3, 512, seed=9)
    want = -values @ (random(*shape, seed=0) - random(*shape, seed=1))
    assert rms_error(run(model, tmp_path, x=values), want) < 3 * TOLERANCES["int8_products"]


@pytest.mark.parametrize(("scheme", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize("depth", [16, 48, 33])
def test_small_product_has_float_activations(scheme: str, bits: int, depth: int, tmp_path: Path) -> None:
    w, x = random(depth, 21), random(5, depth, seed=1)
    model = product(w)
    (decision,) = decide(model, scheme, "projection", tmp_path)
    size = next((s for s in (32, 16) if depth % s == 0), depth)
    assert decision.format == f"int{bits} block {size}, float32 in memory"
    kinds = {str(v.dtype) for v in model.graph.initializers.values()}
    assert kinds <= {"FLOAT", "INT64", "INT8", "UINT8"}, "onnxruntime-web reads no type of 4 bits on WebGPU"
    assert "no faster at this size" in decision.reason
    stored = quantize_blocks(np.ascontiguousarray(w.T), bits, size).dequantize().T
    assert np.abs(run(model, tmp_path, x=x) - x @ stored).max() < 1e-4
    assert decision.error == pytest.approx(relative_error(w, stored))
    assert decision.bytes < w.nbytes * (0.4 if bits == 8 else 0.3)


@pytest.mark.parametrize("shape", [(24, 20), (700, 256)], ids=["small", "large"])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_tied_embedding_gets_two_decisions(scheme: str, shape: tuple[int, int], tmp_path: Path) -> None:
    w, ids = random(*shape), np.array([3, 1, 19], np.int64)
    model = tied(w)
    table, head = decide(model, scheme, "embedding", tmp_path)
    assert (table.tensor, table.role, table.format) == ("w", "embedding", "int8 per row")
    assert (head.tensor, head.role) == ("w (as head)", "head")
    six = scheme == "int4" and w.size >= FASTER_ABOVE
    assert head.format.startswith("int6 block" if six else "int8 block")
    attach_functions(model, {}, {})
    assert "w" not in model.graph.initializers
    assert rms_error(run(model, tmp_path, ids=ids), w[ids] @ w.T) < 2 * TOLERANCES["int8_products"]


def test_tied_embedding_in_fp16_is_stored_once(tmp_path: Path) -> None:
    w, ids = random(24, 20), np.array([3, 1, 19], np.int64)
    model = tied(w)
    (decision,) = decide(model, "fp16", "embedding", tmp_path)
    assert (decision.format, decision.bytes) == ("float16", w.size * 2)
    want = w.astype(np.float16).astype(np.float32)
    assert np.abs(run(model, tmp_path, ids=ids) - want[ids] @ want.T).max() < 1e-4


def test_fp16_is_half_the_bytes_and_sums_in_fp32(tmp_path: Path) -> None:
    w, x = random(300, 8), random(4, 300, seed=1)
    model = product(w)
    (decision,) = decide(model, "fp16", "projection", tmp_path)
    assert (decision.format, decision.bytes) == ("float16", w.size * 2)
    assert 1e-5 < decision.error < 5e-4
    want = x @ w.astype(np.float16).astype(np.float32)
    assert np.abs(run(model, tmp_path, x=x) - want).max() < 1e-4


def test_fp32_and_unlisted_roles_leave_the_graph_alone(tmp_path: Path) -> None:
    for scheme, role in (("fp32", "projection"), ("int8", "choice"), ("int4", "filter"), ("fp16", "norm")):
        model = product(random(512, 260))
        (decision,) = decide(model, scheme, role, tmp_path)
        assert [n.op_type for n in model.graph] == ["MatMul"]
        assert (decision.format, decision.error) == ("float32", 0.0)
        assert decision.reason == get_scheme(scheme).why[role]


@pytest.mark.parametrize(
    ("w", "scheme", "role", "says"),
    [
        (random(8, 40), "int8", "projection", "its depth of 8 is shorter than the smallest block (16)"),
        (random(40, 8), "int8", "embedding", "no table look-up reads it"),
        (np.full((20, 4), 7e4, np.float32), "fp16", "projection", "beyond 65504, the largest of fp16"),
    ],
    ids=["depth", "no look-up", "fp16 range"],
)
def test_refusal_keeps_fp32_and_says_why(w: Array, scheme: str, role: str, says: str, tmp_path: Path) -> None:
    model = product(w)
    (decision,) = decide(model, scheme, role, tmp_path)
    assert (decision.format, decision.bytes, decision.error) == ("float32", w.nbytes, 0.0)
    assert says in decision.reason
    assert get_scheme(scheme).formats[role] in decision.reason
    x = random(3, len(w), seed=1)
    assert np.allclose(run(model, tmp_path, x=x), x @ w, rtol=1e-5)


def test_left_hand_weight_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["w", "x"], ["y"], name="MatMul")
    (decision,) = decide(graph({"w": random(30, 30)}, [node], None, 30), "int8", "projection", tmp_path)
    assert "no matrix product reads it as its right-hand side" in decision.reason


def test_constants_of_the_graph_are_no_weights(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Mul", ["m", "two"], ["y"])]
    model = graph({"w": random(20, 20), "two": np.array(2, np.float32)}, nodes, None, 20)
    decisions = quantize(model, get_scheme("int8"), [("*", "projection")], tmp_path, names={"w"})
    assert [d.tensor for d in decisions] == ["w"]


def test_roles_of_a_users_module_are_guessed_from_the_graph(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"]),
        helper.make_node("MatMul", ["e", "square"], ["a"]),
        helper.make_node("MatMul", ["a", "down"], ["b"]),
        helper.make_node("MatMul", ["b", "up"], ["c"]),
        helper.make_node("Mul", ["c", "scale"], ["d"]),
        helper.make_node("MatMul", ["d", "last"], ["y"]),
    ]
    weights = {
        "table": random(30, 40),
        "square": random(40, 48),
        "down": random(48, 4),
        "up": random(4, 48),
        "scale": random(48),
        "last": random(48, 30),
    }
    decisions = quantize(graph(weights, nodes, 30, 40), get_scheme("int8"), [("up", "gate")], tmp_path)
    assert {d.tensor: d.role for d in decisions} == {
        "table": "embedding",
        "square": "projection",
        "down": "low_rank",
        "up": "gate",
        "scale": "norm",
        "last": "head",
    }


def test_tensors_that_the_graph_does_not_read_are_listed(tmp_path: Path) -> None:
    model = product(random(20, 20))
    decisions = decide(model, "int8", "projection", tmp_path)
    weight = torch.zeros(20, 20)
    rows = unread({"w": weight, "twin": weight, "spare": torch.zeros(3)}, decisions, [("sp*", "gate")])
    assert [(d.tensor, d.role, d.format, d.bytes) for d in rows] == [
        ("spare", "gate", "not stored", 0),
        ("twin", "other", "not stored", 0),
    ]
    assert [d.reason for d in rows] == ["nothing in the graph reads it", "the same tensor as w"]
