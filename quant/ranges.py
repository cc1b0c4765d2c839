"""What range of values a tensor's integers stand for: running histograms, and three ways to read them.

- min-max: everything seen; the widest range, the coarsest step.
- percentile: all but a share of the values at either end; what lies outside saturates.
- entropy: the clipping threshold whose rounded distribution has the smallest Kullback-Leibler divergence from
  the one seen (S. Migacz, "8-bit Inference with TensorRT", GTC 2017).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["METHODS", "Histogram", "Range", "choose"]

Array = np.ndarray[Any, Any]
METHODS = ("min-max", "percentile", "entropy")

_BINS = 2048  # on either side of 0
_OUTSIDE = 1e-4  # share of the values that percentile leaves outside at either end
_TRIES = 48  # thresholds that entropy compares
_LEAST = 0.3  # the smallest threshold tried, as a share of the largest value


class Histogram:
    """Counts of values in equal bins symmetric around 0, over any number of arrays.

    A value beyond the range doubles it as often as needed, and pairs of bins become one: memory is constant,
    and an edge is exact to 1/1024 of the largest value.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(2 * _BINS, np.int64)
        self.limit = 0.0
        self.low, self.high = np.inf, -np.inf

    def add(self, values: Array) -> None:
        """Count an array's finite values."""
        flat = np.asarray(values, np.float32).reshape(-1)
        flat = flat[np.isfinite(flat)]
        if not flat.size:
            return
        self.low, self.high = min(self.low, float(flat.min())), max(self.high, float(flat.max()))
        largest = max(abs(self.low), abs(self.high))
        if self.limit == 0.0:
            self.limit = largest or 1e-6
        while largest > self.limit:
            self._double()
        self.counts += np.histogram(flat, 2 * _BINS, (-self.limit, self.limit))[0]

    def _double(self) -> None:
        """Twice the range: bin j of a side is the old bins 2j and 2j + 1, counted from 0 outwards."""
        wider = np.zeros_like(self.counts)
        half = _BINS // 2
        wider[half : _BINS + half] = self.counts.reshape(-1, 2).sum(1)
        self.counts, self.limit = wider, 2 * self.limit

    @property
    def rms(self) -> float:
        """Root of the mean square, of the bins' middles."""
        middles = (self.edges[1:] + self.edges[:-1]) / 2
        return float(np.sqrt(np.sum(self.counts * middles**2) / max(int(self.counts.sum()), 1)))

    @property
    def edges(self) -> Array:
        """The bins' borders."""
        return np.linspace(-self.limit, self.limit, 2 * _BINS + 1)


@dataclass(frozen=True)
class Range:
    """From ``low`` <= 0 to ``high`` >= 0 in ``2^bits`` equal steps: a value is ``(code - zero) * scale``."""

    low: float
    high: float
    bits: int

    @property
    def scale(self) -> float:
        """Size of a step (float32)."""
        return float(np.float32(max(self.high - self.low, 1e-8) / (2**self.bits - 1)))

    def noise(self, histogram: Histogram) -> float:
        """What rounding puts a value off by (RMS of an even spread over a step), over the values' RMS."""
        return self.scale / math.sqrt(12) / max(histogram.rms, 1e-12)

    @property
    def zero(self) -> int:
        """The code of 0.0, which is exact."""
        return int(np.clip(round(-self.low / self.scale), 0, 2**self.bits - 1))


def choose(histogram: Histogram, method: str, bits: int) -> Range:
    """The range of a tensor by one of :data:`METHODS`; it always holds 0."""
    if histogram.limit == 0.0:  # nothing was seen
        return Range(0.0, 1.0, bits)
    low, high = histogram.low, histogram.high
    if method == "percentile":
        low, high = _percentile(histogram)
    elif method == "entropy":
        threshold = _entropy(histogram, bits)
        low, high = max(low, -threshold), min(high, threshold)
    return Range(min(low, 0.0), max(high, 0.0), bits)


def _percentile(histogram: Histogram) -> tuple[float, float]:
    running = np.cumsum(histogram.counts)
    total, edges = running[-1], histogram.edges
    first = int(np.searchsorted(running, _OUTSIDE * total, side="right"))
    last = int(np.searchsorted(running, (1 - _OUTSIDE) * total, side="left"))
    return max(float(edges[first]), histogram.low), min(float(edges[last + 1]), histogram.high)


def _entropy(histogram: Histogram, bits: int) -> float:
    """The threshold on the absolute value."""
    sizes = histogram.counts[_BINS:] + histogram.counts[_BINS - 1 :: -1]
    used = int(np.flatnonzero(sizes)[-1]) + 1
    levels = 2 ** (bits - 1)  # one side's
    best, chosen = np.inf, used
    for end in np.unique(np.linspace(max(levels, int(_LEAST * used)), used, _TRIES).astype(int)):
        end = min(int(end), used)
        seen = sizes[:end].astype(np.float64)
        seen[-1] += sizes[end:].sum()  # what saturates
        divergence = _divergence(seen, _rounded(sizes[:end], min(levels, end)))
        if divergence < best:
            best, chosen = divergence, end
    return chosen * histogram.limit / _BINS


def _rounded(counts: Array, levels: int) -> Array:
    """The counts as they are after rounding to ``levels``: each level's over its bins that were hit."""
    group = np.arange(len(counts)) * levels // len(counts)
    hit = counts > 0
    sums = np.bincount(group, counts, levels)
    hits = np.bincount(group, hit, levels)
    return np.where(hit, (sums / np.maximum(hits, 1))[group], 0.0)


def _divergence(p: Array, q: Array) -> float:
    """Kullback-Leibler, of smoothed distributions."""
    p, q = p / p.sum(), q / max(q.sum(), 1e-12)
    inside = p > 0
    return float(np.sum(p[inside] * np.log(p[inside] / np.maximum(q[inside], 1e-10))))
