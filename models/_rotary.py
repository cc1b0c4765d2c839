"""Rotary positions (RoFormer, arXiv 2104.09864, section 3.2.2); the angles are ops/rotary_angles."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from xexport.core.errors import InputError
from xexport.ops.rotary_angles.reference import TURN, rope_angles

__all__ = ["rope_angles", "rotate", "rotate_pairs", "turns_of"]


def turns_of(rates: Sequence[float]) -> list[int]:
    """Angles a token, in radians, as whole units of 2^-32 turns.

    Raises:
        InputError: an angle that is negative or above a quarter turn.
    """
    turns = [round(r / (2 * math.pi) * TURN) for r in rates]
    if turns and not 0 <= min(turns) <= max(turns) <= TURN // 4:
        raise InputError("a rotation's angle a token is out of range", got=max(rates), allowed="0 to pi/2")
    return turns


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (i, i + K/2) of the last axis."""
    cos, sin = rope
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of the last axis."""
    even, odd = torch.unflatten(x, -1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
