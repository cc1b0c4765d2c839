"""Whether both sides compute the same thing: llama.cpp's logits against PyTorch's on the same tokens.

A benchmark of two different computations is worth nothing, so this runs before anything is timed:
in one batch and one token at a time (``-ub 1``), for float32 and for what was quantized.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llamacpp.build import BenchmarkError, Tools, run
from llamacpp.files import gguf

__all__ = ["TEXT", "Likeness", "likeness", "llama_logits", "require_same"]

Array = npt.NDArray[Any]
TEXT = "The same text is read by both programs, whatever their tokens are."
#: Largest difference allowed between float32 logits, relative to their standard deviation. Two
#: different orders of summation over 24 layers stay well below it; a wrong operand does not.
_SAME = 1e-2


@dataclass(frozen=True)
class Likeness:
    """Logits of one program against PyTorch's.

    Attributes:
        rms, max: error relative to the standard deviation of PyTorch's logits.
        kl: mean KL divergence, nats a token.
        top1: share of positions with the same most likely token.
        tokens: positions compared.
    """

    rms: float
    max: float
    kl: float
    top1: float
    tokens: int


def llama_logits(path: Path, tools: Tools, *, ubatch: int = 512) -> tuple[Array, Array]:
    """(tokens [T], logits [T,V]) of :data:`TEXT` by llama-results; ``ubatch`` 1 takes single steps.

    Raises:
        BenchmarkError: the program failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "logits.gguf"
        command = [tools.program("llama-results"), "-m", str(path), "-p", TEXT, "-o", str(out)]
        run([*command, "-t", "1", "-c", "512", "-b", "512", "-ub", str(ubatch)], "llama-results")
        found = {t.name: np.array(t.data) for t in gguf(tools).GGUFReader(str(out)).tensors}
    tokens = found["tokens"].reshape(-1).astype(np.int64)
    return tokens, found["logits"].reshape(len(tokens), -1).astype(np.float64)


def likeness(logits: Array, reference: Array) -> Likeness:
    """How far ``logits`` [T,V] are from ``reference`` [T,V]."""
    scale = float(reference.std())
    off = np.abs(logits - reference)
    p, q = _log_softmax(reference), _log_softmax(logits)
    return Likeness(
        rms=float(np.sqrt((off**2).mean())) / scale,
        max=float(off.max()) / scale,
        kl=float((np.exp(p) * (p - q)).sum(-1).mean()),
        top1=float((logits.argmax(-1) == reference.argmax(-1)).mean()),
        tokens=len(logits),
    )


def require_same(path: Path, reference: Any, tools: Tools) -> tuple[Array, Array, dict[str, Any]]:
    """Check a float32 GGUF file against a PyTorch stream of the same weights.

    Returns:
        (tokens, PyTorch's logits, the figures of the batch and of the steps).

    Raises:
        BenchmarkError: they differ by more than rounding.
    """
    figures = {}
    tokens, batch = llama_logits(path, tools)
    wanted = np.asarray(reference.feed(tokens[None]), np.float64)[0]
    figures["batch"] = likeness(batch, wanted)
    again, steps = llama_logits(path, tools, ubatch=1)
    if not np.array_equal(again, tokens):
        raise BenchmarkError(f"{path.name}: two runs of llama-results read different tokens")
    figures["steps"] = likeness(steps, wanted)
    for how, row in figures.items():
        if row.max > _SAME:
            raise BenchmarkError(
                f"{path.name}: llama.cpp's logits ({how}) are not those of the PyTorch model: largest "
                f"difference {row.max:.2g} of their standard deviation, same top token in {row.top1:.0%}"
            )
    return tokens, wanted, {how: asdict(row) for how, row in figures.items()}


def _log_softmax(x: Array) -> Array:
    x = x - x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))
