"""Models in the whole-sequence form: accuracy on windows of a text, and the time of whole passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from xexport.core.errors import InputError
from xexport.core.progress import Progress, Silent
from xexport.core.records import Fidelity, PairedLatency, Passes, Prefill, Setup
from xexport.core.runner import Runner
from xexport.evaluate.fidelity import fidelity_row
from xexport.evaluate.latency import Source, quiet, time_loads
from xexport.evaluate.metrics import TokenMetrics, compare_logits
from xexport.evaluate.streaming import logits_of, notes_of

__all__ = ["compare_whole", "measure_passes", "paired_passes", "windows"]


def windows(
    values: Sequence[int] | Any, runner: Runner, *, clips: Sequence[int] = (), count: int | None = None
) -> list[NDArray[Any]]:
    """Whole sequences of a text ``[n]`` or of features ``[n,F]``, one behind another.

    Each is as long as an evaluation's window (core/contract.py) or the model's fixed length; the last of
    a clip is shorter if the model takes such a length.

    Args:
        clips: lengths of the pieces that ``values`` consists of; no window spans two of them.
        count: stop when there are so many tokens or frames (one window at least).

    Raises:
        InputError: not one sequence that the model takes.
    """
    contract = runner.contract
    spec = contract.inputs
    array = np.asarray(values, dtype=spec.dtype)
    size = contract.nearest(spec.window)
    found: list[NDArray[Any]] = []
    ends = np.cumsum(clips if len(clips) else [len(array)]).tolist()
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        for at in range(begin, end, size):
            length = min(size, end - at) // spec.multiple * spec.multiple
            if contract.allows(length):
                found.append(array[at : at + length])
            if count is not None and sum(map(len, found)) >= count:
                return found
    if not found:
        raise InputError(
            f"too few {spec.unit}s to evaluate on",
            got=len(array),
            allowed=f"at least {contract.nearest(1)}",
            fix="use a longer text",
        )
    return found


def compare_whole(
    reference: Runner,
    candidates: Mapping[str, Runner],
    pieces: Sequence[NDArray[Any]],
    *,
    setup: Setup,
    bytes_per_token: float = 1.0,
    reference_name: str = "torch",
    progress: Progress | None = None,
) -> dict[str, Fidelity]:
    """Every window through the reference and every candidate, position by position.

    Args:
        pieces: from :func:`windows`. A model that was made to predict the next token is scored on all
            positions of a window but the last.
        bytes_per_token: of the text, for bits per byte.

    Returns:
        Candidate name -> its row.
    """
    progress = progress or Silent()
    progress.stage(f"fidelity against {reference_name} on {len(pieces)} whole sequences", len(pieces))
    parts: dict[str, list[TokenMetrics]] = {name: [] for name in candidates}
    scored = 0
    for piece in pieces:
        targets = piece[1:] if reference.contract.predicts_next else None
        expected = _scored(logits_of("reference", reference, piece), targets)
        scored += 0 if targets is None else len(targets)
        for name, candidate in candidates.items():
            got = _scored(logits_of(name, candidate, piece), targets)
            parts[name].append(compare_logits(expected, got, targets))
        progress.advance()
    rows = {}
    for name, found in parts.items():
        metrics = TokenMetrics.join(found)
        rows[name] = fidelity_row(
            metrics,
            setup=msgspec.structs.replace(setup, runner=name),
            reference=reference_name,
            chunk=max(map(len, pieces)),
            vocab_size=reference.vocab_size,
            text_bytes=round(scored * bytes_per_token),
            notes=notes_of(name, metrics, ""),
            form="whole",
        )
    return rows


def _scored(logits: NDArray[Any], targets: NDArray[Any] | None) -> NDArray[Any]:
    return logits if targets is None else logits[: len(targets)]


@quiet()
def measure_passes(
    runner: Runner,
    values: Sequence[int] | Any,
    *,
    setup: Setup,
    lengths: Sequence[int],
    repeats: int = 7,
    open_runner: Callable[[], Runner] | None = None,
    loads: int = 3,
    progress: Progress | None = None,
) -> Passes:
    """Time calls of whole sequences, at several lengths.

    Args:
        values: ``[n]`` ids or ``[n,F]`` features; they are repeated where more are needed.
        lengths: of the sequences; each is made the nearest that the model takes.
        repeats: calls of each length, after one thrown away.
        open_runner: opens a fresh session; timed ``loads`` times, with its first call, of the shortest
            length. None: neither is measured.

    Returns:
        The row, with raw samples.
    """
    progress = progress or Silent()
    source = Source(values, runner)
    wanted = sorted(runner.contract.lengths(lengths))
    progress.stage(f"latency of {setup.runner}", len(wanted) + (loads if open_runner else 0))
    passes = []
    for length in wanted:
        samples = [_timed(runner, source, length) for _ in range(repeats + 1)]
        passes.append(Prefill(length, tuple(samples[1:])))  # the first call of a length allocates
        progress.advance()
    first = wanted[0]
    load_ns, first_ns = time_loads(open_runner, source, loads, first, progress) if open_runner else ((), ())
    return Passes(setup, runner.batch, tuple(passes), load_ns, first if open_runner else 0, first_ns)


def paired_passes(
    runner: Runner,
    other: Runner,
    values: Sequence[int] | Any,
    *,
    setup: Setup,
    other_name: str,
    length: int,
    rounds: int = 12,
    progress: Progress | None = None,
) -> PairedLatency:
    """Time whole sequences of two runners in alternate rounds; who goes first alternates too."""
    progress = progress or Silent()
    progress.stage(f"{setup.runner} against {other_name}", rounds)
    source, pair = Source(values, runner), (runner, other)
    length = runner.contract.nearest(length)
    kept: tuple[list[tuple[int, ...]], list[tuple[int, ...]]] = ([], [])
    with quiet():
        for each in pair:
            _timed(each, source, length)
        for number in range(rounds):
            for index in ((0, 1), (1, 0))[number % 2]:
                kept[index].append((_timed(pair[index], source, length),))
            progress.advance()
    return PairedLatency(setup, other_name, tuple(kept[0]), tuple(kept[1]), length)


def _timed(runner: Runner, source: Source, length: int) -> int:
    piece = source.take(length)
    begin = time.perf_counter_ns()
    runner.feed(piece)
    return time.perf_counter_ns() - begin
