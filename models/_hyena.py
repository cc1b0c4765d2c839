"""Hyena's configuration and its three forms; models/hyena.py has the description and the sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xexport.core.errors import InputError
from xexport.core.state import StateSpec
from xexport.models._implicit import FilterSizes, ImplicitFilter
from xexport.models._monarch import GatedBlocks
from xexport.ops.causal_conv1d.reference import causal_conv1d
from xexport.ops.fft_conv.reference import causal_conv, fft_sizes
from xexport.ops.fft_conv_cached.reference import fft_conv_cached
from xexport.ops.hyena_conv.reference import hyena_conv
from xexport.ops.modal_conv.reference import modal_conv

__all__ = ["Hyena", "HyenaConfig", "HyenaDistilled", "HyenaStack", "HyenaTrain", "build_hyena"]


@dataclass(frozen=True)
class HyenaConfig:
    """Sizes of a Hyena.

    Attributes:
        vocab_size, width, layers: V, d, number of blocks.
        ffn: inner width of the MLP.
        mlp_blocks: 0 for the MLP above, else the gated one of Monarch Mixer, of so many blocks (m2_gpt.py).
        max_tokens: L, the filters' length and the longest stream.
        order: N >= 2.
        filter_width, filter_inner: width of the filters' FFN, and its layers between first and last.
        filter_features: width of ``features(t)``, odd: time, and as many cosines as sines.
        filter_frequency: first value of the sine activations' frequencies.
        filter_shift: what the window ends at.
        eps: epsilon of the layer norms.
        distilled_order: modes that each filter is distilled to (models/_distill.py); 0 for the exact filters.
    """

    vocab_size: int = 256
    width: int = 160
    layers: int = 5
    ffn: int = 320
    max_tokens: int = 2048
    order: int = 2
    filter_width: int = 64
    filter_inner: int = 2
    filter_features: int = 33
    filter_frequency: float = 14.0
    filter_shift: float = 0.0
    eps: float = 1e-5
    mlp_blocks: int = 0
    distilled_order: int = 0

    def __post_init__(self) -> None:
        sizes = (self.vocab_size, self.width, self.layers, self.ffn, self.filter_width)
        if min(sizes) < 1 or self.max_tokens < 2 or min(self.filter_inner, self.distilled_order) < 0:
            raise InputError("a Hyena size is too small", got=self)
        if self.order < 2:
            raise InputError("the order of a Hyena is too low", got=self.order, allowed="2 or more")
        if self.filter_features < 3 or self.filter_features % 2 == 0:
            raise InputError(
                "filter_features holds time and pairs", got=self.filter_features, allowed="3, 5, 7 ..."
            )

    @property
    def filter_sizes(self) -> FilterSizes:
        """What the filters' networks are made of."""
        inner, features = self.filter_inner, self.filter_features
        return FilterSizes(
            self.width, self.order - 1, self.max_tokens, self.filter_width, inner, features, self.filter_shift
        )


class _Mixer(nn.Module):
    """The operator without its long convolutions, which differ between the two forms."""

    def __init__(self, c: HyenaConfig) -> None:
        super().__init__()
        self.c = c
        inner = (c.order + 1) * c.width
        self.in_proj = nn.Linear(c.width, inner)
        self.out_proj = nn.Linear(c.width, c.width)
        self.conv_weight = nn.Parameter(torch.empty(3, inner))
        self.conv_bias = nn.Parameter(torch.zeros(inner))
        self.filter_skip = nn.Parameter(torch.zeros(c.order - 1, c.width))

    def projected(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """The N+1 short-convolved projections of ``x [B,T,d]`` side by side, and the last two projections."""
        return causal_conv1d(self.in_proj(x), self.conv_weight, self.conv_bias, before)


class _Block(nn.Module):
    """One block; ``filters`` is the FFN in the training form, the filters in the chunk form."""

    filters: Any

    def __init__(self, c: HyenaConfig, filters: nn.Module) -> None:
        super().__init__()
        self.hyena_norm = nn.LayerNorm(c.width, c.eps)
        self.hyena = _Mixer(c)
        self.filters = filters
        self.mlp_norm = nn.LayerNorm(c.width, c.eps)
        self.blocks = GatedBlocks(c.width, c.ffn, c.mlp_blocks) if c.mlp_blocks else None
        if self.blocks is None:
            self.fc1 = nn.Linear(c.width, c.ffn)
            self.fc2 = nn.Linear(c.ffn, c.width)

    def mlp(self, x: Tensor) -> Tensor:
        """``x`` with the MLP's output added."""
        z = self.mlp_norm(x)
        if self.blocks is not None:
            mixed: Tensor = self.blocks(z)
            return x + mixed
        y: Tensor = self.fc2(F.gelu(self.fc1(z), approximate="tanh"))
        return x + y


#: (layer, packed [B,T,(N+1)d], its long convolutions' state) -> (mixed [B,T,d], their new state)
_Mix = Callable[[_Block, Tensor, Sequence[Tensor]], tuple[Tensor, list[Tensor]]]


class HyenaStack(nn.Module):
    """What the forms share."""

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.max_tokens: int | None = config.max_tokens
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(_Block(config, self._filters()) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, config.eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)

    def _filters(self) -> nn.Module:
        """What a block holds to make its filters from."""
        raise NotImplementedError

    def _blocks(self) -> list[_Block]:
        return list(self.layers)  # type: ignore[arg-type]

    def _streamed(self, tokens: Tensor, state: Sequence[Tensor], mix: _Mix) -> tuple[Tensor, list[Tensor]]:
        """Logits and the layers' new state; ``mix`` does the gates and long convolutions of a layer."""
        order = self.config.order
        after: list[Tensor] = []
        x = self.embed(tokens)
        for i, layer in enumerate(self._blocks()):
            short, *before = state[i * order : (i + 1) * order]
            packed, now = layer.hyena.projected(layer.hyena_norm(x), short)
            mixed, long = mix(layer, packed, before)
            after += [now, *long]
            x = layer.mlp(x + layer.hyena.out_proj(mixed))
        logits: Tensor = self.head(self.norm(x))
        return logits, after

    def _state_spec(self, name: str, *shape: int) -> list[StateSpec]:
        """Of a layer the short convolution's state and one of ``shape`` a long convolution."""
        c = self.config
        specs: list[StateSpec] = []
        for i in range(c.layers):
            specs.append(StateSpec(f"layers.{i}.short", ("B", 2, (c.order + 1) * c.width)))
            specs += [StateSpec(f"layers.{i}.{name}.{j}", ("B", *shape)) for j in range(c.order - 1)]
        return specs


class Hyena(HyenaStack):
    """The chunk form: ``forward(tokens [B,T] int64, *state) -> (logits [B,T,V], *new_state)``.

    ``position + T`` must not exceed ``max_tokens``; in PyTorch the convolution raises LimitError, in a
    graph the result is undefined, so a runtime checks it beforehand.
    """

    def _filters(self) -> nn.Module:
        c = self.config
        return nn.ParameterList(torch.zeros(c.width, c.max_tokens) for _ in range(c.order - 1))

    def state_spec(self) -> list[StateSpec]:
        """Per layer the short convolution's state and the caches, then the position."""
        specs = self._state_spec("cache", self.config.width, self.config.max_tokens)
        return [*specs, StateSpec("position", (1,), "int64")]

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        position = state[-1]
        logits, after = self._streamed(tokens, state, partial(self._mixed, position))
        return logits, *after, position + tokens.shape[1]

    def _mixed(
        self, position: Tensor, layer: _Block, packed: Tensor, caches: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The gates and long convolutions of ``packed [B,T,(N+1)d]``: ``[B,T,d]`` and the new caches."""
        n1, n2 = fft_sizes(self.config.max_tokens)
        skip = layer.hyena.filter_skip
        if self.config.order == 2:  # one operator
            mixed, cache = hyena_conv(packed, layer.filters[0], skip[0], caches[0], position, n1, n2)
            return mixed, [cache]
        out, *gates, v = torch.split(packed, self.config.width, -1)
        after = []
        for j, gate in enumerate(reversed(gates)):
            z = gate * v
            y, cache = fft_conv_cached(z.transpose(1, 2), layer.filters[j], caches[j], position, n1, n2)
            v = y.transpose(1, 2) + z * skip[j]
            after.append(cache)
        return out * v, after


class Modes(nn.Module):
    """The filters of a convolution as complex modes: ``poles`` and ``residues``, ``[modes,2,d]``."""

    def __init__(self, order: int, width: int) -> None:
        super().__init__()
        self.poles = nn.Parameter(torch.zeros(order, 2, width))
        self.residues = nn.Parameter(torch.zeros(order, 2, width))


class HyenaDistilled(HyenaStack):
    """The chunk form with distilled filters: a state of constant size, and no last token.

    ``forward(tokens [B,T] int64, *state) -> (logits [B,T,V], *new_state)``; ``filter_skip`` has what makes
    tap 0 of every filter exact in it.
    """

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__(config)
        self.max_tokens = None

    def _filters(self) -> nn.Module:
        c = self.config
        return nn.ModuleList(Modes(c.distilled_order, c.width) for _ in range(c.order - 1))

    def state_spec(self) -> list[StateSpec]:
        """Per layer the short convolution's state and the modes of each long one, ``[B,modes,2,d]``."""
        return self._state_spec("modes", self.config.distilled_order, 2, self.config.width)

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        logits, after = self._streamed(tokens, state, self._mixed)
        return logits, *after

    def _mixed(self, layer: _Block, packed: Tensor, modes: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """As in :class:`Hyena`. The operator has two gates: one of order 2 needs one, a longer one a chain
        in which each but the first takes what the one before gave, with ones for the gate that is done.
        """
        out, *gates, v = torch.split(packed, self.config.width, -1)
        after = []
        for j, filters in enumerate(layer.filters):
            last = gates[-2 - j] if j + 2 <= len(gates) else out
            inputs = (
                packed
                if len(gates) == 1
                else torch.cat((last, gates[-1] if j == 0 else torch.ones_like(v), v), -1)
            )
            v, now = modal_conv(inputs, filters.poles, filters.residues, layer.hyena.filter_skip[j], modes[j])
            after.append(now)
        return v, after


class HyenaTrain(HyenaStack):
    """The training form: ``forward(tokens [B,T]) -> logits [B,T,V]`` for T <= max_tokens."""

    def __init__(self, config: HyenaConfig) -> None:
        if config.distilled_order:
            raise InputError("distilled filters are not trained", fix="train the exact form and distill that")
        super().__init__(config)

    def _filters(self) -> nn.Module:
        return ImplicitFilter(self.config.filter_sizes)

    def forward(self, tokens: Tensor) -> Tensor:
        c = self.config
        if tokens.shape[1] > c.max_tokens:
            raise InputError(
                "a sequence is longer than the filters", got=tokens.shape[1], allowed=c.max_tokens
            )
        x = self.embed(tokens)
        empty = x.new_zeros(x.shape[0], 2, (c.order + 1) * c.width)
        for layer in self._blocks():
            packed, _ = layer.hyena.projected(layer.hyena_norm(x), empty)
            out, *gates, v = torch.split(packed, c.width, -1)
            filters = layer.filters(tokens.shape[1])
            for j, gate in enumerate(reversed(gates)):
                z = gate * v
                v = (
                    causal_conv(z.transpose(1, 2), filters[j]).transpose(1, 2)
                    + z * layer.hyena.filter_skip[j]
                )
            x = layer.mlp(x + layer.hyena.out_proj(out * v))
        logits: Tensor = self.head(self.norm(x))
        return logits


def build_hyena(config: HyenaConfig) -> Hyena | HyenaDistilled:
    """The chunk form of a configuration."""
    return HyenaDistilled(config) if config.distilled_order else Hyena(config)
