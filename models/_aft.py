"""What every AFT has: its sizes, the projections around the averages, the block, the filters of conv.

The formulas and the glossary are in models/aft.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xexport.core.errors import InputError

__all__ = ["KEY", "KINDS", "NO_KEY", "AftConfig", "Block", "Mixer", "filter_weights"]

KINDS = ("simple", "full", "local", "conv", "image")
#: bounds of k and of w: exp(40 + 20) times 10^11 values is within float32
KEY, _BIAS = 40.0, 20.0
#: the key of a place in front of the first token: exp(-80) is nothing beside the smallest weight, exp(-40)
NO_KEY = -2 * KEY


@dataclass(frozen=True)
class AftConfig:
    """Sizes and kind of an AFT.

    Attributes:
        kind: ``simple``, ``full``, ``local``, ``conv``, or ``image``: conv on two axes, in the whole form.
        vocab_size, width, layers: V, d, number of blocks.
        ffn: inner width of the feed-forward network.
        max_tokens: L, the longest stream of a model with positions.
        window: s, of local and conv; odd for image, where it is s on both axes.
        rank: r, of full and local.
        heads: h, of conv and image; a divisor of the width.
        positions: learned position embeddings; full and local are bounded by L without them too.
        eps: epsilon of the layer norms.
        grid: of image, rows and columns of patches.
        patch: of image, numbers in one patch, its pixels times their channels.
    """

    kind: str = "local"
    vocab_size: int = 256
    width: int = 160
    layers: int = 5
    ffn: int = 640
    max_tokens: int = 2048
    window: int = 32
    rank: int = 64
    heads: int = 32
    positions: bool = True
    eps: float = 1e-5
    grid: tuple[int, int] = (14, 14)
    patch: int = 768

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError("unknown kind of AFT", got=self.kind, allowed=", ".join(KINDS))
        sizes = (self.vocab_size, self.width, self.layers, self.ffn, self.max_tokens, self.rank, self.heads)
        if min(sizes) < 1:
            raise InputError("an AFT size is too small", got=self)
        if self.window < 2:
            raise InputError("the window of an AFT is too small", got=self.window, allowed="2 or more")
        if self.per_head and self.width % self.heads:
            raise InputError(
                "the width of an AFT-conv must be a multiple of its heads", got=(self.width, self.heads)
            )
        if self.kind == "image" and (
            self.window % 2 == 0 or len(self.grid) != 2 or min(*self.grid, self.patch) < 1
        ):
            raise InputError(
                "an AFT of images needs a grid of patches, and a window that has a middle",
                got=f"grid {self.grid}, patch {self.patch}, window {self.window}",
                allowed="two sizes and a patch of 1 or more, an odd window",
            )

    @property
    def per_head(self) -> bool:
        """Whether a head has one key and one row of position biases, not each channel one."""
        return self.kind in ("conv", "image")

    @property
    def bounded(self) -> bool:
        """Whether there is a last token."""
        return self.positions or self.kind in ("full", "local")


class Mixer(nn.Module):
    """Projections and the gate; a kind adds its sums."""

    def __init__(self, c: AftConfig) -> None:
        super().__init__()
        self.c = c
        self.q_proj = nn.Linear(c.width, c.width, bias=False)
        self.k_proj = nn.Linear(c.width, c.heads if c.per_head else c.width, bias=False)
        self.v_proj = nn.Linear(c.width, c.width, bias=False)
        self.o_proj = nn.Linear(c.width, c.width)

    @staticmethod
    def states(c: AftConfig) -> Mapping[str, tuple[int | str, ...]]:
        """Names and shapes of one layer's state."""
        raise NotImplementedError

    def average(self, x: Tensor, here: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """x [B,T,d] -> the weighted average [B,T,d] before the gate, and the new state."""
        raise NotImplementedError

    def forward(self, x: Tensor, here: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """x [B,T,d] -> (y [B,T,d], the new state)."""
        y, *new = self.average(x, here, *state)
        gated: Tensor = self.o_proj(torch.sigmoid(self.q_proj(x)) * y)
        return (gated, *new)

    def keys(self, x: Tensor) -> Tensor:
        """x [B,T,d] -> k within its bounds [B,T,d or h]."""
        k: Tensor = self.k_proj(x)
        return k.clamp(-KEY, KEY)

    def terms(self, keys: Tensor, values: Tensor) -> Tensor:
        """k [B,T,d or h], v [B,T,d] -> exp(k) v and exp(k) side by side: [B,T,C]."""
        weight = keys.exp()
        return torch.cat((self.spread(weight) * values, weight), -1)

    def quotient(self, sums: Tensor) -> Tensor:
        """[B,T,C] -> [B,T,d]."""
        return sums[..., : self.c.width] / self.spread(sums[..., self.c.width :])

    def spread(self, key: Tensor) -> Tensor:
        """One number a key -> one a channel."""
        return key.repeat_interleave(self.c.width // self.c.heads, -1) if self.c.per_head else key


class Block(nn.Module):
    def __init__(self, c: AftConfig, mixer: Mixer) -> None:
        super().__init__()
        self.mixer_norm = nn.LayerNorm(c.width, c.eps)
        self.mixer = mixer
        self.ffn_norm = nn.LayerNorm(c.width, c.eps)
        self.fc1 = nn.Linear(c.width, c.ffn)
        self.fc2 = nn.Linear(c.ffn, c.width)

    def ffn(self, x: Tensor) -> Tensor:
        """``x`` with the feed-forward network's output added."""
        y: Tensor = self.fc2(F.gelu(self.fc1(self.ffn_norm(x))))
        return x + y


def filter_weights(filters: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """exp(w) of conv (equation 8 of the paper): every head's filter normalised over all its taps.

    Args:
        filters: [h,s] or [h,s,s]; gain, shift: [h].

    Returns:
        As ``filters``.
    """
    rows = filters.flatten(1)
    centred = rows - rows.mean(-1, keepdim=True)
    w = gain[:, None] * centred / rows.std(-1, keepdim=True) + shift[:, None]
    return w.clamp(-KEY, _BIAS).exp().view_as(filters)
