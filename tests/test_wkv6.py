"""xexport::wkv6: parallel form, gradients, ONNX bodies and the native kernel against the plain loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_run import Arrays, body_only, error, kernel, native_library, node_types
from tolerances import TOLERANCES
from torch import Tensor

from xexport.core.registry import get_op
from xexport.ops.run import op_model, run_body
from xexport.ops.wkv6.parallel import wkv6_parallel
from xexport.ops.wkv6.reference import wkv6

SPEC = get_op("wkv6")
dims = st.integers(1, 3)


@pytest.fixture(scope="module")
def library() -> Path:
    return native_library()


def inputs(
    B: int, T: int, H: int, N: int, M: int = 0, seed: int = 0, *, same: bool = False, decay: float = 2.0
) -> Arrays:
    """Decays from nearly 1 to nearly 0 as RWKV-6 makes them, and a state that is not zero."""
    rng = np.random.default_rng((seed, B, T, H, N))
    r, k = rng.standard_normal((2, B, T, H, N))
    w = np.exp(-np.exp(decay * rng.standard_normal((1, 1, H, N) if same else (B, T, H, N)) - 1))
    v, state = rng.standard_normal((B, T, H, M or N)), rng.standard_normal((B, H, N, M or N))
    named = {"r": r, "w": w, "k": k, "v": v, "u": rng.standard_normal((H, N)), "state": state}
    return {n: a.astype(np.float32) for n, a in named.items()}


def tensors(x: Arrays) -> list[Tensor]:
    return [torch.from_numpy(a) for a in x.values()]


def by_the_formula(r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Equations 16 to 19 term by term, as einsums: written differently from reference.py."""
    rows, w = [], w.expand_as(k)
    for t in range(k.shape[1]):
        outer = torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        rows.append(torch.einsum("bhk,bhkv->bhv", r[:, t], S + u[None, :, :, None] * outer))
        S = w[:, t][..., None] * S + outer
    return torch.stack(rows, 1), S


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 40])
def test_reference_and_parallel_form_are_the_formula(T: int, same: bool) -> None:
    x = [a.double() for a in tensors(inputs(2, T, 3, 4, 5, same=same))]
    for form in (wkv6, wkv6_parallel):
        for got, want in zip(form(*x), by_the_formula(*x), strict=True):
            assert error(got.numpy(), want.numpy()) < TOLERANCES["op_fp64"]


@pytest.mark.parametrize("same", [False, True])
def test_gradients_of_the_parallel_form_are_those_of_the_formula(same: bool) -> None:
    x = [a.double().requires_grad_() for a in tensors(inputs(2, 19, 2, 4, same=same, decay=0.5))]
    want = by_the_formula(*x)
    weights = [torch.randn_like(o) for o in want]
    got = torch.autograd.grad(wkv6(*x), x, weights)
    for name, a, b in zip(SPEC.inputs, got, torch.autograd.grad(want, x, weights), strict=True):
        assert error(a.numpy(), b.numpy()) < TOLERANCES["op_fp64"], name


def test_parallel_form_in_float32_where_the_state_is_forgotten_at_once() -> None:
    x = tensors(inputs(1, 50, 2, 8))
    x[1] = torch.where(torch.rand_like(x[1]) < 0.3, 0.0, x[1])
    for got, want in zip(wkv6_parallel(*x), by_the_formula(*x), strict=True):
        assert error(got.numpy(), want.numpy()) < TOLERANCES["op_fp32"]


def test_without_gradients_the_custom_op_is_called() -> None:
    x = [a.requires_grad_() for a in tensors(inputs(1, 2, 1, 4))]
    with torch.no_grad():
        assert wkv6(*x)[0].grad_fn is None
    assert wkv6(*x)[0].grad_fn is not None


def test_custom_op_passes_torchs_own_checks() -> None:
    torch.library.opcheck(torch.ops.xexport.wkv6.default, tuple(tensors(inputs(1, 3, 2, 4))))


@settings(max_examples=25, deadline=None)
@given(B=dims, T=st.integers(1, 40), H=dims, N=st.sampled_from([3, 8]), same=st.booleans())
def test_any_cut_gives_the_same(B: int, T: int, H: int, N: int, same: bool) -> None:
    r, w, k, v, u, state = tensors(inputs(B, T, H, N, same=same))
    cut = T // 3
    whole, end = wkv6(r, w, k, v, u, state)
    pieces = []
    for part in (slice(0, cut), slice(cut, T)):
        y, state = wkv6(r[:, part], w if same else w[:, part], k[:, part], v[:, part], u, state)
        pieces.append(y)
    assert error(torch.cat(pieces, 1).numpy(), whole.numpy()) < TOLERANCES["op_fp32"]
    assert error(state.numpy(), end.numpy()) < TOLERANCES["op_fp32"]


@settings(max_examples=25, deadline=None)
@given(
    B=dims,
    T=st.one_of(st.just(1), st.integers(1, 20)),
    H=dims,
    N=st.sampled_from([1, 3, 8, 16, 31, 64]),
    M=st.sampled_from([1, 8, 20, 32, 64]),
    same=st.booleans(),
)
def test_kernel_and_bodies_are_the_reference(
    library: Path, B: int, T: int, H: int, N: int, M: int, same: bool
) -> None:
    x = inputs(B, T, H, N, M, same=same)
    want = [a.numpy() for a in wkv6(*tensors(x))]
    variants = [v for v in SPEC.bodies if v != "step" or T == 1]
    for got in (kernel("wkv6", x, library), *(run_body(SPEC, x, v) for v in variants)):
        assert max(map(error, got, want)) <= TOLERANCES["op_fp32"]


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize(("T", "N"), [(1, 7), (1, 64), (9, 32), (5, 72)])
def test_kernel_on_every_instruction_set(library: Path, isa: str, T: int, N: int) -> None:
    x = inputs(2, T, 3, N)
    got = kernel("wkv6", x, library, isa)
    assert max(map(error, got, (a.numpy() for a in wkv6(*tensors(x))))) <= TOLERANCES["op_fp32"]


def test_threads_change_nothing(library: Path) -> None:
    x = inputs(2, 300, 4, 32)
    for got, want in zip(kernel("wkv6", x, library, threads=2), kernel("wkv6", x, library), strict=True):
        np.testing.assert_array_equal(got, want)


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(SPEC.inputs),
    T=st.sampled_from([1, 5]),
    value=st.sampled_from([np.nan, np.inf, -np.inf]),
    at=st.integers(0, 10**6),
)
def test_nan_and_infinity_as_in_the_reference(
    library: Path, name: str, T: int, value: float, at: int
) -> None:
    """Not 3e38: whether a sum of products near the largest float overflows on its way is up to its order."""
    x = inputs(1, T, 2, 16)
    place = x[name].reshape(-1)
    place[at % place.size] = value
    want = [a.numpy() for a in wkv6(*tensors(x))]
    for isa in ("baseline", ""):
        for got, expected in zip(kernel("wkv6", x, library, isa), want, strict=True):
            np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
            infinite = np.isinf(expected)
            np.testing.assert_array_equal(got[infinite], expected[infinite])


def test_no_tokens_leave_the_state_alone(library: Path) -> None:
    x = inputs(1, 1, 2, 8)
    y, state = kernel("wkv6", x | {n: x[n][:, :0] for n in ("r", "w", "k", "v")}, library)
    assert y.size == 0
    np.testing.assert_array_equal(state, x["state"])


def test_the_kernel_ran_and_without_it_the_body(library: Path, tmp_path: Path) -> None:
    x = inputs(2, 40, 4, 16)
    assert node_types("wkv6", x, library, tmp_path) == {"wkv6"}
    assert "MatMul" in node_types("wkv6", x, None, tmp_path)
    assert max(map(error, body_only("wkv6", x), kernel("wkv6", x, library))) <= TOLERANCES["op_fp32"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"w": (1, 1, 2, 5)}, "w must be float32 [1,1,2,8], got float32 [1,1,2,5]"),
        ({"w": (2, 3, 2, 8)}, "w must be float32 [1,2,2,8]"),
        ({"u": (8,)}, "u must be float32 [2,8]"),
        ({"state": (1, 2, 8, 4)}, "state must be float32 [1,2,8,8]"),
    ],
)
def test_wrong_shapes_name_the_node(library: Path, change: dict[str, tuple[int, ...]], says: str) -> None:
    bad = inputs(1, 2, 2, 8) | {n: np.zeros(s, np.float32) for n, s in change.items()}
    with pytest.raises(Exception, match="xexport wkv6 node 'mixer0': ") as caught:
        kernel("wkv6", bad, library)
    assert says in str(caught.value)


@pytest.mark.parametrize(("variant", "T"), [("scan", 4), ("step", 1)])
def test_body_runs_in_the_onnx_reference_evaluator(variant: str, T: int) -> None:
    from onnx.reference import ReferenceEvaluator

    x = inputs(2, T, 2, 4)
    got = ReferenceEvaluator(op_model(SPEC, x, variant, 23, {})).run(None, x)
    assert max(map(error, got, (a.numpy() for a in wkv6(*tensors(x))))) <= TOLERANCES["op_fp32"]


@pytest.mark.parametrize("variant", list(SPEC.bodies))
def test_body_has_the_operators_signature(variant: str) -> None:
    body = SPEC.bodies[variant]
    proto = body.build(23)
    assert (proto.domain, proto.name) == (SPEC.domain, SPEC.graph_name)
    assert tuple(proto.input) == SPEC.inputs
    assert tuple(proto.output) == SPEC.outputs
    assert body.why
