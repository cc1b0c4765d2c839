"""The gated linear recurrence: the plain loop, LinearAttention as its body, and the native kernel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_run import Arrays, body_only, error, kernel, native_library, node_types
from tolerances import TOLERANCES

from xexport.ops.linear_attention.reference import linear_attention
from xexport.ops.linear_recurrence.reference import linear_recurrence

SCALE = 0.37
NAME = "linear_recurrence"
dims = st.integers(1, 3)


@pytest.fixture(scope="module")
def library() -> Path:
    return native_library()


def inputs(B: int, T: int, H: int, K: int, V: int, *, a_key: bool, strength: float = 0.3) -> Arrays:
    rng = np.random.default_rng((B, T, H, K, V))
    q, k = rng.standard_normal((2, B, T, H * K))
    v, state = rng.standard_normal((B, T, H * V)), rng.standard_normal((B, H, K, V))
    decay = -np.abs(rng.standard_normal((B, T, H * K if a_key else H))) * strength
    named = {"q": q, "k": k, "v": v, "state": state, "decay": decay}
    return {n: a.astype(np.float32) for n, a in named.items()}


def wanted(x: Arrays, heads: int) -> Arrays:
    """By the reference in double."""
    out, state = linear_recurrence(*(torch.from_numpy(a).double() for a in x.values()), heads, SCALE)
    return {"out": out.numpy(), "new_state": state.numpy()}


def worst(got: list[np.ndarray], want: Arrays) -> float:
    return max(map(error, got, want.values()))


@pytest.mark.parametrize("a_key", [False, True])
def test_reference_is_linear_attentions_gated_rule(a_key: bool) -> None:
    x = [torch.from_numpy(a).double() for a in inputs(2, 5, 3, 4, 6, a_key=a_key).values()]
    for got, want in zip(
        linear_recurrence(*x, 3, SCALE), linear_attention(*x, 3, 3, SCALE, "gated"), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCES["op_fp64"])


def test_torch_op_is_well_formed() -> None:
    x = tuple(torch.from_numpy(a) for a in inputs(2, 3, 2, 4, 3, a_key=True).values())
    torch.library.opcheck(linear_recurrence, (*x, 2, SCALE))


@settings(max_examples=30, deadline=None)
@given(
    B=dims,
    T=st.one_of(st.just(1), st.integers(1, 40)),
    H=dims,
    K=st.sampled_from([1, 3, 8, 31, 64]),
    V=st.sampled_from([1, 8, 20, 32, 70]),
    a_key=st.booleans(),
)
def test_kernel_and_body_are_the_reference(
    library: Path, B: int, T: int, H: int, K: int, V: int, a_key: bool
) -> None:
    x = inputs(B, T, H, K, V, a_key=a_key)
    want = wanted(x, H)
    assert worst(kernel(NAME, x, library, heads=H, scale=SCALE), want) <= TOLERANCES["op_fp32"]
    assert worst(body_only(NAME, x, heads=H, scale=SCALE), want) <= TOLERANCES["linear_attention_fp32"]


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize(("T", "V"), [(1, 7), (1, 64), (17, 32), (33, 72)])
@pytest.mark.parametrize("a_key", [False, True])
def test_kernel_on_every_instruction_set(library: Path, isa: str, T: int, V: int, a_key: bool) -> None:
    x = inputs(2, T, 3, 16, V, a_key=a_key)
    got = kernel(NAME, x, library, isa, heads=3, scale=SCALE)
    assert worst(got, wanted(x, 3)) <= TOLERANCES["op_fp32"]


@settings(max_examples=15, deadline=None)
@given(T=st.integers(2, 40), data=st.data())
def test_any_cut_gives_the_same(library: Path, T: int, data: st.DataObject) -> None:
    x, cut = inputs(2, T, 2, 8, 12, a_key=True), data.draw(st.integers(1, T - 1))
    want, outs, state = wanted(x, 2), [], x["state"]
    for part in (slice(0, cut), slice(cut, T)):
        piece = {n: state if n == "state" else a[:, part] for n, a in x.items()}
        out, state = kernel(NAME, piece, library, heads=2, scale=SCALE)
        outs.append(out)
    assert worst([np.concatenate(outs, 1), state], want) <= TOLERANCES["op_fp32"]


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize(("T", "K"), [(8, 128), (32, 130), (77, 129), (100, 256)])
def test_products_of_many_tokens(library: Path, isa: str, T: int, K: int) -> None:
    """One decay a head and many keys: chunks of 32 tokens, some decays that leave nothing of what was."""
    x = inputs(1, T, 2, K, 64, a_key=False)
    x["decay"][:, T // 2 : T // 2 + 3] -= 700
    got = kernel(NAME, x, library, isa, heads=2, scale=K**-0.5)
    out, state = linear_recurrence(*(torch.from_numpy(a).double() for a in x.values()), 2, K**-0.5)
    assert worst(got, {"out": out.numpy(), "new_state": state.numpy()}) <= TOLERANCES["op_fp32"]


@pytest.mark.parametrize("name", ["q", "k", "v", "decay"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_no_strange_number_gets_to_earlier_tokens(library: Path, name: str, value: float) -> None:
    x = inputs(1, 40, 1, 128, 32, a_key=False)
    want = kernel(NAME, x, library, heads=1, scale=SCALE)[0]
    x[name][0, 21, 0] = value
    np.testing.assert_allclose(
        kernel(NAME, x, library, heads=1, scale=SCALE)[0][:, :21], want[:, :21], atol=1e-4, rtol=1e-5
    )


def test_threads_change_nothing(library: Path) -> None:
    x = inputs(2, 300, 4, 32, 32, a_key=True)
    one, two = (kernel(NAME, x, library, threads=n, heads=4, scale=SCALE) for n in (1, 2))
    for got, want in zip(two, one, strict=True):
        np.testing.assert_array_equal(got, want)


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(["q", "k", "v", "state", "decay"]),
    T=st.sampled_from([1, 5]),
    value=st.sampled_from([np.nan, np.inf, -np.inf, 3e38]),
    at=st.integers(0, 10**6),
    a_key=st.booleans(),
)
def test_nan_and_infinity_as_in_the_reference(
    library: Path, name: str, T: int, value: float, at: int, a_key: bool
) -> None:
    x = inputs(1, T, 2, 16, 16, a_key=a_key)
    place = x[name].reshape(-1)
    place[at % place.size] = value
    want = linear_recurrence(*(torch.from_numpy(a) for a in x.values()), 2, SCALE)
    for isa in ("baseline", ""):
        got = kernel(NAME, x, library, isa, heads=2, scale=SCALE)
        for a, expected in zip(got, (w.numpy() for w in want), strict=True):
            np.testing.assert_array_equal(np.isnan(a), np.isnan(expected))
            infinite = np.isinf(expected)
            np.testing.assert_array_equal(a[infinite], expected[infinite])


def test_no_tokens_leave_the_state_alone(library: Path) -> None:
    x = inputs(1, 1, 2, 8, 8, a_key=False)
    empty = {n: a if n == "state" else a[:, :0] for n, a in x.items()}
    out, state = kernel(NAME, empty, library, heads=2, scale=SCALE)
    assert out.size == 0
    np.testing.assert_array_equal(state, x["state"])


def test_the_kernel_ran_and_without_it_onnx_runtimes_own(library: Path, tmp_path: Path) -> None:
    x = inputs(2, 40, 4, 16, 16, a_key=False)
    assert node_types(NAME, x, library, tmp_path, heads=4, scale=SCALE) == {NAME}
    assert NAME not in node_types(NAME, x, None, tmp_path, heads=4, scale=SCALE)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"q": (1, 2, 15)}, "q must be float32 [1,any,16], got float32 [1,2,15]"),
        ({"v": (1, 3, 16)}, "v must be float32 [1,2,16], got float32 [1,3,16]"),
        ({"state": (1, 3, 8, 8)}, "state must be float32 [1,2,any,any]"),
        ({"decay": (1, 2, 3)}, "decay must be float32 [1,2,2], got float32 [1,2,3]"),
    ],
)
def test_wrong_shapes_name_the_node(library: Path, change: dict[str, tuple[int, ...]], says: str) -> None:
    bad = inputs(1, 2, 2, 8, 8, a_key=False) | {n: np.zeros(s, np.float32) for n, s in change.items()}
    with pytest.raises(Exception, match=f"xexport {NAME} node 'mixer0': ") as caught:
        kernel(NAME, bad, library, heads=2, scale=SCALE)
    assert says in str(caught.value)


def test_half_precision_is_refused_when_the_graph_is_loaded(library: Path) -> None:
    """The exporter emits float32; a file of another type fails at once, by the node's name."""
    x = {n: a.astype(np.float16) for n, a in inputs(1, 2, 2, 8, 8, a_key=False).items()}
    with pytest.raises(Exception, match="mixer0"):
        kernel(NAME, x, library, heads=2, scale=SCALE)
