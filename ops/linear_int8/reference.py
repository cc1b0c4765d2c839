"""Product with 8-bit block-wise weights: the definition.

    y[..., n] = sum_k x[..., k] (weight[n, k] - 128) scales[n, k // block_size]

The layout is that of com.microsoft MatMulNBits with 8 bits: a row of weights is a row of bytes, padded to a
whole number of blocks. The definition is exact in x. The ONNX body rounds x to 8 bits a block, the native
kernel to 16.
"""

from __future__ import annotations

import torch

__all__ = ["dequantized", "linear_int8"]


def dequantized(weight: torch.Tensor, scales: torch.Tensor, depth: int) -> torch.Tensor:
    """uint8 codes ``[N,blocks,block]`` and scales ``[N,blocks]`` -> float64 ``[N,depth]``."""
    return ((weight.double() - 128) * scales.double()[..., None]).flatten(1)[:, :depth]


@torch.library.custom_op("xexport::linear_int8", mutates_args=())
def linear_int8(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, K: int, N: int, block_size: int
) -> torch.Tensor:
    """``x [...,K]`` times the transpose of the weights ``[N,K]`` -> ``[...,N]``.

    Args:
        x: float32.
        weight: uint8 ``[N, ceil(K / block_size), block_size]``, 128 stands for zero.
        scales: float32 ``[N, ceil(K / block_size)]``.
    """
    return (x.double() @ dequantized(weight, scales, K).T).to(x.dtype)


@linear_int8.register_fake
def _(x, weight, scales, K, N, block_size):  # type: ignore[no-untyped-def]
    return x.new_empty([*x.shape[:-1], N])
