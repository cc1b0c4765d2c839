"""The parts of a Conformer: subsampling, feed-forward, relative attention, convolution, and their block.

Sources and symbols: models/conformer.py. ``n`` is the number of frames after subsampling, 40 ms each.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xexport.ops.causal_conv1d.reference import causal_conv1d

__all__ = ["Block", "Places", "Subsampling", "position_table", "projected_table"]

_LONGEST_WAVE = 10_000.0


class Places(NamedTuple):
    """What the layers share about positions.

    Attributes:
        table: :func:`position_table` ``[D,d]`` of the distances that occur, descending by one, or None if
            the layers have it projected.
        ahead: how many of them are negative: frames after the query's that it may see.
        hidden: bool ``[n,S]``, whether query t does not see key s; None if it sees all.
    """

    table: Tensor | None
    ahead: Any
    hidden: Tensor | None = None


class Subsampling(nn.Module):
    """Frames to a quarter: two 3x3 convolutions of stride 2 over time and mel bins, and a projection.

    In time they look back only, each by one row that is carried; over the bins they are centred.
    """

    def __init__(self, bins: int, channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, stride=2, padding=(0, 1))
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=2, padding=(0, 1))
        self.out = nn.Linear(channels * _half(_half(bins)), width)

    def forward(self, x: Tensor, row1: Tensor, row2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x [B,T,F], T a multiple of 4; rows [B,1,1,F] and [B,C,1,F/2]) -> (y [B,T/4,d], new rows)."""
        x = torch.cat((row1, x[:, None]), 2)
        y = torch.cat((row2, F.relu(self.conv1(x))), 2)
        z = F.relu(self.conv2(y))
        return self.out(z.transpose(1, 2).flatten(2)), x[:, :, -1:], y[:, :, -1:]


def _half(bins: int) -> int:
    """Bins after one of the convolutions."""
    return (bins + 1) // 2


class _FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B,n,d] -> [B,n,d]."""
        out: Tensor = self.down(F.silu(self.up(x)))
        return out


class _Attention(nn.Module):
    """[2], equation for A^rel: (q_t + u).k_s + (q_t + v).W_r R_{t-s}, over the root of the head size."""

    def __init__(self, c: Any, trained: bool) -> None:
        super().__init__()
        d, size = c.width, c.width // c.heads
        self.heads, self.scale = c.heads, size**-0.5
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(d, d) for _ in range(4))
        self.u, self.v = (nn.Parameter(torch.zeros(c.heads, 1, size)) for _ in range(2))
        if c.streaming and not trained:
            self.positions = nn.Parameter(torch.zeros(c.heads, size, c.distances))
        else:
            self.pos_proj = nn.Linear(d, d, bias=False)

    def forward(
        self, x: Tensor, places: Places, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(x [B,n,d], earlier keys and values [B,L,d] or None) -> (y [B,n,d], the last L keys and values)."""
        q, k, v = self._split(self.q_proj(x)), self.k_proj(x), self.v_proj(x)
        if past is not None:
            k, v = torch.cat((past[0], k), 1), torch.cat((past[1], v), 1)
        by_place = shifted((q + self.v) @ self._table(places), k.shape[1], places.ahead)
        scores = ((q + self.u) @ self._split(k).transpose(2, 3) + by_place) * self.scale
        if places.hidden is not None:
            scores = scores.masked_fill(places.hidden, -math.inf)
        y = (scores.softmax(-1) @ self._split(v)).transpose(1, 2).flatten(2)
        return self.o_proj(y), k[:, x.shape[1] :], v[:, x.shape[1] :]

    def _split(self, x: Tensor) -> Tensor:
        """[B,n,d] -> [B,H,n,K]."""
        return torch.unflatten(x, -1, (self.heads, -1)).transpose(1, 2)

    def _table(self, places: Places) -> Tensor:
        """W_r R ``[H,K,D]``."""
        if places.table is None:
            return self.positions
        return projected_table(self.pos_proj.weight, places.table, self.heads)


def projected_table(weight: Tensor, table: Tensor, heads: int) -> Tensor:
    """W_r R: (weight [d,d], table [D,d]) -> ``[H,K,D]``."""
    return torch.unflatten(F.linear(table, weight), -1, (heads, -1)).permute(1, 2, 0)


def position_table(most: Any, least: Any, width: int, like: Tensor) -> Tensor:
    """R of the distances ``most``, most - 1, ..., ``least``: ``[D,width]``, of device and dtype of ``like``.

    Sines, then cosines, of distance x 10000^(-2i/width), as [2] has them (other code interleaves them,
    which permutes the columns of W_r).
    """
    step = -2 * math.log(_LONGEST_WAVE) / width
    rates = torch.exp(torch.arange(width // 2, device=like.device, dtype=like.dtype) * step)
    distance = torch.arange(most, least - 1, -1, device=like.device, dtype=like.dtype)
    angle = distance[:, None] * rates
    return torch.cat((angle.sin(), angle.cos()), -1)


def shifted(scores: Tensor, keys: Any, ahead: Any) -> Tensor:
    """Scores by distance to scores by key: ``[B,H,n,D]`` -> ``[B,H,n,keys]``.

    Column e of row t is of the distance S-n+ahead-e, that of query t from key s = t + e - ahead. Rows are
    padded to W + 1 columns, W = keys + ahead, and read again as rows of W: that moves row t by t. What runs
    over the end of a row comes to the first ``ahead`` columns of the next, which are dropped.
    """
    width = keys + ahead
    padded = F.pad(scores, (0, width + 1 - scores.shape[3]))
    rows = padded.flatten(2)[:, :, : scores.shape[2] * width]
    return torch.unflatten(rows, 2, (scores.shape[2], width))[..., ahead:]


class _Depthwise(nn.Module):
    """The depthwise convolution with its batch norm folded into it, and Swish.

    ``right`` frames of it lie after the present one; what is before the first frame is ``last``.
    """

    def __init__(self, channels: int, kernel: int, right: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(kernel, channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.right = right

    def forward(self, x: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """(x [B,n,d], last [B,kernel-1,d]) -> (y [B,n,d], the new last)."""
        if self.right:
            x = F.pad(x, (0, 0, 0, self.right))
        y, last = causal_conv1d(x, self.weight, self.bias, last, silu=True)
        return y[:, self.right :] if self.right else y, last


class _TrainedDepthwise(nn.Module):
    """As :class:`_Depthwise`, with the batch norm as it is trained."""

    def __init__(self, channels: int, kernel: int, right: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, kernel, groups=channels)
        self.norm = nn.BatchNorm1d(channels)
        self.right = right

    def forward(self, x: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`_Depthwise.forward`; ``last`` must be zeros, and comes back."""
        before = last.shape[1] - self.right
        y = self.conv(F.pad(x.transpose(1, 2), (before, self.right)))
        return F.silu(self.norm(y)).transpose(1, 2), last


class _Convolution(nn.Module):
    """Pointwise, gated linear unit, depthwise, batch norm, Swish, pointwise ([1], figure 2)."""

    def __init__(self, c: Any, trained: bool) -> None:
        super().__init__()
        self.up = nn.Linear(c.width, 2 * c.width)
        make = _TrainedDepthwise if trained else _Depthwise
        self.depthwise = make(c.width, c.kernel, 0 if c.streaming else (c.kernel - 1) // 2)
        self.down = nn.Linear(c.width, c.width)

    def forward(self, x: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """(x [B,n,d], last [B,kernel-1,d]) -> (y [B,n,d], the new last)."""
        y, last = self.depthwise(F.glu(self.up(x), -1), last)
        return self.down(y), last


class Block(nn.Module):
    """[1], equation 1: half a feed-forward, attention, convolution, the other half, a norm.

    Args:
        c: a ConformerConfig.
        trained: have the batch norm and W_r as they are trained, not folded.
    """

    def __init__(self, c: Any, trained: bool = False) -> None:
        super().__init__()
        self.ff1_norm, self.attention_norm, self.conv_norm, self.ff2_norm, self.norm = (
            nn.LayerNorm(c.width, eps=c.eps) for _ in range(5)
        )
        self.ff1, self.ff2 = _FeedForward(c.width, c.ffn), _FeedForward(c.width, c.ffn)
        self.attention = _Attention(c, trained)
        self.conv = _Convolution(c, trained)

    def forward(
        self, x: Tensor, places: Places, past: tuple[Tensor, Tensor] | None, last: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """(x [B,n,d], keys and values [B,L,d] or None, last [B,kernel-1,d]) -> (y [B,n,d], these anew)."""
        x = x + self.ff1(self.ff1_norm(x)) * 0.5
        y, k, v = self.attention(self.attention_norm(x), places, past)
        x = x + y
        y, last = self.conv(self.conv_norm(x), last)
        x = x + y
        return self.norm(x + self.ff2(self.ff2_norm(x)) * 0.5), [k, v, last]
