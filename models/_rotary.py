"""Rotary positions (RoFormer, arXiv 2104.09864, section 3.2.2) that are exact at any distance.

``position * theta`` in float32 is wrong by 0.006 rad at token 100 000. Here theta is a fraction of a turn in
units of 2^-32, the product is taken modulo 2^32 in int64 and is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["rope_angles", "rotate", "rotate_pairs", "turns_of"]

_TURN = 1 << 32


def turns_of(rates: Sequence[float]) -> list[int]:
    """Angles a token, in radians, as whole units of 2^-32 turns."""
    return [round(r / (2 * math.pi) * _TURN) for r in rates]


def rope_angles(turns: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin ``[T,1,K/2]`` at int64 positions ``[T]`` below 2^31, of ``turns`` [K/2] in 2^-32 turns."""
    angle = ((positions[:, None, None] * turns) % _TURN).to(dtype) * (2 * math.pi / _TURN)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (i, i + K/2) of the last axis."""
    cos, sin = rope
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of the last axis."""
    even, odd = torch.unflatten(x, -1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
