"""What a runtime gives to a stream: an engine holds the weights, a cell holds one stream's state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

__all__ = ["Cell", "Engine"]


class Cell(Protocol):
    """The state of one stream inside a runtime, at a fixed batch size B.

    Attributes:
        keeps: whether ``keep`` saves work.
    """

    keeps: bool

    def run(self, inputs: Any, keep: int = 0) -> Any:
        """Run checked int64 ids ``[B,T]`` or float32 features ``[B,T,F]`` and return new float32 logits.

        ``keep`` n returns the last n positions, ``[B,min(n,T),V]``; 0 all T. The state moves on only
        if the run succeeds.
        """

    def read(self) -> dict[str, Any]:
        """A copy of every state tensor by name (numpy)."""

    def reset(self) -> None:
        """Back to the state before the first token."""

    def write(self, tensors: Mapping[str, Any]) -> None:
        """Overwrite every state tensor; names, shapes and dtypes have been checked."""


class Engine(Protocol):
    """An opened graph with its weights; any number of cells may share it."""

    def cell(self, batch: int) -> Cell:
        """A new cell for ``batch`` parallel sequences, its state not yet written."""
