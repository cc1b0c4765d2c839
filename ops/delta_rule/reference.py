"""The gated delta rule of com.microsoft LinearAttention, as a plain loop over the tokens: the definition.

Yang et al., arXiv 2412.06464, equation 10, with the state transposed; without decay (g = 0) it is the delta
rule of arXiv 2406.06484, equation 2. For every head, with state ``S [K,V]``:

    S'  = exp(g_t) S_{t-1}
    S_t = S' + beta_t k_t (v_t - S'^T k_t)^T          o_t = scale * S_t^T q_t
"""

from __future__ import annotations

import torch

__all__ = ["delta_rule"]


@torch.library.custom_op("xexport::delta_rule", mutates_args=())
def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    q_num_heads: int,
    kv_num_heads: int,
    scale: float,
    update_rule: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence over a chunk.

    Args:
        q, k: ``[B,T,H*K]``, heads packed; k of unit length, or the state may grow without bound.
        v: ``[B,T,H*V]``.
        state: ``[B,H,K,V]``, the state before the chunk.
        decay: ``[B,T,H]``, g, logarithm of the decay (0 or below).
        beta: ``[B,T,H]``, how much of what k finds is replaced: 0 nothing, 1 all.
        q_num_heads, kv_num_heads: H; equal.
        scale: factor on the output.
        update_rule: ``"gated_delta"``, the one rule supported.

    Returns:
        the output ``[B,T,H*V]`` and the state ``[B,H,K,V]`` after the chunk.
    """
    if update_rule != "gated_delta" or q_num_heads != kv_num_heads:
        raise ValueError(f"unsupported: update_rule={update_rule!r}, heads {q_num_heads}/{kv_num_heads}")
    batch, tokens, heads = q.shape[0], q.shape[1], q_num_heads
    qh, kh, vh = (x.reshape(batch, tokens, heads, -1) for x in (q, k, v))
    keep, rate = decay.exp()[..., None, None], beta[..., None]
    now, out = state.clone(), torch.empty_like(vh)
    for t in range(tokens):
        now = keep[:, t] * now
        found = (kh[:, t, :, None, :] @ now)[:, :, 0]
        now = now + kh[:, t, :, :, None] * (rate[:, t] * (vh[:, t] - found))[:, :, None, :]
        out[:, t] = (qh[:, t, :, None, :] @ now)[:, :, 0] * scale
    return out.reshape(batch, tokens, -1), now


@delta_rule.register_fake
def _(  # type: ignore[no-untyped-def]
    q, k, v, state, decay, beta, q_num_heads, kv_num_heads, scale, update_rule
):
    return torch.empty_like(v), torch.empty_like(state)
