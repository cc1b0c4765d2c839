"""Causal softmax attention of a chunk, with earlier keys and values in a bounded cache: the definition.

Vaswani et al., arXiv 1706.03762, equation 1; heads may share keys and values (GQA, MQA: arXiv 1911.02150).
The caches hold tokens 0 .. pos-1. A chunk of T is written behind them, and query head h at token pos+t sees

    o = sum_{s=0..pos+t} softmax_s(scale * q.k_s) v_s      with k, v of head h // (heads / kv_heads)
"""

from __future__ import annotations

import torch

from xexport.core.errors import LimitError

__all__ = ["cached_attention"]


@torch.library.custom_op("xexport::cached_attention", mutates_args=())
def cached_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    pos: torch.Tensor,
    heads: int,
    kv_heads: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend from ``q [B,T,heads*K]`` to the chunk's own and all earlier keys.

    Args:
        k, v: ``[B,T,kv_heads*K]`` and ``[B,T,kv_heads*V]``.
        k_cache, v_cache: ``[B,kv_heads,L,K]`` and ``[B,kv_heads,L,V]``, the first ``pos`` rows in use.
        pos: int64 ``[1]``, tokens so far.
        heads: a multiple of ``kv_heads``.

    Returns:
        the output ``[B,T,heads*V]`` and the two caches with the chunk in them.

    Raises:
        LimitError: pos + T is more than L.
    """
    begin, limit, tokens = int(pos), k_cache.shape[2], q.shape[1]
    end = begin + tokens
    if end > limit:
        raise LimitError(
            "a stream is longer than the cache of keys and values",
            got=end,
            allowed=limit,
            fix="reset the stream, or export with a larger max_tokens",
        )
    keys, values = k_cache.clone(), v_cache.clone()
    keys[:, :, begin:end] = torch.unflatten(k, -1, (kv_heads, -1)).transpose(1, 2)
    values[:, :, begin:end] = torch.unflatten(v, -1, (kv_heads, -1)).transpose(1, 2)
    query = torch.unflatten(q, -1, (kv_heads, heads // kv_heads, -1)).permute(0, 2, 3, 1, 4)
    scores = (query * scale) @ keys[:, :, None, :end].transpose(-1, -2)
    place = torch.arange(end, device=q.device)
    scores = scores.masked_fill(place > place[begin:, None], float("-inf"))
    out = scores.softmax(-1) @ values[:, :, None, :end]
    return out.permute(0, 3, 1, 2, 4).flatten(2), keys, values


@cached_attention.register_fake
def _(q, k, v, k_cache, v_cache, pos, heads, kv_heads, scale):  # type: ignore[no-untyped-def]
    out = q.new_empty(q.shape[0], q.shape[1], heads * v_cache.shape[3])
    return out, torch.empty_like(k_cache), torch.empty_like(v_cache)
