"""The layout of ``linear_int6x8``: 16 codes of a row in twelve bytes, eight rows side by side.

Three bytes hold a code each in their low six bits, and a third of a fourth code in their high two. So a
vector register of the same four bytes of eight rows needs one mask for four codes a row, and three of them
give the four others (ops/linear_int6x8/loops.cc).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from xexport.ops.linear_int4x8.layout import ROWS, padded

__all__ = ["interleaved_six"]

#: the code that stands for zero
_ZERO = 32


def interleaved_six(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Codes below 64 ``[N,blocks,32]`` -> ``[ceil(N / 8),blocks,6,8,4]``: group, block, dword, row, byte.

    Of 16 codes in a row, dwords 0, 1 and 2 hold codes 0-3, 4-7 and 8-11, and their high bits codes 12-15:
    dword 0 the lowest two bits, 2 the highest.
    """
    blocks = codes.shape[1]
    quads = padded(codes, _ZERO).reshape(-1, ROWS, blocks, 2, 4, 4)
    low, last = quads[..., :3, :], quads[..., 3:, :]
    parts: npt.NDArray[Any] = np.array([[0], [2], [4]], np.uint8)
    stored = low | (((last >> parts) & 3) << 6)  # [groups, row, block, half, dword, byte]
    turned = stored.transpose(0, 2, 3, 4, 1, 5)
    return np.ascontiguousarray(turned.reshape(-1, blocks, 6, ROWS, 4))
