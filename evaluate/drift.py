"""Drift: fidelity against token index over a long stream, and the error of the state itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from xexport.core.progress import Progress, Silent
from xexport.core.records import Drift, Fidelity, Setup, Window
from xexport.core.runner import Runner
from xexport.evaluate.fidelity import fidelity_row, scored_bytes
from xexport.evaluate.metrics import TokenMetrics
from xexport.evaluate.streaming import notes_of, prepare, stream_compared

__all__ = ["compare_and_drift", "state_errors", "window_stops"]


def window_stops(total: int, windows: int, spacing: str = "log") -> list[int]:
    """Ends of ``windows`` windows over ``total`` tokens, the last one ``total``.

    ``log`` spaces them geometrically from 16 on (drift is fast at first), ``linear`` evenly.
    """
    if spacing == "log" and total > 16:
        ends = np.geomspace(16, total, windows)
    else:
        ends = np.linspace(0, total, windows + 1)[1:]
    return sorted({max(1, round(float(e))) for e in ends} | {total})


def compare_and_drift(
    reference: Runner,
    candidates: Mapping[str, Runner],
    tokens: Sequence[int] | Any,
    *,
    setup: Setup,
    chunk: int = 256,
    text_bytes: int | None = None,
    windows: int = 16,
    spacing: str = "log",
    reference_name: str = "torch",
    progress: Progress | None = None,
) -> tuple[dict[str, Fidelity], dict[str, Drift]]:
    """Stream one long text once, for the fidelity of the whole and for its course along the stream.

    Args:
        tokens: ``[n]`` token ids, or features ``[n,F]``; cut at the model's longest stream (the rows say
            so).
        setup, chunk, text_bytes: see :func:`xexport.evaluate.fidelity.compare`.
        windows, spacing: see :func:`window_stops`; the states are compared where windows end, and
            no call goes beyond such an end.

    Returns:
        Candidate name -> its Fidelity row; candidate name -> its Drift row.

    Raises:
        InputError: tokens that a runner can't take.
    """
    progress = progress or Silent()
    fed = prepare({reference_name: reference, **candidates}, tokens)
    unit = fed.unit
    ends = [unit * end for end in window_stops(fed.length // unit, windows, spacing)]
    stops = fed.stops(chunk, ends)
    length = f"{fed.length} {reference.contract.inputs.unit}s"
    progress.stage(f"fidelity and drift against {reference_name} on {length}", len(stops))
    courses = {name: _Course() for name in candidates}
    for compared in stream_compared(reference, candidates, fed, stops):
        truth = reference.state() if compared.stop in ends else None
        for name, metrics in compared.metrics.items():
            courses[name].add(metrics)
            if truth is not None:
                stop = reference.contract.positions(compared.stop)
                courses[name].close(stop, state_errors(truth, candidates[name].state()))
        progress.advance()
    fidelity: dict[str, Fidelity] = {}
    drifts: dict[str, Drift] = {}
    for name, course in courses.items():
        whole = TokenMetrics.join(course.parts)
        mine = msgspec.structs.replace(setup, runner=name)
        notes = notes_of(name, whole, fed.note)
        fidelity[name] = fidelity_row(
            whole,
            setup=mine,
            reference=reference_name,
            chunk=chunk,
            vocab_size=reference.vocab_size,
            text_bytes=scored_bytes(tokens, fed, text_bytes),
            notes=notes,
        )
        drifts[name] = Drift(
            setup=mine,
            reference=reference_name,
            chunk=chunk,
            windows=tuple(course.windows),
            non_finite=int((~whole.finite).sum()),
            warnings=notes,
        )
    return fidelity, drifts


class _Course:
    """One candidate's metrics along the stream, and the windows closed so far."""

    def __init__(self) -> None:
        self.parts: list[TokenMetrics] = []
        self.windows: list[Window] = []
        self._first = 0

    def add(self, metrics: TokenMetrics) -> None:
        self.parts.append(metrics)

    def close(self, stop: int, errors: dict[str, float | None]) -> None:
        start = self.windows[-1].stop if self.windows else 0
        self.windows.append(_window(start, stop, TokenMetrics.join(self.parts[self._first :]), errors))
        self._first = len(self.parts)


def state_errors(
    reference: Mapping[str, NDArray[Any]], candidate: Mapping[str, NDArray[Any]]
) -> dict[str, float | None]:
    """State tensor -> RMS of the difference over the RMS of the reference.

    Where the reference is all zero the absolute RMS; tensors that one side lacks are left out;
    None: a shape that differs, or a value that is not finite.
    """
    errors: dict[str, float | None] = {}
    for name, expected in reference.items():
        if name not in candidate:
            continue
        if np.shape(candidate[name]) != np.shape(expected):
            errors[name] = None
            continue
        r = np.asarray(expected, np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            off, scale = _rms(np.asarray(candidate[name], np.float64) - r), _rms(r)
        value = off / scale if scale else off
        errors[name] = float(f"{value:.6g}") if math.isfinite(value) else None
    return errors


def _rms(values: NDArray[np.float64]) -> float:
    return math.sqrt(float(np.mean(values * values))) if values.size else 0.0


def _window(start: int, stop: int, m: TokenMetrics, errors: dict[str, float | None]) -> Window:
    return Window(
        start=start,
        stop=stop,
        kl_sum=_finite(m.kl.sum()),
        kl_max=_finite(m.kl.max()),
        nll_reference_sum=_total(m.nll_reference),
        nll_candidate_sum=_total(m.nll_candidate),
        same_top1=int(m.same_top1.sum()),
        error_max=_finite(m.error_max.max()),
        error_ms_sum=_finite(m.error_ms.sum()),
        reference_ms_sum=_finite(m.reference_ms.sum()),
        state_errors=errors,
    )


def _total(values: NDArray[np.float64]) -> float | None:
    """The sum; None where nothing was scored."""
    return _finite(values.sum()) if len(values) else None


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
