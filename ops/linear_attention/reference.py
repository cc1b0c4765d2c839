"""The gated rule of com.microsoft LinearAttention, as a plain loop over the tokens: the definition.

For every head, with state ``S [K,V]`` and ``g [K]``, or one number for all keys:

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T          o_t = scale * S_t^T q_t

This is RetNet's recurrence (arXiv 2307.08621, equation 6) when ``g`` is the constant ``log gamma``, gated
linear attention (arXiv 2312.06635, equation 3) with one decay a key, and linear attention without a
normaliser (arXiv 2006.16236, equations 18 to 20) when ``g`` is zero.
"""

from __future__ import annotations

import torch

__all__ = ["linear_attention"]


@torch.library.custom_op("xexport::linear_attention", mutates_args=())
def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    decay: torch.Tensor,
    q_num_heads: int,
    kv_num_heads: int,
    scale: float,
    update_rule: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence over a chunk.

    Args:
        q, k: ``[B,T,H*K]``, heads packed as ONNX Runtime wants them.
        v: ``[B,T,H*V]``.
        state: ``[B,H,K,V]``, the state before the chunk.
        decay: ``[B,T,H]`` or ``[B,T,H*K]``, logarithm of the decay (0 or below).
        q_num_heads, kv_num_heads: H; equal, as grouped heads are not needed by any family here.
        scale: factor on the output.
        update_rule: ``"gated"``, the one rule supported.

    Returns:
        the output ``[B,T,H*V]`` and the state ``[B,H,K,V]`` after the chunk.
    """
    if update_rule != "gated" or q_num_heads != kv_num_heads:
        raise ValueError(f"unsupported: update_rule={update_rule!r}, heads {q_num_heads}/{kv_num_heads}")
    batch, tokens, heads = q.shape[0], q.shape[1], q_num_heads
    qh = q.reshape(batch, tokens, heads, -1) * scale
    kh = k.reshape(batch, tokens, heads, -1)
    vh = v.reshape(batch, tokens, heads, -1)
    keep = decay.exp().reshape(batch, tokens, heads, -1, 1)
    now, out = state.clone(), torch.empty_like(vh)
    for t in range(tokens):
        now = keep[:, t] * now + kh[:, t, :, :, None] * vh[:, t, :, None, :]
        out[:, t] = (qh[:, t, :, None, :] @ now)[:, :, 0]
    return out.reshape(batch, tokens, -1), now


@linear_attention.register_fake
def _(  # type: ignore[no-untyped-def]
    q, k, v, state, decay, q_num_heads, kv_num_heads, scale, update_rule
):
    return torch.empty_like(v), torch.empty_like(state)
