"""A mixture of experts: every token goes through its k best of E feed-forward networks.

Sources:
    [1] N. Shazeer et al., arXiv 1701.06538, section 2.1: a softmax over the k largest scores alone.
    [2] Hugging Face transformers, models/granitemoehybrid: no noise, no capacity, so that a token's result
        depends on nothing but the token; its stored layout.

    s = x W_r,   g = softmax over the k largest of s, 0 elsewhere,   y = sum_e g_e (silu(x A_e) * x B_e) D_e

How it is computed. All E experts, as two products: x with every A and B side by side, and what is left after
the gates, [.., E I], with every D above one another. Both are ordinary weights, read once in their quantized
format by the same kernels as every other, and there is no branch on T. To read only the k experts of a token
in standard operators is to gather their rows into a copy in float32. By count (not measured) that moves 9
bytes a weight of 8 bits, 1 read, 4 written and 4 read again, so at one token it gains only where E / k is
above 9 (17 at 4 bits). Long prompts pay E / k times the multiplications that they need.

Symbols: E experts, k used by a token, I inner width of an expert, d width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["EXPERT_ROLES", "Experts", "experts_from_granite"]

EXPERT_ROLES = (("*.experts.router.*", "choice"), ("*.experts.*_proj.weight", "projection"))


class Experts(nn.Module):
    """``forward(x [..,d]) -> [..,d]``.

    Weights: ``router`` [E,d]; ``gate_up_proj`` [E*2I,d], each expert's A then its B; ``down_proj`` [d,E*I].
    """

    def __init__(self, width: int, experts: int, used: int, inner: int) -> None:
        super().__init__()
        self.used, self.experts = used, experts
        self.router = nn.Linear(width, experts, bias=False)
        self.gate_up_proj = nn.Linear(width, experts * 2 * inner, bias=False)
        self.down_proj = nn.Linear(experts * inner, width, bias=False)

    def gates(self, x: Tensor) -> Tensor:
        """[..,d] -> [..,E], of which k are not 0; their sum is 1."""
        scores = self.router(x)
        best, index = torch.topk(scores, self.used, dim=-1)
        return torch.zeros_like(scores).scatter(-1, index, torch.softmax(best, -1))

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.unflatten(self.gate_up_proj(x), -1, (self.experts, 2, -1)).unbind(-2)
        y: Tensor = self.down_proj((F.silu(a) * b * self.gates(x)[..., None]).flatten(-2))
        return y


#: what follows ``block_sparse_moe.`` in a file, in transformers' two layouts -> our parameter
_GRANITE = {
    "router.layer.weight": "router.weight",
    "router.weight": "router.weight",
    "input_linear.weight": "gate_up_proj.weight",
    "experts.gate_up_proj": "gate_up_proj.weight",
    "output_linear.weight": "down_proj.weight",
    "experts.down_proj": "down_proj.weight",
}


def experts_from_granite(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """[2]'s tensors of experts under our names, all others as they are.

    ``[E,2I,d]`` becomes ``[E*2I,d]``, the same memory; ``[E,d,I]`` becomes ``[d,E*I]``, a copy.
    """
    out: dict[str, Tensor] = {}
    for name, value in tensors.items():
        place, found, leaf = name.partition(".block_sparse_moe.")
        if not found or leaf not in _GRANITE:
            out[name] = value
            continue
        ours = _GRANITE[leaf]
        if ours.startswith("gate_up"):
            value = value.flatten(0, 1)
        elif ours.startswith("down"):
            value = value.transpose(0, 1).flatten(1)
        out[f"{place}.experts.{ours}"] = value
    return out
