"""Latency: single steps, prefill, loading, and steps far along a stream; raw nanoseconds."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xexport.core.errors import InputError
from xexport.core.progress import Progress, Silent
from xexport.core.records import AtPosition, Latency, PairedLatency, Prefill, Setup
from xexport.core.runner import Runner

__all__ = [
    "SAMPLES",
    "Source",
    "measure_latency",
    "paired_latency",
    "quiet",
    "time_loads",
    "time_prefill_once",
    "time_steps",
    "walk_to",
]

#: steps timed at each position of a stream
SAMPLES = 20


@contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection while timing: its pauses are the harness's, not the model's.

    It collects once before; inside of another one nothing happens. In a process with a lot in it a
    collection takes a second, longer than what many of these calls time.
    """
    if not gc.isenabled():
        yield
        return
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@quiet()
def measure_latency(
    runner: Runner,
    tokens: Sequence[int] | Any,
    *,
    setup: Setup,
    warmup: int = 20,
    steps: int = 200,
    prefill: Sequence[int] = (128, 512),
    repeats: int = 5,
    positions: Sequence[int] = (),
    samples: int = SAMPLES,
    open_runner: Callable[[], Runner] | None = None,
    loads: int = 3,
    prompt: int = 32,
    progress: Progress | None = None,
) -> Latency:
    """Time one runner.

    Args:
        tokens: ``[n]`` ids or ``[n,F]`` features to feed; they are repeated where more are needed.
        warmup, steps: single-token calls thrown away, and kept.
        prefill, repeats: lengths of whole-prompt calls on an empty state, and calls each (after one
            thrown away). A length over the model's limit is left out. The logits after the last
            token are asked for, as generation does; the row says whether the others were computed.
        positions, samples: places in the stream where ``samples`` more steps are timed; the way
            there is fed in chunks, so a growing cache is as large as it would be.
        open_runner: opens a fresh session; timed ``loads`` times, with its first call, which feeds
            ``prompt`` tokens. None: neither is measured.

    Returns:
        The row, with raw samples. The runner is left reset.

    Raises:
        InputError: no tokens, or a stream limit too short for the steps asked for.
    """
    progress = progress or Silent()
    source = Source(tokens, runner)
    contract, unit = runner.contract, source.unit
    limit = None if runner.max_tokens is None else runner.max_tokens // unit
    if limit is not None and warmup + steps > limit:
        warmup = min(warmup, limit // 4)
        steps = limit - warmup
    lengths = contract.lengths(n for n in prefill if limit is None or n <= limit * unit)
    reached = [p for p in positions if limit is None or p + samples * unit <= limit * unit]
    places = [contract.nearest(p) if p else 0 for p in reached]
    progress.stage(
        f"latency of {setup.runner}", 1 + len(lengths) + len(places) + (loads if open_runner else 0)
    )

    runner.reset()
    time_steps(runner, source, warmup)
    step_ns = time_steps(runner, source, steps)
    progress.advance()
    calls = []
    for length in lengths:
        calls.append(
            Prefill(length, _time_prefill(runner, source, length, repeats), 1 if runner.keeps else 0)
        )
        progress.advance()
    runner.reset()
    far = []
    for place in sorted(places):
        if runner.position > place:  # the last place was near: its steps went beyond this one
            runner.reset()
        walk_to(runner, source, place)
        time_steps(runner, source, 1)
        far.append(AtPosition(place, time_steps(runner, source, samples - 1)))
        progress.advance()
    runner.reset()
    prompt = contract.nearest(prompt)
    load_ns, first_ns = time_loads(open_runner, source, loads, prompt, progress) if open_runner else ((), ())
    return Latency(
        setup=setup,
        batch=runner.batch,
        warmup=warmup,
        step_ns=step_ns,
        prefill=tuple(calls),
        load_ns=load_ns,
        prompt=prompt if open_runner else 0,
        first_token_ns=first_ns,
        positions=tuple(far),
        unit=unit,
    )


def paired_latency(
    runner: Runner,
    other: Runner,
    tokens: Sequence[int] | Any,
    *,
    setup: Setup,
    other_name: str,
    rounds: int = 20,
    steps: int = 10,
    warmup: int = 5,
    progress: Progress | None = None,
) -> PairedLatency:
    """Time single steps of two runners in alternate rounds; who goes first alternates too.

    Whatever slows the machine for a moment then slows both, which two separate runs would count
    as a difference between them.

    Raises:
        InputError: no tokens.
    """
    progress = progress or Silent()
    progress.stage(f"{setup.runner} against {other_name}", rounds)
    source = Source(tokens, runner)
    pair = (runner, other)
    limits = [r.max_tokens for r in pair if r.max_tokens is not None]
    if limits:
        rounds = max(1, min(rounds, (min(limits) // source.unit - warmup) // steps))
    kept: tuple[list[tuple[int, ...]], list[tuple[int, ...]]] = ([], [])
    with quiet():
        for each in pair:
            each.reset()
            time_steps(each, source, warmup)
        for number in range(rounds):
            for index in ((0, 1), (1, 0))[number % 2]:
                kept[index].append(time_steps(pair[index], source, steps))
            progress.advance()
    for each in pair:
        each.reset()
    return PairedLatency(setup=setup, other=other_name, ns=tuple(kept[0]), other_ns=tuple(kept[1]))


class Source:
    """An endless text or recording in pieces ``[B,T]`` or ``[B,T,F]``, as a runner takes them.

    Attributes:
        unit: the least that the runner can be fed, one step.
    """

    def __init__(self, values: Sequence[int] | Any, runner: Runner) -> None:
        spec = runner.contract.inputs
        array = np.asarray(values, dtype=spec.dtype)
        self._values = array if spec.width else array.reshape(-1)
        if not len(self._values):
            raise InputError(f"no {spec.unit}s to time with", got=0, allowed="at least 1")
        self.unit = spec.multiple
        self._batch = runner.batch
        self._at = 0

    def take(self, count: int) -> NDArray[Any]:
        """The next ``count`` tokens or frames."""
        part = np.take(self._values, range(self._at, self._at + count), axis=0, mode="wrap")
        self._at = (self._at + count) % len(self._values)
        return np.ascontiguousarray(np.broadcast_to(part, (self._batch, *part.shape)))


def time_steps(runner: Runner, source: Source, count: int) -> tuple[int, ...]:
    """Nanoseconds of ``count`` calls of one step each, from where the runner is."""
    pieces = [source.take(source.unit) for _ in range(count)]
    samples = []
    for piece in pieces:
        samples.append(_timed_feed(runner, piece, 0))
    return tuple(samples)


def _timed_feed(runner: Runner, piece: NDArray[Any], keep: int) -> int:
    """Nanoseconds of one call; of a runner in another process, without the way there and back."""
    begin = time.perf_counter_ns()
    runner.feed(piece, keep)
    elapsed = time.perf_counter_ns() - begin
    inside: int | None = getattr(runner, "inside_ns", None)
    return elapsed if inside is None else inside


def _time_prefill(runner: Runner, source: Source, length: int, repeats: int) -> tuple[int, ...]:
    samples = [time_prefill_once(runner, source, length) for _ in range(repeats + 1)]
    return tuple(samples[1:])  # the first call of a length allocates


def time_prefill_once(runner: Runner, source: Source, length: int) -> int:
    """Nanoseconds of one call that feeds ``length`` tokens to an empty state and keeps the last logits."""
    runner.reset()
    piece = source.take(length)
    with quiet():
        return _timed_feed(runner, piece, 1)


def walk_to(runner: Runner, source: Source, position: int, chunk: int = 256) -> None:
    """Feed the runner up to a position of its stream, in chunks."""
    chunk = runner.contract.nearest(chunk)
    while (left := position - runner.position) > 0:
        runner.feed(source.take(min(chunk, left)), 1)


def time_loads(
    open_runner: Callable[[], Runner], source: Source, loads: int, prompt: int, progress: Progress
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Nanoseconds of opening fresh sessions, and of the first call of each, of ``prompt`` tokens."""
    load_ns, first_ns = [], []
    for _ in range(loads):
        with quiet():
            begin = time.perf_counter_ns()
            fresh = open_runner()
            opened = time.perf_counter_ns()
            first_ns.append(_timed_feed(fresh, source.take(prompt), 1))
        load_ns.append(opened - begin)
        del fresh
        progress.advance()
    return tuple(load_ns), tuple(first_ns)
