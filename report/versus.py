"""Several bundles in words and in one table: who is faster or smaller, by how much, and from where on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from xexport.report import format as fmt
from xexport.report.along import overtakes
from xexport.report.jsonout import weights_bytes
from xexport.report.rivals import (
    Rival,
    common_positions,
    common_prefill,
    common_unit,
    difference,
    step_ratio,
)
from xexport.report.tables import Table
from xexport.report.words import Sentence

__all__ = ["side_by_side", "state_bytes_table", "steps_table", "versus"]

#: sizes further apart than this share are not called equal
EQUAL = 0.25


def versus(rivals: Sequence[Rival]) -> list[Sentence]:
    """The comparison, one sentence a finding; nothing that was not measured."""
    if len(rivals) < 2:
        return []
    return [
        *_size(rivals),
        *_accuracy(rivals),
        *_speed(rivals),
        *_growth(rivals),
        *_state(rivals),
    ]


def side_by_side(rivals: Sequence[Rival]) -> Table:
    """One row a bundle: size, accuracy, prefill, first and last step, state."""
    places, length = common_positions(rivals), common_prefill(rivals)
    ends = [places[0], places[-1]] if len(places) > 1 else places
    streams = any(r.manifest.model.contract.streams for r in rivals)
    columns = (
        "Model", "Parameters", "Weights", "Bits per byte",
        *([f"{'Prefill' if streams else 'Pass of'} {length} /s"] if length else []),
        *(f"Step at {fmt.count(p)}" for p in ends),
        *(["State", f"+ a {common_unit(rivals)}"] if streams else []), "Longest",
    )  # fmt: skip
    rows = []
    for r in rivals:
        prefill = r.turns.prefill_of(length) if r.turns and length else None
        rows.append(
            (
                r.label,
                fmt.count(r.manifest.model.parameters),
                fmt.bytes_text(weights_bytes(r.manifest)),
                _bits(r),
                *(
                    [fmt.count(length * 1e3 / prefill.median_ms) if prefill else fmt.MISSING]
                    if length
                    else []
                ),
                *(_step_text(r, p) for p in ends),
                *(_state_cells(r) if streams else ()),
                _longest(r),
            )
        )
    return Table(columns, rows, tuple(range(1, len(columns))))


def _state_cells(rival: Rival) -> tuple[str, str]:
    added = fmt.bytes_text(rival.state.per_token) if rival.state.grows else "0"
    return fmt.bytes_text(rival.state.at(1)), added


def _longest(rival: Rival) -> str:
    fixed = rival.manifest.model.fixed_length
    if fixed is not None:
        return f"exactly {fmt.count(fixed)}"
    return fmt.count(rival.state.bound) if rival.state.bound else "no limit"


def steps_table(rivals: Sequence[Rival]) -> Table:
    """Median step time, one column a position."""
    places = common_positions(rivals)
    if not places:
        return Table((), [])
    rows = [(r.label, *(_step_text(r, p) for p in places)) for r in rivals]
    columns = ("Model", *(f"at {common_unit(rivals)} {fmt.count(p)}" for p in places))
    return Table(columns, rows, tuple(range(1, len(columns))))


def state_bytes_table(rivals: Sequence[Rival]) -> Table:
    """Bytes of state in use after so many tokens, and what is set aside from the beginning."""
    ends = {r.state.bound for r in rivals if r.state.bound}
    places = sorted({1, 100, 1000, *ends, *common_positions(rivals)} - {0})
    rows = [
        (
            r.label,
            *(fmt.MISSING if _beyond(r, p) else fmt.bytes_text(r.state.at(p)) for p in places),
            fmt.bytes_text(r.state.allocated),
        )
        for r in rivals
    ]
    columns = ("Model", *(f"after {fmt.count(p)}" for p in places), "Set aside")
    return Table(columns, rows, tuple(range(1, len(columns))))


def _beyond(rival: Rival, position: int) -> bool:
    return rival.state.bound is not None and position > rival.state.bound


def _bits(rival: Rival) -> str:
    if rival.random:
        return "random weights"
    row = rival.fidelity
    return fmt.plus_minus(*row.bits_per_byte("candidate")) if row else fmt.MISSING


def _step_text(rival: Rival, position: int) -> str:
    at = rival.turns.step_at(position) if rival.turns else None
    return fmt.ms(at.median_ms) if at else fmt.MISSING


def _size(rivals: Sequence[Rival]) -> list[Sentence]:
    sizes = [r.manifest.model.parameters for r in rivals]
    low, high = min(sizes), max(sizes)
    text = f"{fmt.figure(low / 1e6)} to {fmt.figure(high / 1e6)} million parameters"
    if high <= (1 + EQUAL) * low:
        return [Sentence("plain", f"About equal size: {text}.")]
    small, large = rivals[sizes.index(low)].label, rivals[sizes.index(high)].label
    return [
        Sentence(
            "bad",
            f"Not of equal size: {text} ({large} has {fmt.times(high / low)} as many as {small}), so neither "
            "accuracy nor speed ranks the architectures.",
        )
    ]


def _accuracy(rivals: Sequence[Rival]) -> list[Sentence]:
    random = [r.label for r in rivals if r.random]
    trained = [r for r in rivals if not r.random and r.fidelity and _score(r) < math.inf]
    found = []
    if random:
        found.append(
            Sentence(
                "plain", f"Accuracy says nothing of {_and(random)}: the weights are random, not trained."
            )
        )
    if len(trained) < 2:
        return found
    ranked = sorted(trained, key=_score)
    best = ranked[0]
    parts = []
    for other in ranked[1:]:
        paired = difference(other, best)
        if paired is None:
            parts.append(
                f"{other.label} {fmt.figure(_score(other), 4)} (another text or alphabet: not comparable)"
            )
        elif paired[0] <= 2 * paired[1]:
            parts.append(f"{other.label} is as good within the error ({fmt.plus_minus(*paired)} more)")
        else:
            parts.append(f"{other.label} needs {fmt.plus_minus(*paired)} more")
    text = (
        f"Fewest bits per byte: {best.label}, {fmt.figure(_score(best), 4)}; {'; '.join(parts)} "
        "(paired by token). The checkpoints differ in training too, not only in architecture."
    )
    return [*found, Sentence("plain", text)]


def _score(rival: Rival) -> float:
    value = rival.fidelity.bits_per_byte("candidate")[0] if rival.fidelity else math.inf
    return value if math.isfinite(value) else math.inf


def _speed(rivals: Sequence[Rival]) -> list[Sentence]:
    if any(r.turns is None for r in rivals):
        return [
            Sentence(
                "plain",
                "These bundles were not timed in turns, so their speeds are from separate runs: "
                "“xexport compare” times them together.",
            )
        ]
    shared = [p for p in common_positions(rivals) if all(_timed(r, p) for r in rivals)]
    found = [_fastest_step(rivals, p) for p in dict.fromkeys((*shared[:1], *shared[-1:]))]
    length = common_prefill(rivals)
    if length:
        found.append(_fastest_prefill(rivals, length))
    return [*_busy(rivals), *found]


def _busy(rivals: Sequence[Rival]) -> list[Sentence]:
    """Whether other work took the machine meanwhile: ratios from turns stand, the times do not."""
    facts = next(r.turns.setup.environment for r in rivals if r.turns)
    if facts.load_average is None or facts.load_average <= facts.cores + 1:
        return []
    text = (
        f"The machine was busy (load {facts.load_average:.1f} on {facts.cores} cores): times are too long; "
        "the ratios are from rounds made in turns, with wide intervals."
    )
    return [Sentence("bad", text)]


def _timed(rival: Rival, position: int) -> bool:
    return rival.turns is not None and rival.turns.step_at(position) is not None


def _fastest_step(rivals: Sequence[Rival], position: int) -> Sentence:
    ranked = sorted(rivals, key=lambda r: _step_ms(r, position))
    best, parts = ranked[0], []
    for other in ranked[1:]:
        ratio, low, high = step_ratio(other, best, position) or (math.nan, math.nan, math.nan)
        parts.append(_longer(other, ratio, low, high))
    return Sentence(
        "plain",
        f"Fastest step at {common_unit(rivals)} {fmt.count(position)}: {best.label}, "
        f"{fmt.ms(_step_ms(best, position))}; {'; '.join(parts)}.",
    )


def _longer(other: Rival, ratio: float, low: float, high: float) -> str:
    interval = f"{fmt.figure(low)} to {fmt.figure(high)}"
    if low <= 1:
        return f"{other.label} the same within the noise ({interval} times as long)"
    return f"{other.label} takes {fmt.times(ratio)} as long ({interval})"


def _fastest_prefill(rivals: Sequence[Rival], length: int) -> Sentence:
    from xexport.core.stats import median_ratio

    rows = [(r, t) for r in rivals if r.turns and (t := r.turns.prefill_of(length))]
    rows.sort(key=lambda row: row[1].median_ms)
    (best, turns), parts = rows[0], []
    for other, its in rows[1:]:
        ratio, low, high = median_ratio(its.ns, turns.ns)
        parts.append(_longer(other, ratio, low, high))
    speed = fmt.count(length * 1e3 / turns.median_ms)
    model = best.manifest.model
    what, unit = "prefill" if model.contract.streams else "pass", model.input.unit
    return Sentence(
        "plain",
        f"Fastest {what} of {length} {unit}s: {best.label}, {speed} {unit}s per second; {'; '.join(parts)}.",
    )


def _step_ms(rival: Rival, position: int) -> float:
    at = rival.turns.step_at(position) if rival.turns else None
    return at.median_ms if at else math.nan


def _growth(rivals: Sequence[Rival]) -> list[Sentence]:
    """Steps over a growing state, and where they become slower than those over a constant one."""
    found = []
    flat = [r for r in rivals if not r.state.grows and r.turns]
    for growing in (r for r in rivals if r.state.grows and r.turns):
        places = [t.at for t in growing.turns.steps] if growing.turns else []
        if len(places) < 2:
            continue
        first, last = places[0], places[-1]
        text = (
            f"The state of {growing.label} grows: its step goes from {fmt.ms(_step_ms(growing, first))} at "
            f"{growing.unit} {fmt.count(first)} to {fmt.ms(_step_ms(growing, last))} at {growing.unit} "
            f"{fmt.count(last)}"
        )
        beside = [
            f"{r.label} from {fmt.ms(_step_ms(r, first))} to {fmt.ms(_step_ms(r, last))}"
            for r in flat
            if _timed(r, first) and _timed(r, last)
        ]
        text += f", with a constant state {_and(beside)}." if beside else "."
        found.append(Sentence("plain", text))
        found += [_loses(growing, other) for other in flat]
    return found


def _loses(growing: Rival, flat: Rival) -> Sentence:
    """From which position on the growing one is slower than the flat one."""
    places = [t.at for t in growing.turns.steps if _timed(flat, t.at)] if growing.turns else []
    ratios = [step_ratio(growing, flat, p) or (math.nan,) * 3 for p in places]
    names = f"{growing.label} is slower than {flat.label}"
    nowhere = f"Nowhere in what was timed is {growing.label} slower than {flat.label}"
    slower = [low > 1 for _, low, _ in ratios]
    since = next((i for i in range(len(places)) if all(slower[i:])), None)
    if since is not None and places:
        last = fmt.times(ratios[-1][0])
        if since == 0:
            return Sentence(
                "plain", f"{names} at every position timed; at the last one {last} as long a step."
            )
        return Sentence(
            "plain",
            f"{names} from {growing.unit} {fmt.count(places[since])} on, of the positions timed "
            f"(not yet at {fmt.count(places[since - 1])}); at the last one {last} as long a step.",
        )
    cross = _crossing(growing, flat, places)
    if cross is None:
        return Sentence("plain", f"{nowhere} beyond the noise.")
    bound = growing.state.bound
    if bound is not None and cross > bound:
        return Sentence(
            "plain",
            f"{nowhere}; at this growth it would be from about {growing.unit} "
            f"{fmt.count(cross)} on, beyond its longest stream of {fmt.count(bound)}.",
        )
    return Sentence(
        "plain",
        f"{nowhere} beyond the noise; a line through the medians crosses at about {growing.unit} "
        f"{fmt.count(cross)}.",
    )


def _crossing(growing: Rival, flat: Rival, places: Sequence[int]) -> float | None:
    """Where a straight line through the ratio of the medians reaches 1; None if it does not rise."""
    if len(places) < 2:
        return None
    ratios = [_step_ms(growing, p) / _step_ms(flat, p) for p in places]
    slope, start = np.polyfit(places, ratios, 1)
    if slope <= 0 or start >= 1:
        return None
    return float(f"{(1 - start) / slope:.2g}")


def _state(rivals: Sequence[Rival]) -> list[Sentence]:
    rivals = [r for r in rivals if r.manifest.model.contract.streams]
    flat = sorted((r for r in rivals if not r.state.grows), key=lambda r: r.state.allocated)
    found = []
    if flat:
        parts = [f"{r.label} {fmt.bytes_text(r.state.allocated)}" for r in flat]
        found.append(Sentence("plain", f"State of constant size: {_and(parts)}, at every position."))
    for r in (r for r in rivals if r.state.grows):
        end = f", {fmt.bytes_text(r.state.at(r.state.bound))} at its longest stream" if r.state.bound else ""
        text = f"{r.label} adds {fmt.bytes_text(r.state.per_token)} of state with every {r.unit}{end}"
        if r.state.bound and r.state.allocated:
            text += (
                f" (of {fmt.count(r.state.bound)} {r.unit}s, and all of it is set aside from the beginning)"
            )
        places = [(o.label, overtakes(r.state, o.state)) for o in flat]
        parts = [f"{name} from {r.unit} {fmt.count(place)}" for name, place in places if place is not None]
        never = [name for name, place in places if place is None]
        text += f"; it is in use more than that of {_and(parts)} on" if parts else ""
        text += f"; never more than that of {_and(never)}" if never else ""
        found.append(Sentence("plain", f"{text}."))
    return found


def _and(parts: Sequence[str]) -> str:
    return " and ".join((", ".join(parts[:-1]), parts[-1])) if len(parts) > 1 else "".join(parts)
