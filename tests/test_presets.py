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
        forms = [form(family.presets["zoo"]) for form in (family.build, family.train_form)]
    counts = [sum(p.numel() for p in form.parameters()) for form in forms]
    assert any(1.8e6 < count < 2.2e6 for count in counts), "as exported or as trained"
