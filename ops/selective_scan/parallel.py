"""The selective scan with a hand-written backward: differentiable, and the form to train with.

The recurrence is diagonal, so it has no matrix-product form; what costs is memory traffic and the number of
small operations. States are kept as [B,N,D] (channels last, so that every broadcast has a long contiguous
inner loop), and the decays are
computed again in the backward pass instead of being kept.

With q_t = dt_t u_t, decay e_t = exp(dt_t A) and G_t the gradient that reaches h_t:

    h_t = e_t h_{t-1} + B_t q_t^T        G_t = C_t gy_t^T + e_{t+1} G_{t+1}
    gB_t = G_t q_t     gq_t = G_t^T B_t     gC_t = h_t gy_t     M_t = G_t e_t h_{t-1}
    gdt_t = sum_n M_t A + gq_t u_t       gA = sum_t M_t dt_t

Source: the recurrence of A. Gu and T. Dao, arXiv 2312.00752, algorithm 2; the adjoint is derived here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["selective_scan_parallel"]

_LOG2_E = math.log2(math.e)  # exp2 is 1.6 times as fast as exp in torch's CPU kernels


def selective_scan_parallel(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Same function as :func:`xexport.ops.selective_scan.reference.selective_scan`, fast to differentiate.

    Args:
        u, dt: ``[B,T,D]``; A ``[D,N]``; B, C ``[B,T,N]``; D ``[D]``; state ``[B,D,N]``.

    Returns:
        y ``[B,T,D]`` and the state after the last token ``[B,D,N]``.
    """
    y, last = _Scan.apply(dt, dt * u, A, B, C, state)  # type: ignore[no-untyped-call]
    return y + u * D, last


class _Scan(torch.autograd.Function):
    """(dt, q = dt u, A, B, C, state) -> (C.h, last h)."""

    @staticmethod
    def forward(
        ctx: Any, dt: Tensor, q: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        dt_t, q_t, B_t, C_t = (x.transpose(0, 1).contiguous() for x in (dt, q, B, C))
        T, batch, width = dt_t.shape
        A_t = A.t().contiguous()
        A_log2 = A_t * _LOG2_E
        history = dt.new_empty(T + 1, batch, A.shape[1], width)  # h before each step, and the last one
        history[0] = state.transpose(1, 2)
        decay = torch.empty_like(history[0])
        for t in range(T):
            torch.mul(dt_t[t].unsqueeze(1), A_log2, out=decay)
            after = torch.mul(decay.exp2_(), history[t], out=history[t + 1])
            after.addcmul_(B_t[t].unsqueeze(2), q_t[t].unsqueeze(1))
        y = torch.matmul(C_t.unsqueeze(2), history[1:]).squeeze(2)
        ctx.save_for_backward(dt_t, q_t, A_t, B_t, C_t, history)
        return y.transpose(0, 1), history[T].transpose(1, 2).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor, g_last: Tensor) -> tuple[Tensor, ...]:
        dt_t, q_t, A_t, B_t, C_t, history = ctx.saved_tensors
        T = dt_t.shape[0]
        A_log2 = A_t * _LOG2_E
        gy_t = gy.transpose(0, 1).contiguous()
        gB, gC, gq, gdt = (torch.empty_like(x) for x in (B_t, C_t, q_t, dt_t))
        torch.matmul(history[1:], gy_t.unsqueeze(3), out=gC.unsqueeze(3))
        G = g_last.transpose(1, 2).contiguous()
        decay, M, gA = torch.empty_like(G), torch.empty_like(G), torch.zeros_like(G)
        for t in range(T - 1, -1, -1):
            dt_row = dt_t[t].unsqueeze(1)
            G.addcmul_(C_t[t].unsqueeze(2), gy_t[t].unsqueeze(1))
            torch.bmm(G, q_t[t].unsqueeze(2), out=gB[t].unsqueeze(2))
            torch.bmm(B_t[t].unsqueeze(1), G, out=gq[t].unsqueeze(1))
            torch.mul(dt_row, A_log2, out=decay)
            G.mul_(decay.exp2_())
            torch.mul(G, history[t], out=M)
            gA.addcmul_(M, dt_row)
            torch.sum(M.mul_(A_t), 1, out=gdt[t])
        gradients = (x.transpose(0, 1) for x in (gdt, gq))
        return (*gradients, gA.sum(0).t(), gB.transpose(0, 1), gC.transpose(0, 1), G.transpose(1, 2))
