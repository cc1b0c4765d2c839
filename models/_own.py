"""Reading a file of xexport's own training, for families that read nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from xexport.core.checkpoint import RawCheckpoint, match_tensors, require_own_config
from xexport.core.family import Family, LoadedModel

__all__ = ["load_own"]


def _no_tables(config: Any) -> dict[str, Tensor]:
    return {}


def load_own(
    family: Family,
    raw: RawCheckpoint,
    *,
    title: str,
    fix: str = "",
    tables: Callable[[Any], Mapping[str, Tensor]] = _no_tables,
) -> LoadedModel:
    """The tensors of the exported form, made of a file's training form; both are matched name by name.

    Args:
        title, fix: see :func:`xexport.core.checkpoint.require_own_config`.
        tables: config -> tensors of the training form that are constants: they are made anew, so a file may
            lack them.

    Raises:
        CheckpointError: the file is not of our own training, or a tensor of its configuration is missing or
            has another shape.
    """
    config: Any = require_own_config(raw, family.name, family.config, title=title, fix=fix)
    with torch.device("meta"):
        trained, wanted = family.train_form(config), family.build(config)
    given = match_tensors({**raw.tensors, **tables(config)}, trained, raw.path.name)
    made = family.from_training(config, given)
    return LoadedModel(family.name, config, match_tensors(made, wanted, raw.path.name), source=str(raw.path))
