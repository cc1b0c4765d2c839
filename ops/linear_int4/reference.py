"""Product with 4-bit block-wise weights: the definition.

    y[..., n] = sum_k x[..., k] (code[n, k] - 8) scales[n, k // 32]

The layout is that of com.microsoft MatMulNBits with 4 bits and blocks of 32: 16 bytes a block, the even codes
in the low halves. The definition is exact in x; ONNX body and native kernel round x to 8 bits a block.
"""

from __future__ import annotations

import torch

__all__ = ["dequantized", "linear_int4"]


def dequantized(weight: torch.Tensor, scales: torch.Tensor, depth: int) -> torch.Tensor:
    """uint8 ``[N,blocks,16]`` and scales ``[N,blocks]`` -> float64 ``[N,depth]``."""
    codes = torch.stack((weight & 15, weight >> 4), dim=-1).flatten(-2)
    return ((codes.double() - 8) * scales.double()[..., None]).flatten(1)[:, :depth]


@torch.library.custom_op("xexport::linear_int4", mutates_args=())
def linear_int4(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, K: int, N: int) -> torch.Tensor:
    """``x [...,K]`` times the transpose of the weights ``[N,K]`` -> ``[...,N]``.

    Args:
        x: float32.
        weight: uint8 ``[N, ceil(K / 32), 16]``, 8 stands for zero.
        scales: float16 ``[N, ceil(K / 32)]``.
    """
    return (x.double() @ dequantized(weight, scales, K).T).to(x.dtype)


@linear_int4.register_fake
def _(x, weight, scales, K, N):  # type: ignore[no-untyped-def]
    return x.new_empty([*x.shape[:-1], N])
