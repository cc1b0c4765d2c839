"""xexport::modal_conv: the plain loop, the filter it stands for, ONNX bodies and the native kernel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_run import Arrays, error, kernel, native_library
from tolerances import TOLERANCES
from torch import Tensor

from xexport.core.registry import get_op
from xexport.ops.modal_conv.reference import modal_conv, modal_conv_whole
from xexport.ops.run import op_model, run_body

SPEC = get_op("modal_conv")
SIZES = [(1, 1, 8, 4), (3, 1, 5, 3), (2, 3, 64, 4), (2, 45, 70, 16), (1, 4, 33, 1)]


@pytest.fixture(scope="module")
def library() -> Path:
    return native_library()


def inputs(B: int, T: int, D: int, N: int, seed: int = 0) -> Arrays:
    """Poles inside the unit circle from slow to fast, a state that is not zero."""
    rng = np.random.default_rng((B, T, D, N, seed))
    size, angle = np.exp(-np.exp(rng.standard_normal((N, D)) - 2)), 3 * rng.standard_normal((N, D))
    named = {
        "packed": rng.standard_normal((B, T, 3 * D)),
        "poles": np.stack((size * np.cos(angle), size * np.sin(angle)), 1),
        "residues": rng.standard_normal((N, 2, D)) / N,
        "skip": rng.standard_normal(D),
        "state": rng.standard_normal((B, N, 2, D)),
    }
    return {n: a.astype(np.float32) for n, a in named.items()}


def tensors(x: Arrays, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.from_numpy(a).to(dtype) for a in x.values()]


def worst(got: list[np.ndarray], x: Arrays) -> float:
    return max(error(a, w.numpy()) for a, w in zip(got, modal_conv(*tensors(x)), strict=True))


def by_the_filter(x: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """With numpy's complex numbers: the filter's taps, every sum written out."""
    w = {n: a.astype(np.float64) for n, a in x.items()}
    pole, residue, state = (w[n][..., 0, :] + 1j * w[n][..., 1, :] for n in ("poles", "residues", "state"))
    out, gate, v = np.split(w["packed"], 3, -1)
    z, T = gate * v, v.shape[1]
    powers = pole ** np.arange(T + 1)[:, None, None]  # [T+1,N,D]
    h = (residue * powers[:T]).sum(1).real
    h[0] += w["skip"]
    y = np.stack([sum(h[t - s] * z[:, s] for s in range(t + 1)) for t in range(T)], 1)
    y += np.einsum("nd,tnd,bnd->btd", residue, powers[1:], state).real
    end = powers[T] * state + sum(powers[T - 1 - s] * z[:, s, None] for s in range(T))
    return out * y, np.stack((end.real, end.imag), 2)


@pytest.mark.parametrize("sizes", SIZES)
def test_the_loop_is_the_filter(sizes: tuple[int, int, int, int]) -> None:
    x = inputs(*sizes)
    for got, want in zip(modal_conv(*tensors(x)), by_the_filter(x), strict=True):
        assert error(got.numpy(), want) < TOLERANCES["op_fp64"]


def test_whole_form_is_the_loop_and_has_its_gradients() -> None:
    x = inputs(2, 19, 5, 3)
    packed, poles, residues, skip, state = tensors(x)
    leaves = [p.requires_grad_() for p in (packed, poles, residues, skip)]
    got = modal_conv_whole(*leaves)
    want = modal_conv(packed.detach(), poles.detach(), residues.detach(), skip.detach(), 0 * state)[0]
    torch.testing.assert_close(got.detach(), want, rtol=0, atol=TOLERANCES["op_fp64"])
    torch.autograd.gradcheck(lambda *p: modal_conv_whole(*p)[:, ::5], leaves)


def test_torch_op_is_well_formed() -> None:
    torch.library.opcheck(modal_conv, tuple(tensors(inputs(2, 3, 4, 2), torch.float32)))


@settings(max_examples=10, deadline=None)
@given(T=st.integers(1, 40), D=st.integers(1, 70), N=st.integers(1, 5), cut=st.integers(0, 40))
def test_any_cut_gives_the_same(T: int, D: int, N: int, cut: int) -> None:
    """To the bit, as the kernel does one token after the other."""
    x = inputs(2, T, D, N)
    whole = kernel("modal_conv", x, native_library())
    assert worst(whole, x) < TOLERANCES["op_fp32"]
    parts, state = [], x["state"]
    for part in (slice(0, min(cut, T)), slice(min(cut, T), T)):
        y, state = kernel(
            "modal_conv", x | {"packed": x["packed"][:, part], "state": state}, native_library()
        )
        parts.append(y)
    assert np.array_equal(np.concatenate(parts, 1), whole[0])
    assert np.array_equal(state, whole[1])


@pytest.mark.parametrize(
    ("variant", "sizes"), [(v, s) for v in SPEC.bodies for s in SIZES if v != "step" or s[1] == 1]
)
def test_body_matches_the_reference(variant: str, sizes: tuple[int, int, int, int]) -> None:
    x = inputs(*sizes)
    assert worst(run_body(SPEC, x, variant), x) < TOLERANCES["op_fp32"]


@pytest.mark.parametrize(("variant", "T"), [("scan", 7), ("step", 1)])
def test_body_runs_in_the_onnx_reference_evaluator(variant: str, T: int) -> None:
    from onnx.reference import ReferenceEvaluator

    x = inputs(2, T, 6, 4)
    got = ReferenceEvaluator(op_model(SPEC, x, variant, 23, {})).run(None, x)
    assert worst(got, x) < TOLERANCES["op_fp32"]


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("T", [1, 3, 4, 33])
@pytest.mark.parametrize(("D", "N"), [(1, 16), (70, 16), (200, 5), (64, 1)])
def test_kernel_on_every_instruction_set(library: Path, isa: str, T: int, D: int, N: int) -> None:
    x = inputs(2, T, D, N)
    assert worst(kernel("modal_conv", x, library, isa), x) < TOLERANCES["op_fp32"]


def test_threads_change_nothing(library: Path) -> None:
    x = inputs(2, 90, 200, 16)
    for a, b in zip(
        kernel("modal_conv", x, library), kernel("modal_conv", x, library, threads=4), strict=True
    ):
        assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("name", "shape", "text"),
    [
        ("packed", (1, 2, 8), "packed must be float32 [any,any,9]"),
        ("poles", (4, 3, 3), "poles must be float32 [any,2,3]"),
        ("residues", (5, 2, 3), "residues must be float32 [4,2,3]"),
        ("state", (1, 4, 3, 2), "state must be float32 [1,4,2,3]"),
    ],
    ids=["packed", "poles", "residues", "state"],
)
def test_wrong_shapes_name_the_node(library: Path, name: str, shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(Exception, match="xexport modal_conv node 'mixer0': ") as caught:
        kernel("modal_conv", inputs(1, 2, 3, 4) | {name: np.zeros(shape, np.float32)}, library)
    assert text in str(caught.value)
