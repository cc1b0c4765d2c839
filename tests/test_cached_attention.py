"""cached_attention: the definition against equation 1, both ONNX bodies, and the chunk law."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from tolerances import TOLERANCES

from xexport.core.errors import LimitError
from xexport.core.registry import get_op
from xexport.ops.cached_attention.reference import cached_attention
from xexport.ops.run import op_model, run_body

SPEC = get_op("cached_attention")
SCALE = 0.37


def inputs(
    B: int, T: int, heads: int, kv: int, K: int, V: int, L: int, pos: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """A cache whose rows from ``pos`` on are not zero: nothing may read them."""
    rng = np.random.default_rng(seed)
    shapes = {
        "q": (B, T, heads * K),
        "k": (B, T, kv * K),
        "v": (B, T, kv * V),
        "k_cache": (B, kv, L, K),
        "v_cache": (B, kv, L, V),
    }
    x = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    return {**x, "pos": np.array([pos])}


def attributes(heads: int, kv: int) -> dict[str, object]:
    return {"heads": heads, "kv_heads": kv, "scale": SCALE}


def wanted(x: dict[str, np.ndarray], heads: int, kv: int) -> list[np.ndarray]:
    tensors = [torch.from_numpy(x[n]) for n in SPEC.inputs]
    doubles = [t.double() if t.is_floating_point() else t for t in tensors]
    return [t.numpy() for t in cached_attention(*doubles, heads, kv, SCALE)]


def error(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / max(1.0, np.abs(want).max()))


SIZES = [
    (1, 1, 2, 2, 4, 4, 8, 0),
    (2, 1, 4, 2, 4, 6, 16, 15),
    (2, 5, 4, 1, 4, 3, 16, 11),
    (1, 16, 6, 3, 8, 8, 16, 0),
    (3, 7, 5, 5, 2, 2, 40, 9),
    (1, 37, 8, 2, 16, 16, 130, 65),
]
each_size = pytest.mark.parametrize("size", SIZES, ids=lambda s: "-".join(map(str, s)))


@each_size
def test_reference_is_equation_1(size: tuple[int, ...]) -> None:
    """One token and head at a time, in float64."""
    B, T, heads, kv, K, V, _, pos = size
    x = inputs(*size)
    out, keys, values = wanted(x, heads, kv)
    for b in range(B):
        for t in range(T):
            for h in range(heads):
                g = h // (heads // kv)
                q = x["q"][b, t, h * K : (h + 1) * K].astype(np.float64)
                weight = np.exp(SCALE * keys[b, g, : pos + t + 1] @ q)
                want = weight @ values[b, g, : pos + t + 1] / weight.sum()
                got = out[b, t, h * V : (h + 1) * V]
                assert np.abs(got - want).max() <= TOLERANCES["op_fp64"]
    np.testing.assert_array_equal(keys[:, :, :pos], x["k_cache"][:, :, :pos])
    np.testing.assert_array_equal(values[:, :, pos + T :], x["v_cache"][:, :, pos + T :])


@pytest.mark.parametrize("variant", SPEC.bodies)
@each_size
def test_bodies(size: tuple[int, ...], variant: str) -> None:
    heads, kv = size[2:4]
    x = inputs(*size)
    got = run_body(SPEC, x, variant, attributes=attributes(heads, kv))
    for a, b in zip(got, wanted(x, heads, kv), strict=True):
        assert error(a, b) <= TOLERANCES["op_fp32"]


def test_body_without_tokens() -> None:
    """A coarse model of patches gets no rows from most chunks."""
    x = inputs(2, 0, 4, 2, 4, 6, 16, 5)
    out, keys, values = run_body(SPEC, x, "products", attributes=attributes(4, 2))
    assert out.shape == (2, 0, 24)
    np.testing.assert_array_equal(keys, x["k_cache"])
    np.testing.assert_array_equal(values, x["v_cache"])


def test_onnx_reference_runs_the_body() -> None:
    x = inputs(2, 3, 4, 2, 4, 6, 16, 5)
    model = op_model(SPEC, x, "products", 23, attributes(4, 2))
    for a, b in zip(ReferenceEvaluator(model).run(None, x), wanted(x, 4, 2), strict=True):
        assert error(a, b) <= TOLERANCES["op_fp32"]


@settings(max_examples=10, deadline=None)
@given(
    T=st.integers(2, 9), cut=st.integers(1, 8), pos=st.integers(0, 7), variant=st.sampled_from([*SPEC.bodies])
)
def test_chunk_law(T: int, cut: int, pos: int, variant: str) -> None:
    x = inputs(2, T, 4, 2, 4, 6, 16, pos, seed=T * 31 + cut)
    want, outs = wanted(x, 4, 2), []
    caches = {n: x[n] for n in ("k_cache", "v_cache")}
    for part in (slice(0, min(cut, T)), slice(min(cut, T), T)):
        piece = {n: x[n][:, part] for n in "qkv"}
        if piece["q"].shape[1]:
            feed = piece | caches | {"pos": np.array([pos + part.start])}
            out, keys, values = run_body(SPEC, feed, variant, attributes=attributes(4, 2))
            caches = {"k_cache": keys, "v_cache": values}
            outs.append(out)
    for a, b in zip((np.concatenate(outs, 1), *caches.values()), want, strict=True):
        assert error(a, b) <= TOLERANCES["op_fp32"]


def test_torch_op_is_well_formed() -> None:
    x = tuple(torch.from_numpy(a) for a in inputs(2, 3, 4, 2, 4, 6, 16, 5).values())
    torch.library.opcheck(cached_attention, (*x, 4, 2, SCALE))


def test_limit() -> None:
    """The cache of 16 holds 13 + 3 tokens, and not 14 + 3."""
    wanted(inputs(1, 3, 2, 2, 4, 4, 16, 13), 2, 2)
    with pytest.raises(LimitError, match="longer than the cache"):
        wanted(inputs(1, 3, 2, 2, 4, 4, 16, 14), 2, 2)
