"""What the presets of all families have in common."""

from __future__ import annotations

import pytest
import torch

from xexport.core.registry import get_family

#: families whose trained size is compared with one another's
OF_TWO_MILLION = (
    "aft",
    "gtrxl",
    "hourglass",
    "linformer",
    "lmuformer",
    "longnet",
    "mamba_mixer",
    "megabyte",
    "reformer",
    "rwkv4",
    "rwkv6",
    "slab",
    "tokenformer",
)


@pytest.mark.parametrize("name", OF_TWO_MILLION)
def test_zoo_has_about_two_million_parameters(name: str) -> None:
    family = get_family(name)
    with torch.device("meta"):
        count = sum(p.numel() for p in family.train_form(family.presets["zoo"]).parameters())
    assert 1.8e6 < count < 2.2e6
