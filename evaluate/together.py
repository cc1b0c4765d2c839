"""Several runners timed in turns: steps at several positions of the stream, and prefill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from xexport.core.errors import FormError, InputError
from xexport.core.progress import Progress, Silent
from xexport.core.records import Setup, Together, Turns
from xexport.core.runner import Runner
from xexport.evaluate.latency import Source, quiet, time_prefill_once, time_steps, walk_to

__all__ = ["Rival", "default_positions", "measure_together"]

#: the rounds at one position together feed at most ``rounds * steps`` tokens, and one to warm up
_WARM = 2
_DEFAULT = (100, 300, 1000)
_UNBOUNDED_END = 4000


@dataclass(frozen=True)
class Rival:
    """One of the runners: what feeds it, its own tokens, and the configuration its row repeats."""

    runner: Runner
    tokens: Sequence[int] | Any
    setup: Setup


def default_positions(limits: Sequence[int | None], *, rounds: int, steps: int) -> tuple[int, ...]:
    """Where steps are timed if nobody says: early, later, and as far as each bounded runner goes.

    Without a bounded runner the last is 4000; with one, those without a bound are timed at the same
    places, so that every point of the chart has its rivals.

    Args:
        limits: the longest stream of each runner, or None.
        rounds, steps: how many rounds of how many steps are made at a position.
    """
    bounds = {limit for limit in limits if limit is not None}
    ends = {_round_down(bound - _room(rounds, steps)) for bound in bounds} if bounds else {_UNBOUNDED_END}
    last = max(ends)
    early = [p for p in _DEFAULT if p < last]
    return tuple(sorted({0, *early, *(e for e in ends if e > 0)}))


@quiet()
def measure_together(
    rivals: Mapping[str, Rival],
    *,
    positions: Sequence[int],
    prefill: Sequence[int] = (128, 512),
    rounds: int = 12,
    steps: int = 4,
    prefill_rounds: int = 5,
    progress: Progress | None = None,
) -> dict[str, Together]:
    """Time all rivals in alternate rounds; who goes first turns from round to round.

    What slows the machine for a moment slows all of them, which runs one after the other would count
    as a difference between the models.

    Args:
        rivals: name -> runner, in the order of the report. All have one batch size.
        positions: where in the stream steps are timed. The way there is fed in chunks, so that a
            cache is as full as it would be. A position that a bounded runner can't reach, with the
            rounds after it, is left out for that runner alone.
        prefill, prefill_rounds: lengths of calls on an empty state (or of whole sequences), and rounds of
            each; left out for a runner that can't be given such a length.
        rounds, steps: rounds at each position, and single-token calls of a runner in each.

    Returns:
        A row a rival, with raw samples. The runners are left reset.

    Raises:
        InputError: fewer than two rivals, different batch sizes, or a position that none can reach.
        FormError: models of both forms, or with different inputs.
    """
    if len(rivals) < 2:
        raise InputError("a comparison needs at least two bundles", got=len(rivals))
    batches = {r.runner.batch for r in rivals.values()}
    if len(batches) > 1:
        raise InputError("runners of different batch sizes can't be compared", got=sorted(batches))
    streams = _check_alike(rivals)
    places = sorted(set(positions))
    if streams:
        _check_reach(rivals, places, _room(rounds, steps))
    elif places:
        next(iter(rivals.values())).runner.contract.require_state("be timed at a position of a stream")
    progress = progress or Silent()
    progress.stage(f"timing {len(rivals)} bundles in turns", len(places) + len(prefill))
    sources = {name: Source(r.tokens, r.runner) for name, r in rivals.items()}
    found: dict[str, tuple[list[Turns], list[Turns]]] = {name: ([], []) for name in rivals}
    for each in rivals.values():
        each.runner.reset()
    for place in places:
        able = [n for n, r in rivals.items() if _reaches(r.runner, place + _room(rounds, steps))]
        for name, rows in _steps_at(rivals, able, sources, place, rounds, steps).items():
            found[name][0].append(Turns(place, rows))
        progress.advance()
    for length in sorted(set(prefill)):
        able = [n for n, r in rivals.items() if r.runner.contract.allows(length)]
        for name, rows in _prefills(rivals, able, sources, length, prefill_rounds).items():
            found[name][1].append(Turns(length, rows))
        progress.advance()
    run, members = uuid4().hex, tuple(rivals)
    for each in rivals.values():
        each.runner.reset()
    return {
        name: Together(rival.setup, run, members, rival.runner.batch, *map(tuple, found[name]))
        for name, rival in rivals.items()
    }


def _steps_at(
    rivals: Mapping[str, Rival],
    able: Sequence[str],
    sources: Mapping[str, Source],
    place: int,
    rounds: int,
    steps: int,
) -> dict[str, tuple[tuple[int, ...], ...]]:
    kept: dict[str, list[tuple[int, ...]]] = {name: [] for name in able}
    for name in able:
        runner = rivals[name].runner
        if runner.position > place:  # the last place was near: its rounds went beyond this one
            runner.reset()
        walk_to(runner, sources[name], place)
    with quiet():
        for name in able:
            time_steps(rivals[name].runner, sources[name], _WARM)
        for number in range(rounds):
            for name in _turned(able, number):
                kept[name].append(time_steps(rivals[name].runner, sources[name], steps))
    return {name: tuple(rows) for name, rows in kept.items()}


def _prefills(
    rivals: Mapping[str, Rival],
    able: Sequence[str],
    sources: Mapping[str, Source],
    length: int,
    rounds: int,
) -> dict[str, tuple[tuple[int, ...], ...]]:
    kept: dict[str, list[tuple[int, ...]]] = {name: [] for name in able}
    for number in range(rounds + 1):
        for name in _turned(able, number):
            took = time_prefill_once(rivals[name].runner, sources[name], length)
            if number:  # the first call of a length allocates
                kept[name].append((took,))
    return {name: tuple(rows) for name, rows in kept.items()}


def _turned(names: Sequence[str], number: int) -> list[str]:
    turn = number % len(names) if names else 0
    return [*names[turn:], *names[:turn]]


def _room(rounds: int, steps: int) -> int:
    return _WARM + rounds * steps


def _round_down(place: int) -> int:
    """A round number not above ``place``."""
    unit = 100 if place >= 400 else 10
    return max(place // unit * unit, 0)


def _reaches(runner: Runner, end: int) -> bool:
    return runner.max_tokens is None or end <= runner.max_tokens


def _check_alike(rivals: Mapping[str, Rival]) -> bool:
    """Whether they stream; refuses models whose times would not be of the same thing."""
    contracts = {n: r.runner.contract for n, r in rivals.items()}
    kinds = {n: (c.form, c.inputs.kind, c.inputs.multiple) for n, c in contracts.items()}
    if len(set(kinds.values())) > 1:
        raise FormError(
            "these models can't be timed against each other",
            got="; ".join(f"{n}: {form} form, {kind}" for n, (form, kind, _) in kinds.items()),
            allowed="models of one form that read the same kind of input, as much of it at a time",
            fix="compare them in two groups",
        )
    return next(iter(contracts.values())).streams


def _check_reach(rivals: Mapping[str, Rival], places: Sequence[int], room: int) -> None:
    """Refuse a position that no runner reaches."""
    limits = [r.runner.max_tokens for r in rivals.values()]
    if not places or places[0] < 0:
        raise InputError("bad positions to time steps at", got=list(places), allowed="0 or more")
    if any(limit is None for limit in limits):
        return
    longest = max(limit for limit in limits if limit is not None)
    if places[-1] + room > longest:
        raise InputError(
            "no bundle can reach a position",
            got=f"token {places[-1]}, and {room} more to time steps",
            allowed=f"0 to {longest - room}: the longest stream of any of them is {longest}",
        )
