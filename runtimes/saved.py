"""A saved stream: the state of a model after some tokens, in memory or in a file."""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xexport.core.errors import InputError, OutputError

__all__ = ["SavedState"]

_FORMAT = "xexport-state-1"


@dataclass(frozen=True)
class SavedState:
    """What :meth:`Stream.save` returns; a copy that later tokens don't touch.

    Attributes:
        fingerprint: which graph and weights it belongs to.
        batch: B.
        position: tokens fed before it was saved.
        tensors: every state tensor by name.
    """

    fingerprint: str
    batch: int
    position: int
    tensors: dict[str, npt.NDArray[Any]]

    @property
    def bytes(self) -> int:
        """Size of the state in bytes."""
        return sum(t.nbytes for t in self.tensors.values())

    def to_file(self, path: str | os.PathLike[str]) -> Path:
        """Write it as an .npz archive (through a temporary file, so never half of it).

        Raises:
            OutputError: the folder can't be written.
        """
        target = Path(path)
        head = {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "batch": self.batch,
            "position": self.position,
            "names": list(self.tensors),
        }
        arrays = {f"t{i}": tensor for i, tensor in enumerate(self.tensors.values())}
        arrays["head"] = np.frombuffer(json.dumps(head).encode(), np.uint8)
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
            part.replace(target)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise OutputError("the state can't be written", got=f"{target}: {error.strerror}") from error
        return target

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> SavedState:
        """Read what :meth:`to_file` wrote; nothing in the file is executed.

        Raises:
            InputError: no such file, or not a saved state.
        """
        try:
            with np.load(path, allow_pickle=False) as archive:
                head = json.loads(bytes(archive["head"]))
                if head["format"] != _FORMAT:
                    raise ValueError(f"format {head['format']!r}")
                tensors = {str(name): archive[f"t{i}"] for i, name in enumerate(head["names"])}
            return cls(str(head["fingerprint"]), int(head["batch"]), int(head["position"]), tensors)
        except FileNotFoundError as error:
            raise InputError("no such file", got=path) from error
        except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile, EOFError) as error:
            raise InputError(
                "this file is not a saved state",
                got=f"{path}: {error}",
                fix="name a file that SavedState.to_file wrote",
            ) from error
