"""What families in the chunk form share: the first state, training from it, state rows, the RMS norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, int64, nn, ones

from xexport.core.state import StateSpec, state_shape

__all__ = ["FromFirstState", "RMSNorm", "first_state", "layer_states"]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467, equation 4)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same shape."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def first_state(module: Any, batch: int) -> list[Tensor]:
    """The state of ``module`` before the first token, beside its first parameter and, but for integers, of
    its dtype."""
    weight: Tensor = next(module.parameters())
    return [
        weight.new_full(state_shape(s, batch), s.init, dtype=int64 if s.dtype == "int64" else weight.dtype)
        for s in module.state_spec()
    ]


class FromFirstState:
    """Put before a module in the chunk form: its training form, whole sequences from the first state.

    ``class MambaTraining(FromFirstState, Mamba)`` has Mamba's parameters and
    ``forward(tokens [B,T] int64) -> logits [B,T,V]``.
    """

    def forward(self, tokens: Tensor, *state: Tensor) -> Any:
        """tokens [B,T] int64 -> logits [B,T,V]; takes no state."""
        assert not state
        return super().forward(tokens, *first_state(self, tokens.shape[0]))[0]  # type: ignore[misc]


def layer_states(layers: int, shapes: Mapping[str, tuple[int | str, ...]]) -> list[StateSpec]:
    """The same float32 tensors in every layer, ``layers.<i>.<name>``, zero before the first token."""
    return [StateSpec(f"layers.{i}.{name}", shape) for i in range(layers) for name, shape in shapes.items()]
