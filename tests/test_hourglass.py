"""Hourglass: hourglass-transformer-pytorch, the chunk law at every alignment, exports, the bound."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chunk_form import (
    check_cuts,
    check_export,
    check_gradients,
    check_init,
    check_training_form,
    error,
    load_module,
    new_state,
    random_model,
    role,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tolerances import TOLERANCES

import xexport
from xexport.core.checkpoint import open_checkpoint
from xexport.core.errors import CheckpointError, InputError, LimitError
from xexport.core.registry import family_names, get_family
from xexport.models.hourglass import HourglassConfig

FAMILY = get_family("hourglass")
VARIANTS: dict[str, HourglassConfig] = {k: v for k, v in FAMILY.presets.items() if k.startswith("tiny")}
TINY = VARIANTS["tiny"]
each_variant = pytest.mark.parametrize("name", VARIANTS)


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from([*VARIANTS]),
    batch=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 13), min_size=1, max_size=5),
    seed=st.integers(0, 50),
)
def test_any_cut_gives_the_same_logits_and_state(
    name: str, batch: int, lengths: list[int], seed: int
) -> None:
    check_cuts(random_model(FAMILY, VARIANTS[name], seed), batch, lengths)


@each_variant
def test_training_form_is_the_chunk_form_from_the_first_state(name: str) -> None:
    check_training_form(FAMILY, VARIANTS[name])
    check_gradients(FAMILY, VARIANTS[name])


def test_init_depends_on_the_seed_alone() -> None:
    check_init(FAMILY, TINY)


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
    assert {n for n in family_names() if get_family(n).recognise(open_checkpoint(path))} == {"hourglass"}
    module = load_module(FAMILY, path)
    tokens = torch.randint(0, 29, (2, 24))
    with torch.no_grad():
        want = model(tokens)
    state, pieces = new_state(module, 2), []
    for piece in tokens.split([1, 1, 6, 2, 14], 1):
        got, *state = module(piece, *state)
        pieces.append(got)
    assert error(torch.cat(pieces, 1), want) < TOLERANCES["oracle_fp32"]


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


@pytest.mark.parametrize("target", ["cpu-fp32", "cpu-int8"])
def test_bundle_is_pytorch(exporter: Any, target: str) -> None:
    check_export(exporter, "hourglass", target)


def test_the_longest_stream(exporter: Any) -> None:
    module = random_model(FAMILY, replace(TINY, max_tokens=7))
    _, *state = module(torch.zeros(1, 7, dtype=torch.int64), *new_state(module, 1))
    with pytest.raises(LimitError):
        module(torch.zeros(1, 1, dtype=torch.int64), *state)
    bundle = xexport.load(exporter("hourglass", "cpu-fp32"))
    assert bundle.manifest.model.max_tokens == 96
    with pytest.raises(LimitError):
        bundle.stream().feed([1] * 97)


def test_loads_a_file_of_our_own_training(tmp_path: Path) -> None:
    metadata = {
        "xexport.family": "hourglass",
        "xexport.layout": "training",
        "xexport.config": json.dumps(vars(TINY)),
    }
    save_file(random_model(FAMILY, TINY).state_dict(), tmp_path / "own.safetensors", metadata)
    raw = open_checkpoint(tmp_path / "own.safetensors")
    assert "metadata" in str(FAMILY.recognise(raw))
    assert FAMILY.load(raw).config == TINY


def test_another_file_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not an Hourglass"):
        FAMILY.load(open_checkpoint(tmp_path / "other.safetensors"))


@pytest.mark.parametrize(
    "change", [{"factors": ()}, {"factors": (1, 2)}, {"pre": (1,)}, {"heads": 3}, {"valley": 0}], ids=str
)
def test_a_bad_configuration_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        replace(TINY, **change)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("embed.weight", "embedding"),
        ("head.weight", "head"),
        ("level.down.weight", "projection"),
        ("level.inner.gather.kv_proj.weight", "projection"),
        ("level.inner.valley.0.norm.weight", "norm"),
        ("level.spread.ffn.fc1.bias", "norm"),
    ],
)
def test_roles(name: str, wanted: str) -> None:
    assert role(FAMILY, TINY, name) == wanted
