"""Dilated attention of whole sequences, differentiable: the paper's own algorithm (section 2.2).

Every segment's places are gathered into a short dense sequence, which is attended to causally, and scattered
back: sum over pairs of T w / r products instead of T^2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["dilated_parallel"]


def dilated_parallel(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor, rates: Tensor, offsets: Tensor, scale: float
) -> Tensor:
    """``q, k [B,T,H,K]``, ``v [B,T,H,V]`` from token 0 on -> ``[B,T,H,V]``; the rest as dilated_attention's.

    The gradient goes through the shares of the pairs too.
    """
    outs, logs = zip(
        *(
            _pair(q * scale, k, v, min(w, q.shape[1]), r, offset)
            for w, r, offset in zip(segments.tolist(), rates.tolist(), offsets, strict=True)
        ),
        strict=True,
    )
    share = torch.stack(logs).softmax(0)
    return (share[..., None] * torch.stack(outs)).sum(0)


def _pair(q: Tensor, k: Tensor, v: Tensor, segment: int, rate: int, offset: Tensor) -> tuple[Tensor, Tensor]:
    """One pair's output ``[B,T,H,V]`` and the logarithm of its softmax's denominator ``[B,T,H]``."""
    batch, length, heads, _ = q.shape
    count = -(-length // segment)
    padded = -(-segment // rate) * rate
    head = torch.arange(heads, device=q.device)

    def sparse(x: Tensor) -> Tensor:
        """[B,T,H,*] -> [H,B,segments,places,*]: every head's own places."""
        x = F.pad(x, (0, 0, 0, 0, 0, count * segment - length))
        x = torch.unflatten(x, 1, (count, segment))
        x = F.pad(x, (0, 0, 0, 0, 0, padded - segment))
        x = torch.unflatten(x, 2, (-1, rate))
        return x[:, :, :, offset, head].permute(3, 0, 1, 2, 4)

    qs, ks, vs = (sparse(x) for x in (q, k, v))
    scores = qs @ ks.transpose(-1, -2)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    scores = scores.masked_fill(later, float("-inf"))

    def dense(x: Tensor, fill: float) -> Tensor:
        """[H,B,segments,places,*] -> [B,T,H,*], with ``fill`` at the places a head does not have."""
        whole = x.new_full((rate, heads, batch, *x.shape[2:]), fill)
        whole = whole.index_put((offset, head), x).permute(2, 3, 4, 0, 1, 5)
        return whole.flatten(2, 3)[:, :, :segment].flatten(1, 2)[:, :length]

    return dense(scores.softmax(-1) @ vs, 0.0), dense(scores.logsumexp(-1, keepdim=True), float("-inf"))[
        ..., 0
    ]
