"""The RWKV-7 recurrence in chunks of matrix products: differentiable, and the form to train with.

Within a chunk of C tokens, with D_t the product of the decays up to and including t and
``a^ = a D_{t-1}``, ``r^ = r D_t``, ``b^ = b / D_t``, ``k^ = k / D_t``, the vectors u_t = S_{t-1} a_t solve

    U = tril(a^ b^T, -1) U + tril(a^ k^T, -1) V + a^ S_0^T

a unit lower triangular system (the UT transform), so one small inverse per chunk replaces C dependent
steps. Sources: [1] S. Yang et al., arXiv 2406.06484, section 3 (WY form of the delta rule); [2] B. Peng
et al., arXiv 2503.14456, section 4 and appendix on the parallel form of RWKV-7.

Accuracy: 1/D_t grows to 1/w**C. RWKV-7 decays are at least exp(-exp(-0.5)) = 0.545, so C = 16 keeps it below
2e4, harmless in float32. For other decays keep ``min(w)**chunk`` above 1e-30.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["wkv7_parallel"]


def wkv7_parallel(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, chunk: int = 16
) -> tuple[Tensor, Tensor]:
    """Same function as :func:`xexport.ops.wkv7.reference.wkv7`, by matrix products, for any T.

    Args:
        r, w, k, v, a, b: ``[B,T,H,N]``, w the decay in (0, 1].
        state: ``[B,H,N,N]``, S[v,k].
        chunk: C, a power of two.

    Returns:
        y ``[B,T,H,N]`` and the state after the last token ``[B,H,N,N]``.
    """
    B, T, H, N = r.shape
    count = -(-T // chunk)
    pad = count * chunk - T

    def cut(x: Tensor, fill: float = 0.0) -> Tensor:
        """[B,T,H,N] -> [chunks, B*H, C, N]; padding tokens leave the state alone."""
        if pad:
            x = F.pad(x, (0, 0, 0, 0, 0, pad), value=fill)
        return x.reshape(B, count, chunk, H, N).permute(1, 0, 3, 2, 4).reshape(count, B * H, chunk, N)

    log_w = cut(w, 1.0).log()
    total = log_w.cumsum(2)
    D, D_inverse, D_before = total.exp(), (-total).exp(), (total - log_w).exp()
    values = cut(v)
    left = torch.cat((cut(a) * D_before, cut(r) * D), 2)
    right = torch.cat((cut(b) * D_inverse, cut(k) * D_inverse), 2)
    scores = (left @ right.mT) * _causal(chunk, left)
    a_hat, r_hat = torch.split(left, chunk, 2)
    b_hat, k_hat = torch.split(right, chunk, 2)
    inverse = _unit_lower_inverse(scores[:, :, :chunk, :chunk], chunk)
    solved = inverse @ torch.cat((a_hat, scores[:, :, :chunk, chunk:] @ values), 3)
    W, U0 = torch.split(solved, N, 3)
    added = values.mT @ k_hat
    D_last = D[:, :, -1:]

    S = state.reshape(B * H, N, N)
    starts, rows = [], []
    # unbind once: indexing inside the loop would give every step a full-size zero gradient to add
    for W_c, U0_c, b_c, added_c, D_c in zip(
        W.unbind(0), U0.unbind(0), b_hat.unbind(0), added.unbind(0), D_last.unbind(0), strict=True
    ):
        starts.append(S)
        U = torch.baddbmm(U0_c, W_c, S.mT)
        rows.append(U)
        S = torch.baddbmm(S + added_c, U.mT, b_c) * D_c
    y = r_hat @ torch.stack(starts).mT + scores[:, :, chunk:] @ torch.cat((torch.stack(rows), values), 2)
    y = y.reshape(count, B, H, chunk, N).permute(1, 0, 3, 2, 4).reshape(B, count * chunk, H, N)
    return y[:, :T], S.reshape(B, H, N, N)


def _causal(chunk: int, like: Tensor) -> Tensor:
    """[2C,2C]: rows of a see earlier tokens only, rows of r the current one too."""
    ones = torch.ones(chunk, chunk, dtype=like.dtype, device=like.device)
    strict, full = ones.tril(-1), ones.tril()
    return torch.cat((torch.cat((strict, strict), 1), torch.cat((full, full), 1)), 0)


def _unit_lower_inverse(M: Tensor, size: int) -> Tensor:
    """(I - M)^-1 for a strictly lower triangular M, by merging inverted diagonal blocks of 2, 4, 8 ...

    (I + M)(I + M^2)(I + M^4) ... costs the same but cancels where tokens repeat (function.py says more).
    """
    at = torch.arange(size, device=M.device)
    inverse = torch.eye(size, dtype=M.dtype, device=M.device) + M * _same_block(at, 2)
    reach = 2
    while reach < size:
        below = M * (_same_block(at, 2 * reach) & ~_same_block(at, reach))
        inverse = inverse + inverse @ below @ inverse
        reach *= 2
    return inverse


def _same_block(at: Tensor, size: int) -> Tensor:
    """[C,C]: whether row and column lie in the same diagonal block."""
    block = at // size
    return block[:, None] == block
