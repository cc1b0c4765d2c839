"""The recurrence of RWKV-5 and 6 in chunks: differentiable, exact for every decay; the form to train with.

With c_t the sum of the logarithms of the decays of a chunk up to and including t,

    y_t = sum_{s<t} <r_t e^{c_{t-1} - c_s}, k_s> v_s + <r_t u, k_t> v_t + (r_t e^{c_{t-1}}) S
    S'  = e^{c_C} S + sum_s (k_s e^{c_C - c_s}) v_s^T

(S. Yang et al., arXiv 2312.06635, section 4). The usual split of e^{c_{t-1} - c_s} into two factors overflows
where a decay is near zero, which RWKV-6 may choose; here the exponent of every pair is taken, and is never
above 0. That costs C products a token and channel, so C is small.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["wkv6_parallel"]

_LEAST = 1e-38


def wkv6_parallel(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, chunk: int = 16
) -> tuple[Tensor, Tensor]:
    """Same function as :func:`xexport.ops.wkv6.reference.wkv6`, for any T; a decay counts as 1e-38 at least.

    Args:
        r, w, k, v, u, state: as there.
        chunk: C.

    Returns:
        y ``[B,T,H,M]`` and the state after the last token ``[B,H,N,M]``.
    """
    B, T, H, _ = k.shape
    count = -(-T // chunk)
    pad = count * chunk - T

    def cut(x: Tensor) -> Tensor:
        """[B,T,H,X] -> [chunks,B,H,C,X], padded with zeros."""
        x = F.pad(x, (0, 0, 0, 0, 0, pad)) if pad else x
        return x.reshape(B, count, chunk, H, -1).permute(1, 0, 3, 2, 4)

    log_w = cut(w.clamp_min(_LEAST).log().expand_as(k))
    rs, ks, vs = cut(r), cut(k), cut(v)
    past = torch.ones(chunk, chunk, dtype=torch.bool, device=k.device).tril(-1).unsqueeze(-1)
    # [...,t,s,N]: the sum from s + 1 to t, added up for every s alone, as a difference of two long sums
    # would lose the digits of a short one
    spans = (log_w.unsqueeze(4) * past).cumsum(3)
    fade = _late(spans, 3).masked_fill(~past, -torch.inf).exp()
    scores = torch.einsum("...tn,...sn,...tsn->...ts", rs, ks, fade)
    bonus = (rs * u.unsqueeze(1) * ks).sum(-1, keepdim=True)
    inside = scores @ vs + bonus * vs
    total = log_w.cumsum(3)
    faded_r, added = rs * _late(total, 3).exp(), (ks * spans[:, :, :, -1].exp()).mT @ vs
    kept = total[..., -1:, :].exp().mT
    S, starts = state, []
    for added_c, kept_c in zip(added.unbind(0), kept.unbind(0), strict=True):
        starts.append(S)
        S = kept_c * S + added_c
    y = inside + faded_r @ torch.stack(starts)
    return y.permute(1, 0, 3, 2, 4).reshape(B, count * chunk, H, -1)[:, :T], S


def _late(x: Tensor, dim: int) -> Tensor:
    """``x`` one place later along an axis, with zeros in front."""
    return torch.cat((torch.zeros_like(x.narrow(dim, 0, 1)), x.narrow(dim, 0, x.shape[dim] - 1)), dim)
