"""Fidelity: what a candidate's logits lost against a reference's, on real text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from xexport.core.progress import Progress, Silent
from xexport.core.records import Fidelity, Setup
from xexport.core.runner import Runner
from xexport.evaluate.metrics import TokenMetrics
from xexport.evaluate.streaming import Fed, notes_of, prepare, stream_compared

__all__ = ["compare", "fidelity_row", "scored_bytes"]


def compare(
    reference: Runner,
    candidates: Mapping[str, Runner],
    tokens: Sequence[int] | Any,
    *,
    setup: Setup,
    chunk: int = 256,
    text_bytes: int | None = None,
    reference_name: str = "torch",
    progress: Progress | None = None,
) -> dict[str, Fidelity]:
    """Stream one text through the reference once and through every candidate.

    Args:
        tokens: ``[n]`` token ids; n - 1 of them are fed and each next token is scored. Or features
            ``[n,F]``, all of which are fed and none scored.
        setup: the row's configuration; ``runner`` is replaced by the candidate's name.
        chunk: tokens per call, the state carried between calls.
        text_bytes: bytes that ``tokens[1:]`` decode to; None: one byte a token.

    Returns:
        Candidate name -> its row.

    Raises:
        InputError: tokens that a runner can't take.
    """
    progress = progress or Silent()
    fed = prepare({reference_name: reference, **candidates}, tokens)
    stops = fed.stops(chunk)
    progress.stage(
        f"fidelity against {reference_name} on {fed.length} {reference.contract.inputs.unit}s", len(stops)
    )
    parts: dict[str, list[TokenMetrics]] = {name: [] for name in candidates}
    for compared in stream_compared(reference, candidates, fed, stops):
        for name, metrics in compared.metrics.items():
            parts[name].append(metrics)
        progress.advance()
    rows = {}
    for name, pieces in parts.items():
        metrics = TokenMetrics.join(pieces)
        rows[name] = fidelity_row(
            metrics,
            setup=msgspec.structs.replace(setup, runner=name),
            reference=reference_name,
            chunk=chunk,
            vocab_size=reference.vocab_size,
            text_bytes=scored_bytes(tokens, fed, text_bytes),
            notes=notes_of(name, metrics, fed.note),
        )
    return rows


def scored_bytes(tokens: Sequence[int] | Any, fed: Fed, text_bytes: int | None) -> int:
    """Bytes that the scored tokens stand for (0 if none is); a text cut at the limit keeps its ratio."""
    if fed.targets is None:
        return 0
    scored, whole = fed.length, np.asarray(tokens).size - 1
    return scored if text_bytes is None else max(1, round(text_bytes * scored / whole))


def fidelity_row(
    m: TokenMetrics,
    *,
    setup: Setup,
    reference: str,
    chunk: int,
    vocab_size: int,
    text_bytes: int,
    notes: tuple[str, ...],
    form: str = "chunk",
) -> Fidelity:
    """The metrics of a whole text as a row."""
    return Fidelity(
        setup=setup,
        reference=reference,
        chunk=chunk,
        vocab_size=vocab_size,
        text_bytes=text_bytes,
        kl=_row(m.kl),
        nll_reference=_row(m.nll_reference),
        nll_candidate=_row(m.nll_candidate),
        same_top1=tuple(int(v) for v in m.same_top1),
        error_max=_row(m.error_max),
        error_ms=_row(m.error_ms),
        reference_ms=_row(m.reference_ms),
        non_finite=int((~m.finite).sum()),
        warnings=notes,
        form=form,
    )


def _row(values: NDArray[np.float64]) -> tuple[float | None, ...]:
    """Six significant digits a number: a tenth of a per mille of any figure, half the file."""
    return tuple(None if np.isnan(v) else float(f"{v:.6g}") for v in values)
