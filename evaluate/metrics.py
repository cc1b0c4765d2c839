"""Per-token comparison of two sets of logits, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["TokenMetrics", "compare_logits", "log_softmax"]

Floats = NDArray[np.float64]

#: Rows of logits turned to float64 at a time: bounds the memory at a large vocabulary.
_BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class TokenMetrics:
    """One number a position, each ``[T]``; nan where either side is not finite.

    The two nll are empty ``[0]`` where no next token was given.

    Attributes: see :class:`xexport.core.records.Fidelity`.
    """

    kl: Floats
    nll_reference: Floats
    nll_candidate: Floats
    same_top1: NDArray[np.bool_]
    error_max: Floats
    error_ms: Floats
    reference_ms: Floats
    finite: NDArray[np.bool_]

    @staticmethod
    def join(parts: list[TokenMetrics]) -> TokenMetrics:
        """The metrics of consecutive chunks as one."""
        names = TokenMetrics.__dataclass_fields__
        return TokenMetrics(**{n: np.concatenate([getattr(p, n) for p in parts]) for n in names})


def log_softmax(logits: Floats) -> Floats:
    """log p over the last axis, shifted by the maximum so that nothing overflows."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def compare_logits(
    reference: NDArray[Any], candidate: NDArray[Any], targets: NDArray[Any] | None
) -> TokenMetrics:
    """Compare ``reference [T,V]`` with ``candidate [T,V]`` where ``targets [T]`` are the next tokens, if any.

    KL(p || q) = sum p (log p - log q) with p the reference, from log-softmax in float64; tiny
    negative results of rounding are 0.
    """
    rows = max(1, _BLOCK_ELEMENTS // max(reference.shape[-1], 1))
    parts = [
        _compare_block(
            reference[i : i + rows],
            candidate[i : i + rows],
            None if targets is None else targets[i : i + rows],
        )
        for i in range(0, len(reference), rows)
    ]
    return TokenMetrics.join(parts)


def _compare_block(
    reference: NDArray[Any], candidate: NDArray[Any], targets: NDArray[Any] | None
) -> TokenMetrics:
    r, c = reference.astype(np.float64), candidate.astype(np.float64)
    finite = np.asarray(np.isfinite(r).all(axis=-1) & np.isfinite(c).all(axis=-1))
    same = (r.argmax(axis=-1) == c.argmax(axis=-1)) & finite
    r, c = np.where(finite[:, None], r, 0.0), np.where(finite[:, None], c, 0.0)
    log_p, log_q = log_softmax(r), log_softmax(c)
    error = c - r

    def mark(values: Floats) -> Floats:
        return np.where(finite, values, np.nan)

    def nll(log_probabilities: Floats) -> Floats:
        if targets is None:
            return np.empty(0)
        return mark(-log_probabilities[np.arange(len(r)), targets])

    return TokenMetrics(
        kl=mark(np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis=-1), 0.0)),
        nll_reference=nll(log_p),
        nll_candidate=nll(log_q),
        same_top1=same,
        error_max=mark(np.abs(error).max(axis=-1)),
        error_ms=mark((error * error).mean(axis=-1)),
        reference_ms=mark((r * r).mean(axis=-1)),
        finite=finite,
    )
