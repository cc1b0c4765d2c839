"""A causal convolution whose taps change with the token and are shared by all channels: the definition.

    out[b,t,c] = sum_{j=0..S-1} weight[t,j] rows[b,t+j,c]

``rows`` are S-1 rows before the chunk and the chunk's T, so weight[t,S-1] is of the token itself: the product
by a band matrix of which only the band is stored. S. Zhai et al., An Attention Free Transformer, arXiv
2105.14103, equations 2 and 4, need it for the learned biases of AFT-local.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["band_product"]


def _definition(weight: Tensor, rows: Tensor) -> Tensor:
    """The formula, a shifted product a tap; differentiable."""
    length, taps = weight.shape
    if taps == 0 or rows.shape[1] != taps - 1 + length:
        raise ValueError(f"{rows.shape[1]} rows for {length} tokens with {taps} taps")
    out = weight[:, :1] * rows[:, :length]
    for tap in range(1, taps):
        out = out + weight[:, tap : tap + 1] * rows[:, tap : tap + length]
    return out


_band_product = torch.library.custom_op("xexport::band_product", _definition, mutates_args=())


@_band_product.register_fake
def _(weight: Tensor, rows: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[0], rows.shape[2])


def band_product(weight: Tensor, rows: Tensor) -> Tensor:
    """The product, differentiable where a gradient is asked for.

    Args:
        weight: ``[T,S]``, S >= 1, the oldest row's first.
        rows: ``[B,S-1+T,C]``.

    Returns:
        ``[B,T,C]``.

    Raises:
        ValueError: another number of rows.
    """
    wanted = weight.requires_grad or rows.requires_grad
    if torch.is_grad_enabled() and not torch.compiler.is_exporting() and wanted:
        return _definition(weight, rows)
    out: Tensor = _band_product(weight, rows)
    return out
