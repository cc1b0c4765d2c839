"""Models that read patches (models/_patches.py): training forms, files of our own, the bound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from chunk_form import check_gradients, check_init, check_own_file, check_training_form, random_model
from safetensors.torch import save_file

import xexport
from xexport.core.checkpoint import open_checkpoint
from xexport.core.errors import CheckpointError, LimitError
from xexport.core.registry import get_family

TITLES = {"block_transformer": "a Block Transformer", "hourglass": "an Hourglass", "megabyte": "a MegaByte"}
VARIANTS = [(f, v) for f in TITLES for v in get_family(f).presets if v.startswith("tiny")]
each_family = pytest.mark.parametrize("name", TITLES)


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_training_form_is_the_chunk_form_from_the_first_state(name: str, variant: str) -> None:
    family = get_family(name)
    check_training_form(family, family.presets[variant])
    check_gradients(family, family.presets[variant])


@each_family
def test_init_depends_on_the_seed_alone(name: str) -> None:
    check_init(get_family(name), get_family(name).presets["tiny"])


@each_family
def test_a_bundle_refuses_what_is_longer(exporter: Any, name: str) -> None:
    bundle = xexport.load(exporter(name, "cpu-fp32"))
    assert bundle.manifest.model.max_tokens == 96
    with pytest.raises(LimitError):
        bundle.stream().feed([1] * 97)


@each_family
def test_loads_a_file_of_our_own_training(tmp_path: Path, name: str) -> None:
    family = get_family(name)
    config = family.presets["tiny"]
    wanted = random_model(family, config).state_dict()
    tensors = {k: v for k, v in wanted.items() if not k.endswith("turns")}
    # the Block Transformer's own names are the authors', which it reads without metadata too
    another = {"x": torch.zeros(1)} if name == "block_transformer" else None
    check_own_file(family, config, tensors, wanted, tmp_path, another=another)


@each_family
def test_another_file_is_refused(tmp_path: Path, name: str) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=f"not {TITLES[name]}"):
        get_family(name).load(open_checkpoint(tmp_path / "other.safetensors"))
