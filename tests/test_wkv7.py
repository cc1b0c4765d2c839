"""xexport::wkv7: parallel form, gradients and ONNX bodies against the plain loop."""

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
from xexport.ops.wkv7.parallel import wkv7_parallel
from xexport.ops.wkv7.reference import wkv7

SPEC = get_op("wkv7")
NAMES = ("r", "w", "k", "v", "a", "b", "state")


def make_inputs(
    B: int, T: int, H: int, N: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Inputs as RWKV-7 makes them: decay above 0.545, a unit removal key, a non-zero state."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=dtype)

    r, k, v = (normal(B, T, H, N) for _ in range(3))
    w = torch.exp(-0.606531 * torch.sigmoid(3 * normal(B, T, H, N)))
    kk = F.normalize(normal(B, T, H, N), dim=-1)
    return [r, w, k, v, -kk, kk * torch.sigmoid(normal(B, T, H, N)), normal(B, H, N, N)]


def by_the_formula(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, S: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence term by term, as einsums: written differently from reference.py, and differentiable."""
    rows = []
    for t in range(r.shape[1]):
        u = torch.einsum("bhvk,bhk->bhv", S, a[:, t])
        S = (
            torch.einsum("bhvk,bhk->bhvk", S, w[:, t])
            + torch.einsum("bhv,bhk->bhvk", u, b[:, t])
            + torch.einsum("bhv,bhk->bhvk", v[:, t], k[:, t])
        )
        rows.append(torch.einsum("bhvk,bhk->bhv", S, r[:, t]))
    return torch.stack(rows, 1), S


def error(got: object, want: Tensor) -> float:
    """Largest error, relative to the largest expected value."""
    array = np.asarray(got.detach() if isinstance(got, Tensor) else got)
    expected = want.detach().numpy()
    assert array.shape == expected.shape
    return float(np.abs(array - expected).max() / max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize(("B", "T", "H", "N"), [(1, 1, 1, 4), (2, 5, 3, 8), (1, 33, 2, 16)])
def test_reference_is_the_formula(B: int, T: int, H: int, N: int) -> None:
    x = make_inputs(B, T, H, N)
    for got, want in zip(wkv7(*x), by_the_formula(*x), strict=True):
        assert error(got, want) < TOLERANCES["op_fp32"]


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 33, 64])
def test_parallel_is_the_formula(T: int) -> None:
    x = make_inputs(2, T, 3, 8, dtype=torch.float64)
    for got, want in zip(wkv7_parallel(*x), by_the_formula(*x), strict=True):
        assert error(got, want) < TOLERANCES["op_fp64"]


def test_parallel_in_float32_at_the_fastest_decay_rwkv_can_have() -> None:
    x = make_inputs(1, 200, 2, 64)
    x[1] = torch.full_like(x[1], float(np.exp(-np.exp(-0.5))))
    for got, want in zip(wkv7_parallel(*x), by_the_formula(*x), strict=True):
        assert error(got, want) < TOLERANCES["op_fp32"]


def test_gradients_of_the_parallel_form_are_those_of_the_formula() -> None:
    x = [p.requires_grad_() for p in make_inputs(2, 19, 2, 4, dtype=torch.float64)]
    weights = [torch.randn_like(o) for o in by_the_formula(*x)]
    want = torch.autograd.grad(by_the_formula(*x), x, weights)
    got = torch.autograd.grad(wkv7(*x), x, weights)
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert error(a, b) < TOLERANCES["op_fp64"], name


def test_without_gradients_the_custom_op_is_called() -> None:
    x = [p.requires_grad_() for p in make_inputs(1, 2, 1, 4)]
    with torch.no_grad():
        assert wkv7(*x)[0].grad_fn is None
    assert wkv7(*x)[0].grad_fn is not None


def test_custom_op_passes_torchs_own_checks() -> None:
    torch.library.opcheck(torch.ops.xexport.wkv7.default, tuple(make_inputs(1, 3, 2, 4)))


@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 40),
    H=st.integers(1, 3),
    N=st.sampled_from([3, 8, 16]),
    seed=st.integers(0, 99),
)
def test_any_cut_gives_the_same(B: int, T: int, H: int, N: int, seed: int) -> None:
    x = make_inputs(B, T, H, N, seed=seed)
    cut = seed % T
    whole, last = wkv7(*x)
    state, pieces = x[-1], []
    for part in (slice(0, cut), slice(cut, T)):
        y, state = wkv7(*(p[:, part] for p in x[:-1]), state)
        pieces.append(y)
    assert error(torch.cat(pieces, 1), whole) < TOLERANCES["op_fp32"]
    assert error(state, last) < TOLERANCES["op_fp32"]


@pytest.mark.parametrize(
    ("variant", "B", "T", "H", "N"),
    [
        (variant, *shape)
        for variant in SPEC.bodies
        for shape in [
            (1, 1, 2, 8),
            (3, 1, 1, 5),
            (2, 3, 2, 8),
            (1, 32, 2, 16),
            (2, 45, 3, 8),
            (1, 130, 1, 64),
        ]
        if variant != "step" or shape[1] == 1
    ],
)
def test_body_matches_the_reference(variant: str, B: int, T: int, H: int, N: int) -> None:
    x = make_inputs(B, T, H, N, seed=T)
    got = run_body(SPEC, dict(zip(NAMES, (p.numpy() for p in x), strict=True)), variant)
    for a, b in zip(got, wkv7(*x), strict=True):
        assert error(a, b) < TOLERANCES["op_fp32"]


@pytest.mark.parametrize("variant", ["auto", "chunked", "scan"])
def test_body_keeps_its_digits_at_the_fastest_decay_rwkv_can_have(variant: str) -> None:
    x = make_inputs(1, 100, 2, 16)
    x[1] = torch.full_like(x[1], float(np.exp(-np.exp(-0.5))))
    got = run_body(SPEC, dict(zip(NAMES, (p.numpy() for p in x), strict=True)), variant)
    for a, b in zip(got, wkv7(*x), strict=True):
        assert error(a, b) < TOLERANCES["op_fp32"]


def repeated_tokens() -> list[Tensor]:
    """The same key again and again, removed in full: the triangular system of a chunk is all ones."""
    x = make_inputs(1, 48, 2, 16)
    for i in (1, 4, 5):
        x[i] = x[i][:, :1].expand_as(x[i]).contiguous()
    x[1] = torch.full_like(x[1], 0.999)
    x[5] = -0.99 * x[4]
    return x


def test_parallel_in_float32_keeps_its_digits_where_tokens_repeat() -> None:
    x = repeated_tokens()
    for got, want in zip(wkv7_parallel(*x), by_the_formula(*x), strict=True):
        assert error(got, want) < TOLERANCES["op_fp32"]


@pytest.mark.parametrize("variant", ["auto", "chunked", "scan"])
def test_body_keeps_its_digits_where_tokens_repeat(variant: str) -> None:
    x = repeated_tokens()
    got = run_body(SPEC, dict(zip(NAMES, (p.numpy() for p in x), strict=True)), variant)
    for a, b in zip(got, wkv7(*x), strict=True):
        assert error(a, b) < TOLERANCES["op_fp32"]


@pytest.mark.parametrize(("variant", "T"), [("scan", 7), ("step", 1)])
def test_body_runs_in_the_onnx_reference_evaluator(variant: str, T: int) -> None:
    from onnx.reference import ReferenceEvaluator

    x = make_inputs(2, T, 2, 4)
    feeds = dict(zip(NAMES, (p.numpy() for p in x), strict=True))
    got = ReferenceEvaluator(op_model(SPEC, feeds, variant, 23, {})).run(None, feeds)
    for a, b in zip(got, wkv7(*x), strict=True):
        assert error(a, b) < TOLERANCES["op_fp32"]


@pytest.mark.parametrize("variant", list(SPEC.bodies))
def test_body_has_the_operators_signature(variant: str) -> None:
    body = SPEC.bodies[variant]
    proto = body.build(23)
    assert (proto.domain, proto.name) == (SPEC.domain, SPEC.graph_name)
    assert tuple(proto.input) == SPEC.inputs
    assert tuple(proto.output) == SPEC.outputs
    assert body.why
