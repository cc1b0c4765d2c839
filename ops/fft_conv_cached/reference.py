"""Causal long convolution of a chunk, with the inputs so far in a cache: the definition.

The cache holds inputs 0 .. pos-1. A chunk of T is written behind them, and

    y[b,d,t] = sum_{s=0..pos+t} h[d,pos+t-s] cache[b,d,s]          for t = 0 .. T-1

exactly as if the sequence had been convolved at once, up to the filter's length L.
"""

from __future__ import annotations

import torch

from xexport.core.errors import LimitError
from xexport.ops.fft_conv.reference import causal_conv

__all__ = ["fft_conv_cached"]


@torch.library.custom_op("xexport::fft_conv_cached", mutates_args=())
def fft_conv_cached(
    u: torch.Tensor, h: torch.Tensor, cache: torch.Tensor, pos: torch.Tensor, n1: int, n2: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolve a chunk ``u [B,D,T]`` with ``h [D,L]`` after ``pos [1]`` earlier inputs in ``cache [B,D,L]``.

    Returns:
        the outputs ``[B,D,T]`` and the cache with the chunk in it.

    Raises:
        LimitError: pos + T is more than L.
    """
    begin, limit = int(pos), h.shape[-1]
    end = begin + u.shape[-1]
    if end > limit:
        raise LimitError("a stream is longer than the filter", got=end, allowed=limit, fix="reset the stream")
    after = cache.clone()
    after[..., begin:end] = u
    seen = after[..., :end].double()
    if end - begin == 1:
        y = (seen * h[:, :end].double().flip(-1)).sum(-1, keepdim=True)
    else:
        y = causal_conv(seen, h.double())[..., begin:]
    return y.to(u.dtype), after


@fft_conv_cached.register_fake
def _(u, h, cache, pos, n1, n2):  # type: ignore[no-untyped-def]
    return torch.empty_like(u), torch.empty_like(cache)
