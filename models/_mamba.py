"""The frame that Mamba-1 and 2 share: blocks of one norm and one mixer, with the published names.

Source: Hugging Face transformers, models/mamba and models/mamba2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from xexport.core.checkpoint import RawCheckpoint, require_keys
from xexport.core.state import StateSpec
from xexport.models._chunk import RMSNorm, layer_states

__all__ = ["MambaFrame", "tied_head"]


class _Layer(nn.Module):
    def __init__(self, config: Any, mixer: nn.Module) -> None:
        super().__init__()
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.mixer = mixer


class _Backbone(nn.Module):
    def __init__(self, config: Any, mixer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(_Layer(config, mixer()) for _ in range(config.layers))
        self.norm_f = RMSNorm(config.width, config.norm_eps)


class MambaFrame(nn.Module):
    """Mamba-1 or 2 in the chunk form.

    Args:
        config: layers, width, vocab_size, norm_eps.
        mixer: makes one layer's mixer, (x [B,T,d], conv, ssm) -> (y [B,T,d], new conv, new ssm).
        states: shapes of a layer's ``conv`` and ``ssm``, in this order.
    """

    max_tokens: int | None = None

    def __init__(
        self, config: Any, mixer: Callable[[], nn.Module], states: Mapping[str, tuple[int | str, ...]]
    ) -> None:
        super().__init__()
        self.config = config
        self.vocab_size: int = config.vocab_size
        self.backbone = _Backbone(config, mixer)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self._states = dict(states)

    def forward(self, tokens: Tensor, *state: Tensor) -> Any:
        """(tokens [B,T] int64, state as :meth:`state_spec`) -> (logits [B,T,V], new state)."""
        x = self.backbone.embeddings(tokens)
        new: list[Tensor] = []
        for index, layer in enumerate(self.backbone.layers):
            assert isinstance(layer, _Layer)
            y, conv, ssm = layer.mixer(layer.norm(x), state[2 * index], state[2 * index + 1])
            x = x + y
            new += [conv, ssm]
        return (self.lm_head(self.backbone.norm_f(x)), *new)

    def state_spec(self) -> Sequence[StateSpec]:
        """Two tensors a layer, all float32, all zero before the first token."""
        return layer_states(self.config.layers, self._states)


def tied_head(
    raw: RawCheckpoint, tensors: Mapping[str, Tensor], family: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors with a head (the embedding where the checkpoint has none), and notes on it.

    Raises:
        CheckpointError: there is no embedding either.
    """
    if "lm_head.weight" in tensors:
        return dict(tensors), []
    require_keys(raw, ("backbone.embeddings.weight",), family)
    head = {"lm_head.weight": tensors["backbone.embeddings.weight"]}
    return {**tensors, **head}, ["the head is tied to the embedding: both are written"]
