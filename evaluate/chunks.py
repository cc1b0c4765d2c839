"""The chunk law: any way of cutting a sequence gives the same logits and the same final state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xexport.core.errors import InputError
from xexport.core.progress import Progress, Silent
from xexport.core.records import ChunkLaw, Cut, Setup
from xexport.core.runner import Runner
from xexport.evaluate.drift import state_errors

__all__ = ["chunk_law", "random_cuts"]


def random_cuts(total: int, count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """``count`` ways of cutting ``total`` tokens into pieces of random odd lengths (the last is the rest).

    The typical length grows from cut to cut, so that short and long pieces are both tried.
    """
    rng = np.random.default_rng(seed)
    cuts = []
    for index in range(count):
        longest = max(1, min(total // 2, 3 * 4**index))
        pieces: list[int] = []
        while (left := total - sum(pieces)) > 0:
            pieces.append(min(left, 2 * int(rng.integers(0, (longest + 1) // 2 + 1)) + 1))
        cuts.append(tuple(pieces))
    return cuts


def chunk_law(
    runner: Runner,
    tokens: Sequence[int] | Any,
    *,
    setup: Setup,
    start: int | None = None,
    cuts: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
) -> ChunkLaw:
    """Feed the same tokens whole, in random odd pieces, and one by one, from one non-zero state.

    Args:
        tokens: ``[n]`` (or ``[B,n]`` for a batch of streams), or features with one more axis. The first
            ``start`` (default a quarter) make the state; the rest is cut. The whole's logits are held in
            memory. Of features, ``start`` and the pieces count positions of the logits.
        cuts: random cuts beside "one by one".

    Returns:
        The row; its ``error`` and ``worst`` cut are what a gate looks at.

    Raises:
        InputError: too few tokens.
        FormError: the model has the whole-sequence form only.
    """
    progress = progress or Silent()
    contract = runner.contract
    contract.require_state("keep the chunk law")
    unit = contract.inputs.multiple
    array = contract.batched(tokens, runner.batch)
    if runner.max_tokens is not None:
        array = array[:, : runner.max_tokens]
    count = array.shape[1] // unit
    if count < 4:
        raise InputError(
            f"too few {contract.inputs.unit}s to cut", got=array.shape[1], allowed=f"at least {4 * unit}"
        )
    begin = count // 4 if start is None else start
    if not 0 <= begin <= count - 2:
        raise InputError("the start leaves nothing to cut", got=begin, allowed=f"0 to {count - 2}")
    rest = array[:, begin * unit : count * unit]
    total = count - begin
    ways = [*random_cuts(total, cuts, seed), (1,) * total]
    progress.stage(f"chunk law on {total} {'tokens' if unit == 1 else 'positions'}", len(ways) + 1)

    runner.reset()
    if begin:
        runner.feed(array[:, : begin * unit])
    saved = runner.save()
    whole = np.asarray(runner.feed(rest), np.float64)
    final = runner.state()
    progress.advance()
    rows = []
    for pieces in ways:
        runner.restore(saved)
        rows.append(_cut(runner, rest, pieces, whole, final))
        progress.advance()
    runner.reset()
    return ChunkLaw(setup=setup, start=begin, tokens=total, seed=seed, cuts=tuple(rows))


def _cut(
    runner: Runner,
    rest: NDArray[Any],
    pieces: tuple[int, ...],
    whole: NDArray[np.float64],
    final: dict[str, NDArray[Any]],
) -> Cut:
    worst, at, contract = 0.0, 0, runner.contract
    unit = contract.inputs.multiple
    per_unit = contract.positions(unit)
    for length in pieces:
        got = np.asarray(runner.feed(rest[:, at * unit : (at + length) * unit]), np.float64)
        with np.errstate(invalid="ignore"):
            # np.maximum, unlike max, keeps a nan once it is seen.
            worst = float(
                np.maximum(worst, np.abs(got - whole[:, at * per_unit : (at + length) * per_unit]).max())
            )
        at += length
    errors = state_errors(final, runner.state())
    name = max(errors, key=lambda n: math.inf if errors[n] is None else float(errors[n] or 0.0), default="")
    return Cut(
        pieces=pieces,
        logit_error=worst if math.isfinite(worst) else None,
        logit_rms=float(np.sqrt(np.mean(whole * whole))) if np.isfinite(whole).all() else 0.0,
        state_error=errors[name] if name else 0.0,
        state=name,
    )
