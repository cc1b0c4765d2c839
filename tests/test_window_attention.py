"""window_attention: the definition against equation 1 of arXiv 1706.03762, body, kernel, chunk law."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_run import Arrays, error, kernel, native_library
from tolerances import TOLERANCES

from xexport.core.registry import get_op
from xexport.ops.run import run_body
from xexport.ops.window_attention.reference import window_attention

SPEC = get_op("window_attention")
SCALE = 0.37
#: B, T, heads, kv_heads, K, V, W, S, rows of the ring beyond W, pos
SIZES = {
    "first token": (1, 1, 2, 2, 4, 4, 3, 0, 0, 0),
    "step": (2, 1, 4, 2, 4, 6, 5, 2, 0, 40),
    "into the sinks": (2, 9, 6, 2, 20, 37, 8, 3, 0, 1),
    "only sinks": (2, 3, 4, 1, 8, 8, 4, 6, 1, 0),
    "longer than the ring": (1, 70, 4, 4, 8, 8, 10, 0, 0, 301),
    "wide": (1, 100, 5, 1, 16, 16, 33, 4, 7, 70),
}
each_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
Size = tuple[int, ...]


def inputs(size: Size, seed: int = 0) -> Arrays:
    B, T, heads, kv, K, V, W, S, spare, pos = size
    rng = np.random.default_rng((seed, *size))
    shapes = {"q": (B, T, heads * K), "q_sinks": (B, T, heads * K), "k": (B, T, kv * K), "v": (B, T, kv * V)}
    shapes |= {"k_cache": (B, kv, S + W + spare, K), "v_cache": (B, kv, S + W + spare, V)}
    x = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    return x | {"pos": np.array([pos])}


def attributes(size: Size) -> dict[str, int | float]:
    return {"heads": size[2], "kv_heads": size[3], "window": size[6], "sinks": size[7], "scale": SCALE}


def wanted(x: Arrays, size: Size) -> list[np.ndarray]:
    """The definition in float64."""
    doubles = [torch.from_numpy(a.astype(np.float64) if a.dtype == np.float32 else a) for a in x.values()]
    return [t.numpy() for t in window_attention(*doubles, *attributes(size).values())]


@pytest.mark.parametrize("size", [(1, 23, 4, 2, 4, 6, 5, 2, 0, 0), (2, 17, 3, 1, 4, 4, 6, 0, 2, 0)])
def test_definition_is_equation_1_under_a_mask(size: Size) -> None:
    """A whole stream: one token and head at a time, over all tokens, in float64."""
    B, T, heads, kv, K, V, W, S, *_ = size
    x = inputs(size)
    got = wanted(x, size)[0]
    split = {n: x[n].astype(np.float64).reshape(B, T, -1, V if n == "v" else K) for n in x if x[n].ndim == 3}
    for b in range(B):
        for n in range(T):
            for h in range(heads):
                g = h // (heads // kv)
                seen = [s for s in range(n + 1) if s < S or s > n - W]
                q = [split["q_sinks" if s < S else "q"][b, n, h] for s in seen]
                weight = np.exp([SCALE * split["k"][b, s, g] @ u for s, u in zip(seen, q, strict=True)])
                want = weight @ split["v"][b, seen, g] / weight.sum()
                assert np.abs(got[b, n, h * V : (h + 1) * V] - want).max() <= TOLERANCES["op_fp64"]


@each_size
def test_body(size: Size) -> None:
    x = inputs(size)
    got = run_body(SPEC, x, "masked", attributes=attributes(size))
    assert max(map(error, got, wanted(x, size))) <= TOLERANCES["op_fp32"]


@settings(max_examples=15, deadline=None)
@given(
    T=st.integers(2, 20),
    cut=st.integers(1, 19),
    W=st.integers(1, 7),
    S=st.integers(0, 3),
    pos=st.integers(0, 9),
)
def test_chunk_law(T: int, cut: int, W: int, S: int, pos: int) -> None:
    size = (1, T, 4, 2, 4, 6, W, S, 0, pos)
    x = inputs(size)
    want, outs = wanted(x, size), []
    caches = {n: x[n] for n in ("k_cache", "v_cache")}
    for part in (slice(0, min(cut, T)), slice(min(cut, T), T)):
        if part.start < part.stop:
            feed = x | {n: x[n][:, part] for n in ("q", "q_sinks", "k", "v")} | caches
            out, keys, values = wanted(feed | {"pos": np.array([pos + part.start])}, size)
            caches = {"k_cache": keys.astype(np.float32), "v_cache": values.astype(np.float32)}
            outs.append(out)
    for a, b in zip((np.concatenate(outs, 1), *caches.values()), want, strict=True):
        assert error(a, b) <= TOLERANCES["op_fp64"]


def test_torch_op_is_well_formed() -> None:
    size = SIZES["step"]
    x = tuple(torch.from_numpy(a) for a in inputs(size).values())
    torch.library.opcheck(window_attention, (*x, *attributes(size).values()))


# The kernel


@settings(max_examples=30, deadline=None)
@given(
    T=st.one_of(st.just(1), st.integers(1, 150)),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (5, 1), (40, 1)]),
    sizes=st.sampled_from([(2, 2), (4, 7), (33, 20), (64, 64)]),
    W=st.integers(1, 130),
    S=st.integers(0, 5),
    spare=st.integers(0, 9),
    pos=st.integers(0, 300),
)
def test_kernel(
    T: int, heads: tuple[int, int], sizes: tuple[int, int], W: int, S: int, spare: int, pos: int
) -> None:
    size = (1, T, *heads, *sizes, W, S, spare, pos)
    x = inputs(size)
    got = kernel("window_attention", x, native_library(), **attributes(size))
    assert max(map(error, got, wanted(x, size))) <= TOLERANCES["op_fp32"]


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@each_size
def test_kernel_on_every_instruction_set(isa: str, size: Size) -> None:
    x = inputs(size)
    got = kernel("window_attention", x, native_library(), isa, **attributes(size))
    assert max(map(error, got, wanted(x, size))) <= TOLERANCES["op_fp32"]


def test_kernel_with_threads() -> None:
    size = (2, 90, 8, 4, 32, 32, 200, 4, 0, 300)
    x = inputs(size)
    one, two = (
        kernel("window_attention", x, native_library(), threads=n, **attributes(size)) for n in (1, 2)
    )
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("changes", "given", "text"),
    [
        ({"q": (2, 1, 9)}, {}, "q must be float32 [2,any,16]"),
        ({"q_sinks": (2, 2, 16)}, {}, "q_sinks must be float32 [2,1,16]"),
        ({}, {"window": 6}, "a window of 6 tokens in a ring of 5 rows"),
        ({}, {"window": 0}, "a window of 0 tokens"),
        ({}, {"heads": 3}, "3 heads for 2 heads of keys"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Size], given: dict[str, int], text: str) -> None:
    size = SIZES["step"]
    x = inputs(size) | {n: np.zeros(s, np.float32) for n, s in changes.items()}
    with pytest.raises(Exception, match="xexport window_attention node 'mixer0': ") as caught:
        kernel("window_attention", x, native_library(), **(attributes(size) | given))
    assert text in str(caught.value)
