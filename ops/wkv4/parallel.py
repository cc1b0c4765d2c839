"""The RWKV-4 recurrence by doubling: differentiable, in log2(T) rounds of vector operations.

A pair of pieces (A, B, p) with true sums A e^p and B e^p joins associatively: the left one decays by the
length n of the right one, e^{n w}, and both are scaled to the larger exponent. So all prefixes come from
log2(T) rounds in which every token joins with the piece that ends n tokens earlier (Hillis and Steele,
"Data parallel algorithms", 1986).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["wkv4_parallel"]

_Piece = tuple[Tensor, Tensor, Tensor]


def _join(left: _Piece, right: _Piece) -> _Piece:
    """The sum of two pieces. The exponent that scales them is no variable of the sum: it has no gradient."""
    most = torch.maximum(left[2], right[2]).detach()
    a, b = torch.exp(left[2] - most), torch.exp(right[2] - most)
    return a * left[0] + b * right[0], a * left[1] + b * right[1], most


def wkv4_parallel(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, aa: Tensor, bb: Tensor, pp: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Same function as :func:`xexport.ops.wkv4.reference.wkv4`, for any T.

    Args:
        w, u: ``[C]``.
        k, v: ``[B,T,C]``.
        aa, bb, pp: ``[B,C]``.

    Returns:
        y ``[B,T,C]`` and the new aa, bb, pp.
    """
    first = [x.unsqueeze(1) for x in (aa, bb, pp)]
    A, B, P = (torch.cat(pair, 1) for pair in zip(first, (v, torch.ones_like(v), k), strict=True))
    reach = 1
    while reach < A.shape[1]:
        left = (A[:, :-reach], B[:, :-reach], P[:, :-reach] + reach * w)
        joined = _join(left, (A[:, reach:], B[:, reach:], P[:, reach:]))
        A, B, P = (torch.cat((x[:, :reach], y), 1) for x, y in zip((A, B, P), joined, strict=True))
        reach *= 2
    top, bottom, _ = _join((A[:, :-1], B[:, :-1], P[:, :-1]), (v, torch.ones_like(v), u + k))
    return top / bottom, A[:, -1], B[:, -1], P[:, -1]
