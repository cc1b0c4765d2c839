"""The gated delta rule in chunks: differentiable, and the form to train with.

arXiv 2406.06484, section 3.2 (the WY form), with the decays of arXiv 2412.06464, section 3.3. In a chunk,
c being the running sum of the logarithms of the decay and D_ts = exp(c_t - c_s) for s <= t:

    A = strictly lower part of diag(beta) (K K^T * D)
    U = (I + A)^-1 diag(beta) (V - diag(exp c) K S)           what is really written at every token
    O = diag(exp c) Q S + (Q K^T * D) U                        S' = exp(c_C) S + (exp(c_C - c) K)^T U
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["delta_rule_parallel"]

_CHUNK = 32


def delta_rule_parallel(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, decay: Tensor, beta: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The same function as ``delta_rule``, with the heads as an axis.

    Args:
        q, k: ``[B,T,H,K]``.
        v: ``[B,T,H,V]``.
        state: ``[B,H,K,V]``.
        decay, beta: ``[B,T,H]``; the decay's logarithm, 0 or below.
        scale: factor on the output.

    Returns:
        the output ``[B,T,H,V]`` and the state after the last token.
    """
    outs: list[Tensor] = []
    terms = (q * scale, k, v, decay.unsqueeze(-1), beta.unsqueeze(-1))
    rows = (torch.split(x.transpose(1, 2), _CHUNK, 2) for x in terms)
    for qc, kc, vc, g, rate in zip(*rows, strict=True):
        running = g.cumsum(2)
        total = running[:, :, -1:]
        fade = (running - running.mT).clamp(max=0).exp()
        erased = (rate * (kc @ kc.mT) * fade).tril(-1)
        wanted = rate * (vc - running.exp() * (kc @ state))
        # the diagonal is taken to be one, whatever is there
        written = torch.linalg.solve_triangular(erased, wanted, upper=False, unitriangular=True)
        outs.append((qc @ kc.mT * fade).tril() @ written + running.exp() * (qc @ state))
        state = total.exp() * state + (kc * (total - running).exp()).mT @ written
    return torch.cat(outs, 2).transpose(1, 2), state
