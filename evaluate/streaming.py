"""Feeding one text or recording to several runners in step, chunk by chunk, with their states carried."""

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

__all__ = ["Compared", "Fed", "NonFiniteWarning", "logits_of", "notes_of", "prepare", "stream_compared"]


class NonFiniteWarning(RuntimeWarning):
    """A runner gave logits that are infinite or not a number."""


@dataclass(frozen=True)
class Compared:
    """What one chunk ``[start:stop]`` of what is fed gave: candidate name -> metrics of its positions."""

    start: int
    stop: int
    metrics: Mapping[str, TokenMetrics]


@dataclass(frozen=True)
class Fed:
    """One text or recording as it is fed to runners of batch 1.

    Attributes:
        values: ids ``[n]`` or features ``[n,F]``.
        targets: the next tokens ``[n]``, or None where there is nothing to predict.
        unit: n and every cut of it are multiples of it; one position of the logits.
        note: a warning, if the text had to be cut.
    """

    values: NDArray[Any]
    targets: NDArray[np.int64] | None
    unit: int
    note: str

    @property
    def length(self) -> int:
        return len(self.values)

    def stops(self, chunk: int, ends: Sequence[int] = ()) -> list[int]:
        """Increasing ends of chunks of at most ``chunk``, and of the given ends, which are kept."""
        step = max(chunk // self.unit, 1) * self.unit
        return sorted({*range(step, self.length, step), self.length, *ends})


def prepare(runners: Mapping[str, Runner], values: Sequence[int] | Any) -> Fed:
    """What every runner can take of a text ``[n]`` or of features ``[n,F]``.

    Scoring n tokens feeds n - 1 of them, so a stream limit of m allows m + 1.

    Raises:
        InputError: too few, a token outside a vocabulary, features of another width, or a runner with a
            batch other than 1.
    """
    contract = next(iter(runners.values())).contract
    spec, ahead = contract.inputs, contract.predicts_next
    array = np.asarray(values, dtype=spec.dtype)
    array = array if spec.width else array.reshape(-1)
    unit, extra = spec.multiple, int(ahead)
    usable = (len(array) - extra) // unit * unit + extra
    if usable < unit + extra:
        raise InputError(
            f"too few {spec.unit}s to evaluate on",
            got=len(array),
            allowed=f"at least {unit + extra}",
            fix="use a longer text",
        )
    array = array[:usable]
    for name, runner in runners.items():
        _check(name, runner, array)
    limit = min((r.max_tokens for r in runners.values() if r.max_tokens is not None), default=None)
    note = ""
    if limit is not None and len(array) > limit // unit * unit + extra:
        top = limit // unit * unit + extra
        note = f"the text was cut to {top} {spec.unit}s: the longest stream the model can hold is {limit}"
        array = array[:top]
    return Fed(array[:-1] if ahead else array, array[1:] if ahead else None, unit, note)


def _check(name: str, runner: Runner, array: NDArray[Any]) -> None:
    """Refuse what one runner can't take."""
    spec = runner.contract.inputs
    if runner.batch != 1:
        raise InputError(f"runner {name!r} can't be compared", got=f"batch {runner.batch}", allowed=1)
    if spec.width:
        if array.ndim != 2 or array.shape[1] != spec.width:
            raise InputError(
                f"features that {name!r} can't take",
                got=f"shape {list(array.shape)}",
                allowed=f"[n, {spec.width}]",
            )
    elif array.min() < 0 or array.max() >= runner.vocab_size:
        raise InputError(
            f"a token is outside the vocabulary of {name!r}",
            got=f"tokens from {array.min()} to {array.max()}",
            allowed=f"0 to {runner.vocab_size - 1}",
            fix="evaluate on a text in the model's own tokens",
        )


def stream_compared(
    reference: Runner, candidates: Mapping[str, Runner], fed: Fed, stops: Sequence[int]
) -> Iterator[Compared]:
    """Feed everything from reset states, cut at ``stops``, and compare chunk by chunk.

    The reference is run once for all candidates; only one chunk's logits are held at a time.

    Args:
        stops: increasing ends of the chunks, the last one ``fed.length``.
    """
    reference.reset()
    for runner in candidates.values():
        runner.reset()
    start = 0
    for stop in stops:
        piece = fed.values[start:stop]
        targets = None if fed.targets is None else fed.targets[start:stop]
        positions = reference.contract.positions(len(piece))
        expected = logits_of("reference", reference, piece, positions)
        metrics = {
            n: compare_logits(expected, logits_of(n, c, piece, positions), targets)
            for n, c in candidates.items()
        }
        yield Compared(start, stop, metrics)
        start = stop


def notes_of(name: str, metrics: TokenMetrics, note: str) -> tuple[str, ...]:
    """The warnings for a candidate's rows; logits that are not finite are warned of aloud too."""
    notes = [note] if note else []
    bad = int((~metrics.finite).sum())
    if bad:
        notes.append(f"{name}: {bad} of {len(metrics.finite)} tokens gave logits that are not finite")
        warnings.warn(notes[-1], NonFiniteWarning, stacklevel=3)
    return tuple(notes)


def logits_of(name: str, runner: Runner, piece: NDArray[Any], positions: int | None = None) -> NDArray[Any]:
    """Logits ``[positions,V]`` of one call at batch 1; None: of as many positions as there are.

    Raises:
        InputError: logits of another shape.
    """
    out = np.asarray(runner.feed(piece[None]))
    wanted = (1, out.shape[1] if positions is None else positions, runner.vocab_size)
    if out.shape != wanted:
        raise InputError(f"runner {name!r} returned logits of a wrong shape", got=out.shape, allowed=wanted)
    return np.asarray(out[0])
