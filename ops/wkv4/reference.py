"""The RWKV-4 recurrence as a plain loop: the definition that every other form is compared with.

Per channel, the values so far are averaged with weights that decay, and the current one has a bonus u:

    y_t = (A_{t-1} + e^{u + k_t} v_t) / (B_{t-1} + e^{u + k_t})
    A_t = e^w A_{t-1} + e^{k_t} v_t        B_t = e^w B_{t-1} + e^{k_t}

Source: B. Peng et al., "RWKV: Reinventing RNNs for the Transformer Era", arXiv 2305.13048, equation 16 and
the recurrent form of its appendix D. A and B would overflow, so the state holds them divided by e^pp:
aa = A / e^pp, bb = B / e^pp, with pp the largest exponent so far (decayed).
"""

from __future__ import annotations

import torch
from torch import Tensor

from xexport.ops.wkv4.parallel import wkv4_parallel

__all__ = ["wkv4"]

_Four = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("xexport::wkv4", mutates_args=())
def _wkv4(w: Tensor, u: Tensor, k: Tensor, v: Tensor, aa: Tensor, bb: Tensor, pp: Tensor) -> _Four:
    aa, bb, pp, rows = aa.clone(), bb.clone(), pp.clone(), []
    for t in range(k.shape[1]):
        bonus = u + k[:, t]
        most = torch.maximum(pp, bonus)
        old, new = torch.exp(pp - most), torch.exp(bonus - most)
        rows.append((old * aa + new * v[:, t]) / (old * bb + new))
        faded = pp + w
        pp = torch.maximum(faded, k[:, t])
        old, new = torch.exp(faded - pp), torch.exp(k[:, t] - pp)
        aa, bb = old * aa + new * v[:, t], old * bb + new
    return (torch.stack(rows, 1) if rows else torch.empty_like(v)), aa, bb, pp


@_wkv4.register_fake
def _(w: Tensor, u: Tensor, k: Tensor, v: Tensor, aa: Tensor, bb: Tensor, pp: Tensor) -> _Four:
    return v.new_empty(v.shape), aa.new_empty(aa.shape), bb.new_empty(bb.shape), pp.new_empty(pp.shape)


def wkv4(w: Tensor, u: Tensor, k: Tensor, v: Tensor, aa: Tensor, bb: Tensor, pp: Tensor) -> _Four:
    """The recurrence, differentiable where a gradient is asked for.

    Args:
        w, u: ``[C]``; the logarithm of the decay (0 or below), and the bonus of the current token.
        k, v: ``[B,T,C]``.
        aa, bb, pp: ``[B,C]``; before the first token 0, 0 and -1e30.

    Returns:
        y ``[B,T,C]`` and the new aa, bb, pp.
    """
    inputs = (w, u, k, v, aa, bb, pp)
    if torch.is_grad_enabled() and not torch.compiler.is_exporting() and any(x.requires_grad for x in inputs):
        return wkv4_parallel(*inputs)
    y, aa, bb, pp = _wkv4(*inputs)
    return y, aa, bb, pp
