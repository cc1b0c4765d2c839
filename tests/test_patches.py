"""Models that read patches (models/_patches.py): training forms, files of our own, the bound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import xexport
from xexport.core.checkpoint import open_checkpoint
from xexport.core.errors import CheckpointError, LimitError
from xexport.core.registry import get_family

TITLES = {"block_transformer": "a Block Transformer", "hourglass": "an Hourglass", "megabyte": "a MegaByte"}
VARIANTS = [(f, v) for f in TITLES for v in get_family(f).presets if v.startswith("tiny")]
each_family = pytest.mark.parametrize("name", TITLES)


@each_family
def test_a_bundle_refuses_what_is_longer(exporter: Any, name: str) -> None:
    bundle = xexport.load(exporter(name, "cpu-fp32"))
    assert bundle.manifest.model.max_tokens == 96
    with pytest.raises(LimitError):
        bundle.stream().feed([1] * 97)


@each_family
def test_another_file_is_refused(tmp_path: Path, name: str) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=f"not {TITLES[name]}"):
        get_family(name).load(open_checkpoint(tmp_path / "other.safetensors"))
