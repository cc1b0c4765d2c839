"""The gated linear recurrence as a plain loop over the tokens: the definition.

For every head, with state ``S [K,V]`` and ``g [K]``, or one number for all keys:

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T          o_t = scale * S_t^T q_t

Sources: RetNet (Sun et al., arXiv 2307.08621, equation 6) where ``g`` is the constant ``log gamma``; Mamba-2
(Dao and Gu, arXiv 2405.21060, section 6) with one decay a head; gated linear attention (Yang et al., arXiv
2312.06635, equation 3) with one a key; linear attention (arXiv 2006.16236, equations 18 to 20) where it is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["linear_recurrence"]


@torch.library.custom_op("xexport::linear_recurrence", mutates_args=())
def linear_recurrence(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, decay: Tensor, heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over a chunk.

    Args:
        q, k: ``[B,T,H*K]``, heads packed.
        v: ``[B,T,H*V]``.
        state: ``[B,H,K,V]``, the state before the chunk.
        decay: ``[B,T,H]`` or ``[B,T,H*K]``, logarithm of the decay (0 or below).
        heads: H.
        scale: factor on the output.

    Returns:
        the output ``[B,T,H*V]`` and the state ``[B,H,K,V]`` after the chunk.
    """
    batch, tokens = q.shape[:2]
    qh, kh, vh = (x.reshape(batch, tokens, heads, -1) for x in (q * scale, k, v))
    keep = decay.exp().reshape(batch, tokens, heads, -1, 1)
    now, out = state.clone(), torch.empty_like(vh)
    for t in range(tokens):
        now = keep[:, t] * now + kh[:, t, :, :, None] * vh[:, t, :, None, :]
        out[:, t] = (qh[:, t, :, None, :] @ now)[:, :, 0]
    return out.reshape(batch, tokens, -1), now


@linear_recurrence.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, decay: Tensor, heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), torch.empty_like(state)
