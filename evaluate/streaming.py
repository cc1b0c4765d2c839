"""Feeding one text to several runners in step, chunk by chunk, with their states carried."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xexport.core.errors import InputError
from xexport.core.runner import Runner
from xexport.evaluate.metrics import TokenMetrics, compare_logits

__all__ = ["Compared", "NonFiniteWarning", "check_tokens", "notes_of", "stream_compared"]


class NonFiniteWarning(RuntimeWarning):
    """A runner gave logits that are infinite or not a number."""


@dataclass(frozen=True)
class Compared:
    """What one chunk ``tokens[start:stop]`` gave: candidate name -> metrics of its tokens."""

    start: int
    stop: int
    metrics: Mapping[str, TokenMetrics]


def check_tokens(runners: Mapping[str, Runner], tokens: Sequence[int] | Any) -> tuple[NDArray[np.int64], str]:
    """The tokens as an array that every runner can take, and a warning if they had to be cut.

    Scoring n tokens feeds n - 1 of them, so a stream limit of m allows m + 1.

    Raises:
        InputError: too few tokens, one outside a vocabulary, or a runner with a batch other than 1.
    """
    array = np.asarray(tokens, dtype=np.int64).reshape(-1)
    if len(array) < 2:
        raise InputError(
            "too few tokens to evaluate on", got=len(array), allowed="at least 2", fix="use a longer text"
        )
    note = ""
    for name, runner in runners.items():
        if runner.batch != 1:
            raise InputError(f"runner {name!r} can't be compared", got=f"batch {runner.batch}", allowed=1)
        if array.min() < 0 or array.max() >= runner.vocab_size:
            raise InputError(
                f"a token is outside the vocabulary of {name!r}",
                got=f"tokens from {array.min()} to {array.max()}",
                allowed=f"0 to {runner.vocab_size - 1}",
                fix="evaluate on a text in the model's own tokens",
            )
    limit = min((r.max_tokens for r in runners.values() if r.max_tokens is not None), default=None)
    if limit is not None and len(array) > limit + 1:
        note = f"the text was cut to {limit + 1} tokens: the longest stream the model can hold is {limit}"
        array = array[: limit + 1]
    return array, note


def stream_compared(
    reference: Runner, candidates: Mapping[str, Runner], tokens: NDArray[np.int64], stops: Sequence[int]
) -> Iterator[Compared]:
    """Feed ``tokens[:-1]`` from reset states, cut at ``stops``, and compare chunk by chunk.

    The reference is run once for all candidates; only one chunk's logits are held at a time.

    Args:
        stops: increasing ends of the chunks, the last one ``len(tokens) - 1``.
    """
    reference.reset()
    for runner in candidates.values():
        runner.reset()
    start = 0
    for stop in stops:
        piece, targets = tokens[start:stop], tokens[start + 1 : stop + 1]
        expected = _logits("reference", reference, piece)
        yield Compared(
            start,
            stop,
            {n: compare_logits(expected, _logits(n, c, piece), targets) for n, c in candidates.items()},
        )
        start = stop


def notes_of(name: str, metrics: TokenMetrics, note: str) -> tuple[str, ...]:
    """The warnings for a candidate's rows; logits that are not finite are warned of aloud too."""
    notes = [note] if note else []
    bad = int((~metrics.finite).sum())
    if bad:
        notes.append(f"{name}: {bad} of {len(metrics.finite)} tokens gave logits that are not finite")
        warnings.warn(notes[-1], NonFiniteWarning, stacklevel=3)
    return tuple(notes)


def _logits(name: str, runner: Runner, piece: NDArray[np.int64]) -> NDArray[Any]:
    """Logits ``[T,V]`` of one chunk at batch 1."""
    out = np.asarray(runner.feed(piece))
    if out.shape != (1, len(piece), runner.vocab_size):
        raise InputError(
            f"runner {name!r} returned logits of a wrong shape",
            got=out.shape,
            allowed=(1, len(piece), runner.vocab_size),
        )
    return np.asarray(out[0])
