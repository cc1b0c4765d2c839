"""com.microsoft LinearAttention: the plain loop, ONNX Runtime's own kernel, and the local fallback."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from local_function import under_own_domain
from onnx.reference import ReferenceEvaluator
from tolerances import TOLERANCES

from xexport.core.registry import get_op
from xexport.ops.linear_attention.reference import linear_attention
from xexport.ops.run import op_model, run_body

SPEC = get_op("linear_attention")
SCALE = 0.37


WAYS = {
    "kernel": (SPEC, "chunked"),
    "fallback-chunked": (under_own_domain(SPEC), "chunked"),
    "fallback-parallel": (under_own_domain(SPEC), "parallel"),
    "fallback-either": (under_own_domain(SPEC), "parallel_either"),
}


def inputs(
    B: int, T: int, H: int, K: int, V: int, seed: int = 0, *, by_key: bool = False
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "q": normal(B, T, H * K),
        "k": normal(B, T, H * K),
        "v": normal(B, T, H * V),
        "state": normal(B, H, K, V),
        "decay": -np.abs(normal(B, T, H * (K if by_key else 1))) * np.float32(0.3),
    }


def attributes(heads: int) -> dict[str, object]:
    return {"q_num_heads": heads, "kv_num_heads": heads, "scale": SCALE, "update_rule": "gated"}


def wanted(x: dict[str, np.ndarray], heads: int) -> list[np.ndarray]:
    tensors = (torch.from_numpy(x[n]).double() for n in SPEC.inputs)
    return [t.numpy() for t in linear_attention(*tensors, heads, heads, SCALE, "gated")]


def error(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / max(1.0, np.abs(want).max()))


def test_reference_is_the_closed_sum() -> None:
    """o_t = scale * (sum_s e^{c_t-c_s} (q_t.k_s) v_s + e^{c_t} S^T q_t), as one masked product."""
    B, T, H, K, V = 2, 6, 3, 4, 5
    x = {n: torch.from_numpy(a).double() for n, a in inputs(B, T, H, K, V).items()}
    q, k, v = (x[n].reshape(B, T, H, -1) for n in ("q", "k", "v"))
    running = x["decay"].cumsum(1)
    fade = torch.exp(running[:, :, None] - running[:, None]).permute(0, 3, 1, 2).tril()
    scores = torch.einsum("bthk,bshk->bhts", q, k) * fade
    out = torch.einsum("bhts,bshv->bthv", scores, v)
    out += torch.einsum("bthk,bhkv,bth->bthv", q, x["state"], running.exp())
    got, _ = linear_attention(*(x[n] for n in SPEC.inputs), H, H, SCALE, "gated")
    torch.testing.assert_close(got, (out * SCALE).flatten(2), rtol=0, atol=TOLERANCES["op_fp64"])


def test_reference_refuses_another_rule() -> None:
    x = [torch.from_numpy(a) for a in inputs(1, 2, 1, 2, 2).values()]
    with pytest.raises(ValueError, match="delta"):
        linear_attention(*x, 1, 1, 1.0, "delta")


def test_torch_op_is_well_formed() -> None:
    x = tuple(torch.from_numpy(a) for a in inputs(2, 3, 2, 4, 3).values())
    torch.library.opcheck(linear_attention, (*x, 2, 2, SCALE, "gated"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("B", "T", "H", "K", "V"),
    [
        (2, 1, 3, 4, 5),
        (1, 2, 2, 4, 6),
        (2, 63, 2, 8, 4),
        (1, 64, 2, 8, 8),
        (2, 65, 3, 4, 8),
        (1, 131, 1, 3, 2),
    ],
    ids=lambda n: str(n),
)
def test_parity(way: str, B: int, T: int, H: int, K: int, V: int) -> None:
    spec, variant = WAYS[way]
    x = inputs(B, T, H, K, V, seed=T)
    got = run_body(spec, x, variant, attributes=attributes(H))
    for a, b in zip(got, wanted(x, H), strict=True):
        assert error(a, b) <= TOLERANCES["linear_attention_fp32"]


@pytest.mark.parametrize("way", ["kernel", "fallback-chunked"])
@pytest.mark.parametrize(("T", "K"), [(1, 4), (2, 4), (15, 3), (16, 4), (33, 5), (131, 2)])
def test_one_decay_a_key(way: str, T: int, K: int) -> None:
    spec, variant = WAYS[way]
    x = inputs(2, T, 3, K, 4, seed=T, by_key=True)
    got = run_body(spec, x, variant, attributes=attributes(3))
    for a, b in zip(got, wanted(x, 3), strict=True):
        assert error(a, b) <= TOLERANCES["linear_attention_fp32"]


def test_the_parallel_body_refuses_a_decay_a_key() -> None:
    """A square of keys and tokens would otherwise be taken for a matrix of lags."""
    spec, variant = WAYS["fallback-parallel"]
    with pytest.raises(Exception, match=r"(?i)reshape|dimension|shape"):
        run_body(spec, inputs(2, 4, 2, 4, 4, by_key=True), variant, attributes=attributes(2))


@settings(max_examples=12, deadline=None)
@given(T=st.integers(1, 20), cut=st.integers(0, 19), seed=st.integers(0, 99), way=st.sampled_from(list(WAYS)))
def test_chunk_law(T: int, cut: int, seed: int, way: str) -> None:
    spec, variant = WAYS[way]
    x = inputs(2, T, 2, 4, 3, seed)
    want_out, want_state = wanted(x, 2)
    outs, state = [], x["state"]
    for part in (slice(0, cut), slice(cut, T)):
        piece = {n: a[:, part] for n, a in x.items() if n != "state"} | {"state": state}
        if piece["q"].shape[1]:
            out, state = run_body(spec, piece, variant, attributes=attributes(2))
            outs.append(out)
    assert error(np.concatenate(outs, 1), want_out) <= TOLERANCES["linear_attention_fp32"]
    assert error(state, want_state) <= TOLERANCES["linear_attention_fp32"]


@pytest.mark.parametrize("by_key", [False, True], ids=["head", "key"])
@pytest.mark.parametrize("way", ["fallback-chunked", "fallback-parallel", "fallback-either"])
def test_strong_decay_does_not_overflow(way: str, by_key: bool) -> None:
    """exp(-(c_t - c_s)) would be inf here; all that is left is the rounding of the running sum c."""
    spec, variant = WAYS[way]
    if by_key and way == "fallback-parallel":
        pytest.skip("that body has one decay a head")
    x = inputs(1, 70, 2, 4, 4, by_key=by_key)
    x["decay"] = x["decay"] * np.float32(100)
    rounding = float(np.abs(x["decay"].sum(1)).max()) * 2.0**-24
    got = run_body(spec, x, variant, attributes=attributes(2))
    for a, b in zip(got, wanted(x, 2), strict=True):
        assert np.isfinite(a).all()
        assert error(a, b) <= 2 * rounding


@pytest.mark.parametrize("variant", ["chunked", "parallel", "parallel_either"])
@pytest.mark.parametrize("T", [1, 3, 66])
def test_onnx_reference_runs_the_body(variant: str, T: int) -> None:
    x = inputs(2, T, 2, 3, 4)
    model = op_model(under_own_domain(SPEC), x, variant, 23, attributes(2))
    for a, b in zip(ReferenceEvaluator(model).run(None, x), wanted(x, 2), strict=True):
        assert error(a, b) <= TOLERANCES["linear_attention_fp32"]
