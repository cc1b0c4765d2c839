"""Several bundles side by side: one run in which they took turns, found again in their records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from xexport.core import stats
from xexport.core.manifest import Manifest
from xexport.core.records import Fidelity, Record, Together
from xexport.report.along import StateGrowth, state_growth
from xexport.report.entries import Entry, all_of, fidelity_of

__all__ = [
    "Rival",
    "common_positions",
    "common_prefill",
    "common_unit",
    "difference",
    "rivals_of",
    "step_ratio",
]


class Rival(NamedTuple):
    """One bundle of a comparison.

    Attributes:
        label: what the page calls it; no two are the same.
        turns: its row of the run that all of them share, or None.
        fidelity: accuracy on real weights; None where nothing was measured.
        random: the weights were never trained, so accuracy says nothing of the model.
    """

    label: str
    manifest: Manifest
    turns: Together | None
    fidelity: Fidelity | None
    state: StateGrowth
    random: bool

    @property
    def unit(self) -> str:
        """What its stream counts: token or frame."""
        return self.manifest.model.input.unit


def rivals_of(entries: Sequence[tuple[Manifest, Sequence[Record]]]) -> list[Rival]:
    """The bundles, each with its row of the newest run in which all of them took turns, if there is one."""
    both = [Entry(*e) for e in entries]
    run = _shared_run(both)
    labels = _labels([e.manifest for e in both])
    return [
        Rival(
            label,
            entry.manifest,
            next((t for t in all_of(entry.records, Together) if t.run == run), None),
            fidelity_of(entry.records),
            state_growth(entry.manifest),
            entry.manifest.model.source.startswith("preset "),
        )
        for label, entry in zip(labels, both, strict=True)
    ]


def common_unit(rivals: Sequence[Rival]) -> str:
    """What positions count: ``token`` or ``frame``; ``position`` where the models differ in it."""
    units = {r.unit for r in rivals}
    return units.pop() if len(units) == 1 else "position"


def common_positions(rivals: Sequence[Rival]) -> list[int]:
    """Every position at which at least one of them was timed."""
    return sorted({t.at for r in rivals if r.turns for t in r.turns.steps})


def common_prefill(rivals: Sequence[Rival]) -> int | None:
    """The longest prefill that all of them were timed with."""
    lengths = [{t.at for t in r.turns.prefill} if r.turns else set() for r in rivals]
    shared = set.intersection(*lengths) if lengths else set()
    return max(shared, default=None)


def step_ratio(slow: Rival, fast: Rival, position: int) -> tuple[float, float, float] | None:
    """step(slow) / step(fast) at a position, with its 95% interval, from rounds made in turns."""
    if slow.turns is None or fast.turns is None:
        return None
    a, b = slow.turns.step_at(position), fast.turns.step_at(position)
    return stats.median_ratio(a.ns, b.ns) if a and b else None


def difference(worse: Rival, better: Rival) -> tuple[float, float] | None:
    """(bits per byte of ``worse`` - ``better``, its standard error), paired by token.

    Only where both read the same text byte by byte: then both are scored on the part that both have
    seen, and the error bar is that of the difference.
    """
    a, b = worse.fidelity, better.fidelity
    if a is None or b is None or not (a.scored and b.scored and _same_bytes(a, b)):
        return None
    count = min(a.tokens, b.tokens)
    lost = np.array(a.nll_candidate[:count], np.float64) - np.array(b.nll_candidate[:count], np.float64)
    scale = 1 / math.log(2)
    return float(lost.mean() * scale), stats.block_se(lost) * scale


def _same_bytes(a: Fidelity, b: Fidelity) -> bool:
    """One token is one byte in both, of the same text."""
    bytewise = all(abs(r.text_bytes - r.tokens) <= 1 for r in (a, b))
    return bool(bytewise and a.setup.text_sha256 and a.setup.text_sha256 == b.setup.text_sha256)


def _shared_run(entries: Sequence[Entry]) -> str | None:
    runs = [[t.run for t in all_of(e.records, Together)] for e in entries]
    shared = set.intersection(*map(set, runs)) if len(runs) > 1 else set()
    return next((run for run in reversed(runs[0]) if run in shared), None) if runs else None


def _labels(manifests: Sequence[Manifest]) -> list[str]:
    """Family; with the target where they differ in it; with a number where that is not enough."""
    same_target = len({m.target for m in manifests}) == 1
    names = [m.model.family if same_target else f"{m.model.family} · {m.target}" for m in manifests]
    found: list[str] = []
    for index, name in enumerate(names):
        again = names[:index].count(name)
        found.append(f"{name} ({again + 1})" if again else name)
    return found
