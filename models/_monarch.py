"""Block-diagonal linear maps: one factor of a Monarch matrix, as Monarch Mixer mixes the model dimension.

Sources: Fu et al., Monarch Mixer, arXiv 2310.12109, section 3; HazyResearch/m2, ``blockdiag_linear.py``,
whose weight ``[blocks, out/blocks, in/blocks]`` :func:`split_weight` reads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xexport.core.errors import InputError

__all__ = ["BlockDiagonal", "GatedBlocks", "split_weight"]


class BlockDiagonal(nn.Module):
    """y = concat_k(W_k x_k) + b, x cut into ``blocks`` equal parts.

    Every block is a matrix of its own (``parts.<k>.weight``), so that a graph has plain products of
    matrices, which every runtime and every format of weights knows.
    """

    def __init__(self, inputs: int, outputs: int, blocks: int, bias: bool = True) -> None:
        super().__init__()
        if blocks < 1 or inputs % blocks or outputs % blocks:
            raise InputError(
                "a block-diagonal matrix has no whole blocks",
                got=f"{outputs} x {inputs} in {blocks} blocks",
                allowed="a number of blocks that divides both",
            )
        self.blocks = blocks
        parts = (nn.Linear(inputs // blocks, outputs // blocks, bias=False) for _ in range(blocks))
        self.parts = nn.ModuleList(parts)
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        cut = torch.chunk(x, self.blocks, -1)
        y = torch.cat([part(piece) for part, piece in zip(self.parts, cut, strict=True)], -1)
        return y if self.bias is None else y + self.bias


class GatedBlocks(nn.Module):
    """M2's gated feed-forward network: (gelu(a) * b) W_o + bias, [a, b] = x W_g, both block-diagonal."""

    def __init__(self, width: int, inner: int, blocks: int) -> None:
        super().__init__()
        self.gated_layers = BlockDiagonal(width, 2 * inner, blocks, bias=False)
        self.wo = BlockDiagonal(inner, width, blocks)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same shape."""
        gate, value = self.gated_layers(x).chunk(2, -1)
        y: Tensor = self.wo(F.gelu(gate) * value)
        return y


def split_weight(weight: Tensor, name: str) -> dict[str, Tensor]:
    """A published ``[blocks, out, in]`` weight under the names of :class:`BlockDiagonal` called ``name``."""
    return {f"{name}.parts.{k}.weight": part for k, part in enumerate(weight)}
