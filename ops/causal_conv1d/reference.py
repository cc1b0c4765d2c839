"""Stateful causal short convolution, one filter a channel, channels last: the definition.

With the state, the last K-1 inputs, in front of the chunk,

    y[b,t,d] = bias[d] + sum_{k=0..K-1} weight[k,d] past[b,t+k,d]        past = [state; x]

so weight[K-1] is the tap of the present input. The new state is the last K-1 rows of past. With ``silu``
the output is y sigmoid(y). This is what A. Gu and T. Dao, arXiv 2312.00752, figure 3, and M. Poli et al.,
arXiv 2302.10866, appendix A, put before a state space and a long convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["causal_conv1d"]


def _definition(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, channels: int, silu: int
) -> tuple[Tensor, Tensor]:
    """The formula, a shifted product a tap; differentiable."""
    taps, length = weight.shape[0], x.shape[1]
    if channels != x.shape[2] or silu not in (0, 1):
        raise ValueError(f"{channels} channels for an input of {x.shape[2]}, silu {silu}")
    past = torch.cat((state, x), 1)
    y = bias + past[:, taps - 1 :] * weight[taps - 1]
    for tap in range(taps - 1):
        y = y + past[:, tap : tap + length] * weight[tap]
    return F.silu(y) if silu else y, past[:, length:].clone()


_causal_conv1d = torch.library.custom_op("xexport::causal_conv1d", _definition, mutates_args=())


@_causal_conv1d.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, channels: int, silu: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), state.new_empty(state.shape)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, *, silu: bool = False
) -> tuple[Tensor, Tensor]:
    """The convolution, differentiable where a gradient is asked for.

    Args:
        x: ``[B,T,D]``.
        weight: ``[K,D]``, K >= 1, the oldest input's tap first.
        bias: ``[D]``; zeros if there is none.
        state: ``[B,K-1,D]``, the last inputs, oldest first; zeros before the first token.
        silu: whether the output goes through SiLU.

    Returns:
        y ``[B,T,D]`` and the new state ``[B,K-1,D]``.
    """
    inputs = (x, weight, bias, state)
    channels = weight.shape[1]
    if torch.is_grad_enabled() and not torch.compiler.is_exporting() and any(i.requires_grad for i in inputs):
        return _definition(*inputs, channels, int(silu))
    y, new_state = _causal_conv1d(*inputs, channels, int(silu))
    return y, new_state
