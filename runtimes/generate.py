"""Generation: feed a prompt in chunks, sample, and hand out text that is valid at every border."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from xexport.core.errors import InputError, LimitError
from xexport.runtimes.inputs import check_limit, check_tokens
from xexport.runtimes.sampling import Sampler

if TYPE_CHECKING:
    from xexport.core.runner import Runner
    from xexport.runtimes.tokenizers import Tokenizer

__all__ = ["PROMPT_CHUNK", "Generation", "GenerationStats"]

#: Prompts are fed in pieces of this many tokens, which bounds the memory that activations take.
PROMPT_CHUNK = 512


@dataclass
class GenerationStats:
    """What a generation has done so far; seconds exclude the time the caller held a piece."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    new_tokens: int = 0
    decode_seconds: float = 0.0

    @property
    def prompt_tokens_per_s(self) -> float:
        """Prefill speed."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Speed of sampling and feeding back one token at a time."""
        return self.new_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def record(self) -> dict[str, float]:
        """Counts, seconds and speeds as plain data."""
        return {
            **asdict(self),
            "prompt_tokens_per_s": self.prompt_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
        }


class Generation(Iterator[str]):
    """An iterator over pieces of text.

    A piece is handed out after its token was fed back, so whenever the caller stops, the stream
    holds exactly the tokens whose text it has given (with what the decoder and the search for a
    stop string still hold back).

    Attributes:
        ids: the ids generated so far.
        stats: counts and seconds so far.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        prompt: str | Sequence[int],
        *,
        max_tokens: int,
        sampler: Sampler,
        seed: int | None = None,
        stop: str | int | Sequence[str | int] | None = None,
    ) -> None:
        if runner.batch != 1:
            raise InputError("generation needs a stream of batch 1", got=runner.batch)
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 0:
            raise InputError("bad max_tokens", got=max_tokens, allowed="an integer, 0 or more")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
            raise InputError("bad seed", got=seed, allowed="an integer, 0 or more")
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        self._prompt = check_tokens(_not_empty(ids), 1, runner.vocab_size)
        check_limit(runner.position, self._prompt.shape[1], runner.max_tokens)
        self._runner = runner
        self._decoder = tokenizer.decoder()
        self._known = min(runner.vocab_size, tokenizer.vocab_size or runner.vocab_size)
        self._left = max_tokens
        self._sampler = sampler
        self._rng = np.random.default_rng(seed)
        self._stop_ids, self._stop_texts = _split_stop(stop)
        self._stop_ids |= tokenizer.end_ids
        self.ids: list[int] = []
        self.stats = GenerationStats()
        self._pieces = self._run()

    def __next__(self) -> str:
        return next(self._pieces)

    def _run(self) -> Iterator[str]:
        held = _StopSearch(self._stop_texts)
        row = self._feed_prompt()
        while self._left > 0:
            began = time.perf_counter()
            token = self._sampler.choose(row[: self._known], self._rng)
            if token in self._stop_ids:
                break
            self._left -= 1
            full = False
            try:
                row = self._runner.feed([token])[0, -1]
            except LimitError:
                full = True
            self.ids.append(token)
            self.stats.new_tokens += 1
            self.stats.decode_seconds += time.perf_counter() - began
            piece = held.push(self._decoder.push(token))
            if piece:
                yield piece
            if held.found:
                return
            if full and self._left > 0:
                yield from _nonempty(held.push(self._decoder.flush()) + held.flush())
                check_limit(self._runner.position, 1, self._runner.max_tokens)
        yield from _nonempty(held.push(self._decoder.flush()) + held.flush())

    def _feed_prompt(self) -> Any:
        """The logits ``[V]`` after the prompt."""
        began = time.perf_counter()
        logits: Any = None
        for start in range(0, self._prompt.shape[1], PROMPT_CHUNK):
            logits = self._runner.feed(self._prompt[:, start : start + PROMPT_CHUNK], 1)
        self.stats.prompt_tokens = self._prompt.shape[1]
        self.stats.prompt_seconds = time.perf_counter() - began
        return logits[0, -1]


class _StopSearch:
    """Holds back text that may be the beginning of a stop string; drops the string and what follows."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        if not self._stops or self.found:
            return "" if self.found else text
        self._held += text
        ends = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if ends:
            self.found = True
            out, self._held = self._held[: min(ends)], ""
            return out
        keep = self._overlap()
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def flush(self) -> str:
        out, self._held = self._held, ""
        return out

    def _overlap(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), max(len(s) for s in self._stops) - 1)
        for size in range(longest, 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0


def _not_empty(ids: Sequence[int]) -> Sequence[int]:
    if len(ids) == 0:
        raise InputError(
            "the prompt is empty", allowed="at least one token", fix="begin with a newline or another token"
        )
    return ids


def _split_stop(stop: str | int | Sequence[str | int] | None) -> tuple[frozenset[int], tuple[str, ...]]:
    if stop is None:
        return frozenset(), ()
    rows = (stop,) if isinstance(stop, str | int) else tuple(stop)
    texts = tuple(s for s in rows if isinstance(s, str))
    if "" in texts:
        raise InputError("a stop string is empty", allowed="strings of at least one character, or ids")
    return frozenset(s for s in rows if isinstance(s, int)), texts


def _nonempty(text: str) -> Iterator[str]:
    if text:
        yield text
