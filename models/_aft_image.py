"""AFT-conv of images: equation 6 of models/aft.py's [1] on two axes, every patch from every patch.

An image is a grid of R x S patches; what one call reads is [B,R*S,P] float32, the patches row by row, each
its P numbers (pixels times channels, scaled as in training), and it gives one row of logits [B,1,V]: the
class, read from the mean over all patches. With head i, for patches t and u a displacement t - u apart:
    AFT_t = sigmoid(q_t) * (sum_u exp(k_u + w_tu) * v_u) / (sum_u exp(k_u + w_tu))
    w_tu = w^i_{t-u} where both axes of t - u are within (s-1)/2, else 0.

How it is computed. [1] writes it as a depthwise convolution with exp(w) - 1 plus the sum over the image,
which cancels where w is far below 0. Here the convolution has exp(w), and what is outside of a window is
summed by itself: all of the rows beyond it, and in its own rows the columns beyond it, two products by
matrices of 0 and 1. Only positive terms.

Departures from [1], section 5.3: the channels of a patch go through one linear layer with a bias (as in DeiT,
on which it builds). There are no position embeddings unless ``positions`` says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xexport.core.contract import InputSpec
from xexport.core.state import StateSpec
from xexport.models._aft import KEY, AftConfig, Block, Mixer, filter_weights

__all__ = ["AftImage", "AftImageTraining", "image_tensors"]


class _Image(Mixer):
    """exp(w) as a buffer ``weight`` [h,1,s,s]."""

    weight: Tensor

    def __init__(self, c: AftConfig) -> None:
        super().__init__(c)
        self.register_buffer("weight", torch.ones(c.heads, 1, c.window, c.window))

    def average(self, x: Tensor, here: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """x [B,R*S,d] -> ([B,R*S,d],)."""
        c, (rows, columns) = self.c, self.c.grid
        key = self.k_proj(x).clamp(-KEY, KEY).exp()[..., None]
        value = torch.unflatten(self.v_proj(x), -1, (c.heads, -1))
        terms = torch.cat((key * value, key), -1)  # [B,R*S,h,d/h+1]
        each = terms.shape[-1]
        plane = terms.permute(0, 3, 2, 1).reshape(-1, c.heads, rows, columns)
        sums = self.near(plane) + self.beyond(plane)
        sums = sums.view(-1, each, c.heads, rows * columns).permute(0, 3, 2, 1)
        return ((sums[..., : each - 1] / sums[..., each - 1 :]).flatten(2),)

    def near(self, plane: Tensor) -> Tensor:
        """What is in the windows, [n,h,R,S] -> the same shape."""
        return F.conv2d(plane, self.taps(), padding=self.c.window // 2, groups=self.c.heads)

    def beyond(self, plane: Tensor) -> Tensor:
        """What is outside of them: rows beyond, and columns beyond of the rows within."""
        rows, columns = (_beyond(size, self.c.window, plane) for size in self.c.grid)
        return rows @ plane.sum(-1, keepdim=True) + (1 - rows) @ (plane @ columns)

    def taps(self) -> Tensor:
        """[h,1,s,s]."""
        return self.weight


class _ImageTraining(_Image):
    def __init__(self, c: AftConfig) -> None:
        super().__init__(c)
        del self.weight
        self.filter = nn.Parameter(torch.zeros(c.heads, c.window, c.window))
        self.gain, self.shift = (nn.Parameter(torch.zeros(c.heads)) for _ in range(2))

    def taps(self) -> Tensor:
        return filter_weights(self.filter, self.gain, self.shift)[:, None]


def _beyond(size: int, window: int, like: Tensor) -> Tensor:
    """[size,size]: 1 where two places of an axis are more than half a window apart. Symmetric; a constant."""
    place = torch.arange(size, device=like.device)
    return ((place[:, None] - place).abs() > window // 2).to(like.dtype)


class AftImage(nn.Module):
    """The whole form: ``forward(features [B,R*S,P] float32) -> (logits [B,1,V],)``."""

    form = "whole"
    predicts_next = False
    mixer: type[_Image] = _Image

    def __init__(self, config: AftConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.fixed_length = config.grid[0] * config.grid[1]
        self.input_spec = InputSpec("features", "patches", config.patch)
        self.patches = nn.Linear(config.patch, config.width)
        self.place = nn.Embedding(self.fixed_length, config.width) if config.positions else None
        self.layers = nn.ModuleList(Block(config, self.mixer(config)) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, config.eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)

    def state_spec(self) -> Sequence[StateSpec]:
        """Empty: nothing is carried."""
        return []

    def blocks(self) -> list[Block]:
        """The blocks in their order."""
        return list(self.layers)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        return (self.logits(features),)

    def logits(self, features: Tensor) -> Tensor:
        """Patches ``[B,R*S,P]`` -> logits of the classes ``[B,1,V]``."""
        x, here = self.patches(features), torch.arange(self.fixed_length, device=features.device)
        if self.place is not None:
            x = x + self.place(here)
        for block in self.blocks():
            x = block.ffn(x + block.mixer(block.mixer_norm(x), here)[0])
        found: Tensor = self.head(self.norm(x).mean(1, keepdim=True))
        return found


class AftImageTraining(AftImage):
    """The training form: ``forward(features) -> logits``; filters in place of the weights they make."""

    mixer = _ImageTraining

    def forward(self, features: Tensor) -> Tensor:  # type: ignore[override]
        return self.logits(features)


def image_tensors(config: AftConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The training form's tensors with every filter replaced by exp(w), made in float64."""
    result = {name: value.detach() for name, value in tensors.items()}
    for i in range(config.layers):
        prefix = f"layers.{i}.mixer."
        parts = (result.pop(prefix + name).double() for name in ("filter", "gain", "shift"))
        result[prefix + "weight"] = filter_weights(*parts)[:, None].float()
    return result
