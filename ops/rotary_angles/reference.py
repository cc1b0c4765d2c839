"""Rotary positions (RoFormer, arXiv 2104.09864, section 3.2.2), exact at any distance: the definition.

``position * theta`` in float32 is wrong by 0.006 rad at token 100 000. Here theta is a fraction of a turn in
units of 2^-32, and the product is taken modulo 2^32, so that it is exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["TURN", "rope_angles", "rotary_angles"]

#: units of a whole turn
TURN = 1 << 32


def rope_angles(turns: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin ``[T,1,N]`` at int64 positions ``[T]`` below 2^31 of ``turns [N]``, 2^-32 turns a token."""
    if dtype == torch.float32:
        found: tuple[Tensor, Tensor] = rotary_angles(positions, turns)
        return found
    return _angles(positions, turns, dtype)


def _angles(positions: Tensor, turns: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = ((positions[:, None, None] * turns) % TURN).to(dtype) * (2 * math.pi / TURN)
    return angle.cos(), angle.sin()


@torch.library.custom_op("xexport::rotary_angles", mutates_args=())
def rotary_angles(positions: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
    """The angles' cos and sin in float32.

    Args:
        positions: int64 ``[T]``, from 0 to 2^31 - 1.
        turns: int64 ``[N]``, 0 to 2^30 units of 2^-32 turns a token.

    Returns:
        cos and sin, float32 ``[T,1,N]``.
    """
    return _angles(positions, turns, torch.float32)


@rotary_angles.register_fake
def _(positions, turns):  # type: ignore[no-untyped-def]
    shape = positions.shape[0], 1, turns.shape[0]
    return tuple(turns.new_empty(shape, dtype=torch.float32) for _ in range(2))
