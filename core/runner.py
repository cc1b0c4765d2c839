"""What can be fed tokens or features and keeps its own state: a bundle's stream, or the PyTorch module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from xexport.core.contract import Contract

__all__ = ["Runner"]


class Runner(Protocol):
    """The one interface that evaluation, generation and profiling need.

    Attributes:
        contract: its form and input. In the whole form every call is one whole sequence: the position
            stays 0, and nothing can be saved.
        vocab_size: V, the width of the logits.
        batch: B, fixed for the life of the runner.
        position: tokens fed since the last reset.
        max_tokens: the longest stream the state can hold, or None.
        keeps: whether ``keep`` saves work; else every position's logits are computed and most dropped.
    """

    contract: Contract
    vocab_size: int
    batch: int
    position: int
    max_tokens: int | None
    keeps: bool

    def feed(self, tokens: Sequence[int] | Any, keep: int = 0) -> Any:
        """Feed tokens (``[T]``, or int64 ``[B,T]``) or features and return float32 logits (numpy).

        ``keep`` n returns those of the last n positions, ``[B,min(n,T),V]``; 0 those of all T.
        """

    def reset(self) -> None:
        """Back to the state before the first token."""

    def save(self) -> Any:
        """A copy of the state and position, opaque to the caller."""

    def restore(self, saved: Any) -> None:
        """Continue from what :meth:`save` returned."""

    def state(self) -> dict[str, Any]:
        """A copy of every state tensor by name (numpy)."""
