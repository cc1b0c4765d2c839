"""xexport::band_product: the definition against a dense band matrix, its gradients, the bodies against it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import TOLERANCES
from torch import Tensor

from xexport.core.registry import get_op
from xexport.ops.band_product.reference import band_product
from xexport.ops.run import run_body

SPEC = get_op("band_product")


def make_inputs(
    B: int, T: int, C: int, S: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=dtype) for s in ((T, S), (B, S - 1 + T, C))]


def dense(weight: Tensor, rows: Tensor) -> Tensor:
    """The band as a matrix of which most is zero."""
    T, S = weight.shape
    matrix = weight.new_zeros(T, S - 1 + T)
    for t in range(T):
        matrix[t, t : t + S] = weight[t]
    return matrix @ rows


def error(got: np.ndarray, want: Tensor) -> float:
    assert got.shape == want.shape
    return float(np.abs(got - want.numpy()).max() / max(1.0, float(want.abs().max())))


@pytest.mark.parametrize(("B", "T", "C", "S"), [(1, 1, 4, 1), (2, 1, 3, 5), (2, 7, 5, 3), (1, 3, 2, 8)])
def test_definition_is_the_product_by_a_band_matrix(B: int, T: int, C: int, S: int) -> None:
    x = make_inputs(B, T, C, S, dtype=torch.float64)
    assert error(band_product(*x).numpy(), dense(*x)) < TOLERANCES["op_fp64"]


def test_gradients_are_those_of_the_dense_product() -> None:
    x = [p.requires_grad_() for p in make_inputs(2, 6, 3, 4, dtype=torch.float64)]
    upstream = torch.randn(2, 6, 3, dtype=torch.float64)
    want = torch.autograd.grad(dense(*x), x, upstream)
    got = torch.autograd.grad(band_product(*x), x, upstream)
    for name, a, b in zip(SPEC.inputs, got, want, strict=True):
        assert error(a.numpy(), b) < TOLERANCES["op_fp64"], name


def test_custom_op_passes_torchs_own_checks() -> None:
    torch.library.opcheck(torch.ops.xexport.band_product.default, tuple(make_inputs(2, 3, 4, 3)))


def test_another_number_of_rows_is_refused() -> None:
    weight, rows = make_inputs(1, 4, 2, 3)
    with pytest.raises(ValueError, match="5 rows for 4 tokens with 3 taps"):
        band_product(weight, rows[:, :-1])


@settings(max_examples=30, deadline=None)
@given(B=st.integers(1, 3), T=st.integers(1, 23), C=st.integers(1, 5), S=st.integers(1, 9))
def test_bodies_are_the_definition(B: int, T: int, C: int, S: int) -> None:
    """Fewer tokens than taps, whole blocks, a last block that is short."""
    x = make_inputs(B, T, C, S, seed=T)
    arrays = dict(zip(SPEC.inputs, (t.numpy() for t in x), strict=True))
    for body in ("auto", "blocks", *(["step"] if T == 1 else [])):
        (got,) = run_body(SPEC, arrays, body)
        assert error(got, band_product(*x)) < TOLERANCES["op_fp32"], body
