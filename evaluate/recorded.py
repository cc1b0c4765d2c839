"""PyTorch's logits on a short text or clip travel with the bundle: a device without torch can be checked."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xexport.core.contract import Contract
from xexport.core.errors import BundleError, InputError
from xexport.core.runner import Runner

__all__ = ["REFERENCE_NAME", "RecordedRunner", "Recording", "read_reference", "write_reference"]

REFERENCE_NAME = "reference.npz"
_BUDGET = 1 << 20  # bytes of float32 logits that a bundle carries at most
_MIN = 8


@dataclass(frozen=True)
class Recording:
    """What PyTorch made of one short text from its first token.

    Attributes:
        values: ids ``[n]`` or features ``[n,F]``.
        logits: float32 ``[p,V]``.
        at: the positions that the logits are of; all of them in the chunk form, where little memory is
            left for a whole sequence of a fixed length some.
    """

    values: NDArray[Any]
    logits: NDArray[np.float32]
    at: NDArray[np.int64]


class RecordedRunner:
    """Plays back recorded logits as if it were the model: a Runner whose only text is the recorded one."""

    def __init__(self, recording: Recording, contract: Contract) -> None:
        self.contract = contract
        self.values = recording.values
        self.batch = 1
        self.vocab_size = int(recording.logits.shape[1])
        self.max_tokens: int | None = len(recording.values)
        self.position = 0
        self.keeps = True
        self._logits = recording.logits

    def feed(self, tokens: Sequence[int] | Any, keep: int = 0) -> NDArray[np.float32]:
        """The recorded logits of the next tokens.

        Raises:
            InputError: the tokens are not the recorded ones.
        """
        spec = self.contract.inputs
        values = np.asarray(tokens, dtype=spec.dtype)
        values = values.reshape(-1, *self.values.shape[1:])
        stop = self.position + len(values)
        if not np.array_equal(values, self.values[self.position : stop]):
            raise InputError("a recorded reference knows its own text only", got=values[:8].tolist())
        first, last = self.contract.positions(self.position), self.contract.positions(stop)
        out = self._logits[None, max(first, last - (keep or last)) : last]
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


def write_reference(path: Path, runner: Runner, values: NDArray[Any]) -> None:
    """Feed the beginning of a text to the reference from its first token, and keep the logits.

    In the whole form that is one whole sequence; if its length is fixed and large, the logits of some
    positions are kept.

    Raises:
        InputError: the text is shorter than any sequence that the model takes.
    """
    contract = runner.contract
    spec = contract.inputs
    budget = max(_MIN, _BUDGET // (4 * runner.vocab_size))
    most = budget * spec.multiple if contract.streams else min(budget * spec.multiple, spec.window)
    count = contract.nearest(min(most, max(len(values), 1)))
    while not (contract.allows(count) and count <= len(values)):
        count -= 1
        if count < 1 or contract.fixed_length is not None:
            raise InputError(
                f"too few {spec.unit}s to evaluate on",
                got=len(values),
                allowed=f"at least {contract.nearest(1)}",
                fix="use a longer text",
            )
    kept = np.ascontiguousarray(values[:count])
    runner.reset()
    logits = np.asarray(runner.feed(kept[None])[0], dtype=np.float32)
    runner.reset()
    if len(logits) <= budget:
        np.savez_compressed(path, tokens=kept, logits=logits)
    else:
        at = np.unique(np.linspace(0, len(logits) - 1, budget).round().astype(np.int64))
        np.savez_compressed(path, tokens=kept, logits=logits[at], at=at)


def read_reference(path: Path) -> Recording:
    """The recorded reference of a bundle.

    Raises:
        BundleError: it is missing or not what :func:`write_reference` wrote.
    """
    try:
        with np.load(path, allow_pickle=False) as table:
            values, logits = table["tokens"], table["logits"].astype(np.float32)
            at = table["at"].astype(np.int64) if "at" in table.files else np.arange(len(logits))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise BundleError(
            "the bundle's recorded reference can't be read", got=f"{path.name}: {error}"
        ) from error
    fits = logits.ndim == 2 and at.shape == logits.shape[:1] and len(values) >= len(logits)
    if not fits or values.ndim not in (1, 2) or (len(at) and not 0 <= at.min() <= at.max() < len(values)):
        raise BundleError("the bundle's recorded reference has a wrong shape", got=path.name)
    return Recording(values.astype(np.int64) if values.ndim == 1 else values.astype(np.float32), logits, at)
