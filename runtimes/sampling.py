"""Choosing the next token from logits: greedy, temperature, top-k and nucleus (top-p) sampling.

Source of nucleus sampling: Holtzman et al., arXiv 1904.09751, section 3.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from xexport.core.errors import InputError, RuntimeFailure

__all__ = ["Sampler", "probabilities"]

Logits = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the most probable token.
        top_p: keep the most probable tokens whose probabilities first sum to it (1 keeps all).
        top_k: keep this many of the most probable tokens (0 keeps all).

    Raises:
        InputError: a value out of its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise InputError("bad temperature", got=self.temperature, allowed="0 (greedy) or more, finite")
        if not 0 < self.top_p <= 1:
            raise InputError("bad top_p", got=self.top_p, allowed="more than 0, at most 1")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise InputError("bad top_k", got=self.top_k, allowed="an integer, 0 (all) or more")

    def choose(self, logits: Logits, rng: np.random.Generator) -> int:
        """The next token id, from logits ``[V]``; greedy choice draws nothing from ``rng``."""
        if self.temperature == 0:
            _require_finite(logits)
            return int(logits.argmax())
        chances = probabilities(logits, self)
        # One uniform number and a search: the same draw for the same seed whatever V is.
        edge = int(np.searchsorted(np.cumsum(chances), rng.random(), side="right"))
        return min(edge, int(np.flatnonzero(chances)[-1]))


def probabilities(logits: Logits, sampler: Sampler) -> npt.NDArray[np.float64]:
    """The distribution ``[V]`` that :class:`Sampler` draws from (temperature above 0).

    Ties at the border of top-k or top-p are broken by the lower id, so the result is deterministic.

    Raises:
        RuntimeFailure: a logit is NaN or +infinity.
    """
    _require_finite(logits)
    scaled = (logits.astype(np.float64) - float(logits.max())) / sampler.temperature
    chances = np.exp(scaled)
    chances /= chances.sum()
    if sampler.top_k == 0 and sampler.top_p >= 1:
        return chances
    order = np.argsort(-chances, kind="stable")
    keep = len(order) if sampler.top_k == 0 else min(sampler.top_k, len(order))
    if sampler.top_p < 1:
        # the mass of the top-k survivors is renormalised before top-p, as the two compose in order
        mass = np.cumsum(chances[order[:keep]])
        keep = int(np.searchsorted(mass, sampler.top_p * mass[-1], side="left")) + 1
    kept = order[:keep]
    result = np.zeros_like(chances)
    result[kept] = chances[kept] / chances[kept].sum()
    return result


def _require_finite(logits: Logits) -> None:
    top = float(logits.max()) if logits.size else math.nan
    if not math.isfinite(top):
        raise RuntimeFailure(
            "the model's logits are not finite",
            got=top,
            fix="run `xexport validate` on the bundle; a weight or the state has overflowed",
        )
