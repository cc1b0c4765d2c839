"""Drift: fidelity against token index over a long stream, and the error of the state itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from xexport.core.progress import Progress, Silent
from xexport.core.records import Drift, Setup, Window
from xexport.core.runner import Runner
from xexport.evaluate.metrics import TokenMetrics
from xexport.evaluate.streaming import check_tokens, stream_compared, warn_not_finite

__all__ = ["drift", "state_errors", "window_stops"]


def window_stops(total: int, windows: int, spacing: str = "log") -> list[int]:
    """Ends of ``windows`` windows over ``total`` tokens, the last one ``total``.

    ``log`` spaces them geometrically from 16 on (drift is fast at first), ``linear`` evenly.
    """
    if spacing == "log" and total > 16:
        ends = np.geomspace(16, total, windows)
    else:
        ends = np.linspace(0, total, windows + 1)[1:]
    return sorted({max(1, round(float(e))) for e in ends} | {total})


def drift(
    reference: Runner,
    candidates: Mapping[str, Runner],
    tokens: Sequence[int] | Any,
    *,
    setup: Setup,
    chunk: int = 256,
    windows: int = 16,
    spacing: str = "log",
    reference_name: str = "torch",
    progress: Progress | None = None,
) -> dict[str, Drift]:
    """Stream one long text through the reference once and through every candidate.

    Args:
        tokens: ``[n]`` token ids; cut at the model's longest stream (the row says so).
        windows, spacing: see :func:`window_stops`; the states are compared where windows end.

    Returns:
        Candidate name -> its row.

    Raises:
        InputError: tokens that a runner can't take.
    """
    progress = progress or Silent()
    array, note = check_tokens({reference_name: reference, **candidates}, tokens)
    ends = window_stops(len(array) - 1, windows, spacing)
    stops = sorted(set(ends) | set(range(chunk, ends[-1], chunk)))
    progress.stage(f"drift over {ends[-1]} tokens", len(stops))
    rows: dict[str, list[Window]] = {name: [] for name in candidates}
    parts: dict[str, list[TokenMetrics]] = {name: [] for name in candidates}
    bad = dict.fromkeys(candidates, 0)
    begun = 0
    for compared in stream_compared(reference, candidates, array, stops):
        for name, metrics in compared.metrics.items():
            parts[name].append(metrics)
        progress.advance()
        if compared.stop not in ends:
            continue
        truth = reference.state()
        for name, runner in candidates.items():
            joined = TokenMetrics.join(parts[name])
            errors = state_errors(truth, runner.state())
            rows[name].append(_window(begun, compared.stop, joined, errors))
            bad[name] += int((~joined.finite).sum())
            parts[name] = []
        begun = compared.stop
    return {
        name: Drift(
            setup=msgspec.structs.replace(setup, runner=name),
            reference=reference_name,
            chunk=chunk,
            windows=tuple(rows[name]),
            non_finite=bad[name],
            warnings=tuple(
                ([note] if note else []) + ([warn_not_finite(name, bad[name], begun)] if bad[name] else [])
            ),
        )
        for name in candidates
    }


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
        nll_reference_sum=_finite(m.nll_reference.sum()),
        nll_candidate_sum=_finite(m.nll_candidate.sum()),
        same_top1=int(m.same_top1.sum()),
        error_max=_finite(m.error_max.max()),
        error_ms_sum=_finite(m.error_ms.sum()),
        reference_ms_sum=_finite(m.reference_ms.sum()),
        state_errors=errors,
    )


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
