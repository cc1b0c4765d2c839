"""The gated rule with one decay a key in chunks: differentiable, the form to train GLA with.

The formula of parallel.py with ``g [K]`` a token: the fading is inside the sum over keys, so it is written
out for every pair of tokens of a short chunk (arXiv 2312.06635, section 4.1, without its second level of
chunks). No exponent is above 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gated_by_key_parallel"]

_CHUNK = 16


def gated_by_key_parallel(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, decay: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The same function as ``linear_attention`` with the rule "gated", with the heads as an axis.

    Args:
        q, k, decay: ``[B,T,H,K]``; the decay's logarithm, 0 or below.
        v: ``[B,T,H,V]``.
        state: ``[B,H,K,V]``.
        scale: factor on the output.

    Returns:
        the output ``[B,T,H,V]`` and the state after the last token.
    """
    outs: list[Tensor] = []
    rows = (torch.split(x.transpose(1, 2), _CHUNK, 2) for x in (q * scale, k, v, decay))
    for qc, kc, vc, g in zip(*rows, strict=True):
        running = g.cumsum(2)
        total = running[:, :, -1:]
        fade = (running[:, :, :, None] - running[:, :, None]).clamp(max=0).exp()
        scores = (qc[:, :, :, None] * kc[:, :, None] * fade).sum(-1).tril()
        outs.append(scores @ vc + (qc * running.exp()) @ state)
        state = total.exp().mT * state + (kc * (total - running).exp()).mT @ vc
    return torch.cat(outs, 2).transpose(1, 2), state
