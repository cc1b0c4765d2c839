"""Checking a bundle on the device it was copied to: no torch, only what the folder itself holds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xexport.core.errors import BundleError
from xexport.core.progress import Progress
from xexport.core.records import ChunkLaw, Fidelity, Record
from xexport.core.runner import Runner
from xexport.core.stats import finite_or_none as number
from xexport.evaluate.corpus import Corpus, read_corpus
from xexport.evaluate.fidelity import compare
from xexport.evaluate.recorded import REFERENCE_NAME, read_reference
from xexport.evaluate.suite import law, setup_for, sizes_for
from xexport.runtimes.bundle import Bundle

__all__ = ["bits_per_byte", "validate_bundle"]

#: A float graph keeps the chunk law to rounding. A quantized one rounds activations to 8 bits, where the
#: last bit of a sum can tip a value to the next level: there the export's own figure is the yardstick.
CHUNK_TOLERANCE = 1e-3
CHUNK_FACTOR = 10.0
#: mean KL (nats) from the logits that PyTorch recorded: the export's own figure is on more of the same text
KL_TOLERANCE = 1e-3
KL_FACTOR = 10.0


def validate_bundle(
    bundle: Bundle, eval_text: str | Path | None, progress: Progress
) -> tuple[dict[str, Any], list[Record]]:
    """Run the chunk law, the recorded PyTorch logits and a text through the bundle.

    Returns:
        The ``--json`` object (``ok`` and its reasons among the keys), and the rows measured.
    """
    manifest = bundle.manifest
    sizes = sizes_for(manifest.model.parameters)
    corpus = read_corpus(bundle.tokenizer(), manifest.model.vocab_size, eval_text)
    setup = setup_for(manifest, bundle.path.name, corpus)
    stream = bundle.stream()
    chunk = law(stream, corpus, setup, sizes, progress)
    fidelity = _against_recording(bundle, stream, progress)
    part = corpus.head(sizes.fidelity_tokens)
    progress.stage(f"score {len(part.tokens)} tokens")
    bits = bits_per_byte(stream, part)
    problems = _problems(chunk, _allowed_chunk_error(bundle), fidelity, _allowed_kl(bundle), bits)
    rows: list[Record] = [chunk] if fidelity is None else [chunk, fidelity]
    return _result(bundle, chunk, fidelity, bits, part, problems), rows


def bits_per_byte(runner: Runner, corpus: Corpus, chunk: int = 256) -> float:
    """Bits per byte of a text streamed from the first token; the first token itself is not scored."""
    limit = runner.max_tokens or len(corpus.tokens)
    tokens = corpus.tokens[: limit + 1]
    runner.reset()
    total = 0.0
    for start in range(0, len(tokens) - 1, chunk):
        ids = tokens[start : min(start + chunk, len(tokens) - 1)]
        logits = np.asarray(runner.feed(ids[None, :])[0], np.float64)
        total += float(_nll(logits, tokens[start + 1 : start + 1 + len(ids)]).sum())
    runner.reset()
    scored = corpus.bytes * (len(tokens) - 1) / len(corpus.tokens)
    return total / math.log(2) / scored


def _nll(logits: NDArray[np.float64], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    top = logits.max(axis=1, keepdims=True)
    norm = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
    out: NDArray[np.float64] = norm - logits[np.arange(len(targets)), targets]
    return out


def _against_recording(bundle: Bundle, stream: Runner, progress: Progress) -> Fidelity | None:
    path = bundle.path / REFERENCE_NAME
    if not path.is_file():
        return None
    recorded = read_reference(path)
    if recorded.vocab_size != bundle.manifest.model.vocab_size:
        raise BundleError("the recorded reference is of another model", got=recorded.vocab_size)
    setup = setup_for(bundle.manifest, bundle.path.name, None)
    stream.reset()
    return compare(
        recorded,
        {"bundle": stream},
        recorded.tokens,
        setup=setup,
        reference_name="torch (recorded)",
        progress=progress,
    )["bundle"]


def _allowed_chunk_error(bundle: Bundle) -> float:
    at_export = bundle.manifest.figures.get("chunk_error") or 0.0
    return max(CHUNK_TOLERANCE, CHUNK_FACTOR * float(at_export))


def _allowed_kl(bundle: Bundle) -> float:
    at_export = (bundle.manifest.figures.get("kl") or {}).get("mean")
    return max(KL_TOLERANCE, KL_FACTOR * float(at_export or 0.0))


def _problems(
    chunk: ChunkLaw, allowed: float, fidelity: Fidelity | None, allowed_kl: float, bits: float
) -> list[str]:
    problems = []
    if not chunk.error <= allowed:
        problems.append(f"the chunk law is broken here: error {chunk.error:.2e}, allowed {allowed:.0e}")
    if fidelity is not None and fidelity.non_finite:
        problems.append(f"{fidelity.non_finite} tokens gave logits that are not finite")
    elif fidelity is not None and not fidelity.kl_mean <= allowed_kl:
        problems.append(
            f"the results here are not PyTorch's: mean KL {fidelity.kl_mean:.2e} nats from the logits "
            f"recorded at export, allowed {allowed_kl:.0e}"
        )
    if not math.isfinite(bits):
        problems.append("the text could not be scored: logits that are not finite")
    return problems


def _result(
    bundle: Bundle,
    chunk: ChunkLaw,
    fidelity: Fidelity | None,
    bits: float,
    corpus: Corpus,
    problems: list[str],
) -> dict[str, Any]:
    at_export = bundle.manifest.figures.get("bits_per_byte") or {}
    result: dict[str, Any] = {
        "model": bundle.manifest.model.family,
        "target": bundle.manifest.target,
        "bundle": str(bundle.path),
        "ok": not problems,
        "problems": problems,
        "chunk_error": number(chunk.error),
        "bits_per_byte": {"here": number(bits), "bundle_at_export": at_export.get("bundle")},
        "text": corpus.name,
        "kl": None,
        "same_top1": None,
    }
    if fidelity is not None:
        result["kl"] = {
            "mean": number(fidelity.kl_mean),
            "p99": number(fidelity.kl_percentile(99)),
            "max": number(fidelity.kl_percentile(100)),
        }
        result["same_top1"] = number(fidelity.agreement)
        result["max_error"] = number(fidelity.max_error)
    return result
