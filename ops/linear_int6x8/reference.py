"""Product with 6-bit block-wise weights, eight rows interleaved: the definition.

    y[..., n] = sum_k x[..., k] (code[n, k] - 32) scales[n, k // 32]

layout.py says where the codes lie. The definition is exact in x; ONNX body and native kernel round x to 8
bits a block.
"""

from __future__ import annotations

import torch

__all__ = ["dequantized", "linear_int6x8"]


def dequantized(weight: torch.Tensor, scales: torch.Tensor, depth: int) -> torch.Tensor:
    """uint8 ``[groups,blocks,6,8,4]`` and scales ``[groups,blocks,8]`` -> float64 ``[8 groups,depth]``."""
    groups, blocks = weight.shape[:2]
    stored = weight.reshape(groups, blocks, 2, 3, 8, 4)  # group, block, half, dword, row, byte
    high = stored >> 6
    last = high[:, :, :, 0] | (high[:, :, :, 1] << 2) | (high[:, :, :, 2] << 4)
    quads = torch.cat((stored & 63, last[:, :, :, None]), dim=3)
    codes = quads.permute(0, 4, 1, 2, 3, 5).flatten(0, 1).flatten(2)  # [8 groups, blocks, 32]
    factors = scales.double().transpose(1, 2).flatten(0, 1)
    return ((codes.double() - 32) * factors[..., None]).flatten(1)[:, :depth]


@torch.library.custom_op("xexport::linear_int6x8", mutates_args=())
def linear_int6x8(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, K: int, N: int
) -> torch.Tensor:
    """``x [...,K]`` times the transpose of the weights ``[N,K]`` -> ``[...,N]``.

    Args:
        x: float32.
        weight: uint8 ``[ceil(N / 8), ceil(K / 32), 6, 8, 4]``, a code of 32 stands for zero.
        scales: float16 ``[ceil(N / 8), ceil(K / 32), 8]``.
    """
    return (x.double() @ dequantized(weight, scales, K)[:N].T).to(x.dtype)


@linear_int6x8.register_fake
def _(x, weight, scales, K, N):  # type: ignore[no-untyped-def]
    return x.new_empty([*x.shape[:-1], N])
