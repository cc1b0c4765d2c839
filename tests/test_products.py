"""Weight-streaming products: reference, body, kernel; chunks bit by bit; the pass that puts them there."""
# ruff: noqa: F811, F401  (fixtures that another file has)

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from test_native import _options, isa, library
from tolerances import TOLERANCES

from xexport.core.op import DOMAIN
from xexport.core.registry import get_op
from xexport.exporter.functions import attach_functions
from xexport.exporter.passes.products import rewrite
from xexport.ops.linear.reference import linear
from xexport.ops.linear_int4x8.layout import interleaved_codes, interleaved_scales
from xexport.ops.linear_int4x8.reference import dequantized, linear_int4x8
from xexport.ops.linear_int6x8 import reference as six
from xexport.ops.linear_int6x8.layout import interleaved_six
from xexport.ops.linear_int6x8.reference import linear_int6x8
from xexport.ops.linear_int8.reference import linear_int8
from xexport.quant.apply import quantize
from xexport.quant.blocks import quantize_blocks
from xexport.quant.scheme import get_scheme

Array = np.ndarray[Any, Any]
KINDS = ("float32", "float16", "int8-32", "int8-64", "int8-128", "int6", "int4")
_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "uint8": TensorProto.UINT8}


class Case:
    """One product: its operator, its weights and its attributes."""

    def __init__(self, kind: str, K: int, N: int, seed: int = 0) -> None:
        rng = np.random.default_rng((seed, K, N))
        w = rng.standard_normal((N, K)).astype(np.float32)
        self.kind, self.K, self.N = kind, K, N
        self.attributes: dict[str, int] = {}
        if kind.startswith("float"):
            self.op, self.tensors = "linear", [w.astype(kind)]
            return
        bits, size = (8, int(kind[5:])) if kind.startswith("int8") else (int(kind[3:]), 32)
        blocks = quantize_blocks(w, bits, size, half_scales=bits < 8)
        self.op = "linear_int8" if bits == 8 else f"linear_int{bits}x8"
        self.attributes = {"K": K, "N": N}
        if bits == 8:
            self.attributes["block_size"] = size
            self.tensors = [blocks.codes, blocks.scales]
            return
        packed = blocks.codes[..., 0::2] | (blocks.codes[..., 1::2] << 4)
        codes = interleaved_codes(packed) if bits == 4 else interleaved_six(blocks.codes)
        self.tensors = [codes, interleaved_scales(blocks.scales.astype(np.float16))]

    def reference(self, x: Array) -> Array:
        function: Any = {
            "linear": linear,
            "linear_int8": linear_int8,
            "linear_int6x8": linear_int6x8,
            "linear_int4x8": linear_int4x8,
        }[self.op]
        y: Array = function(
            torch.from_numpy(x).double(), *map(torch.from_numpy, self.tensors), *self.attributes.values()
        ).numpy()
        return y

    def error(self, got: Array, x: Array) -> float:
        """RMS of the difference over that of sums without cancellation: of such products, uncorrelated."""
        want, power = self.reference(x), np.square(x, dtype=np.float64)
        assert got.shape == want.shape
        eye = np.eye(self.K, dtype=np.float32)
        scale = np.sqrt(np.mean(power @ np.square(self.reference(eye))))
        return float(np.sqrt(np.mean(np.square(got - want))) / scale)

    def model(self, rank: int = 3, *, constant: bool = True) -> bytes:
        """A node "mixer". Weights that are no constants are inputs of symbolic shape, as x is, so that ONNX
        Runtime itself can't see a wrong one."""
        spec = get_op(self.op)
        named = dict(zip(spec.inputs[1:], self.tensors, strict=True))
        infos = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [f"x{i}" for i in range(rank)])]
        if not constant:
            infos += [
                helper.make_tensor_value_info(n, _TYPES[str(a.dtype)], [f"{n}{i}" for i in range(a.ndim)])
                for n, a in named.items()
            ]
        inits = [numpy_helper.from_array(a, n) for n, a in named.items()] if constant else []
        out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        node = helper.make_node(self.op, list(spec.inputs), ["y"], "mixer", domain=DOMAIN, **self.attributes)
        body = next(iter(spec.bodies.values())).build(23)
        domains = {"": 23, DOMAIN: 1, "com.microsoft": 1}
        model: bytes = helper.make_model(
            helper.make_graph([node], "g", infos, [out], inits),
            functions=[body],
            opset_imports=[helper.make_opsetid(d, v) for d, v in domains.items()],
            ir_version=10,
        ).SerializeToString()
        return model

    def run(
        self, x: Array, library: Path | None, isa: str = "", threads: int = 1, *, constant: bool = True
    ) -> Array:
        options = _options(library, isa, threads)
        model = self.model(x.ndim, constant=constant)
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        named = zip(get_op(self.op).inputs[1:], self.tensors, strict=True)
        y: Array = session.run(None, {"x": x} if constant else {"x": x, **dict(named)})[0]
        return y


def activations(*shape: int, seed: int = 0) -> Array:
    """Normal, with a few channels ten times as large, as real ones have."""
    rng = np.random.default_rng((seed, *shape))
    x = rng.standard_normal(shape)
    x[..., :: max(2, shape[-1] // 5)] *= 10
    return x.astype(np.float32)


def error(got: Array, want: Array) -> float:
    """RMS of the difference over RMS."""
    assert got.shape == want.shape
    power = float(np.mean(np.square(want))) if want.size else 0.0
    return (
        float(np.sqrt(np.mean(np.square(got - want)) / power)) if power else float(np.abs(got).max(initial=0))
    )


def tolerance(kind: str, count: int = 32) -> float:
    """Of the RMS; that of a few numbers can be four times as large by chance."""
    row = f"product_{kind[:4]}" if kind.startswith("int") else "op_fp32"
    return TOLERANCES[row] * (1 if count >= 32 else 4)


# Parity


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    B=st.integers(1, 3),
    T=st.sampled_from([1, 2, 3, 5, 17, 33]),
    K=st.integers(1, 300),
    N=st.integers(1, 70),
    seed=st.integers(0, 9),
)
def test_three_ways(library: Path, kind: str, B: int, T: int, K: int, N: int, seed: int) -> None:
    case, x = Case(kind, K, N, seed), activations(B, T, K, seed=seed)
    assert case.error(case.run(x, library), x) <= tolerance(kind, B * T * N)
    body = "float32" if kind.startswith("float") else "int4"  # activations of 8 bits
    assert case.error(case.run(x, None), x) <= tolerance(body, B * T * N)


@pytest.mark.parametrize("T", [1, 2, 3, 7, 17, 33])
@pytest.mark.parametrize(("K", "N"), [(64, 64), (200, 37), (768, 96), (33, 1), (1, 5), (416, 8)])
@pytest.mark.parametrize("kind", KINDS)
def test_on_every_instruction_set(library: Path, isa: str, kind: str, K: int, N: int, T: int) -> None:
    case, x = Case(kind, K, N), activations(T, K)
    assert case.error(case.run(x, library, isa), x) <= tolerance(kind, T * N)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_any_rank(library: Path, rank: int) -> None:
    case, x = Case("int8-64", 70, 9), activations(*(2,) * (rank - 1), 70)
    assert case.error(case.run(x, library), x) <= tolerance("int8-64", 9)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens(library: Path, kind: str) -> None:
    assert Case(kind, 64, 5).run(np.zeros((2, 0, 64), np.float32), library).shape == (2, 0, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_nothing(library: Path, kind: str) -> None:
    case = Case(kind, 768, 1000)
    for T in (1, 3, 40):
        x = activations(T, 768)
        np.testing.assert_array_equal(case.run(x, library, threads=2), case.run(x, library))


@pytest.mark.parametrize("N", [1, 8, 13])
def test_interleaved_rows_are_those_of_matmulnbits(N: int) -> None:
    """The reference undoes what layout.py does: each row has its own codes and scales, and no other's."""
    rng = np.random.default_rng(N)
    codes = rng.integers(0, 256, (N, 3, 16), dtype=np.uint8)
    scales = rng.uniform(0.5, 2, (N, 3)).astype(np.float16)
    halves = np.stack((codes & 15, codes >> 4), -1).reshape(N, 3, 32).astype(np.float64) - 8
    want = (halves * scales[..., None].astype(np.float64)).reshape(N, 96)[:, :90]
    stored = (torch.from_numpy(a) for a in (interleaved_codes(codes), interleaved_scales(scales)))
    got = dequantized(*stored, 90).numpy()
    np.testing.assert_array_equal(got[:N], want)
    assert not got[N:].any()


@pytest.mark.parametrize("N", [1, 8, 13])
def test_six_bits_are_where_the_layout_says(N: int) -> None:
    """Of 16 codes in a row twelve lie in low six bits, and the bits of four in high two."""
    rng = np.random.default_rng(N)
    codes = rng.integers(0, 64, (N, 3, 32), dtype=np.uint8)
    scales = rng.uniform(0.5, 2, (N, 3)).astype(np.float16)
    want = (codes.astype(np.float64) - 32) * scales[..., None].astype(np.float64)
    stored = interleaved_six(codes)
    assert stored.shape == (-(-N // 8), 3, 6, 8, 4)
    row = N - 1
    for half in range(2):
        dwords = stored[row // 8, 1, 3 * half : 3 * half + 3, row % 8]  # [3, 4]
        np.testing.assert_array_equal((dwords & 63).reshape(-1), codes[row, 1, 16 * half : 16 * half + 12])
        last = (dwords.astype(int) >> 6) << np.array([[0], [2], [4]])
        np.testing.assert_array_equal(last.sum(axis=0), codes[row, 1, 16 * half + 12 : 16 * half + 16])
    got = six.dequantized(torch.from_numpy(stored), torch.from_numpy(interleaved_scales(scales)), 90).numpy()
    np.testing.assert_array_equal(got[:N], want.reshape(N, 96)[:, :90])
    assert not got[N:].any()


# The chunk law: what a token gives doesn't depend on the others


@pytest.mark.parametrize("kind", [k for k in KINDS if k.startswith("int")])
@pytest.mark.parametrize(("K", "N"), [(256, 61), (96, 200), (1000, 33)])
def test_chunks_give_the_same_bits(library: Path, isa: str, kind: str, K: int, N: int) -> None:
    case, x = Case(kind, K, N), activations(41, K)
    x[7] *= 1e4
    whole = case.run(x, library, isa)
    for size in (1, 2, 3, 5, 11, 20):
        parts = [case.run(x[i : i + size], library, isa) for i in range(0, len(x), size)]
        np.testing.assert_array_equal(np.concatenate(parts), whole, f"chunks of {size}")


@pytest.mark.parametrize("kind", [k for k in KINDS if k.startswith("int8")])
def test_activations_keep_16_bits(library: Path, kind: str) -> None:
    """Against the body, whose activations have 8: what ruins small recurrent models."""
    case, x = Case(kind, 384, 100), activations(9, 384)
    assert case.error(case.run(x, library), x) < case.error(case.run(x, None), x) / 50


# Values that are no ordinary numbers


@pytest.mark.parametrize("T", [1, 2, 20])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_shows(library: Path, isa: str, kind: str, value: float, T: int) -> None:
    case, x = Case(kind, 100, 21), activations(T, 100)
    clean = case.run(x, library, isa)
    x[T // 2, 70] = value
    got = case.run(x, library, isa)
    assert not np.isfinite(got[T // 2]).any()
    others = np.arange(T) != T // 2
    np.testing.assert_array_equal(got[others], clean[others])


@pytest.mark.parametrize("T", [1, 20])
@pytest.mark.parametrize("scale", [1e-42, 1e-31, 1e30])
@pytest.mark.parametrize("kind", ["int8-128", "int6", "int4"])
def test_activations_of_any_size(library: Path, isa: str, kind: str, scale: float, T: int) -> None:
    case, x = Case(kind, 128, 21), (activations(T, 128) * scale).astype(np.float32)
    got, want = case.run(x, library, isa), case.reference(x)
    assert np.abs(got - want).max() <= tolerance(kind) * np.abs(want).max() * 4 + 1e-27


# Safety


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("float32", {0: (9, 63)}, r"x must be float32 \[...,63\], got float32 \[2,64\]"),
        ("int8-64", {0: (9, 1, 32)}, "K 64 and N 9 disagree with the weight, uint8 \\[9,1,32\\]"),
        ("int8-64", {0: (9, 1, 48)}, "blocks must be of 32, 64 or 128 weights"),
        ("int8-64", {1: (9, 2)}, r"scales must be float32 \[9,1\], got float32 \[9,2\]"),
        ("int4", {0: (2, 3, 4, 8, 4), 1: (2, 3, 8)}, "disagree"),
        ("int4", {0: (1, 2, 4, 8, 4), 1: (1, 2, 8)}, "K 64 and N 9 disagree"),
        ("int4", {0: (2, 2, 4, 8, 3)}, r"weight must be uint8 \[any,any,4,8,4\]"),
        ("int4", {1: (2, 8, 2)}, r"scales must be float16 \[2,2,8\], got float16 \[2,8,2\]"),
        ("int6", {0: (2, 2, 4, 8, 4)}, r"weight must be uint8 \[any,any,6,8,4\]"),
        ("int6", {0: (1, 2, 6, 8, 4), 1: (1, 2, 8)}, "K 64 and N 9 disagree"),
    ],
)
def test_wrong_shapes_are_refused_by_name(
    library: Path,
    kind: str,
    change: dict[int, tuple[int, ...]],
    says: str,
) -> None:
    case = Case(kind, 64, 9)
    for index, shape in change.items():
        case.tensors[index] = np.zeros(shape, case.tensors[index].dtype)
    with pytest.raises(Exception, match=says) as caught:
        case.run(activations(2, 64), library, constant=False)
    assert f"xexport {case.op} node 'mixer'" in str(caught.value)


def test_concurrent_runs_of_several_sessions(library: Path) -> None:
    cases = [Case(kind, 320, 500) for kind in KINDS]
    inputs = [activations(T, 320) for T in (1, 2, 30)]
    sessions = [
        ort.InferenceSession(c.model(2), _options(library, "", 2), providers=["CPUExecutionProvider"])
        for c in cases
    ]
    wanted = [[s.run(None, {"x": x})[0] for x in inputs] for s in sessions]

    def work(i: int) -> None:
        kind, x = i % len(cases), i // len(cases) % len(inputs)
        np.testing.assert_array_equal(sessions[kind].run(None, {"x": inputs[x]})[0], wanted[kind][x])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(120)))


# Which of the two ran


@pytest.mark.parametrize("kind", ["float16", "int8-128", "int6", "int4"])
def test_the_kernel_runs_where_it_is_registered(library: Path, kind: str, tmp_path: Path) -> None:
    """The graph that ONNX Runtime executes holds the operator itself, or the body's nodes."""
    case = Case(kind, 64, 9)
    kinds = []
    for given_ in (library, None):
        options = _options(given_)
        options.optimized_model_filepath = str(tmp_path / "seen.onnx")
        ort.InferenceSession(case.model(), options, providers=["CPUExecutionProvider"])
        seen = ir.load(tmp_path / "seen.onnx")
        kinds.append([n.op_type for n in seen.graph])
    assert kinds[0] == [case.op]
    assert {"float16": "MatMul"}.get(kind, "MatMulNBits") in "".join(kinds[1])
    assert case.op not in kinds[1]


# The pass


def graph(nodes: Sequence[Any], weights: dict[str, Array], width: int) -> ir.Model:
    """A model of ``x`` [T,width] to ``y``."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", width])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", None])
    inits = [numpy_helper.from_array(w, n) for n, w in weights.items()]
    proto = helper.make_graph(list(nodes), "g", [x], [y], inits)
    return ir.from_proto(helper.make_model(proto, opset_imports=[helper.make_opsetid("", 23)], ir_version=10))


def product(w: Array) -> ir.Model:
    return graph([helper.make_node("MatMul", ["x", "w"], ["y"], name="att/MatMul")], {"w": w}, len(w))


def outputs(model: ir.Model, x: Array, folder: Path, library: Path | None) -> Array:
    attach_functions(model, {}, {})
    path = folder / "model.onnx"
    ir.save(model, path)
    session = ort.InferenceSession(str(path), _options(library), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.mark.parametrize(
    ("scheme", "op"),
    [("fp32", "linear"), ("fp16", "linear"), ("int8", "linear_int8"), ("int4", "linear_int4x8")],
)
@pytest.mark.parametrize("native", [True, False], ids=["kernel", "body"])
def test_pass_keeps_the_result(scheme: str, op: str, native: bool, library: Path, tmp_path: Path) -> None:
    w = np.random.default_rng(0).standard_normal((512, 260)).astype(np.float32)
    model, x = product(w), activations(5, 512)
    quantize(model, get_scheme(scheme), [("*", "projection")], tmp_path)
    assert rewrite(model) == []
    assert [(n.domain, n.op_type, n.name) for n in model.graph] == [("xexport", op, f"att/{op}")]
    assert all(
        "fp16" in n or len(v.shape or ()) != 2 or v.shape[0] == 260
        for n, v in model.graph.initializers.items()
    )
    got = outputs(model, x, tmp_path, library if native else None)
    assert error(got, x @ w) <= TOLERANCES[f"pass_{scheme}"]


@pytest.mark.parametrize("native", [True, False], ids=["kernel", "body"])
def test_the_head_of_a_4_bit_model_has_6(native: bool, library: Path, tmp_path: Path) -> None:
    w = np.random.default_rng(0).standard_normal((512, 260)).astype(np.float32)
    model, x = product(w), activations(5, 512)
    (decision,) = quantize(model, get_scheme("int4"), [("*", "head")], tmp_path)
    assert (decision.format, decision.bytes) == ("int6 block 32", 264 * 512 * 13 // 16)
    assert 0.015 < decision.error < 0.025
    assert rewrite(model) == []
    assert [(n.domain, n.op_type, n.name) for n in model.graph] == [
        ("xexport", "linear_int6x8", "att/linear_int6x8")
    ]
    assert set(model.graph.initializers) == {"w.int6", "w.scale"}
    got = outputs(model, x, tmp_path, library if native else None)
    assert error(got, x @ w) <= TOLERANCES["pass_int6"]


@pytest.mark.parametrize(
    ("shape", "size", "format_", "says"),
    [
        ((520, 256), 1, "int8 block 32", "6 are not possible: its depth of 520 is no multiple of 32"),
        (
            (512, 260),
            1e-7,
            "int8 block 128",
            "6 are not possible: its scales are out of the range of float16",
        ),
        ((64, 32), 1, "int8 block 32, float32 in memory", "2048 elements"),
    ],
    ids=["depth", "scales", "small"],
)
def test_a_head_that_cannot_have_6_bits_has_8(
    shape: tuple[int, int], size: float, format_: str, says: str, tmp_path: Path
) -> None:
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32) * np.float32(size)
    model = product(w)
    (decision,) = quantize(model, get_scheme("int4"), [("*", "head")], tmp_path)
    assert decision.format == format_
    assert says in decision.reason
    assert not any(n.op_type == "linear_int6x8" for n in model.graph)


@pytest.mark.parametrize("native", [True, False], ids=["kernel", "body"])
def test_pass_reads_a_tied_weight_as_it_is(native: bool, library: Path, tmp_path: Path) -> None:
    """Embedding and head are one tensor, which is stored once."""
    w = np.random.default_rng(0).standard_normal((20, 64)).astype(np.float32)
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["a"], name="head/MatMul"),
        helper.make_node("Gather", ["w", "i"], ["e"]),
        helper.make_node("MatMul", ["a", "e"], ["y"], name="computed/MatMul"),
    ]
    model, x = graph(nodes, {"w": w, "i": np.arange(20)}, 64), activations(3, 64)
    (refusal,) = rewrite(model)
    assert (refusal.pass_, refusal.node) == ("products", "computed/MatMul")
    assert [n.op_type for n in model.graph] == ["linear", "Gather", "MatMul"]
    assert set(model.graph.initializers) == {"w", "i"}
    assert error(outputs(model, x, tmp_path, library if native else None), x @ w.T @ w) <= 1e-5


@pytest.mark.parametrize(
    ("nodes", "weights", "says"),
    [
        ([("MatMul", "wx")], {"w": (5, 16)}, "left-hand side"),
        ([("MatMul", "xx")], {}, "computed: no weight"),
        ([("MatMul", "xw")], {"w": (2, 16, 3)}, "3 dimensions"),
    ],
    ids=["left", "computed", "rank"],
)
def test_pass_gives_a_reason(
    nodes: list[tuple[str, str]], weights: dict[str, tuple[int, ...]], says: str
) -> None:
    made = [helper.make_node(op, list(names), ["y"], name="n") for op, names in nodes]
    model = graph(made, {n: np.zeros(s, np.float32) for n, s in weights.items()}, 16)
    (refusal,) = rewrite(model)
    assert refusal.node == "n"
    assert says in refusal.reason
    assert [n.op_type for n in model.graph] == ["MatMul"]


def test_small_matrices_of_a_quantized_model_stay(tmp_path: Path) -> None:
    """Without kernels an 8-bit product would round their activations to 8 bits."""
    model = product(np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32))
    quantize(model, get_scheme("int8"), [("*", "projection")], tmp_path)
    (refusal,) = rewrite(model)
    assert "its weight is small" in refusal.reason


def test_scales_beyond_float16_are_refused(tmp_path: Path) -> None:
    w = np.random.default_rng(0).standard_normal((512, 260)).astype(np.float32) * np.float32(1e-7)
    model = product(w)
    quantize(model, get_scheme("int4"), [("*", "projection")], tmp_path)
    (refusal,) = rewrite(model)
    assert "range of float16" in refusal.reason
    assert [n.op_type for n in model.graph] == ["MatMulNBits"]
