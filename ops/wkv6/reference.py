"""The recurrence of RWKV-5 and 6 as a plain loop: the definition that every other form is compared with.

    y_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t        S_t = diag(w_t) S_{t-1} + k_t v_t^T

Source: B. Peng et al., "Eagle and Finch", arXiv 2404.05892, equations 7 and 8 (RWKV-5: w is the same for
every token) and 16 to 19 (RWKV-6). The state is ``[B,H,N,M]`` and read as S[k,v]: rows are key channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xexport.ops.wkv6.parallel import wkv6_parallel

__all__ = ["wkv6"]


@torch.library.custom_op("xexport::wkv6", mutates_args=())
def _wkv6(r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    S, rows, w = state.clone(), [], w.expand_as(k)
    for t in range(k.shape[1]):
        read = r[:, t].unsqueeze(-2) @ S
        bonus = (r[:, t] * u * k[:, t]).sum(-1, keepdim=True) * v[:, t]
        rows.append(read.squeeze(-2) + bonus)
        S = w[:, t].unsqueeze(-1) * S + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
    return (torch.stack(rows, 1) if rows else torch.empty_like(v)), S


@_wkv6.register_fake
def _(r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), state.new_empty(state.shape)


def wkv6(r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence, differentiable where a gradient is asked for.

    Args:
        r, k: ``[B,T,H,N]``.
        w: ``[B,T,H,N]``, the decay in [0, 1]; or ``[1,1,H,N]``, the same for every token.
        v: ``[B,T,H,M]``.
        u: ``[H,N]``, the bonus of the current token.
        state: ``[B,H,N,M]``, S[k,v].

    Returns:
        y ``[B,T,H,M]`` and the new state ``[B,H,N,M]``.
    """
    inputs = (r, w, k, v, u, state)
    if torch.is_grad_enabled() and not torch.compiler.is_exporting() and any(x.requires_grad for x in inputs):
        return wkv6_parallel(*inputs)
    y, new_state = _wkv6(*inputs)
    return y, new_state
