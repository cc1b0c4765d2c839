"""xexport::wkv4: parallel form, gradients, ONNX bodies and the native kernel against the plain loop."""

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
from xexport.ops.wkv4.parallel import wkv4_parallel
from xexport.ops.wkv4.reference import wkv4

SPEC = get_op("wkv4")
dims = st.integers(1, 3)


@pytest.fixture(scope="module")
def library() -> Path:
    return native_library()


def inputs(B: int, T: int, C: int, seed: int = 0, scale: float = 1.0) -> Arrays:
    """Keys far beyond what exp of a float32 holds, decays from none to all at once, a state that is used."""
    rng = np.random.default_rng((seed, B, T, C))
    k, v = rng.standard_normal((2, B, T, C))
    aa, bb, pp = rng.standard_normal((3, B, C))
    w, u = -np.exp(3 * rng.standard_normal(C) - 2), rng.standard_normal(C)
    named = {"w": w, "u": u, "k": 40 * scale * k, "v": v, "aa": aa, "bb": np.exp(bb), "pp": 20 * scale * pp}
    return {n: a.astype(np.float32) for n, a in named.items()}


def tensors(x: Arrays) -> list[Tensor]:
    return [torch.from_numpy(a) for a in x.values()]


def by_the_formula(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, aa: Tensor, bb: Tensor, pp: Tensor
) -> list[Tensor]:
    """The sums themselves, in double precision: for exponents that it can hold."""
    A, B, rows = aa * pp.exp(), bb * pp.exp(), []
    for t in range(k.shape[1]):
        bonus = (u + k[:, t]).exp()
        rows.append((A + bonus * v[:, t]) / (B + bonus))
        A, B = w.exp() * A + k[:, t].exp() * v[:, t], w.exp() * B + k[:, t].exp()
    return [torch.stack(rows, 1), A, B]


def sums(y: Tensor, aa: Tensor, bb: Tensor, pp: Tensor) -> list[Tensor]:
    """The state without its scale, which forms may choose differently."""
    return [y, aa * pp.exp(), bb * pp.exp()]


@pytest.mark.parametrize("T", [1, 2, 5, 16, 33])
def test_reference_and_parallel_form_are_the_formula(T: int) -> None:
    x = [a.double() for a in tensors(inputs(2, T, 5, scale=0.1))]
    want = by_the_formula(*x)
    for form in (wkv4, wkv4_parallel):
        for got, expected in zip(sums(*form(*x)), want, strict=True):
            assert error(got.numpy(), expected.numpy()) < TOLERANCES["op_fp64"]


def test_gradients_of_the_parallel_form_are_those_of_the_formula() -> None:
    x = [a.double().requires_grad_() for a in tensors(inputs(2, 13, 3, scale=0.05))]
    want = by_the_formula(*x)
    weights = [torch.randn_like(o) for o in want]
    got = torch.autograd.grad(sums(*wkv4(*x)), x, weights)
    for name, a, b in zip(SPEC.inputs, got, torch.autograd.grad(want, x, weights), strict=True):
        assert error(a.numpy(), b.numpy()) < TOLERANCES["op_fp64"], name


def test_without_gradients_the_custom_op_is_called() -> None:
    x = [a.requires_grad_() for a in tensors(inputs(1, 2, 4))]
    with torch.no_grad():
        assert wkv4(*x)[0].grad_fn is None
    assert wkv4(*x)[0].grad_fn is not None


def test_custom_op_passes_torchs_own_checks() -> None:
    torch.library.opcheck(torch.ops.xexport.wkv4.default, tuple(tensors(inputs(1, 3, 4))))


@settings(max_examples=25, deadline=None)
@given(B=dims, T=st.integers(1, 40), C=st.integers(1, 9), seed=st.integers(0, 99))
def test_any_cut_gives_the_same(B: int, T: int, C: int, seed: int) -> None:
    w, u, k, v, *state = tensors(inputs(B, T, C, seed))
    cut = seed % T
    whole, *end = wkv4(w, u, k, v, *state)
    pieces = []
    for part in (slice(0, cut), slice(cut, T)):
        y, *state = wkv4(w, u, k[:, part], v[:, part], *state)
        pieces.append(y)
    assert torch.equal(torch.cat(pieces, 1), whole)
    assert all(torch.equal(a, b) for a, b in zip(state, end, strict=True))


def test_before_the_first_token_nothing_is_averaged() -> None:
    w, u, k, v, *_ = tensors(inputs(1, 1, 6))
    zero = torch.zeros(1, 6)
    y, aa, bb, pp = wkv4(w, u, k, v, zero, zero, zero - 1e30)
    assert torch.equal(y, v)
    assert torch.equal(aa, v[:, 0])
    assert torch.equal(bb, torch.ones(1, 6))
    assert torch.equal(pp, k[:, 0])


@settings(max_examples=25, deadline=None)
@given(B=dims, T=st.one_of(st.just(1), st.integers(1, 20)), C=st.integers(1, 70), seed=st.integers(0, 9))
def test_kernel_and_bodies_are_the_reference(library: Path, B: int, T: int, C: int, seed: int) -> None:
    x = inputs(B, T, C, seed)
    want = [a.numpy() for a in wkv4(*tensors(x))]
    variants = [v for v in SPEC.bodies if v != "step" or T == 1]
    for got in (kernel("wkv4", x, library), *(run_body(SPEC, x, v) for v in variants)):
        assert max(map(error, got, want)) <= TOLERANCES["op_fp32"]


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize(("T", "C"), [(1, 3), (1, 64), (9, 33), (5, 200)])
def test_kernel_on_every_instruction_set(library: Path, isa: str, T: int, C: int) -> None:
    x = inputs(2, T, C)
    got = kernel("wkv4", x, library, isa)
    assert max(map(error, got, (a.numpy() for a in wkv4(*tensors(x))))) <= TOLERANCES["op_fp32"]


def test_kernel_starts_from_nothing(library: Path) -> None:
    x = inputs(1, 7, 20)
    x["aa"][:], x["bb"][:], x["pp"][:] = 0, 0, -1e30
    got = kernel("wkv4", x, library)
    assert max(map(error, got, (a.numpy() for a in wkv4(*tensors(x))))) <= TOLERANCES["op_fp32"]


def test_threads_change_nothing(library: Path) -> None:
    x = inputs(2, 300, 200)
    for got, want in zip(kernel("wkv4", x, library, threads=2), kernel("wkv4", x, library), strict=True):
        np.testing.assert_array_equal(got, want)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(SPEC.inputs),
    T=st.sampled_from([1, 5]),
    value=st.sampled_from([np.nan, np.inf, -np.inf, 3e38]),
    at=st.integers(0, 10**6),
)
def test_nan_and_infinity_as_in_the_reference(
    library: Path, name: str, T: int, value: float, at: int
) -> None:
    x = inputs(1, T, 20)
    place = x[name].reshape(-1)
    place[at % place.size] = value
    want = [a.numpy() for a in wkv4(*tensors(x))]
    for isa in ("baseline", ""):
        for got, expected in zip(kernel("wkv4", x, library, isa), want, strict=True):
            np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
            infinite = np.isinf(expected)
            np.testing.assert_array_equal(got[infinite], expected[infinite])


def test_no_tokens_leave_the_state_alone(library: Path) -> None:
    x = inputs(1, 1, 9)
    y, *state = kernel("wkv4", x | {n: x[n][:, :0] for n in ("k", "v")}, library)
    assert y.size == 0
    for name, got in zip(("aa", "bb", "pp"), state, strict=True):
        np.testing.assert_array_equal(got, x[name])


def test_the_kernel_ran_and_without_it_the_body(library: Path, tmp_path: Path) -> None:
    x = inputs(2, 40, 70)
    assert node_types("wkv4", x, library, tmp_path) == {"wkv4"}
    assert "Exp" in node_types("wkv4", x, None, tmp_path)
    assert max(map(error, body_only("wkv4", x), kernel("wkv4", x, library))) <= TOLERANCES["op_fp32"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"w": (5,)}, "w must be float32 [4], got float32 [5]"),
        ({"k": (2, 4)}, "k must be float32 [any,any,any]"),
        ({"pp": (2, 4)}, "pp must be float32 [1,4]"),
    ],
)
def test_wrong_shapes_name_the_node(library: Path, change: dict[str, tuple[int, ...]], says: str) -> None:
    bad = inputs(1, 2, 4) | {n: np.zeros(s, np.float32) for n, s in change.items()}
    with pytest.raises(Exception, match="xexport wkv4 node 'mixer0': ") as caught:
        kernel("wkv4", bad, library)
    assert says in str(caught.value)


@pytest.mark.parametrize(("variant", "T"), [("scan", 4), ("step", 1)])
def test_body_runs_in_the_onnx_reference_evaluator(variant: str, T: int) -> None:
    from onnx.reference import ReferenceEvaluator

    x = inputs(2, T, 3)
    got = ReferenceEvaluator(op_model(SPEC, x, variant, 23, {})).run(None, x)
    assert max(map(error, got, (a.numpy() for a in wkv4(*tensors(x))))) <= TOLERANCES["op_fp32"]


@pytest.mark.parametrize("variant", list(SPEC.bodies))
def test_body_has_the_operators_signature(variant: str) -> None:
    body = SPEC.bodies[variant]
    proto = body.build(23)
    assert (proto.domain, proto.name) == (SPEC.domain, SPEC.graph_name)
    assert tuple(proto.input) == SPEC.inputs
    assert tuple(proto.output) == SPEC.outputs
    assert body.why
