"""The gated rule of linear_attention in chunks of matrix products: differentiable, the form to train with.

Inside a chunk of C tokens, with ``g`` the log decays (arXiv 2312.06635, section 4.1; arXiv 2405.21060,
section 6, where the matrix of pairwise decays is called the 1-semiseparable mask):

    o_t = scale * ( sum_{s<=t} e^{g_{s+1} + .. + g_t} (q_t.k_s) v_s  +  e^{g_1 + .. + g_t} S^T q_t )
    S'  = e^{g_1 + .. + g_C} S + sum_s e^{g_{s+1} + .. + g_C} k_s v_s^T
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["gated_parallel"]


def gated_parallel(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, decay: Tensor, scale: float = 1.0, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """The same function as ``linear_attention`` with the rule "gated", with the heads as an axis.

    Args:
        q, k: ``[B,T,H,K]``.
        v: ``[B,T,H,V]``.
        state: ``[B,H,K,V]``.
        decay: ``[B,T,H]``, 0 or below.
        scale: factor on the output.
        chunk: C.

    Returns:
        the output ``[B,T,H,V]`` and the state after the last token.
    """
    B, T, H, _ = k.shape
    chunk = min(chunk, T)
    count = -(-T // chunk)
    pad = count * chunk - T

    def cut(x: Tensor) -> Tensor:
        """[B,T,H,X] -> [chunks,B,H,C,X], padded with zeros."""
        x = F.pad(x, (0, 0, 0, 0, 0, pad)) if pad else x
        return x.reshape(B, count, chunk, H, -1).permute(1, 0, 3, 2, 4)

    q, k, v, g = cut(q * scale), cut(k), cut(v), cut(decay.unsqueeze(-1))
    within = torch.ones(chunk, chunk, dtype=torch.bool, device=k.device).tril()
    # [...,t,s]: the sum from s + 1 to t, added up for every s alone (a difference of sums loses digits)
    spans = (g * within.tril(-1)).cumsum(3)
    fade = spans.masked_fill(~within, -torch.inf).exp()
    total = g.cumsum(3)
    inside = ((q @ k.mT) * fade) @ v
    added = (k * spans[..., -1, :].exp().unsqueeze(-1)).mT @ v
    kept = total[..., -1:, :].exp()
    S, starts = state, []
    for added_c, kept_c in zip(added.unbind(0), kept.unbind(0), strict=True):
        starts.append(S)
        S = kept_c * S + added_c
    out = inside + (q * total.exp()) @ torch.stack(starts)
    return out.permute(1, 0, 3, 2, 4).reshape(B, count * chunk, H, -1)[:, :T], S
