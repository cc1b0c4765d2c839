"""Hourglass: hourglass-transformer-pytorch, the bound, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chunk_form import error, in_chunks, load_module, new_state, random_model, recognised_by
from tolerances import TOLERANCES

from xexport.core.checkpoint import open_checkpoint
from xexport.core.errors import CheckpointError, InputError, LimitError
from xexport.core.registry import get_family
from xexport.models.hourglass import HourglassConfig

FAMILY = get_family("hourglass")
TINY: HourglassConfig = FAMILY.presets["tiny"]


def their_file(folder: Path, **options: Any) -> tuple[Any, Path]:
    """A random model of hourglass-transformer-pytorch and its state_dict as a file."""
    package = pytest.importorskip("hourglass_transformer_pytorch", reason="the oracle is not installed")
    torch.manual_seed(0)
    sizes = {"num_tokens": 29, "dim": 16, "max_seq_len": 24, "heads": 2, "depth": (1, 2, 1)}
    sizes |= {"shorten_factor": 3, "updown_sample_type": "linear"}
    model = package.HourglassTransformerLM(**(sizes | options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    torch.save(model.state_dict(), folder / "model.pt")
    return model, folder / "model.pt"


@pytest.mark.oracle
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attn_resampling": False},
        {"depth": (1, (2, 1, 1), 1), "shorten_factor": (3, 2)},
        {"depth": (1, (1, (1, 1, 1), 1), 2), "shorten_factor": (2, 2, 3), "attn_resampling": False},
    ],
    ids=["attention", "linear", "two levels", "three levels"],
)
def test_parity_with_hourglass_transformer_pytorch(tmp_path: Path, options: dict[str, Any]) -> None:
    """Lengths that all factors divide: the package fails at others."""
    model, path = their_file(tmp_path, **options)
    assert recognised_by(open_checkpoint(path)) == {"hourglass"}
    module = load_module(FAMILY, path)
    tokens = torch.randint(0, 29, (2, 24))
    with torch.no_grad():
        want = model(tokens)
    got = in_chunks(module, tokens, new_state(module, 2), [1, 2, 8, 10])[0]
    assert error(got, want) < TOLERANCES["oracle_fp32"]


@pytest.mark.oracle
@pytest.mark.parametrize("attention", [True, False], ids=["attention", "plain"])
def test_means_are_those_of_the_package(tmp_path: Path, attention: bool) -> None:
    """Its file does not tell the factor: with matrices in place of means all the rest is told."""
    model, path = their_file(tmp_path, updown_sample_type="naive", attn_resampling=attention)
    with pytest.raises(CheckpointError, match="does not tell the factors"):
        FAMILY.load(open_checkpoint(path))
    tensors = model.state_dict()
    d = 16
    row = torch.eye(d).repeat(1, 3) / 3
    stand_in = {"downsample.proj.weight": row, "upsample.proj.weight": torch.eye(d).repeat(3, 1)}
    for name, weight in stand_in.items():
        tensors[f"transformer.{name}"] = weight
        tensors[f"transformer.{name.replace('weight', 'bias')}"] = torch.zeros(weight.shape[0])
    torch.save(tensors, path)
    matrices = load_module(FAMILY, path)
    module = FAMILY.build(replace(matrices.config, linear=False)).requires_grad_(False)
    module.load_state_dict({k: v for k, v in matrices.state_dict().items() if k in module.state_dict()})
    tokens = torch.randint(0, 29, (2, 24))
    with torch.no_grad():
        want = model(tokens)
    for each in (module, matrices):
        assert error(each(tokens, *new_state(each, 2))[0], want) < TOLERANCES["oracle_fp32"]


def test_the_longest_stream() -> None:
    module = random_model(FAMILY, replace(TINY, max_tokens=7))
    _, *state = module(torch.zeros(1, 7, dtype=torch.int64), *new_state(module, 1))
    with pytest.raises(LimitError):
        module(torch.zeros(1, 1, dtype=torch.int64), *state)


@pytest.mark.parametrize(
    "change", [{"factors": ()}, {"factors": (1, 2)}, {"pre": (1,)}, {"heads": 3}, {"valley": 0}], ids=str
)
def test_a_bad_configuration_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        replace(TINY, **change)
