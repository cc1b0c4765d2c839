"""The RWKV-7 recurrence as a plain loop: the definition that every other form is compared with.

    S_t = S_{t-1} diag(w_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T        y_t = S_t r_t

Source: B. Peng et al., "RWKV-7 Goose", arXiv 2503.14456, equations 17 and 18 (a = -kk, b = kk * iclr).
The state is ``[B,H,N,N]`` and read as S[v,k]: rows are value channels, columns key channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xexport.ops.wkv7.parallel import wkv7_parallel

__all__ = ["wkv7"]


@torch.library.custom_op("xexport::wkv7", mutates_args=())
def _wkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    S, rows = state, []
    for t in range(r.shape[1]):
        removed = S @ a[:, t].unsqueeze(-1)
        # one product adds both outer products: [u v] [b k]^T
        columns = torch.cat((removed, v[:, t].unsqueeze(-1)), -1)
        S = S * w[:, t].unsqueeze(-2) + columns @ torch.stack((b[:, t], k[:, t]), -2)
        rows.append((S @ r[:, t].unsqueeze(-1)).squeeze(-1))
    return (torch.stack(rows, 1) if rows else torch.empty_like(v)), S.clone()


@_wkv7.register_fake
def _(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), state.new_empty(state.shape)


def wkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence, differentiable where a gradient is asked for.

    Args:
        r, w, k, v, a, b: ``[B,T,H,N]`` float; w is the decay in (0, 1).
        state: ``[B,H,N,N]``, S[v,k].

    Returns:
        y ``[B,T,H,N]`` and the new state ``[B,H,N,N]``.
    """
    inputs = (r, w, k, v, a, b, state)
    if torch.is_grad_enabled() and not torch.compiler.is_exporting() and any(x.requires_grad for x in inputs):
        return wkv7_parallel(*inputs)
    y, new_state = _wkv7(*inputs)
    return y, new_state
