"""Causal softmax attention over sinks and a window, with a ring of keys and values: the definition.

Beltagy et al., Longformer, arXiv 2004.05150, section 3.1 (a sliding window); Xiao et al., arXiv 2309.17453,
section 3.2 (the first S tokens, the sinks, are always seen). Query head h at token n sees, with the keys of
head h // (heads / kv_heads), the sinks s < S through ``q_sinks`` and the tokens max(S, n-W+1) .. n through
``q``, all in one softmax. Row s of a cache holds sink s, row S + (s - S) mod C token s, C >= W rows being
its ring.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["window_attention"]


@torch.library.custom_op("xexport::window_attention", mutates_args=())
def window_attention(
    q: Tensor,
    q_sinks: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    pos: Tensor,
    heads: int,
    kv_heads: int,
    window: int,
    sinks: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend from a chunk to sinks and window.

    Args:
        q, q_sinks: ``[B,T,heads*K]``; another one for the sinks, whose rotation may differ.
        k, v: ``[B,T,kv_heads*K]`` and ``[B,T,kv_heads*V]``.
        k_cache, v_cache: ``[B,kv_heads,S+C,K]`` and ``[B,kv_heads,S+C,V]``.
        pos: int64 ``[1]``, tokens so far.
        heads: a multiple of ``kv_heads``.
        window, sinks: W and S.

    Returns:
        the output ``[B,T,heads*V]`` and the two caches with the chunk in them.
    """
    ring = k_cache.shape[2] - sinks
    kh, vh = (torch.unflatten(x, -1, (kv_heads, -1)) for x in (k, v))
    grouped = [torch.unflatten(x * scale, -1, (kv_heads, heads // kv_heads, -1)) for x in (q_sinks, q)]
    keys, values = k_cache.clone(), v_cache.clone()
    out = []
    for t in range(q.shape[1]):
        n = int(pos) + t
        row = n if n < sinks else sinks + (n - sinks) % ring
        keys[:, :, row], values[:, :, row] = kh[:, t], vh[:, t]
        first = list(range(min(sinks, n + 1)))
        near = [sinks + (s - sinks) % ring for s in range(max(sinks, n - window + 1), n + 1)]
        scores = [
            x[:, t] @ keys[:, :, rows].transpose(-1, -2)
            for x, rows in zip(grouped, (first, near), strict=True)
        ]
        out.append((torch.cat(scores, -1).softmax(-1) @ values[:, :, first + near]).flatten(1))
    return torch.stack(out, 1), keys, values


@window_attention.register_fake
def _(q, q_sinks, k, v, k_cache, v_cache, pos, heads, kv_heads, window, sinks, scale):  # type: ignore[no-untyped-def]
    out = q.new_empty(q.shape[0], q.shape[1], heads * v_cache.shape[3])
    return out, torch.empty_like(k_cache), torch.empty_like(v_cache)
