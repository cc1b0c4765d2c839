"""PyTorch's logits on a short text travel with the bundle, so that a device without torch can be checked."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xexport.core.errors import BundleError, InputError
from xexport.core.runner import Runner

__all__ = ["REFERENCE_NAME", "RecordedRunner", "read_reference", "write_reference"]

REFERENCE_NAME = "reference.npz"
_BUDGET = 1 << 20  # bytes of float32 logits that a bundle carries at most
_MIN = 8


class RecordedRunner:
    """Plays back recorded logits as if it were the model: a Runner whose only text is the recorded one."""

    def __init__(self, tokens: NDArray[np.int64], logits: NDArray[np.float32]) -> None:
        self.tokens = tokens
        self.batch = 1
        self.vocab_size = int(logits.shape[1])
        self.max_tokens: int | None = len(tokens)
        self.position = 0
        self.keeps = True
        self._logits = logits

    def feed(self, tokens: Sequence[int] | Any, keep: int = 0) -> NDArray[np.float32]:
        """The recorded logits of the next tokens.

        Raises:
            InputError: the tokens are not the recorded ones.
        """
        ids = np.asarray(tokens, dtype=np.int64).reshape(-1)
        stop = self.position + len(ids)
        if not np.array_equal(ids, self.tokens[self.position : stop]):
            raise InputError("a recorded reference knows its own text only", got=ids[:8].tolist())
        out = self._logits[None, max(self.position, stop - (keep or stop)) : stop]
        self.position = stop
        return out

    def reset(self) -> None:
        """Back to the first token."""
        self.position = 0

    def save(self) -> int:
        """The position, which is all the state there is."""
        return self.position

    def restore(self, saved: int) -> None:
        """Continue from a saved position."""
        self.position = saved

    def state(self) -> dict[str, Any]:
        """No state was recorded."""
        return {}


def write_reference(path: Path, runner: Runner, tokens: NDArray[np.int64]) -> None:
    """Feed the beginning of a text to the reference from its first token, and keep the logits."""
    count = max(_MIN, _BUDGET // (4 * runner.vocab_size))
    count = min(count, len(tokens), runner.max_tokens or len(tokens))
    ids = np.ascontiguousarray(tokens[:count])
    runner.reset()
    logits = np.asarray(runner.feed(ids[None, :])[0], dtype=np.float32)
    runner.reset()
    np.savez_compressed(path, tokens=ids, logits=logits)


def read_reference(path: Path) -> RecordedRunner:
    """The recorded reference of a bundle.

    Raises:
        BundleError: it is missing or not what :func:`write_reference` wrote.
    """
    try:
        with np.load(path, allow_pickle=False) as table:
            tokens, logits = table["tokens"], table["logits"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise BundleError(
            "the bundle's recorded reference can't be read", got=f"{path.name}: {error}"
        ) from error
    if tokens.ndim != 1 or logits.ndim != 2 or len(tokens) != len(logits):
        raise BundleError("the bundle's recorded reference has a wrong shape", got=path.name)
    return RecordedRunner(tokens.astype(np.int64), logits.astype(np.float32))
