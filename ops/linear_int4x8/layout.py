"""The layout of ``linear_int4x8``: MatMulNBits' with eight rows side by side.

A vector register then holds the same four bytes of eight rows, one row a lane: four activations in every lane
serve them all, and no sum ever has to cross lanes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["ROWS", "interleaved_codes", "interleaved_scales", "padded"]

#: rows that lie together
ROWS = 8

#: 8 + 8 * 16, two codes that stand for zero
_ZEROS = 0x88


def interleaved_codes(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """MatMulNBits' ``[N,blocks,16]`` -> ``[ceil(N / 8),blocks,4,8,4]``: group, block, dword, row, byte."""
    groups = padded(codes, _ZEROS).reshape(-1, ROWS, codes.shape[1], 4, 4)
    return np.ascontiguousarray(groups.transpose(0, 2, 3, 1, 4))


def interleaved_scales(scales: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """``[N,blocks]`` -> ``[ceil(N / 8),blocks,8]``."""
    return np.ascontiguousarray(padded(scales, 0).reshape(-1, ROWS, scales.shape[1]).transpose(0, 2, 1))


def padded(rows: npt.NDArray[Any], value: int) -> npt.NDArray[Any]:
    """Rows of ``value`` behind the others, up to a multiple of eight."""
    missing = -len(rows) % ROWS
    return np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1), constant_values=value)
