"""The selective scan of Mamba-1 as a plain loop: the definition that every other form is compared with.

    h_t = exp(dt_t A) * h_{t-1} + (dt_t u_t) B_t        y_t = <h_t, C_t> + D * u_t

Source: A. Gu and T. Dao, "Mamba", arXiv 2312.00752, algorithm 2 with the simplified (Euler) B of section
3.6, as its published code computes it. The state is ``[B,D,N]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xexport.ops.selective_scan.parallel import selective_scan_parallel

__all__ = ["selective_scan"]


@torch.library.custom_op("xexport::selective_scan", mutates_args=())
def _selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    h, rows = state, []
    for t in range(u.shape[1]):
        step = dt[:, t].unsqueeze(-1)
        h = torch.exp(step * A) * h + (step * u[:, t].unsqueeze(-1)) @ B[:, t].unsqueeze(1)
        rows.append((h @ C[:, t].unsqueeze(-1)).squeeze(-1))
    y = torch.stack(rows, 1) if rows else torch.empty_like(u)
    return y + u * D, h.clone()


@_selective_scan.register_fake
def _(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), state.new_empty(state.shape)


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The scan, differentiable where a gradient is asked for.

    Args:
        u, dt: ``[B,T,D]`` input and step size (> 0).
        A: ``[D,N]``, negative. B, C: ``[B,T,N]``. D: ``[D]``, the skip.
        state: ``[B,D,N]``.

    Returns:
        y ``[B,T,D]`` and the new state ``[B,D,N]``.
    """
    inputs = (u, dt, A, B, C, D, state)
    if torch.is_grad_enabled() and not torch.compiler.is_exporting() and any(x.requires_grad for x in inputs):
        return selective_scan_parallel(*inputs)
    y, new_state = _selective_scan(*inputs)
    return y, new_state
