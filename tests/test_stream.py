"""Streams over a hand-made bundle: the chunk law, ping-pong state, saving, limits, bad input, generation."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xexport.core.errors import InputError, LimitError, RuntimeFailure
from xexport.runtimes.bundle import Bundle, load
from xexport.runtimes.generate import PROMPT_CHUNK, Generation
from xexport.runtimes.sampling import Sampler
from xexport.runtimes.stream import SavedState, Stream
from xexport.runtimes.tokenizers import BytesTokenizer, NoTokenizer

ToyMaker = Callable[..., Path]


@pytest.fixture
def bundle(toy_bundle: Path) -> Bundle:
    return load(toy_bundle)


@pytest.fixture
def stream(bundle: Bundle) -> Stream:
    return bundle.stream(threads=1)


def _ids(count: int, batch: int = 1, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (batch, count))


def _toy_reference(folder: Path, ids: Any) -> Any:
    """The toy's recurrence in numpy, from the weights in its own graph."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(folder / "model.onnx")
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    x = weights["emb"][ids]
    total = np.cumsum(x, axis=1) + 1.0
    before = np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], axis=1)
    at = np.arange(1, ids.shape[1] + 1, dtype=np.float32)[None, :, None]
    return (total + 3 * before + at) @ weights["head"]


def test_logits_are_those_of_the_recurrence(toy_bundle: Path) -> None:
    ids = _ids(17, batch=3)
    logits = load(toy_bundle).stream(batch=3, threads=1).feed(ids)
    assert logits.dtype == np.float32
    assert logits.shape == (3, 17, 256)
    np.testing.assert_array_equal(logits, _toy_reference(toy_bundle, ids))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    batch=st.integers(1, 3),
    prefix=st.integers(0, 3),
)
def test_any_cut_gives_the_same_logits_and_state(
    bundle: Bundle, cuts: list[int], batch: int, prefix: int
) -> None:
    whole, parts = bundle.stream(batch, threads=1), bundle.stream(batch, threads=1)
    if prefix:  # begin from a state that is not the first one
        for s in (whole, parts):
            s.feed(_ids(prefix, batch, seed=9))
    ids = _ids(sum(cuts), batch, seed=len(cuts))
    expected = whole.feed(ids)
    got = [parts.feed(piece) for piece in np.split(ids, np.cumsum(cuts)[:-1], axis=1)]
    np.testing.assert_array_equal(np.concatenate(got, axis=1), expected)
    assert parts.position == whole.position == prefix + sum(cuts)
    for name, tensor in whole.state().items():
        np.testing.assert_array_equal(parts.state()[name], tensor)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9])
def test_ping_pong_keeps_the_state_after_odd_and_even_counts(stream: Stream, count: int) -> None:
    ids = _ids(count)[0].tolist()
    for token in ids:
        stream.feed([token])
    assert stream.state()["position"].tolist() == [count]
    assert stream.position == count
    chunked = stream.save()
    stream.reset()
    stream.feed(ids)
    np.testing.assert_array_equal(stream.state()["layers.0.sum"], chunked.tensors["layers.0.sum"])


def test_steps_and_chunks_may_alternate(stream: Stream) -> None:
    ids = _ids(40)
    expected = stream.feed(ids)
    stream.reset()
    pieces = [ids[:, :1], ids[:, 1:6], ids[:, 6:7], ids[:, 7:8], ids[:, 8:13], ids[:, 13:31], ids[:, 31:]]
    np.testing.assert_array_equal(np.concatenate([stream.feed(p) for p in pieces], axis=1), expected)


def test_logits_belong_to_the_caller(stream: Stream) -> None:
    first = stream.feed([5])
    kept = first.copy()
    stream.feed([6])
    stream.feed([7])
    np.testing.assert_array_equal(first, kept)
    chunk = stream.feed([1, 2, 3])
    kept = chunk.copy()
    stream.feed([4, 5, 6])
    np.testing.assert_array_equal(chunk, kept)


def test_state_is_a_copy_and_has_the_first_values_of_the_manifest(stream: Stream) -> None:
    state = stream.state()
    assert state["layers.0.sum"].tolist() == [[1.0] * 8]
    assert state["position"].dtype == np.int64
    state["layers.0.sum"][...] = 99
    assert stream.state()["layers.0.sum"].max() == 1.0


def test_reset_is_the_same_as_a_new_stream(bundle: Bundle, stream: Stream) -> None:
    stream.feed(_ids(11))
    stream.reset()
    assert stream.position == 0
    np.testing.assert_array_equal(stream.feed([3, 4]), bundle.stream(threads=1).feed([3, 4]))


def test_restore_goes_on_from_where_save_was(stream: Stream) -> None:
    stream.feed(_ids(7))
    saved = stream.save()
    expected = stream.feed([1, 2, 3])
    for _ in range(2):  # as often as one likes
        stream.feed([200])
        stream.restore(saved)
        assert stream.position == 7
        np.testing.assert_array_equal(stream.feed([1, 2, 3]), expected)


def test_saved_state_survives_a_file(bundle: Bundle, stream: Stream, tmp_path: Path) -> None:
    stream.feed(_ids(5))
    path = stream.save().to_file(tmp_path / "five.npz")
    other = bundle.stream(threads=1)
    other.restore(SavedState.from_file(path))
    np.testing.assert_array_equal(other.feed([9]), stream.feed([9]))
    assert [p.name for p in tmp_path.glob("*.part")] == []


def test_a_file_that_is_no_saved_state_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with pytest.raises(InputError, match="no such file"):
        SavedState.from_file(path)
    path.write_bytes(b"PK nonsense")
    with pytest.raises(InputError, match="not a saved state"):
        SavedState.from_file(path)
    np.savez(path, head=np.array([object()], dtype=object))
    with pytest.raises(InputError, match="not a saved state"):
        SavedState.from_file(path)


def test_a_state_of_other_weights_is_refused(make_toy_bundle: ToyMaker, stream: Stream) -> None:
    other = load(make_toy_bundle("other", seed=1)).stream(threads=1)
    with pytest.raises(InputError, match="another model"):
        stream.restore(other.save())


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(bundle: Bundle, stream: Stream) -> None:
    stream.feed([1, 2])
    good = stream.save()
    wrong_shape = {**good.tensors, "layers.0.sum": np.zeros((1, 9), np.float32)}
    wrong_dtype = {**good.tensors, "position": good.tensors["position"].astype(np.int32)}
    missing = {k: v for k, v in good.tensors.items() if k != "position"}
    for tensors in (wrong_shape, wrong_dtype, missing):
        with pytest.raises(InputError, match="doesn't fit"):
            stream.restore(replace(good, tensors=tensors))
    with pytest.raises(InputError, match="batch size"):
        stream.restore(bundle.stream(2, threads=1).save())
    with pytest.raises(InputError, match="impossible position"):
        stream.restore(replace(good, position=-1))
    with pytest.raises(InputError, match="not a saved state"):
        stream.restore({"position": 3})  # type: ignore[arg-type]
    assert stream.position == 2
    np.testing.assert_array_equal(stream.state()["layers.0.sum"], good.tensors["layers.0.sum"])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "no tokens"),
        (np.empty((1, 0), np.int64), "no tokens"),
        ([256], "out of range"),
        ([-1], "out of range"),
        ([1, -2, 3], "out of range"),
        (np.array([[1, 2**40]]), "out of range"),
        (np.array([2**63 + 5, 1], np.uint64), "out of range"),
        ([2**70], "not integers|out of range"),
        ([1.0], "not integers"),
        ([True, False], "not integers"),
        ("text", "not text"),
        (b"text", "not text"),
        ([[1, 2], [3, 4]], "wrong shape"),
        ([[1], [2, 3]], "rectangular"),
        (np.zeros((1, 1, 1), np.int64), "wrong shape"),
        (np.array(3), "wrong shape"),
        (None, "not integers"),
    ],
)
def test_bad_tokens_are_refused_before_the_graph_sees_them(stream: Stream, tokens: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        stream.feed(tokens)
    assert stream.position == 0
    assert stream.state()["position"].tolist() == [0]


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_integer_arrays_of_any_width_and_layout_are_taken(stream: Stream, dtype: Any) -> None:
    wide = _ids(20).astype(dtype)
    expected = stream.feed(wide[:, ::2].tolist())
    stream.reset()
    np.testing.assert_array_equal(stream.feed(wide[:, ::2]), expected)


def test_batch_needs_two_dimensions(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="wrong shape") as caught:
        bundle.stream(2, threads=1).feed([1, 2])
    assert caught.value.allowed == "[2, T]"


def test_limit_is_exact_and_leaves_the_stream_usable(make_toy_bundle: ToyMaker) -> None:
    stream = load(make_toy_bundle(max_tokens=8)).stream(threads=1)
    stream.feed(_ids(6))
    with pytest.raises(LimitError, match="8 tokens") as caught:
        stream.feed([1, 2, 3])
    assert "position 6" in str(caught.value)
    assert "at most 2" in str(caught.value)
    stream.feed([1])
    stream.feed([2])
    with pytest.raises(LimitError):
        stream.feed([3])
    stream.reset()
    stream.feed(_ids(8))


def test_streams_share_one_session_and_not_their_state(bundle: Bundle) -> None:
    one, two = bundle.stream(threads=1), bundle.stream(threads=1)
    assert bundle.engine(threads=1) is bundle.engine(threads=1)
    assert bundle.engine(threads=1) is not bundle.engine(threads=2)
    one.feed([1, 2, 3])
    assert two.state()["position"].tolist() == [0]


def test_streams_of_one_bundle_may_run_in_several_threads(bundle: Bundle) -> None:
    ids = _ids(200)
    expected = bundle.stream(threads=1).feed(ids)
    results: dict[int, Any] = {}

    def work(index: int, stream: Stream) -> None:
        results[index] = np.concatenate([stream.feed([int(i)]) for i in ids[0]], axis=1)

    threads = [threading.Thread(target=work, args=(i, bundle.stream(threads=1))) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(4):
        np.testing.assert_array_equal(results[index], expected)


def test_feeding_one_stream_from_two_threads_is_an_error(stream: Stream) -> None:
    inside, leave = threading.Event(), threading.Event()
    cell = stream._cell

    class Slow:
        def run(self, ids: Any, keep: int = 0) -> Any:
            inside.set()
            leave.wait(10)
            return cell.run(ids, keep)

    stream._cell = Slow()  # type: ignore[assignment]
    thread = threading.Thread(target=stream.feed, args=([1],))
    thread.start()
    inside.wait(10)
    try:
        with pytest.raises(RuntimeFailure, match="another thread"):
            stream.feed([2])
    finally:
        leave.set()
        thread.join()
    assert stream.position == 1


@pytest.mark.parametrize("batch", [0, -1, True, 1.5])
def test_bad_batch_is_refused(bundle: Bundle, batch: Any) -> None:
    with pytest.raises(InputError, match="batch"):
        bundle.stream(batch)


# Generation


def test_same_seed_same_text(stream: Stream) -> None:
    texts = []
    for seed in (3, 3, 4):
        stream.reset()
        texts.append("".join(stream.generate("Call me ", 40, temperature=9.0, seed=seed)))
    assert texts[0] == texts[1] != texts[2]


def test_generation_leaves_the_stream_after_all_its_tokens(stream: Stream) -> None:
    generation = stream.generate("abc", max_tokens=5, seed=0)
    text = list(generation)
    assert stream.position == 3 + 5 == 3 + len(generation.ids)
    assert generation.stats.prompt_tokens == 3
    assert generation.stats.new_tokens == 5
    assert generation.stats.decode_tokens_per_s > 0
    after = stream.state()
    stream.reset()
    stream.feed([*b"abc", *generation.ids])
    np.testing.assert_array_equal(after["layers.0.sum"], stream.state()["layers.0.sum"])
    assert "".join(text) == BytesTokenizer().decode(generation.ids)


def test_a_long_prompt_is_fed_in_chunks_to_the_same_result(stream: Stream) -> None:
    prompt = _ids(2 * PROMPT_CHUNK + 7)[0].tolist()
    greedy = stream.generate(prompt, max_tokens=3, temperature=0)
    list(greedy)
    stream.reset()
    last = stream.feed(prompt)[0, -1]
    assert greedy.ids[0] == int(last.argmax())


class _Script:
    """A runner whose greedy continuation is a given list of ids."""

    def __init__(self, ids: list[int], max_tokens: int | None = None) -> None:
        self.vocab_size, self.batch, self.position, self.max_tokens = 256, 1, 0, max_tokens
        self._ids = ids
        self._fed = 0
        self.keeps = False

    def feed(self, tokens: Any, keep: int = 0) -> Any:
        count = np.asarray(tokens).size
        if self.max_tokens is not None and self.position + count > self.max_tokens:
            raise LimitError("full")
        self.position += count
        logits = np.zeros((1, count, 256), np.float32)
        logits[0, -1, self._ids[min(self._fed, len(self._ids) - 1)]] = 1
        self._fed += 1
        return logits

    def reset(self) -> None: ...
    def save(self) -> Any: ...
    def restore(self, saved: Any) -> None: ...
    def state(self) -> dict[str, Any]:
        return {}


def _greedy(text: bytes, **options: Any) -> Generation:
    runner = _Script(list(text), options.pop("limit", None))
    options = {"max_tokens": len(text), "sampler": Sampler(0), **options}
    return Generation(runner, options.pop("tokenizer", BytesTokenizer()), [1], **options)


def test_characters_are_never_cut() -> None:
    text = "né €uro 🐋 fin"
    pieces = list(_greedy(text.encode()))
    assert "".join(pieces) == text
    assert "🐋" in pieces
    assert all("�" not in p for p in pieces)


def test_an_unfinished_character_ends_as_one_replacement() -> None:
    assert "".join(_greedy("ab🐋".encode()[:-1])) == "ab�"


def test_invalid_bytes_become_replacements_and_text_goes_on() -> None:
    assert "".join(_greedy(b"a\xff\xc3b")) == "a��b"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("END", "one "),
        (["zzz", "END"], "one "),
        ("o", ""),
        (ord("E"), "one "),
        (["nothing"], "one END two"),
        ("two!", "one END two"),
    ],
)
def test_stop_ends_before_the_stop(stop: Any, expected: str) -> None:
    assert "".join(_greedy(b"one END two", stop=stop)) == expected


def test_stop_is_found_over_overlapping_beginnings() -> None:
    assert "".join(_greedy(b"aaaab rest", stop="aab")) == "aa"


def test_the_model_s_limit_gives_the_text_first_and_then_says_so() -> None:
    generation = _greedy(b"abcdefgh", limit=4)
    pieces: list[str] = []
    with pytest.raises(LimitError):
        pieces.extend(generation)
    assert "".join(pieces) == "abcd"  # three were fed back, the fourth needs no room


def test_a_generation_that_just_fits_ends_without_error() -> None:
    assert "".join(_greedy(b"abcdefgh", limit=4, max_tokens=4)) == "abcd"


def test_without_a_tokenizer_ids_come_as_text() -> None:
    assert "".join(_greedy(bytes([7, 8]), tokenizer=NoTokenizer())) == "7 8 "


def test_prompts_that_cannot_be_fed_are_refused(
    bundle: Bundle, make_toy_bundle: ToyMaker, stream: Stream
) -> None:
    with pytest.raises(InputError, match="empty"):
        stream.generate("")
    with pytest.raises(InputError, match="batch 1"):
        bundle.stream(2, threads=1).generate("x")
    with pytest.raises(InputError, match="max_tokens"):
        stream.generate("x", max_tokens=-1)
    with pytest.raises(InputError, match="stop string is empty"):
        stream.generate("x", stop="")
    bare = load(make_toy_bundle("bare", tokenizer="none")).stream(threads=1)
    with pytest.raises(InputError, match="no tokenizer") as caught:
        bare.generate("x")
    assert "--ids" in str(caught.value)
    short = load(make_toy_bundle("short", max_tokens=4)).stream(threads=1)
    with pytest.raises(LimitError):
        short.generate("more than four")


def test_max_tokens_of_zero_feeds_the_prompt_only(stream: Stream) -> None:
    assert list(stream.generate("ab", max_tokens=0)) == []
    assert stream.position == 2


def test_ids_beyond_the_tokenizer_are_never_sampled(make_toy_bundle: ToyMaker) -> None:
    stream = load(make_toy_bundle("wide", vocab=300)).stream(threads=1)
    generation = stream.generate("x", max_tokens=200, temperature=50.0, seed=1)
    list(generation)
    assert max(generation.ids) < 256


# The PyTorch module as a stream


@pytest.fixture
def module() -> Any:
    import torch

    from xexport.core.state import StateSpec

    class Toy(torch.nn.Module):
        vocab_size = 16

        def __init__(self) -> None:
            super().__init__()
            self.emb = torch.nn.Embedding(16, 4)
            self.head = torch.nn.Linear(4, 16)

        def state_spec(self) -> list[StateSpec]:
            return [StateSpec("sum", ("B", 4), init=0.5), StateSpec("count", ("B",), "int64")]

        def forward(self, tokens: Any, total: Any, count: Any) -> Any:
            c = torch.cumsum(self.emb(tokens), dim=1) + total[:, None]
            return self.head(c), c[:, -1], count + tokens.shape[1]

    torch.manual_seed(0)
    return Toy()


def test_torch_stream_is_a_runner(module: Any) -> None:
    from xexport.runtimes.torch_eager import TorchStream

    stream = TorchStream(module, batch=2)
    ids = np.random.default_rng(0).integers(0, 16, (2, 9))
    whole = stream.feed(ids)
    assert whole.shape == (2, 9, 16)
    assert stream.state()["count"].tolist() == [9, 9]
    stream.reset()
    assert stream.state()["sum"].tolist() == [[0.5] * 4] * 2
    head = stream.feed(ids[:, :4])
    saved = stream.save()
    tail = stream.feed(ids[:, 4:])
    np.testing.assert_allclose(np.concatenate([head, tail], axis=1), whole, atol=1e-5, rtol=0)
    stream.restore(saved)
    np.testing.assert_array_equal(stream.feed(ids[:, 4:]), tail)
    assert stream.position == 9


def test_torch_stream_finds_the_vocabulary_of_a_module_that_does_not_say(module: Any) -> None:
    from xexport.runtimes.torch_eager import TorchStream

    module.vocab_size = None
    stream = TorchStream(module)
    assert stream.vocab_size == 16
    assert stream.position == 0
    assert stream.state()["count"].tolist() == [0]


def test_a_module_that_drops_state_is_refused(module: Any) -> None:
    from xexport.runtimes.torch_eager import TorchStream

    full = module.forward
    module.forward = lambda *inputs: full(*inputs)[:2]
    with pytest.raises(RuntimeFailure, match="chunk form"):
        TorchStream(module).feed([1])
