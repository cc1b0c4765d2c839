"""The native kernels against the references and the function bodies; which of them ran; what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from tolerances import TOLERANCES

from xexport.core.op import DOMAIN
from xexport.core.registry import get_op
from xexport.ops.cached_attention.reference import cached_attention
from xexport.ops.causal_conv1d.reference import causal_conv1d
from xexport.ops.fft_conv.reference import causal_conv, fft_sizes
from xexport.ops.fft_conv_cached.reference import fft_conv_cached
from xexport.ops.hyena_conv.reference import hyena_conv
from xexport.ops.run import run_body
from xexport.ops.selective_scan.reference import selective_scan
from xexport.ops.wkv7.reference import wkv7
from xexport.runtimes.native import find_native

Arrays = dict[str, np.ndarray]
ISAS = ("baseline", "avx2", "avx512")
_TYPES = {"float32": 1, "int64": 7, "float64": 11}


@pytest.fixture(scope="module")
def library() -> Path:
    """The kernels; their absence is a failure where they are required, and otherwise a reason to skip."""
    native = find_native()
    if native.path is None:
        if os.environ.get("XEXPORT_REQUIRE_NATIVE") == "1":
            pytest.fail(native.reason)
        pytest.skip(native.reason)
    return native.path


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, library: Path) -> str:
    """Every instruction set of this machine."""
    try:
        _options(library, request.param)
    except Exception as error:  # ORT's exception classes share no public base
        if "no instruction set" not in str(error):
            raise
        pytest.skip(f"this machine lacks {request.param}")
    return str(request.param)


def _options(library: Path | None, isa: str = "", threads: int = 1) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if isa:
        options.add_session_config_entry("xexport.isa", isa)
    if library is not None:
        options.register_custom_ops_library(str(library))
    return options


def _model(
    name: str, x: Arrays, attributes: Mapping[str, float], constant: Sequence[str] = (), times: int = 1
) -> bytes:
    """``times`` nodes "mixer0" ... of an operator, the state handed from each to the next; every dimension
    is symbolic, so that ONNX Runtime itself can't see a wrong shape."""
    spec = get_op(name)
    state = next((n for n in spec.inputs if n in ("state", "cache")), "")
    nodes, given = [], {n: n for n in spec.inputs}
    for i in range(times):
        outs = [f"{n}{i}" for n in spec.outputs]
        nodes.append(
            helper.make_node(
                spec.graph_name, list(given.values()), outs, f"mixer{i}", domain=DOMAIN, **attributes
            )
        )
        if state:
            given[state] = outs[1]
    inputs = [
        helper.make_tensor_value_info(n, _TYPES[str(a.dtype)], [f"{n}{i}" for i in range(a.ndim)])
        for n, a in x.items()
        if n not in constant
    ]
    outputs = [
        helper.make_tensor_value_info(n, _TYPES[str(next(iter(x.values())).dtype)], None)
        for n in nodes[-1].output
    ]
    inits = [numpy_helper.from_array(x[n], n) for n in constant]
    graph = helper.make_graph(nodes, name, inputs, outputs, inits)
    bodies = [next(iter(s.bodies.values())).build(23) for s in (spec, *map(get_op, spec.depends))]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    model: bytes = helper.make_model(
        graph, functions=bodies, opset_imports=opsets, ir_version=10
    ).SerializeToString()
    return model


def kernel(
    name: str,
    x: Arrays,
    library: Path,
    isa: str = "",
    *,
    threads: int = 1,
    constant: Sequence[str] = (),
    times: int = 1,
    **attributes: float,
) -> list[np.ndarray]:
    model = _model(name, x, attributes, constant, times)
    session = ort.InferenceSession(model, _options(library, isa, threads), providers=["CPUExecutionProvider"])
    outputs: list[np.ndarray] = session.run(None, {n: a for n, a in x.items() if n not in constant})
    return outputs


def error(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    return float(np.abs(got - want).max(initial=0) / max(1.0, np.abs(want).max(initial=0)))


def reference(function: Any, x: Arrays, *rest: float) -> list[np.ndarray]:
    out = function(*(torch.from_numpy(a) for a in x.values()), *rest)
    return [y.numpy() for y in (out if isinstance(out, tuple) else (out,))]


def sizes(length: int) -> dict[str, int]:
    n1, n2 = fft_sizes(length)
    return {"n1": n1, "n2": n2}


def wkv7_inputs(B: int, T: int, H: int, N: int, seed: int = 0) -> Arrays:
    rng = np.random.default_rng((seed, B, T, H, N))
    r, k, v, w, g = (rng.standard_normal((B, T, H, N)) for _ in range(5))
    kk = k / np.linalg.norm(k, axis=-1, keepdims=True)
    rate = 1 / (1 + np.exp(-g))
    decay = np.exp(-np.exp(-0.5) / (1 + np.exp(-w)))
    state = rng.standard_normal((B, H, N, N))
    named = {"r": r, "w": decay, "k": k, "v": v, "a": -kk, "b": kk * rate, "state": state}
    return {n: a.astype(np.float32) for n, a in named.items()}


def scan_inputs(B: int, T: int, D: int, N: int, seed: int = 0) -> Arrays:
    rng = np.random.default_rng((seed, B, T, D, N))
    shapes = {"u": (B, T, D), "dt": (B, T, D), "A": (D, N), "B": (B, T, N), "C": (B, T, N), "D": (D,)}
    x = {n: rng.standard_normal(s) for n, s in (shapes | {"state": (B, D, N)}).items()}
    x["dt"], x["A"] = np.log1p(np.exp(x["dt"] - 2)), -np.exp(x["A"])
    return {n: a.astype(np.float32) for n, a in x.items()}


def conv_inputs(B: int, D: int, L: int, S: int, seed: int = 0) -> Arrays:
    rng = np.random.default_rng((seed, B, D, L, S))
    h = rng.standard_normal((D, L)) * np.exp(-4 * np.arange(L) / L)
    return {"u": rng.standard_normal((B, D, S)).astype(np.float32), "h": h.astype(np.float32)}


def cached_inputs(B: int, D: int, L: int, T: int, pos: int, seed: int = 0) -> Arrays:
    x = conv_inputs(B, D, L, T, seed)
    cache = np.random.default_rng((seed, pos)).standard_normal((B, D, L)).astype(np.float32)
    return x | {"cache": cache, "pos": np.array([pos])}


def hyena_inputs(B: int, D: int, L: int, T: int, pos: int, seed: int = 0) -> Arrays:
    x = cached_inputs(B, D, L, T, pos, seed)
    rng = np.random.default_rng((seed, T))
    shapes = {"packed": (B, T, 3 * D), "h": None, "skip": (D,), "cache": None, "pos": None}
    return {n: x[n] if s is None else rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def short_inputs(B: int, T: int, D: int, K: int, seed: int = 0) -> Arrays:
    rng = np.random.default_rng((seed, B, T, D, K))
    shapes = {"x": (B, T, D), "weight": (K, D), "bias": (D,), "state": (B, K - 1, D)}
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def short_attributes(x: Arrays, silu: bool) -> dict[str, int]:
    return {"channels": x["x"].shape[2], "silu": int(silu)}


def short_reference(x: Arrays, silu: bool) -> list[np.ndarray]:
    return reference(lambda *tensors: causal_conv1d(*tensors, silu=silu), x)


# Parity: reference, body, kernel

dims = st.integers(1, 3)
lengths = st.one_of(st.just(1), st.integers(1, 40))


@settings(max_examples=25, deadline=None)
@given(B=dims, T=lengths, H=dims, N=st.sampled_from([1, 2, 5, 8, 16, 31, 32, 64, 70]), seed=st.integers(0, 9))
def test_wkv7_three_ways(library: Path, B: int, T: int, H: int, N: int, seed: int) -> None:
    x = wkv7_inputs(B, T, H, N, seed)
    want = reference(wkv7, x)
    for got in (kernel("wkv7", x, library), run_body(get_op("wkv7"), x, "auto")):
        assert max(map(error, got, want)) <= TOLERANCES["op_fp32"]


@settings(max_examples=25, deadline=None)
@given(
    B=dims, T=lengths, D=st.integers(1, 70), N=st.sampled_from([1, 3, 8, 16, 24, 32]), seed=st.integers(0, 9)
)
def test_selective_scan_three_ways(library: Path, B: int, T: int, D: int, N: int, seed: int) -> None:
    x = scan_inputs(B, T, D, N, seed)
    want = reference(selective_scan, x)
    for got in (kernel("selective_scan", x, library), run_body(get_op("selective_scan"), x, "auto")):
        assert max(map(error, got, want)) <= TOLERANCES["op_fp32"]


@settings(max_examples=25, deadline=None)
@given(B=dims, D=st.integers(1, 20), L=st.integers(1, 400), data=st.data(), constant=st.booleans())
def test_fft_conv_three_ways(
    library: Path, B: int, D: int, L: int, data: st.DataObject, constant: bool
) -> None:
    x = conv_inputs(B, D, L, data.draw(st.one_of(st.just(L), st.integers(1, L))))
    want = reference(causal_conv, {n: a.astype(np.float64) for n, a in x.items()})
    got = kernel("fft_conv", x, library, constant=("h",) if constant else (), **sizes(L))
    assert error(got[0], want[0]) <= TOLERANCES["native_fft"]
    body = run_body(get_op("fft_conv"), x, "monarch", attributes=sizes(L))
    assert error(got[0], body[0]) <= TOLERANCES["op_fp32"]


@settings(max_examples=25, deadline=None)
@given(B=dims, D=st.integers(1, 12), L=st.integers(1, 300), data=st.data(), constant=st.booleans())
def test_fft_conv_cached_three_ways(
    library: Path, B: int, D: int, L: int, data: st.DataObject, constant: bool
) -> None:
    T = data.draw(st.one_of(st.just(1), st.integers(1, L)))
    x = cached_inputs(B, D, L, T, data.draw(st.integers(0, L - T)))
    want = reference(fft_conv_cached, x, *fft_sizes(L))
    got = kernel("fft_conv_cached", x, library, constant=("h",) if constant else (), **sizes(L))
    assert error(got[0], want[0]) <= TOLERANCES["native_fft"]
    np.testing.assert_array_equal(got[1], want[1])
    body = run_body(get_op("fft_conv_cached"), x, "monarch", attributes=sizes(L))
    assert max(map(error, got, body)) <= TOLERANCES["op_fp32"]


@settings(max_examples=40, deadline=None)
@given(
    B=dims,
    T=lengths,
    D=st.integers(1, 70),
    K=st.integers(1, 7),
    silu=st.booleans(),
    seed=st.integers(0, 9),
)
def test_causal_conv1d_three_ways(
    library: Path, B: int, T: int, D: int, K: int, silu: bool, seed: int
) -> None:
    x = short_inputs(B, T, D, K, seed)
    want, attributes = short_reference(x, silu), short_attributes(x, silu)
    body = run_body(get_op("causal_conv1d"), x, "auto", attributes=attributes)
    for got in (kernel("causal_conv1d", x, library, **attributes), body):
        assert error(got[0], want[0]) <= TOLERANCES["op_fp32"]
        np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize("T", [1, 2, 5, 130])
@pytest.mark.parametrize(("D", "K"), [(1, 4), (33, 3), (64, 4), (70, 1), (40, 9)])
def test_causal_conv1d_on_every_instruction_set(library: Path, isa: str, T: int, D: int, K: int) -> None:
    x = short_inputs(2, T, D, K)
    got = kernel("causal_conv1d", x, library, isa, **short_attributes(x, True))
    want = short_reference(x, True)
    assert error(got[0], want[0]) <= TOLERANCES["op_fp32"]
    np.testing.assert_array_equal(got[1], want[1])


def test_silu_of_any_number(library: Path, isa: str) -> None:
    """From where its result underflows to where it is the number itself, and what isn't one."""
    v = np.array([-np.inf, -3e38, -200, -90, -88, -60, -1e-30, 0, 1e-30, 1, 60, 90, 3e38, np.inf, np.nan])
    x = {"x": v[None, :, None].repeat(33, 2), "weight": np.ones((1, 33)), "bias": np.zeros(33)}
    x |= {"state": np.zeros((1, 0, 33))}
    x = {n: a.astype(np.float32) for n, a in x.items()}
    (y, _), (want, _) = (
        kernel("causal_conv1d", x, library, isa, channels=33, silu=1),
        short_reference(x, True),
    )
    # half an ulp of an exponent near 130 is 4e-6 of the result; -90 and less end in denormals or zero
    far = v < -30
    np.testing.assert_allclose(y[:, far], want[:, far], rtol=8e-6, atol=1e-36)
    np.testing.assert_allclose(y[:, ~far], want[:, ~far], rtol=TOLERANCES["native_exp"])


@settings(max_examples=25, deadline=None)
@given(B=dims, D=st.integers(1, 70), L=st.integers(1, 300), data=st.data(), constant=st.booleans())
def test_hyena_conv_three_ways(
    library: Path, B: int, D: int, L: int, data: st.DataObject, constant: bool
) -> None:
    T = data.draw(st.one_of(st.just(1), st.integers(1, L)))
    x = hyena_inputs(B, D, L, T, data.draw(st.integers(0, L - T)))
    want = reference(hyena_conv, x, *fft_sizes(L))
    got = kernel("hyena_conv", x, library, constant=("h", "skip") if constant else (), **sizes(L))
    body = run_body(get_op("hyena_conv"), x, "gated", attributes=sizes(L))
    assert error(got[0], want[0]) <= TOLERANCES["op_fp32"]
    assert error(body[0], want[0]) <= TOLERANCES["op_fp32"]
    for cache in (got[1], body[1]):
        np.testing.assert_array_equal(cache, want[1])


@pytest.mark.parametrize(("T", "pos"), [(1, 0), (1, 299), (15, 3), (16, 0), (40, 0), (299, 1), (300, 0)])
@pytest.mark.parametrize("D", [9, 40, 64])
def test_hyena_conv_on_every_instruction_set(library: Path, isa: str, T: int, pos: int, D: int) -> None:
    x = hyena_inputs(2, D, 300, T, pos)
    got = kernel("hyena_conv", x, library, isa, **sizes(300))
    want = reference(hyena_conv, x, *fft_sizes(300))
    assert error(got[0], want[0]) <= TOLERANCES["op_fp32"]
    np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize("T", [1, 2, 5, 6, 33])
@pytest.mark.parametrize("N", [7, 16, 32, 64, 72])
def test_wkv7_on_every_instruction_set(library: Path, isa: str, T: int, N: int) -> None:
    x = wkv7_inputs(2, T, 3, N)
    got = kernel("wkv7", x, library, isa)
    assert max(map(error, got, reference(wkv7, x))) <= TOLERANCES["op_fp32"]


@pytest.mark.parametrize("T", [1, 3, 4, 33])
@pytest.mark.parametrize(("D", "N"), [(1, 16), (70, 16), (40, 5), (33, 32)])
def test_selective_scan_on_every_instruction_set(library: Path, isa: str, T: int, D: int, N: int) -> None:
    x = scan_inputs(2, T, D, N)
    got = kernel("selective_scan", x, library, isa)
    assert max(map(error, got, reference(selective_scan, x))) <= TOLERANCES["op_fp32"]


@pytest.mark.parametrize("N", [4, 6, 16])
def test_selective_scan_of_even_decays(library: Path, isa: str, N: int) -> None:
    """A near -1 .. -N: decays are made of each other, but for the channels and tokens that forbid it."""
    x = scan_inputs(2, 40, 70, N)
    x["A"] = -np.arange(1, N + 1, dtype=np.float32) - np.abs(x["A"]) / 100
    x["A"][16:20] = x["A"][16:20, ::-1]
    x["dt"] /= 4
    x["dt"][:, 7::11] *= 100
    x["dt"][:, 3, 50] = 0
    got = kernel("selective_scan", x, library, isa)
    assert max(map(error, got, reference(selective_scan, x))) <= TOLERANCES["op_fp32"]


@pytest.mark.parametrize("L", [1, 2, 31, 64, 97, 128, 160, 192, 1000, 1025, 1300, 4096, 20000])
def test_fft_conv_on_every_instruction_set(library: Path, isa: str, L: int) -> None:
    """All three radices of the first pass, with and without blocks that exceed the cache."""
    x = conv_inputs(1, 3, L, L)
    want = reference(causal_conv, {n: a.astype(np.float64) for n, a in x.items()})
    got = kernel("fft_conv", x, library, isa, **sizes(L))
    assert error(got[0], want[0]) <= TOLERANCES["native_fft"]


@pytest.mark.parametrize(("T", "pos"), [(1, 0), (1, 299), (40, 0), (299, 1), (300, 0)])
def test_fft_conv_cached_on_every_instruction_set(library: Path, isa: str, T: int, pos: int) -> None:
    x = cached_inputs(2, 9, 300, T, pos)
    got = kernel("fft_conv_cached", x, library, isa, **sizes(300))
    want = reference(fft_conv_cached, x, *fft_sizes(300))
    assert error(got[0], want[0]) <= TOLERANCES["native_fft"]
    np.testing.assert_array_equal(got[1], want[1])


CASES: dict[str, tuple[Arrays, dict[str, int]]] = {
    "wkv7": (wkv7_inputs(2, 300, 4, 32), {}),
    "selective_scan": (scan_inputs(2, 90, 200, 16), {}),
    "fft_conv": (conv_inputs(2, 40, 900, 900), sizes(900)),
    "fft_conv_cached": (cached_inputs(2, 40, 900, 700, 100), sizes(900)),
    "causal_conv1d": (short_inputs(2, 300, 300, 4), {"channels": 300, "silu": 1}),
    "hyena_conv": (hyena_inputs(2, 40, 900, 700, 100), sizes(900)),
}


@pytest.mark.parametrize("name", CASES)
def test_threads_change_nothing(library: Path, name: str) -> None:
    x, attributes = CASES[name]
    for got, want in zip(
        kernel(name, x, library, threads=2, **attributes), kernel(name, x, library, **attributes), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def _stateful(name: str, T: int) -> tuple[Arrays, dict[str, int], Any, tuple[int, ...]]:
    """Inputs and attributes of an operator with state, its reference and that one's last arguments."""
    if name == "fft_conv_cached":
        return cached_inputs(2, 3, 50, T, 10), sizes(50), fft_conv_cached, fft_sizes(50)
    if name == "hyena_conv":
        return hyena_inputs(2, 3, 50, T, 10), sizes(50), hyena_conv, fft_sizes(50)
    if name == "causal_conv1d":
        x = short_inputs(2, T, 9, 4)
        return x, short_attributes(x, True), partial(causal_conv1d, silu=True), ()
    if name == "wkv7":
        return wkv7_inputs(2, T, 2, 16), {}, wkv7, ()
    return scan_inputs(2, T, 20, 16), {}, selective_scan, ()


@pytest.mark.parametrize("name", ["wkv7", "selective_scan", "fft_conv_cached", "causal_conv1d", "hyena_conv"])
@pytest.mark.parametrize("T", [1, 2, 20])
def test_state_updated_in_place(library: Path, name: str, T: int) -> None:
    """Two nodes in a row: ONNX Runtime lets the second write its state over the first one's."""
    x, attributes, function, rest = _stateful(name, T)
    state = next(n for n in x if n in ("state", "cache"))
    middle = reference(function, x, *rest)
    want = reference(function, x | {state: middle[1]}, *rest)
    assert max(map(error, kernel(name, x, library, times=2, **attributes), want)) <= TOLERANCES["op_fp32"]


@pytest.mark.parametrize("name", ["wkv7", "selective_scan", "fft_conv_cached", "causal_conv1d", "hyena_conv"])
def test_no_tokens_leave_the_state_alone(library: Path, name: str) -> None:
    x, attributes, *_ = _stateful(name, 1)
    kept = {"state", "cache", "h", "pos", "A", "D", "weight", "bias", "skip"}
    empty = {
        n: a if n in kept else a[..., :0] if name == "fft_conv_cached" else a[:, :0] for n, a in x.items()
    }
    y, state = kernel(name, empty, library, **attributes)
    assert y.size == 0
    np.testing.assert_array_equal(state, x["cache" if "cache" in x else "state"])


# Attention over a cache


def attention_inputs(
    B: int, T: int, heads: tuple[int, int], sizes: tuple[int, int], L: int, pos: int, seed: int = 0
) -> Arrays:
    """Rows of the cache from ``pos`` on are not zero: nothing may read them."""
    rng = np.random.default_rng((seed, B, T, L, pos))
    (H, G), (K, V) = heads, sizes
    shapes = {
        "q": (B, T, H * K),
        "k": (B, T, G * K),
        "v": (B, T, G * V),
        "k_cache": (B, G, L, K),
        "v_cache": (B, G, L, V),
    }
    x = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    return {**x, "pos": np.array([pos])}


def attention_attributes(H: int, G: int) -> dict[str, float]:
    return {"heads": H, "kv_heads": G, "scale": 0.31}


@settings(max_examples=40, deadline=None)
@given(
    B=dims,
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (5, 1), (40, 1)]),
    sizes=st.sampled_from([(2, 2), (4, 7), (8, 16), (16, 8), (33, 20), (64, 64)]),
    L=st.integers(1, 200),
    data=st.data(),
)
def test_cached_attention_three_ways(
    library: Path, B: int, heads: tuple[int, int], sizes: tuple[int, int], L: int, data: st.DataObject
) -> None:
    T = data.draw(st.one_of(st.just(1), st.integers(1, L)))
    x = attention_inputs(B, T, heads, sizes, L, data.draw(st.integers(0, L - T)))
    want = _attention(x, *heads)
    got = kernel("cached_attention", x, library, **attention_attributes(*heads))
    body = run_body(get_op("cached_attention"), x, "products", attributes=attention_attributes(*heads))
    for a, b, c in zip(got, body, want, strict=True):
        assert max(error(a, c), error(b, c)) <= TOLERANCES["op_fp32"]
    for a, c in zip(got[1:], want[1:], strict=True):
        np.testing.assert_array_equal(a, c.astype(np.float32))


def _attention(x: Arrays, H: int, G: int) -> list[np.ndarray]:
    """The definition in float64."""
    doubles = {n: a.astype(np.float64) if a.dtype == np.float32 else a for n, a in x.items()}
    return reference(cached_attention, doubles, H, G, 0.31)


@pytest.mark.parametrize("T", [1, 3, 40, 130])
@pytest.mark.parametrize("pos", [0, 63, 200])
def test_cached_attention_on_every_instruction_set(library: Path, isa: str, T: int, pos: int) -> None:
    """Across blocks of 32 rows and 64 keys, with sizes that are no whole vectors."""
    x = attention_inputs(2, T, (6, 3), (20, 37), 400, pos)
    got = kernel("cached_attention", x, library, isa, **attention_attributes(6, 3))
    assert max(map(error, got, _attention(x, 6, 3))) <= TOLERANCES["op_fp32"]


@pytest.mark.parametrize("size", [30.0, 1e4, 1e18])
def test_cached_attention_of_large_scores(library: Path, isa: str, size: float) -> None:
    """The largest grows from block to block; scores of 10^18 are of one key a row."""
    x = attention_inputs(1, 70, (2, 1), (16, 16), 300, 200)
    x["q"] = (x["q"] * np.float32(size)).astype(np.float32)
    want = _attention(x, 2, 1)
    got = kernel("cached_attention", x, library, isa, **attention_attributes(2, 1))
    assert np.isfinite(got[0]).all()
    # rounding of a score is an error of its share: size * 4 * 2^-24, where shares aren't 0 or 1
    assert np.mean(np.abs(got[0] - want[0])) <= TOLERANCES["op_fp32"] * max(1.0, size)


def test_cached_attention_with_threads(library: Path) -> None:
    x, attributes = attention_inputs(2, 90, (8, 4), (32, 32), 400, 300), attention_attributes(8, 4)
    one, two = (kernel("cached_attention", x, library, threads=n, **attributes) for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


def test_cached_attention_of_no_tokens(library: Path) -> None:
    x = attention_inputs(2, 0, (4, 2), (8, 8), 20, 5)
    out, keys, values = kernel("cached_attention", x, library, **attention_attributes(4, 2))
    assert out.shape == (2, 0, 32)
    np.testing.assert_array_equal(keys, x["k_cache"])
    np.testing.assert_array_equal(values, x["v_cache"])


@pytest.mark.parametrize(("T", "pos"), [(1, 9), (4, 6), (1, -1), (2, 2**62)])
def test_a_stream_longer_than_the_cache_is_refused(library: Path, T: int, pos: int) -> None:
    x = attention_inputs(1, T, (2, 2), (4, 4), 9, 0) | {"pos": np.array([pos])}
    with pytest.raises(Exception, match="'mixer0': a stream is longer than the cache"):
        kernel("cached_attention", x, library, **attention_attributes(2, 2))


@pytest.mark.parametrize(
    ("changes", "attributes", "text"),
    [
        ({"q": (1, 2, 9)}, {}, "q must be float32 [1,any,8]"),
        ({"k": (1, 3, 8)}, {}, "k must be float32 [1,2,8]"),
        ({"v_cache": (1, 2, 8, 4)}, {}, "v_cache must be float32 [1,2,9,any]"),
        ({"pos": (2,)}, {}, "pos must be int64 [1]"),
        ({}, {"heads": 3}, "3 heads for 2 heads of keys"),
    ],
)
def test_cached_attention_of_wrong_shapes_names_the_node(
    library: Path, changes: dict[str, Any], attributes: dict[str, int], text: str
) -> None:
    x = attention_inputs(1, 2, (2, 2), (4, 4), 9, 0)
    bad = x | {n: np.zeros(s, x[n].dtype) for n, s in changes.items()}
    with pytest.raises(Exception, match="xexport cached_attention node 'mixer0': ") as caught:
        kernel("cached_attention", bad, library, **(attention_attributes(2, 2) | attributes))
    assert text in str(caught.value)


# Values that are no ordinary numbers


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["wkv7", "selective_scan"]),
    T=st.sampled_from([1, 9]),
    # of numbers near float32's largest, 3e38, the order of sums decides which of them overflow
    value=st.sampled_from([np.nan, np.inf, -np.inf, 1e30]),
    data=st.data(),
)
def test_nan_and_infinity_as_in_the_reference(
    library: Path, name: str, T: int, value: float, data: st.DataObject
) -> None:
    x = wkv7_inputs(1, T, 2, 16) if name == "wkv7" else scan_inputs(1, T, 20, 16)
    place = x[data.draw(st.sampled_from(sorted(x)))].reshape(-1)
    place[data.draw(st.integers(0, place.size - 1))] = value
    want = reference(wkv7 if name == "wkv7" else selective_scan, x)
    for isa in ("baseline", ""):
        for got, expected in zip(kernel(name, x, library, isa), want, strict=True):
            np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
            infinite = np.isinf(expected)
            np.testing.assert_array_equal(got[infinite], expected[infinite])


@pytest.mark.parametrize("T", [1, 12])
def test_decay_is_exp_everywhere(library: Path, isa: str, T: int) -> None:
    """With a state of 1 and no input y is exp(dt A): from below the denormals to beyond the largest float."""
    exponents = np.concatenate((np.linspace(-120, 95, 2000), np.linspace(-1, 1, 48))).astype(np.float32)
    D = exponents.size
    x = {"u": np.zeros((1, T, D)), "dt": np.zeros((1, T, D)), "A": np.zeros((D, 16))}
    x |= {
        "B": np.zeros((1, T, 16)),
        "C": np.zeros((1, T, 16)),
        "D": np.zeros(D),
        "state": np.ones((1, D, 16)),
    }
    x["A"][:, 0] = exponents
    x["dt"][:, 0] = 1
    x["C"][..., 0] = 1
    y, _ = kernel("selective_scan", {n: a.astype(np.float32) for n, a in x.items()}, library, isa)
    with np.errstate(over="ignore"):
        want = np.exp(exponents.astype(np.float64)).astype(np.float32)
    got = y[0, -1]
    ordinary = np.isfinite(want) & (want > np.finfo(np.float32).tiny)
    # half an ulp of dt * A log2(e), near 137, is 4e-6 of the result; between -1 and 1 it is 6e-8
    relative = np.abs(got / np.where(ordinary, want, 1) - 1)[ordinary]
    assert relative.max() <= 2e-5
    assert relative[-48:].max() <= TOLERANCES["native_exp"]
    np.testing.assert_array_equal(got[np.isinf(want)], np.inf)
    tiny = ~ordinary & np.isfinite(want)
    assert np.abs(got[tiny] - want[tiny]).max() <= 1e-40


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("L", [8, 300])
def test_a_bad_value_stays_in_its_channel(library: Path, value: float, L: int) -> None:
    x = conv_inputs(2, 5, L, L)
    clean = kernel("fft_conv", x, library, **sizes(L))[0]
    x["u"][1, 2, 5] = value
    y = kernel("fft_conv", x, library, **sizes(L))[0]
    assert not np.isfinite(y[1, 2, 5:]).any()
    hit = np.zeros_like(y, bool)
    hit[1, 2] = True
    np.testing.assert_array_equal(y[~hit], clean[~hit])


# Memory of the spectra of constant filters

_SPECTRA = """
import ctypes, gc, sys, zlib
import numpy as np
from test_native import _model, _options, conv_inputs, sizes
import onnxruntime as ort
from pathlib import Path
library = Path(sys.argv[1])
kept = ctypes.CDLL(str(library)).xexport_native_spectrum_bytes
kept.restype = ctypes.c_int64
x = conv_inputs(1, 64, 4096, 4096)
model = _model("fft_conv", x, sizes(4096), ("h",))
sessions = [ort.InferenceSession(model, _options(library)) for _ in range(3)]
found = []
for session in sessions:
    for length in (4096, 4096, 1000, 300):
        (y,) = session.run(None, {"u": np.ascontiguousarray(x["u"][..., :length])})
        found.append(zlib.crc32(y.tobytes()))
    found.append(kept())
del session, sessions
gc.collect()
print(*found, kept())
"""


def test_spectra_are_bounded_and_freed(library: Path) -> None:
    """One of 4096 points and 64 channels takes 2 MB, one of 1000 points an eighth or more of that."""
    runs = {}
    for megabytes in (None, 5, 0):
        environment = {k: v for k, v in os.environ.items() if k != "XEXPORT_SPECTRUM_MB"}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        if megabytes is not None:
            environment["XEXPORT_SPECTRUM_MB"] = str(megabytes)
        done = subprocess.run(
            [sys.executable, "-c", _SPECTRA, str(library)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        numbers = [int(n) for n in done.stdout.split()]
        runs[megabytes] = numbers[4:-1:5], numbers[-1], [n for i, n in enumerate(numbers[:-1]) if i % 5 < 4]
    free, bound, none = (runs[m] for m in (None, 5, 0))
    assert free[0][0] > 0
    assert free[0] == [free[0][0] * n for n in (1, 2, 3)]
    assert 0 < max(bound[0]) <= 5 << 20
    assert none[0] == [0, 0, 0]
    assert [r[1] for r in runs.values()] == [0, 0, 0]  # with the sessions they go
    assert free[2] == bound[2] == none[2]  # to the bit


# Which of the two ran


def _events(model: bytes, feed: Arrays, options: ort.SessionOptions, folder: Path) -> set[str]:
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    session.run(None, feed)
    rows = json.loads(Path(session.end_profiling()).read_text())
    return {row["args"]["op_name"] for row in rows if row.get("cat") == "Node"}


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_ran_and_without_it_the_body(library: Path, tmp_path: Path, name: str) -> None:
    x, attributes = CASES[name]
    model = _model(name, x, attributes)
    assert _events(model, x, _options(library), tmp_path) == {name}
    inlined = _events(model, x, _options(None), tmp_path)
    assert name not in inlined
    assert {"MatMul", "Conv"} & inlined


# What is refused

BAD_SHAPES = {
    "wkv7-rank": ("wkv7", {"r": (1, 2, 16)}, "r must be float32 [any,any,any,any], got float32 [1,2,16]"),
    "wkv7-head": ("wkv7", {"k": (1, 2, 2, 8)}, "k must be float32 [1,2,2,16], got float32 [1,2,2,8]"),
    "wkv7-state": ("wkv7", {"state": (2, 2, 16, 16)}, "state must be float32 [1,2,16,16]"),
    "scan-A": ("selective_scan", {"A": (9, 16)}, "A must be float32 [20,any], got float32 [9,16]"),
    "scan-B": ("selective_scan", {"B": (1, 3, 16)}, "B must be float32 [1,2,16]"),
    "conv-channels": ("fft_conv", {"h": (4, 9)}, "h must be float32 [3,any], got float32 [4,9]"),
    "conv-short": ("fft_conv", {"h": (3, 6)}, "9 points, a filter of 6"),
    "conv-wrap": ("fft_conv", {"h": (3, 90)}, "a filter of 90, a transform of 32"),
    "cached-cache": ("fft_conv_cached", {"cache": (1, 3, 8)}, "cache must be float32 [1,3,9]"),
    "short-channels": (
        "causal_conv1d",
        {"x": (1, 2, 7)},
        "x must be float32 [any,any,9], got float32 [1,2,7]",
    ),
    "short-weight": ("causal_conv1d", {"weight": (0, 9)}, "weight must have a tap at least"),
    "short-state": ("causal_conv1d", {"state": (1, 4, 9)}, "state must be float32 [1,3,9]"),
    "hyena-packed": ("hyena_conv", {"packed": (1, 2, 8)}, "packed must be float32 [any,any,9]"),
    "hyena-cache": ("hyena_conv", {"cache": (1, 3, 8)}, "cache must be float32 [1,3,9]"),
    "hyena-wrap": ("hyena_conv", {"h": (3, 90), "cache": (1, 3, 90)}, "a filter of 90, a transform of 32"),
    "cached-pos": ("fft_conv_cached", {"pos": (2,)}, "pos must be int64 [1], got int64 [2]"),
}


def _small(name: str) -> tuple[Arrays, dict[str, int]]:
    return {
        "wkv7": (wkv7_inputs(1, 2, 2, 16), {}),
        "selective_scan": (scan_inputs(1, 2, 20, 16), {}),
        "fft_conv": (conv_inputs(1, 3, 9, 9), sizes(9)),
        "fft_conv_cached": (cached_inputs(1, 3, 9, 2, 4), sizes(9)),
        "causal_conv1d": (short_inputs(1, 2, 9, 4), {"channels": 9, "silu": 1}),
        "hyena_conv": (hyena_inputs(1, 3, 9, 2, 4), sizes(9)),
    }[name]


@pytest.mark.parametrize("case", BAD_SHAPES)
def test_wrong_shapes_name_the_node(library: Path, case: str) -> None:
    name, changes, text = BAD_SHAPES[case]
    x, attributes = _small(name)
    bad = x | {n: np.zeros(s, x[n].dtype) for n, s in changes.items()}
    with pytest.raises(Exception, match=f"xexport {name} node 'mixer0': ") as caught:
        kernel(name, bad, library, **attributes)
    assert text in str(caught.value)


@pytest.mark.parametrize("name", CASES)
def test_other_dtypes_are_refused_when_the_graph_is_loaded(library: Path, name: str) -> None:
    x, attributes = _small(name)
    double = {n: a.astype(np.float64) if a.dtype == np.float32 else a for n, a in x.items()}
    with pytest.raises(Exception, match="mixer0"):
        kernel(name, double, library, **attributes)


def test_a_missing_attribute_names_the_node(library: Path) -> None:
    x, _ = _small("fft_conv")
    with pytest.raises(Exception, match="fft_conv node 'mixer0': the attribute n2 is missing"):
        kernel("fft_conv", x, library, n1=8)


@pytest.mark.parametrize("name", ["fft_conv_cached", "hyena_conv"])
@pytest.mark.parametrize(("T", "pos"), [(1, 9), (4, 6), (1, -1), (2, 2**62)])
def test_a_stream_longer_than_the_filter_is_refused(library: Path, name: str, T: int, pos: int) -> None:
    inputs = cached_inputs if name == "fft_conv_cached" else hyena_inputs
    x = inputs(1, 3, 9, T, 0) | {"pos": np.array([pos])}
    with pytest.raises(Exception, match="'mixer0': a stream is longer than the filter"):
        kernel(name, x, library, **sizes(9))


def test_an_unknown_instruction_set_is_refused_by_name(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Exception, match=r"no instruction set .sse9. on this machine; it has (sse2|neon)"):
        _options(library, "sse9")
    monkeypatch.setenv("XEXPORT_ISA", "sse9")
    with pytest.raises(Exception, match="no instruction set 'sse9'"):
        _options(library)
    assert "XEXPORT_ISA=sse9" in find_native().reason
    monkeypatch.setenv("XEXPORT_ISA", "baseline")
    assert find_native().isa in ("sse2", "neon")
    _options(library)


# Many at a time


@pytest.mark.parametrize("name", CASES)
def test_concurrent_runs_of_several_sessions(library: Path, name: str) -> None:
    """Four threads on three sessions; a constant filter's spectrum is first computed by whoever is first."""
    x, attributes = CASES[name]
    constant = ("h",) if "h" in x else ()
    feed = {n: a for n, a in x.items() if n not in constant}
    want = kernel(name, x, library, constant=constant, **attributes)
    model = _model(name, x, attributes, constant)
    sessions = [
        ort.InferenceSession(model, _options(library, threads=n), providers=["CPUExecutionProvider"])
        for n in (1, 1, 2)
    ]

    def work(number: int) -> list[list[np.ndarray]]:
        return [sessions[(number + i) % 3].run(None, feed) for i in range(6)]

    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(work, range(4)):
            for result in results:
                for got, expected in zip(result, want, strict=True):
                    np.testing.assert_array_equal(got, expected)


def test_spectra_beyond_the_limit_are_computed_each_time(library: Path) -> None:
    """More sizes than a node keeps, in turn: the results stay the same."""
    L = 3000
    x = cached_inputs(1, 3, L, 1, 0)
    model = _model("fft_conv_cached", x, sizes(L), ("h",))
    session = ort.InferenceSession(model, _options(library), providers=["CPUExecutionProvider"])
    for T in (100, 400, 3000, 100, 1100, 400):
        now = cached_inputs(1, 3, L, T, 0) | {"h": x["h"]}
        y, _ = session.run(None, {n: a for n, a in now.items() if n != "h"})
        assert error(y, reference(fft_conv_cached, now, *fft_sizes(L))[0]) <= TOLERANCES["native_fft"]
