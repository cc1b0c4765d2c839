"""fft_conv and fft_conv_cached: the definitions against plain sums, the ONNX bodies against those."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from tolerances import TOLERANCES

from xexport.core.errors import LimitError
from xexport.core.registry import get_op
from xexport.ops.fft_conv.reference import causal_conv, fft_conv, fft_sizes
from xexport.ops.fft_conv_cached.reference import fft_conv_cached
from xexport.ops.run import op_model, run_body

CONV, CACHED = get_op("fft_conv"), get_op("fft_conv_cached")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def sizes(length: int) -> dict[str, int]:
    n1, n2 = fft_sizes(length)
    return {"n1": n1, "n2": n2}


def plain(u: np.ndarray, h: np.ndarray) -> np.ndarray:
    """The sum itself, one term at a time, in float64."""
    y = np.zeros(u.shape)
    for t in range(u.shape[-1]):
        for s in range(t + 1):
            y[..., t] += h[:, t - s].astype(float) * u[..., s]
    return y


def error(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / max(1.0, np.abs(want).max()))


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 1000, 1024, 1025, 65536])
def test_factors_hold_twice_the_length(length: int) -> None:
    n1, n2 = fft_sizes(length)
    assert n1 % 2 == 0
    assert n1 >= n2
    assert 2 * length <= n1 * n2 <= max(4, 4 * length)


@pytest.mark.parametrize(("L", "S"), [(1, 1), (5, 5), (9, 4), (16, 16)])
def test_reference_is_the_sum(L: int, S: int) -> None:
    u, h = normal(2, 3, S), normal(3, L)
    got = fft_conv(torch.from_numpy(u), torch.from_numpy(h), *fft_sizes(L)).numpy()
    assert error(got, plain(u, h)) <= TOLERANCES["op_fp32"]
    double = causal_conv(torch.from_numpy(u).double(), torch.from_numpy(h).double()).numpy()
    assert error(double, plain(u, h)) <= TOLERANCES["op_fp64"]


def test_reference_refuses_a_transform_that_wraps_around() -> None:
    with pytest.raises(ValueError, match="transform"):
        fft_conv(torch.zeros(1, 1, 8), torch.zeros(1, 8), 2, 4)


def test_torch_ops_are_well_formed() -> None:
    u, h, cache = (torch.from_numpy(normal(*s)) for s in ((2, 3, 4), (3, 9), (2, 3, 9)))
    torch.library.opcheck(fft_conv, (u, h, *fft_sizes(9)))
    torch.library.opcheck(fft_conv_cached, (u, h, cache, torch.tensor([5]), *fft_sizes(9)))


@pytest.mark.parametrize(
    ("B", "D", "L", "S"),
    [(1, 3, 1, 1), (2, 3, 5, 4), (1, 2, 7, 7), (2, 4, 64, 64), (2, 3, 100, 33), (1, 2, 1000, 1000)],
    ids=lambda n: str(n),
)
def test_body_parity(B: int, D: int, L: int, S: int) -> None:
    u, h = normal(B, D, S), normal(D, L)
    (got,) = run_body(CONV, {"u": u, "h": h}, "monarch", attributes=sizes(L))
    want = causal_conv(torch.from_numpy(u).double(), torch.from_numpy(h).double()).numpy()
    assert error(got, want) <= TOLERANCES["op_fp32"]


@pytest.mark.parametrize("L", [2048, 32768])
def test_long_transforms_are_as_accurate(L: int) -> None:
    """The phases are exact integers, so the error grows with the sums only: as log L."""
    u, h = normal(1, 1, L), normal(1, L) * np.exp(-np.arange(L) / L).astype(np.float32)
    (got,) = run_body(CONV, {"u": u, "h": h}, "monarch", attributes=sizes(L))
    want = causal_conv(torch.from_numpy(u).double(), torch.from_numpy(h).double()).numpy()
    assert error(got, want) <= TOLERANCES["op_fp32"]


def test_other_factors_give_the_same() -> None:
    u, h = normal(1, 2, 12), normal(2, 12)
    for n1, n2 in ((16, 2), (4, 8), (6, 5), (24, 1), (2, 12)):
        (got,) = run_body(CONV, {"u": u, "h": h}, "monarch", attributes={"n1": n1, "n2": n2})
        assert error(got, plain(u, h)) <= TOLERANCES["op_fp32"], (n1, n2)


def test_tables_and_filter_spectrum_are_computed_once(tmp_path: Path) -> None:
    """With a constant filter nothing but the input's own transform is left after loading."""
    u, h = normal(1, 2, 16), normal(2, 16)
    model = op_model(CONV, {"u": u, "h": h}, "monarch", 23, sizes(16), constant=("h",))
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    left = [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert not {"Cos", "Sin", "Mod", "Range", "Gather"} & set(left)
    assert left.count("MatMul") == 4


CASES = {
    "first-token": (1, 3, 50, 1, 0),
    "last-token": (2, 3, 50, 1, 49),
    "one-slot-filter": (1, 2, 1, 1, 0),
    "short-prompt": (2, 2, 50, 3, 0),
    "few": (2, 2, 50, 8, 8),
    "few-to-the-end": (1, 2, 50, 2, 48),
    "power-of-two": (1, 2, 50, 9, 7),
    "behind-a-power-of-two": (1, 2, 50, 10, 7),
    "middle": (2, 2, 50, 20, 17),
    "to-the-end": (2, 3, 50, 33, 17),
    "whole": (1, 2, 64, 64, 0),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("constant", [True, False], ids=["constant-filter", "any-filter"])
@pytest.mark.parametrize("variant", CACHED.bodies)
def test_cached_parity(case: str, constant: bool, variant: str) -> None:
    B, D, L, T, position = CASES[case]
    x = {"u": normal(B, D, T), "h": normal(D, L), "cache": normal(B, D, L), "pos": np.array([position])}
    model = op_model(CACHED, x, variant, 23, sizes(L), constant=("h",) if constant else ())
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    y, cache = session.run(None, {k: v for k, v in x.items() if k != "h" or not constant})
    seen = np.concatenate((x["cache"][..., :position], x["u"]), -1)
    assert error(y, plain(seen, x["h"])[..., position:]) <= TOLERANCES["op_fp32"]
    np.testing.assert_array_equal(cache[..., : position + T], seen)
    np.testing.assert_array_equal(cache[..., position + T :], x["cache"][..., position + T :])


@settings(max_examples=10, deadline=None)
@given(data=st.data(), L=st.integers(1, 40), seed=st.integers(0, 99))
def test_chunk_law(data: st.DataObject, L: int, seed: int) -> None:
    """Any cuts give the convolution of the whole; in ONNX Runtime and in PyTorch."""
    total = data.draw(st.integers(1, L))
    cuts = sorted({0, total, *data.draw(st.lists(st.integers(0, total), max_size=2))})
    u, h = normal(2, 3, total, seed=seed), normal(3, L, seed=seed)
    cache, twin, outs, twins = np.zeros((2, 3, L), np.float32), torch.zeros(2, 3, L), [], []
    for a, b in itertools.pairwise(cuts):
        x = {"u": u[..., a:b], "h": h, "cache": cache, "pos": np.array([a])}
        y, cache = run_body(CACHED, x, "monarch", attributes=sizes(L))
        tensors = (torch.from_numpy(np.ascontiguousarray(x[n])) for n in ("u", "h"))
        z, twin = fft_conv_cached(*tensors, twin, torch.tensor([a]), *fft_sizes(L))
        outs.append(y)
        twins.append(z)
    assert error(np.concatenate(outs, -1), plain(u, h)) <= TOLERANCES["op_fp32"]
    assert error(torch.cat(twins, -1).numpy(), plain(u, h)) <= TOLERANCES["op_fp32"]
    np.testing.assert_array_equal(cache, twin.numpy())


def test_reference_refuses_what_does_not_fit() -> None:
    with pytest.raises(LimitError, match="longer than the filter"):
        fft_conv_cached(
            torch.zeros(1, 1, 3), torch.zeros(1, 4), torch.zeros(1, 1, 4), torch.tensor([2]), 4, 2
        )


@pytest.mark.parametrize(("T", "position"), [(1, 5), (3, 0), (6, 9), (9, 6)])
@pytest.mark.parametrize("variant", CACHED.bodies)
def test_onnx_reference_runs_the_bodies(T: int, position: int, variant: str) -> None:
    x = {"u": normal(2, 2, T), "h": normal(2, 15), "cache": normal(2, 2, 15), "pos": np.array([position])}
    y, _ = ReferenceEvaluator(op_model(CACHED, x, variant, 23, sizes(15))).run(None, x)
    seen = np.concatenate((x["cache"][..., :position], x["u"]), -1)
    assert error(y, plain(seen, x["h"])[..., position:]) <= TOLERANCES["op_fp32"]
    pair = {"u": x["u"], "h": x["h"]}
    (z,) = ReferenceEvaluator(op_model(CONV, pair, "monarch", 23, sizes(15))).run(None, pair)
    assert error(z, plain(x["u"], x["h"])) <= TOLERANCES["op_fp32"]
