"""The optimizer of the recipe: Muon for hidden matrices, AdamW for everything else.

Muon replaces the momentum-averaged gradient of a matrix by its nearest semi-orthogonal matrix, found
with a few Newton-Schulz iterations, so that every direction is learnt equally fast. torch.optim.Muon
iterates in bfloat16, which a CPU without bfloat16 instructions emulates slowly; this one iterates in
float32 and takes matrices of one shape together in one batched product.

Sources:
    [1] K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024 (the quintic
        coefficients, Nesterov momentum).
    [2] J. Liu et al., "Muon is scalable for LLM training", arXiv:2502.16982, section 2.2 (weight decay,
        the update scaled to AdamW's RMS, so that one learning rate serves both).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Muon", "make_optimizers", "orthogonalise"]

_QUINTIC = (3.4445, -4.7750, 2.0315)
#: Two-dimensional parameters that are tables, heads, or not the matrix of a product.
_NOT_HIDDEN = re.compile(r"emb|head|log|filter|conv|norm")


def orthogonalise(gradients: Tensor, iterations: int = 5) -> Tensor:
    """The (nearly) nearest semi-orthogonal matrices: float32 [K,M,N] -> [K,M,N] (reference [1])."""
    a, b, c = _QUINTIC
    tall = gradients.shape[1] > gradients.shape[2]
    x = gradients.transpose(1, 2) if tall else gradients
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(iterations):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """Muon over matrices, with decoupled weight decay.

    Args:
        params: parameters with two dimensions.
        lr: learning rate, on AdamW's scale.
        momentum: of the gradient average.
        weight_decay: per step and learning rate.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; ``closure`` is not supported and ignored."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape].append(parameter)
            for shape, parameters in shapes.items():
                self._update(group, shape, parameters)

    def _update(self, group: dict[str, Any], shape: torch.Size, parameters: list[Tensor]) -> None:
        keep = group["momentum"]
        directions = []
        for p in parameters:
            state = self.state[p]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(p)
            assert p.grad is not None
            state["momentum"].lerp_(p.grad, 1 - keep)
            directions.append(torch.lerp(p.grad, state["momentum"], keep))  # Nesterov
        updates = orthogonalise(torch.stack(directions))
        scale = 0.2 * max(shape) ** 0.5
        for p, update in zip(parameters, updates, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update, alpha=-group["lr"] * scale)


def make_optimizers(
    module: nn.Module, *, muon_lr: float, adam_lr: float, weight_decay: float, kind: str = "muon"
) -> tuple[torch.optim.Optimizer, ...]:
    """Muon over the hidden matrices (``kind`` "muon") and AdamW over the rest.

    Each parameter group keeps its peak learning rate under ``peak`` for the schedule. Vectors, tables and
    heads get no weight decay.
    """
    hidden: list[nn.Parameter] = []
    other: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        (hidden if _is_hidden(name, parameter) else other).append(parameter)
    groups: list[dict[str, Any]] = [{"params": other, "weight_decay": 0.0}]
    if kind == "adamw":
        groups.append({"params": hidden, "weight_decay": weight_decay})
    adam = torch.optim.AdamW(groups, lr=adam_lr, betas=(0.9, 0.98), eps=1e-9, fused=True)
    made: list[torch.optim.Optimizer] = [adam]
    if kind == "muon" and hidden:
        made.append(Muon(hidden, lr=muon_lr, weight_decay=weight_decay))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return tuple(made)


def _is_hidden(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 2 and min(parameter.shape) >= 16 and not _NOT_HIDDEN.search(name)
