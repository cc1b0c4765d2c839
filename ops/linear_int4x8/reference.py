"""Product with 4-bit block-wise weights, eight rows interleaved: the definition.

    y[..., n] = sum_k x[..., k] (code[n, k] - 8) scales[n, k // 32]

The layout is that of com.microsoft MatMulNBits with 4 bits and blocks of 32 (16 bytes a block, even codes in
the low halves), with the same four bytes of eight rows together (layout.py). The definition is exact in x;
ONNX body and native kernel round x to 8 bits a block.
"""

from __future__ import annotations

import torch

__all__ = ["dequantized", "linear_int4x8"]


def dequantized(weight: torch.Tensor, scales: torch.Tensor, depth: int) -> torch.Tensor:
    """uint8 ``[groups,blocks,4,8,4]`` and scales ``[groups,blocks,8]`` -> float64 ``[8 groups,depth]``."""
    rows = weight.permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(-2)  # [8 groups, blocks, 16]
    codes = torch.stack((rows & 15, rows >> 4), dim=-1).flatten(-2)
    factors = scales.double().transpose(1, 2).flatten(0, 1)
    return ((codes.double() - 8) * factors[..., None]).flatten(1)[:, :depth]


@torch.library.custom_op("xexport::linear_int4x8", mutates_args=())
def linear_int4x8(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, K: int, N: int
) -> torch.Tensor:
    """``x [...,K]`` times the transpose of the weights ``[N,K]`` -> ``[...,N]``.

    Args:
        x: float32.
        weight: uint8 ``[ceil(N / 8), ceil(K / 32), 4, 8, 4]``, 8 stands for zero.
        scales: float16 ``[ceil(N / 8), ceil(K / 32), 8]``.
    """
    return (x.double() @ dequantized(weight, scales, K)[:N].T).to(x.dtype)


@linear_int4x8.register_fake
def _(x, weight, scales, K, N):  # type: ignore[no-untyped-def]
    return x.new_empty([*x.shape[:-1], N])
