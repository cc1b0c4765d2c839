"""Checking a bundle on the device it was copied to: no torch, only what the folder itself holds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xexport.core.errors import BundleError
from xexport.core.progress import Progress
from xexport.core.records import ChunkLaw, Fidelity, Record, Setup
from xexport.core.runner import Runner
from xexport.core.stats import finite_or_none as number
from xexport.evaluate.corpus import Corpus, read_corpus
from xexport.evaluate.fidelity import compare, fidelity_row
from xexport.evaluate.metrics import compare_logits
from xexport.evaluate.recorded import REFERENCE_NAME, RecordedRunner, Recording, read_reference
from xexport.evaluate.streaming import logits_of, notes_of
from xexport.evaluate.suite import law, setup_for, sizes_for
from xexport.evaluate.whole import windows
from xexport.runtimes.bundle import Bundle

__all__ = ["bits_per_byte", "validate_bundle"]

#: A float graph keeps the chunk law to rounding. A quantized one rounds activations to 8 bits, where the
#: last bit of a sum can tip a value to the next level: there the export's own figure is the yardstick.
CHUNK_TOLERANCE = 1e-3
CHUNK_FACTOR = 10.0
#: mean KL (nats) from the logits that PyTorch recorded: the export's own figure is on more of the same text
KL_TOLERANCE = 1e-3
KL_FACTOR = 10.0
_RECORDED = "torch (recorded)"


def validate_bundle(
    bundle: Bundle, eval_text: str | Path | None, progress: Progress, runtime: str | None = None
) -> tuple[dict[str, Any], list[Record]]:
    """Run the chunk law, the recorded PyTorch logits and a text through the bundle.

    In the whole-sequence form there is no chunk law; without next tokens there are no bits per byte.
    ``runtime`` is the one that runs the bundle, its own by default.

    Returns:
        The ``--json`` object (``ok`` and its reasons among the keys), and the rows measured.
    """
    manifest = bundle.manifest
    sizes = sizes_for(manifest.model.parameters)
    model = manifest.model
    corpus = read_corpus(bundle.tokenizer(), model.vocab_size, eval_text, inputs=model.input)
    setup = setup_for(manifest, bundle.path.name, corpus, runtime=runtime)
    stream = bundle.stream(runtime=runtime)
    chunk = law(stream, corpus, setup, sizes, progress) if model.contract.streams else None
    fidelity = _against_recording(bundle, stream, progress, runtime)
    part = corpus.head(sizes.fidelity_tokens)
    bits = None
    if model.predicts_next:
        progress.stage(f"score {len(part.tokens)} tokens")
        bits = bits_per_byte(stream, part)
    problems = _problems(chunk, _allowed_chunk_error(bundle), fidelity, _allowed_kl(bundle), bits)
    rows: list[Record] = [row for row in (chunk, fidelity) if row is not None]
    result = _result(bundle, chunk, fidelity, bits, part, problems)
    return {**result, "runtime": runtime or manifest.runtime}, rows


def bits_per_byte(runner: Runner, corpus: Corpus, chunk: int = 256) -> float:
    """Bits per byte of a text from the first token; the first token itself is not scored.

    It is streamed; in the whole form each window (windows()) is scored alone.
    """
    if not runner.contract.streams:
        return _bits_of_windows(runner, corpus)
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


def _bits_of_windows(runner: Runner, corpus: Corpus) -> float:
    total, scored = 0.0, 0
    for piece in windows(corpus.tokens, runner):
        logits = np.asarray(runner.feed(piece[None])[0, :-1], np.float64)
        total += float(_nll(logits, piece[1:]).sum())
        scored += len(piece) - 1
    return total / math.log(2) / max(scored * corpus.bytes / len(corpus.tokens), 1e-9)


def _nll(logits: NDArray[np.float64], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    top = logits.max(axis=1, keepdims=True)
    norm = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
    out: NDArray[np.float64] = norm - logits[np.arange(len(targets)), targets]
    return out


def _against_recording(
    bundle: Bundle, stream: Runner, progress: Progress, runtime: str | None
) -> Fidelity | None:
    path = bundle.path / REFERENCE_NAME
    if not path.is_file():
        return None
    recording, model = read_reference(path), bundle.manifest.model
    if recording.logits.shape[1] != model.vocab_size or recording.values.ndim + 1 != len(
        model.input.shape(1, 1)
    ):
        shapes = f"inputs {list(recording.values.shape)}, logits {list(recording.logits.shape)}"
        raise BundleError("the recorded reference is of another model", got=shapes)
    setup = setup_for(bundle.manifest, bundle.path.name, None, runtime=runtime)
    stream.reset()
    if not model.contract.streams:
        return _whole_against(recording, stream, setup)
    return compare(
        RecordedRunner(recording, model.contract),
        {setup.runner: stream},
        recording.values,
        setup=setup,
        reference_name=_RECORDED,
        progress=progress,
    )[setup.runner]


def _whole_against(recording: Recording, stream: Runner, setup: Setup) -> Fidelity:
    """The one recorded sequence, at the positions that were kept; nothing is scored."""
    logits = logits_of("bundle", stream, recording.values)
    if recording.at[-1] >= len(logits):
        raise BundleError("the recorded reference has positions that the model lacks", got=recording.at[-1])
    metrics = compare_logits(recording.logits, logits[recording.at], None)
    return fidelity_row(
        metrics,
        setup=setup,
        reference=_RECORDED,
        chunk=len(recording.values),
        vocab_size=stream.vocab_size,
        text_bytes=0,
        notes=notes_of("bundle", metrics, ""),
        form="whole",
    )


def _allowed_chunk_error(bundle: Bundle) -> float:
    at_export = bundle.manifest.figures.get("chunk_error") or 0.0
    return max(CHUNK_TOLERANCE, CHUNK_FACTOR * float(at_export))


def _allowed_kl(bundle: Bundle) -> float:
    at_export = (bundle.manifest.figures.get("kl") or {}).get("mean")
    return max(KL_TOLERANCE, KL_FACTOR * float(at_export or 0.0))


def _problems(
    chunk: ChunkLaw | None,
    allowed: float,
    fidelity: Fidelity | None,
    allowed_kl: float,
    bits: float | None,
) -> list[str]:
    problems = []
    if chunk is not None and not chunk.error <= allowed:
        problems.append(f"the chunk law is broken here: error {chunk.error:.2e}, allowed {allowed:.0e}")
    if fidelity is not None and fidelity.non_finite:
        problems.append(f"{fidelity.non_finite} tokens gave logits that are not finite")
    elif fidelity is not None and not fidelity.kl_mean <= allowed_kl:
        problems.append(
            f"the results here are not PyTorch's: mean KL {fidelity.kl_mean:.2e} nats from the logits "
            f"recorded at export, allowed {allowed_kl:.0e}"
        )
    if bits is not None and not math.isfinite(bits):
        problems.append("the text could not be scored: logits that are not finite")
    return problems


def _result(
    bundle: Bundle,
    chunk: ChunkLaw | None,
    fidelity: Fidelity | None,
    bits: float | None,
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
        "form": bundle.manifest.model.form,
        "chunk_error": number(chunk.error) if chunk else None,
        "bits_per_byte": {
            "here": None if bits is None else number(bits),
            "bundle_at_export": at_export.get("bundle"),
        },
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
