"""xexport::selective_scan: differentiable form, gradients and ONNX bodies against the plain loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import TOLERANCES
from torch import Tensor

from xexport.core.registry import get_op
from xexport.ops.run import op_model, run_body
from xexport.ops.selective_scan.parallel import selective_scan_parallel
from xexport.ops.selective_scan.reference import selective_scan

SPEC = get_op("selective_scan")
NAMES = SPEC.inputs


def make_inputs(
    B: int, T: int, D: int, N: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Inputs as Mamba makes them: dt > 0, A < 0, a non-zero state."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=dtype)

    A = -torch.exp(normal(D, N))
    return [
        normal(B, T, D),
        F.softplus(normal(B, T, D)),
        A,
        normal(B, T, N),
        normal(B, T, N),
        normal(D),
        normal(B, D, N),
    ]


def by_the_formula(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence as einsums: written differently from reference.py, and differentiable."""
    rows = []
    for t in range(u.shape[1]):
        decay = torch.exp(torch.einsum("bd,dn->bdn", dt[:, t], A))
        h = decay * h + torch.einsum("bd,bn->bdn", dt[:, t] * u[:, t], B[:, t])
        rows.append(torch.einsum("bdn,bn->bd", h, C[:, t]) + D * u[:, t])
    return torch.stack(rows, 1), h


def error(got: object, want: Tensor) -> float:
    """Largest error, relative to the largest expected value."""
    array = np.asarray(got.detach() if isinstance(got, Tensor) else got)
    expected = want.detach().numpy()
    assert array.shape == expected.shape
    return float(np.abs(array - expected).max() / max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize(("B", "T", "D", "N"), [(1, 1, 4, 2), (2, 5, 7, 3), (1, 33, 24, 16)])
def test_reference_is_the_formula(B: int, T: int, D: int, N: int) -> None:
    x = make_inputs(B, T, D, N)
    for got, want in zip(selective_scan(*x), by_the_formula(*x), strict=True):
        assert error(got, want) < TOLERANCES["op_fp32"]


@pytest.mark.parametrize("T", [1, 2, 17, 64])
def test_differentiable_form_is_the_formula(T: int) -> None:
    x = make_inputs(2, T, 6, 4, dtype=torch.float64)
    for got, want in zip(selective_scan_parallel(*x), by_the_formula(*x), strict=True):
        assert error(got, want) < TOLERANCES["op_fp64"]


def test_gradients_are_those_of_the_formula() -> None:
    x = [p.requires_grad_() for p in make_inputs(2, 19, 5, 3, dtype=torch.float64)]
    weights = [torch.randn_like(o) for o in by_the_formula(*x)]
    want = torch.autograd.grad(by_the_formula(*x), x, weights)
    got = torch.autograd.grad(selective_scan(*x), x, weights)
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert error(a, b) < TOLERANCES["op_fp64"], name


def test_without_gradients_the_custom_op_is_called() -> None:
    x = [p.requires_grad_() for p in make_inputs(1, 2, 3, 2)]
    with torch.no_grad():
        assert selective_scan(*x)[0].grad_fn is None
    assert selective_scan(*x)[0].grad_fn is not None


def test_custom_op_passes_torchs_own_checks() -> None:
    torch.library.opcheck(torch.ops.xexport.selective_scan.default, tuple(make_inputs(1, 3, 4, 2)))


@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 40),
    D=st.integers(1, 9),
    N=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_any_cut_gives_the_same(B: int, T: int, D: int, N: int, seed: int) -> None:
    u, dt, A, Bm, C, skip, state = make_inputs(B, T, D, N, seed=seed)
    whole, last = selective_scan(u, dt, A, Bm, C, skip, state)
    cut, pieces = seed % T, []
    for part in (slice(0, cut), slice(cut, T)):
        y, state = selective_scan(u[:, part], dt[:, part], A, Bm[:, part], C[:, part], skip, state)
        pieces.append(y)
    assert error(torch.cat(pieces, 1), whole) < TOLERANCES["op_fp32"]
    assert error(state, last) < TOLERANCES["op_fp32"]


@pytest.mark.parametrize(
    ("variant", "B", "T", "D", "N"),
    [
        (variant, *shape)
        for variant in SPEC.bodies
        for shape in [(1, 1, 8, 4), (3, 1, 5, 3), (2, 3, 8, 4), (2, 45, 24, 16)]
        if variant != "step" or shape[1] == 1
    ],
)
def test_body_matches_the_reference(variant: str, B: int, T: int, D: int, N: int) -> None:
    x = make_inputs(B, T, D, N, seed=T)
    got = run_body(SPEC, dict(zip(NAMES, (p.numpy() for p in x), strict=True)), variant)
    for a, b in zip(got, selective_scan(*x), strict=True):
        assert error(a, b) < TOLERANCES["op_fp32"]


@pytest.mark.parametrize(("variant", "T"), [("scan", 7), ("step", 1)])
def test_body_runs_in_the_onnx_reference_evaluator(variant: str, T: int) -> None:
    from onnx.reference import ReferenceEvaluator

    x = make_inputs(2, T, 6, 4)
    feeds = dict(zip(NAMES, (p.numpy() for p in x), strict=True))
    got = ReferenceEvaluator(op_model(SPEC, feeds, variant, 23, {})).run(None, feeds)
    for a, b in zip(got, selective_scan(*x), strict=True):
        assert error(a, b) < TOLERANCES["op_fp32"]


@pytest.mark.parametrize("variant", list(SPEC.bodies))
def test_body_has_the_operators_signature(variant: str) -> None:
    body = SPEC.bodies[variant]
    proto = body.build(23)
    assert (proto.domain, proto.name) == (SPEC.domain, SPEC.graph_name)
    assert tuple(proto.input) == SPEC.inputs
    assert tuple(proto.output) == SPEC.outputs
    assert body.why
