"""Hyena's operator of order 2, channels last, with the convolved inputs so far in a cache: the definition.

    x0, x1, v = packed              each [B,T,D]
    z = x1 * v
    y = x0 * (h (*) z + skip * z)                          (*): causal long convolution, ops/fft_conv_cached

(M. Poli et al., arXiv 2302.10866, section 3.1, in the form of its published code, which gates first.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from xexport.ops.fft_conv_cached.reference import fft_conv_cached

__all__ = ["hyena_conv"]


@torch.library.custom_op("xexport::hyena_conv", mutates_args=())
def hyena_conv(
    packed: Tensor, h: Tensor, skip: Tensor, cache: Tensor, pos: Tensor, n1: int, n2: int
) -> tuple[Tensor, Tensor]:
    """Gate, convolve and gate a chunk ``packed [B,T,3D]`` after ``pos [1]`` earlier ones.

    Args:
        packed: x0, x1 and v side by side.
        h: ``[D,L]``, the filters. skip: ``[D]``.
        cache: ``[B,D,L]``, z of the stream so far.
        pos: tokens in the cache.
        n1, n2: factors of a transform that an implementation may use (ops/fft_conv fft_sizes).

    Returns:
        y ``[B,T,D]`` and the cache with the chunk's z in it.

    Raises:
        LimitError: pos + T is more than L.
    """
    x0, x1, v = packed.chunk(3, -1)
    z = x1 * v
    convolved, after = fft_conv_cached(z.mT, h, cache, pos, n1, n2)
    return x0 * (convolved.mT + skip * z), after


@hyena_conv.register_fake
def _(packed, h, skip, cache, pos, n1, n2):  # type: ignore[no-untyped-def]
    return packed.new_empty(*packed.shape[:2], skip.shape[0]), torch.empty_like(cache)
