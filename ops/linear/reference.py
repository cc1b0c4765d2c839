"""Product with a float weight that has one row an output, as checkpoints store it: the definition.

y[..., n] = sum_k x[..., k] weight[n, k]
"""

from __future__ import annotations

import torch

__all__ = ["linear"]


@torch.library.custom_op("xexport::linear", mutates_args=())
def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x [...,K]`` (float32) times the transpose of ``weight [N,K]`` (float32 or float16) -> ``[...,N]``."""
    return (x.double() @ weight.double().T).to(x.dtype)


@linear.register_fake
def _(x, weight):  # type: ignore[no-untyped-def]
    return x.new_empty([*x.shape[:-1], weight.shape[0]])
