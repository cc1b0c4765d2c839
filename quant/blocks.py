"""Block-wise symmetric quantization of a matrix, with the scale that minimises each block's squared error.

Round-to-nearest with the largest absolute value as the range wastes levels on one outlier. Each
block tries a few smaller ranges and keeps the best: the search of GPTQ-style and GGUF quantizers,
in vectorised numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Blocks", "block_size_for", "quantize_blocks", "quantize_rows", "relative_error"]

Array = np.ndarray[Any, Any]
#: fractions of the largest absolute value that are tried as the range; 31/32 puts it at the code -32
_SHRINK = {8: (1.0,), 6: (1.0, 31 / 32), 4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)}

#: blocks of smaller values are stored as zeros: their step would be a subnormal number, or zero
_SMALLEST = 1e-30

#: the smallest and the largest normal number of float16
_HALF = (2.0**-14, 65504.0)
#: blocks of values too small for such a scale take the smallest, if the squared error grows by no more
_COARSER = 0.01


@dataclass(frozen=True)
class Blocks:
    """A quantized matrix: values ``(codes - zero) * scales``, codes uint8 [rows, blocks, size]."""

    codes: Array
    scales: Array
    zero: int

    @property
    def are_half(self) -> bool:
        """Whether float16 holds every scale exactly."""
        with np.errstate(over="ignore"):
            return bool(np.array_equal(self.scales.astype(np.float16).astype(np.float32), self.scales))

    def dequantize(self) -> Array:
        """float32 [rows, blocks * size]."""
        values = (self.codes.astype(np.float32) - self.zero) * self.scales[..., None]
        return values.reshape(values.shape[0], -1)


def block_size_for(depth: int, bits: int) -> int:
    """The block length along the summed dimension: small for 4 bits, the largest that divides for 8.

    A block that does not divide the depth is padded, which wastes bytes and time.
    """
    wanted = (32, 16) if bits == 4 else (128, 64, 32, 16)
    return next((size for size in wanted if depth % size == 0), 32)


def quantize_blocks(matrix: Array, bits: int, size: int, *, half_scales: bool = False) -> Blocks:
    """Quantize float32 [rows, depth] in blocks of ``size`` along depth (zero padded).

    ``half_scales`` asks for scales that float16 holds exactly. A few blocks of nearly nothing, as pruned rows
    have, get its smallest normal number; where that would cost, or a scale is beyond its largest number,
    all of them stay float32.
    """
    rows, depth = matrix.shape
    padded = -depth % size
    if padded:
        matrix = np.pad(matrix, ((0, 0), (0, padded)))
    blocks = np.ascontiguousarray(matrix, dtype=np.float32).reshape(rows, -1, size)
    zero = 1 << (bits - 1)
    top = zero - 1
    largest = np.abs(blocks).max(axis=2)
    half_scales = half_scales and _half_holds(largest[largest > _SMALLEST] / top)
    best_error = np.full(largest.shape, np.inf, np.float32)
    codes = np.empty(blocks.shape, np.uint8)
    scales = np.empty(largest.shape, np.float32)
    for shrink in _SHRINK[bits]:
        scale = np.where(largest > _SMALLEST, largest * (shrink / top), 1.0).astype(np.float32)
        if half_scales:
            scale = np.maximum(scale, np.float32(_HALF[0])).astype(np.float16).astype(np.float32)
        levels = np.clip(np.rint(blocks / scale[..., None]), -zero, top)
        error = np.square(levels * scale[..., None] - blocks).sum(axis=2)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        scales = np.where(better, scale, scales)
        codes = np.where(better[..., None], (levels + zero).astype(np.uint8), codes)
    return Blocks(codes, scales, zero)


def _half_holds(scales: Array) -> bool:
    """Whether float16 holds these scales, but for a few whose blocks its smallest normal number serves."""
    smallest, largest = _HALF
    if scales.size == 0:
        return True
    # a step of s costs s^2 / 12 a value
    below = int((scales < smallest).sum())
    power = float(np.square(scales, dtype=np.float64).sum())
    return float(scales.max()) <= largest and below * smallest**2 <= _COARSER * power


def quantize_rows(matrix: Array) -> tuple[Array, Array]:
    """int8 [rows, depth] and float32 scales [rows, 1]: symmetric, one scale a row."""
    largest = np.abs(matrix).max(axis=1, keepdims=True)
    scale = np.where(largest > _SMALLEST, largest / 127, 1.0).astype(np.float32)
    return np.rint(matrix / scale).astype(np.int8), scale


def relative_error(original: Array, stored: Array) -> float:
    """RMS of the difference over RMS of the original (float64)."""
    power = float(np.mean(np.square(original, dtype=np.float64)))
    if power == 0.0:
        return 0.0
    difference = np.asarray(stored, np.float64) - original
    return float(np.sqrt(np.mean(np.square(difference)) / power))
