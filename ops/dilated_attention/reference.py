"""Causal dilated attention of a chunk, with the going segments' keys and values in a cache: the definition.

Ding et al., LongNet, arXiv 2307.02486, equations 2 to 12. Pair p of a segment length w_p and a rate r_p
cuts the stream into segments of w_p tokens, in which head h has the places o_ph, o_ph + r_p, o_ph + 2 r_p
.. alone. A token at such a place sees itself and the places before it in its segment; the outputs of all
pairs that a token takes part in are mixed in proportion to the denominators of their softmaxes.

The cache has ceil(w_p / r_p) rows for every pair, one pair behind the other, and in each the last token at
that place: what is left of the segment before is overwritten by and by, and never read.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cache_rows", "dilated_attention"]


def cache_rows(segment: int, rate: int) -> int:
    """Rows of one pair: ceil(w / r)."""
    return -(-segment // rate)


@torch.library.custom_op("xexport::dilated_attention", mutates_args=())
def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    pos: Tensor,
    segments: Tensor,
    rates: Tensor,
    offsets: Tensor,
    heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend from ``q [B,T,H*K]`` to the places of every pair so far.

    Args:
        k, v: ``[B,T,H*K]`` and ``[B,T,H*V]``.
        k_cache, v_cache: ``[B,H,R,K]`` and ``[B,H,R,V]``, R the rows of all pairs.
        pos: int64 ``[1]``, tokens so far.
        segments, rates: int64 ``[P]``, w and r; one rate is 1, so that every token sees itself.
        offsets: int64 ``[P,H]``, o, below the rate.
        heads: H.

    Returns:
        the output ``[B,T,H*V]`` and the two caches with the chunk in them.
    """
    qh, kh, vh = (torch.unflatten(x, -1, (heads, -1)) for x in (q * scale, k, v))
    keys, values, out = k_cache.clone(), v_cache.clone(), torch.zeros_like(vh)
    pairs = list(zip(segments.tolist(), rates.tolist(), offsets, strict=True))
    for t in range(q.shape[1]):
        outs, logs = [], []  # of every pair, log the logarithm of the softmax's denominator
        first = 0
        for segment, rate, offset in pairs:
            place = (int(pos) + t) % segment
            here = (offset == place % rate).nonzero()[:, 0]  # the heads that have this place
            row = first + place // rate
            keys[:, here, row], values[:, here, row] = kh[:, t, here], vh[:, t, here]
            scores = (keys[:, here, first : row + 1] @ qh[:, t, here, :, None])[..., 0]
            mean = (scores.softmax(-1)[:, :, None] @ values[:, here, first : row + 1])[:, :, 0]
            outs.append(torch.zeros_like(out[:, t]).index_copy(1, here, mean))
            nothing = q.new_full((q.shape[0], heads), float("-inf"))
            logs.append(nothing.index_copy(1, here, scores.logsumexp(-1)))
            first += cache_rows(segment, rate)
        share = torch.stack(logs).softmax(0)
        out[:, t] = (share[..., None] * torch.stack(outs)).sum(0)
    return out.flatten(2), keys, values


@dilated_attention.register_fake
def _(q, k, v, k_cache, v_cache, pos, segments, rates, offsets, heads, scale):  # type: ignore[no-untyped-def]
    return torch.empty_like(v), torch.empty_like(k_cache), torch.empty_like(v_cache)
