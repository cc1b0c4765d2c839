"""First values to train from: the variance 1/fan_in, less for what writes to a residual stream."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import nn

from xexport.core.family import Family

__all__ = ["fill", "fill_by_training"]


def fill(
    module: nn.Module,
    seed: int,
    *,
    writes: Mapping[str, int],
    small: Iterable[str] = ("head.weight",),
    fixed: Mapping[str, float] | None = None,
    vectors: Mapping[str, float] | None = None,
) -> torch.Generator:
    """Fill every parameter, in their order, with what depends on ``seed`` alone.

    A matrix gets N(0, 1/fan_in), fan_in being its last axis; a vector 0 if it is a bias, else 1. The
    exceptions are globs over parameter names; of those of a matrix, the first match of ``writes``, ``small``
    and ``fixed`` in this order counts.

    Args:
        writes: what writes to a residual stream -> how many layers do: smaller by sqrt(2 * layers), so that
            the stream's variance does not grow with depth.
        small: a quarter of the deviation: the first logits are nearly flat.
        fixed: the deviation itself, of vectors too; embeddings (``embed.weight``) 0.5 if it is not given.
        vectors: the value of all elements.

    Returns:
        The generator, for what else is to be drawn.
    """
    rng = torch.Generator().manual_seed(seed)
    shares = {glob: (2 * layers) ** -0.5 for glob, layers in writes.items()} | dict.fromkeys(small, 0.25)
    fixed = {"embed.weight": 0.5} if fixed is None else fixed
    with torch.no_grad():
        for name, p in module.named_parameters():
            std = _first(fixed, name)
            if p.ndim < 2 and std is None:
                value = _first(vectors or {}, name)
                p.fill_(value if value is not None else 0.0 if name.endswith("bias") else 1.0)
                continue
            share = _first(shares, name)
            if share is not None or std is None:
                std = p.shape[-1] ** -0.5 * (1.0 if share is None else share)
            p.copy_(torch.randn(p.shape, generator=rng) * std)
    return rng


def fill_by_training(family: Family, module: nn.Module, seed: int) -> None:
    """Fill the form that is exported with what its training form would have."""
    train = family.train_form(module.config)
    family.init(train, seed)
    module.load_state_dict(family.from_training(module.config, train.state_dict()))


def _first(rows: Mapping[str, float], name: str) -> float | None:
    """The value of the first glob that matches."""
    return next((value for glob, value in rows.items() if fnmatchcase(name, glob)), None)
