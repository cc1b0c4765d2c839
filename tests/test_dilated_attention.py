"""dilated_attention: dense masks and the paper's mixture as a second derivation, body, kernel, chunk law."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_run import Arrays, error, kernel, native_library
from tolerances import TOLERANCES

from xexport.core.registry import get_op
from xexport.ops.dilated_attention.parallel import dilated_parallel
from xexport.ops.dilated_attention.reference import cache_rows, dilated_attention
from xexport.ops.run import run_body

SPEC = get_op("dilated_attention")
SCALE = 0.37
PAIRS = {
    "one": ((4, 1),),
    "paper": ((4, 1), (8, 2), (16, 4)),
    "odd": ((3, 1), (7, 2), (16, 8)),  # rates that divide neither segments nor heads
    "wide": ((5, 1), (9, 3), (6, 1)),
}
each_pairs = pytest.mark.parametrize("pairs", PAIRS.values(), ids=PAIRS)


Pairs = tuple[tuple[int, int], ...]


def inputs(
    pairs: Pairs,
    B: int,
    T: int,
    H: int,
    sizes: tuple[int, int],
    pos: int,
    seed: int = 0,
) -> Arrays:
    """Caches full of numbers: nothing may read what is older than the segment."""
    rng = np.random.default_rng((seed, B, T, H, pos))
    rows = sum(cache_rows(*p) for p in pairs)
    K, V = sizes
    shapes = {"q": (B, T, H * K), "k": (B, T, H * K), "v": (B, T, H * V)}
    shapes |= {"k_cache": (B, H, rows, K), "v_cache": (B, H, rows, V)}
    x = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    offsets = np.array([[h % r for h in range(H)] for _, r in pairs])
    constants = {"segments": np.array([w for w, _ in pairs]), "rates": np.array([r for _, r in pairs])}
    return x | {"pos": np.array([pos])} | constants | {"offsets": offsets}


def wanted(x: Arrays, H: int) -> list[np.ndarray]:
    """The definition in float64."""
    doubles = [torch.from_numpy(a.astype(np.float64) if a.dtype == np.float32 else a) for a in x.values()]
    return [t.numpy() for t in dilated_attention(*doubles, H, SCALE)]


def by_masks(x: Arrays, H: int) -> np.ndarray:
    """Equations 2 to 12 for a whole stream: one dense mask a pair, and the mixture of section 2.2."""
    q, k, v = (x[n].astype(np.float64).reshape(*x[n].shape[:2], H, -1) for n in "qkv")
    T, place = q.shape[1], np.arange(q.shape[1])
    scores = SCALE * np.einsum("bthk,bshk->bhts", q, k)
    outs, denominators = [], []
    for w, r, offset in zip(x["segments"], x["rates"], x["offsets"], strict=True):
        segment = place // w
        mine = (place % w) % r == offset[:, None]  # [H,T]
        mask = (segment[:, None] == segment) & (place[:, None] >= place) & mine[:, :, None] & mine[:, None]
        weight = np.exp(scores) * mask
        z = weight.sum(-1)  # [B,H,T]
        outs.append(np.einsum("bhts,bshv->bhtv", weight / np.maximum(z, 1e-300)[..., None], v))
        denominators.append(z)
    share = np.stack(denominators) / np.sum(denominators, axis=0)
    mixed = (share[..., None] * np.stack(outs)).sum(0)
    return mixed.transpose(0, 2, 1, 3).reshape(q.shape[0], T, -1)


@each_pairs
@pytest.mark.parametrize("H", [1, 5])
def test_definition_is_the_papers(pairs: Pairs, H: int) -> None:
    x = inputs(pairs, 2, 37, H, (4, 6), 0)
    assert np.abs(wanted(x, H)[0] - by_masks(x, H)).max() <= TOLERANCES["op_fp64"]


@each_pairs
@pytest.mark.parametrize("T", [1, 6, 37])
def test_parallel_form(pairs: Pairs, T: int) -> None:
    x = inputs(pairs, 2, T, 5, (4, 6), 0)
    q, k, v = (torch.unflatten(torch.from_numpy(x[n]).double(), -1, (5, -1)) for n in "qkv")
    constants = (torch.from_numpy(x[n]) for n in ("segments", "rates", "offsets"))
    got = dilated_parallel(q, k, v, *constants, SCALE).flatten(2).numpy()
    assert np.abs(got - wanted(x, 5)[0]).max() <= TOLERANCES["op_fp64"]


@each_pairs
@pytest.mark.parametrize(("T", "pos"), [(1, 0), (1, 77), (6, 5), (40, 33)])
def test_body(pairs: Pairs, T: int, pos: int) -> None:
    x = inputs(pairs, 2, T, 3, (4, 6), pos)
    got = run_body(SPEC, x, "masked", attributes={"heads": 3, "scale": SCALE})
    assert max(map(error, got, wanted(x, 3))) <= TOLERANCES["op_fp32"]


@settings(max_examples=15, deadline=None)
@given(
    T=st.integers(2, 40),
    cut=st.integers(1, 39),
    pos=st.integers(0, 50),
    pairs=st.sampled_from([*PAIRS.values()]),
)
def test_chunk_law(T: int, cut: int, pos: int, pairs: Pairs) -> None:
    x = inputs(pairs, 1, T, 3, (4, 4), pos)
    want, outs = wanted(x, 3), []
    caches = {n: x[n] for n in ("k_cache", "v_cache")}
    for part in (slice(0, min(cut, T)), slice(min(cut, T), T)):
        if part.start < part.stop:
            feed = x | {n: x[n][:, part] for n in "qkv"} | caches | {"pos": np.array([pos + part.start])}
            out, keys, values = wanted(feed, 3)
            caches = {"k_cache": keys.astype(np.float32), "v_cache": values.astype(np.float32)}
            outs.append(out)
    for a, b in zip((np.concatenate(outs, 1), *caches.values()), want, strict=True):
        assert error(a, b) <= TOLERANCES["op_fp64"]


def test_torch_op_is_well_formed() -> None:
    x = tuple(torch.from_numpy(a) for a in inputs(PAIRS["paper"], 2, 3, 4, (4, 6), 5).values())
    torch.library.opcheck(dilated_attention, (*x, 4, SCALE))


# The kernel


@settings(max_examples=30, deadline=None)
@given(
    T=st.one_of(st.just(1), st.integers(1, 150)),
    H=st.integers(1, 5),
    sizes=st.sampled_from([(2, 2), (4, 7), (20, 37), (64, 64)]),
    pos=st.integers(0, 70),
    pairs=st.sampled_from([*PAIRS.values(), ((64, 1), (128, 2), (256, 4)), ((40, 1), (90, 7), (99, 11))]),
)
def test_kernel(T: int, H: int, sizes: tuple[int, int], pos: int, pairs: Pairs) -> None:
    """Across blocks of 32 rows and 64 keys, segments that begin and end in the chunk."""
    x = inputs(pairs, 1, T, H, sizes, pos)
    got = kernel("dilated_attention", x, native_library(), heads=H, scale=SCALE)
    assert max(map(error, got, wanted(x, H))) <= TOLERANCES["op_fp32"]


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("T", [1, 70])
def test_kernel_on_every_instruction_set(isa: str, T: int) -> None:
    x = inputs(PAIRS["paper"], 2, T, 3, (20, 37), 45)
    got = kernel("dilated_attention", x, native_library(), isa, heads=3, scale=SCALE)
    assert max(map(error, got, wanted(x, 3))) <= TOLERANCES["op_fp32"]


def test_kernel_with_threads() -> None:
    x = inputs(((64, 1), (128, 2)), 2, 200, 4, (32, 32), 100)
    one, two = (
        kernel("dilated_attention", x, native_library(), threads=n, heads=4, scale=SCALE) for n in (1, 2)
    )
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"q": np.zeros((2, 3, 9), np.float32)}, "q must be float32 [2,any,12]"),
        ({"rates": np.array([1, 2])}, "rates must be int64 [3]"),
        ({"rates": np.array([1, 2, 0])}, "a segment of 16 tokens at a rate of 0"),
        ({"segments": np.array([4, 8, 20])}, "the caches have 12 rows, the segments 13"),
        ({"offsets": np.full((3, 3), 2)}, "an offset of 2 at a rate of 1"),
        ({"pos": np.array([-1])}, "pos is -1"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: Arrays, text: str) -> None:
    x = inputs(PAIRS["paper"], 2, 3, 3, (4, 6), 0) | changes
    with pytest.raises(Exception, match="xexport dilated_attention node 'mixer0': ") as caught:
        kernel("dilated_attention", x, native_library(), heads=3, scale=SCALE)
    assert text in str(caught.value)
