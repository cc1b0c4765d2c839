"""Numbers derived from raw samples: percentiles, standard errors, bootstrap intervals. numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "binomial_se",
    "block_se",
    "finite_or_none",
    "median_ratio",
    "percentile",
]

#: Tokens of a text are correlated, so errors come from the means of this many consecutive blocks.
BLOCKS = 32


def percentile(samples: Sequence[float], q: float) -> float:
    """The ``q``-th percentile (0..100), linear between neighbours; nan for no samples."""
    return float(np.percentile(np.asarray(samples, np.float64), q)) if len(samples) else math.nan


def binomial_se(successes: int, trials: int) -> float:
    """Standard error of a proportion, ``sqrt(p (1-p) / n)`` with p shrunk by one half on each side.

    The shrinking (Jeffreys) keeps the error above zero when every trial succeeded.
    """
    if trials == 0:
        return math.nan
    p = (successes + 0.5) / (trials + 1)
    return math.sqrt(p * (1 - p) / trials)


def block_se(samples: Sequence[float] | NDArray[Any], blocks: int = BLOCKS) -> float:
    """Standard error of the mean of a correlated series, from the means of consecutive blocks.

    The series is cut into ``blocks`` equal runs (the remainder is left out); if the runs are longer
    than the correlation, their means are independent and the error is ``std(means) / sqrt(blocks)``
    (method of batch means). Fewer samples than two a block: fewer blocks; under four samples: nan.
    """
    values = np.asarray(samples, np.float64)
    count = min(blocks, len(values) // 2)
    if count < 2:
        return math.nan
    size = len(values) // count
    means = values[: count * size].reshape(count, size).mean(axis=1)
    return float(means.std(ddof=1) / math.sqrt(count))


def median_ratio(
    first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], *, seed: int = 0, draws: int = 1000
) -> tuple[float, float, float]:
    """median(first) / median(second) with its 95% interval, resampling whole rounds in pairs.

    Args:
        first, second: samples of each round; rounds of one index ran one after the other, so a
            slow moment of the machine hits both, and a pair of rounds is drawn together.

    Returns:
        (ratio, low, high); nan where there are no samples.
    """
    if not first or len(first) != len(second):
        return math.nan, math.nan, math.nan
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    ratio = float(np.median(a) / np.median(b))
    picks = np.random.default_rng(seed).integers(0, len(a), size=(draws, len(a)))
    drawn = np.median(a[picks].reshape(draws, -1), axis=1) / np.median(b[picks].reshape(draws, -1), axis=1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return ratio, float(low), float(high)


def finite_or_none(value: float) -> float | None:
    """``value`` for JSON: None where it is nan or infinite."""
    return float(value) if math.isfinite(value) else None
