"""Mamba-1: parity with transformers, the chunk law, loading a Hugging Face folder, roles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chunk_form import (
    check_cuts,
    error,
    load_module,
    new_state,
    operators,
    random_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tolerances import TOLERANCES

from xexport.core.checkpoint import open_checkpoint
from xexport.core.errors import CheckpointError
from xexport.core.registry import get_family
from xexport.models.mamba import MambaConfig

FAMILY = get_family("mamba")
TINY = FAMILY.presets["tiny"]


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 13), min_size=1, max_size=4),
    kernel=st.integers(2, 5),
    seed=st.integers(0, 50),
)
def test_any_cut_gives_the_same_logits_and_state(
    batch: int, lengths: list[int], kernel: int, seed: int
) -> None:
    config = MambaConfig(2, 20, 31, state_size=3, conv_kernel=kernel)
    check_cuts(random_model(FAMILY, config, seed), batch, lengths)


def test_initial_step_sizes_are_spread() -> None:
    module = FAMILY.build(TINY)
    FAMILY.init(module, 7)
    dt = torch.nn.functional.softplus(module.backbone.layers[0].mixer.dt_proj.bias)
    assert 0.0009 < dt.min() < dt.max() < 0.11


def test_export_keeps_one_operator_a_layer_and_dynamic_axes() -> None:
    assert operators(FAMILY, TINY).count("xexport.selective_scan.default") == TINY.layers


def save_hugging_face(folder: Path, **changes: Any) -> Any:
    """A tiny random transformers model with a published layout, saved into ``folder``."""
    transformers = pytest.importorskip("transformers", reason="the oracle is not installed")
    row = {
        "vocab_size": 41,
        "hidden_size": 24,
        "state_size": 5,
        "num_hidden_layers": 2,
        "expand": 2,
        "conv_kernel": 4,
        "initializer_range": 0.5,
        "layer_norm_epsilon": 1e-4,
        **changes,
    }
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**row)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)
    return model


@pytest.mark.oracle
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"use_bias": True, "use_conv_bias": False, "expand": 3, "conv_kernel": 3, "time_step_rank": 7},
    ],
    ids=["tied", "untied", "other sizes and biases"],
)
def test_parity_with_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = save_hugging_face(tmp_path, **changes)
    raw = open_checkpoint(tmp_path)
    assert FAMILY.recognise(raw)
    loaded = FAMILY.load(raw)
    module = load_module(FAMILY, tmp_path)
    tokens = torch.randint(0, 41, (2, 11))
    with torch.no_grad():
        want = model(tokens, use_cache=True)
    got, *state = module(tokens, *new_state(module, 2))
    assert error(got, want.logits) < TOLERANCES["oracle_fp32"]
    cache = want.cache_params
    for token in (3, 17):
        step = torch.full((2, 1), token)
        with torch.no_grad():
            want = model(step, cache_params=cache, use_cache=True)
        got, *state = module(step, *state)
        assert error(got, want.logits) < TOLERANCES["oracle_fp32"]
    assert any("tied" in note for note in loaded.notes) == changes.get("tie_word_embeddings", True)


@pytest.mark.oracle
def test_parity_with_falcon_mamba(tmp_path: Path) -> None:
    """Mamba-1 with a norm of dt, B and C; its tokens go in at once and one by one."""
    transformers = pytest.importorskip("transformers", reason="the oracle is not installed")
    row = {
        "vocab_size": 41,
        "hidden_size": 24,
        "state_size": 5,
        "num_hidden_layers": 2,
        "mixer_rms_eps": 1e-3,
    }
    torch.manual_seed(0)
    model = transformers.FalconMambaForCausalLM(transformers.FalconMambaConfig(**row)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(tmp_path)
    raw = open_checkpoint(tmp_path)
    assert "falcon_mamba" in str(FAMILY.recognise(raw))
    loaded = FAMILY.load(raw)
    assert loaded.config.mixer_norm_eps == 1e-3
    module = load_module(FAMILY, tmp_path)
    tokens = torch.randint(0, 41, (2, 11))
    with torch.no_grad():
        want = model(tokens).logits
    got, *state = module(tokens[:, :9], *new_state(module, 2))
    pieces = [got]
    for t in (9, 10):
        got, *state = module(tokens[:, t : t + 1], *state)
        pieces.append(got)
    assert error(torch.cat(pieces, 1), want) < TOLERANCES["oracle_fp32"]


def test_loads_a_file_of_our_own_training(tmp_path: Path) -> None:
    config = {"layers": 2, "width": 24, "vocab_size": 61, "state_size": 4, "dt_rank": 3}
    metadata = {
        "xexport.family": "mamba",
        "xexport.layout": "training",
        "xexport.config": json.dumps(config),
    }
    tensors = {k: v.half() for k, v in random_model(FAMILY, TINY).state_dict().items()}
    save_file(tensors, tmp_path / "own.safetensors", metadata)
    loaded = FAMILY.load(open_checkpoint(tmp_path / "own.safetensors"))
    assert loaded.config == TINY
    assert set(loaded.tensors) == set(tensors)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"xexport.config": '{"layers": 2, "width": 24, "colour": 1}'}, "colour"),
        ({"xexport.config": "{"}, "can't be read"),
        ({}, "can't be read"),
        ({"xexport.config": "{}", "xexport.layout": "chunks"}, "chunks"),
    ],
    ids=["unknown key", "not JSON", "no configuration", "unknown layout"],
)
def test_bad_metadata_is_refused(tmp_path: Path, metadata: dict[str, str], says: str) -> None:
    table = {"xexport.family": "mamba", "xexport.layout": "training", **metadata}
    save_file({"x": torch.zeros(1)}, tmp_path / "own.safetensors", table)
    with pytest.raises(CheckpointError, match=says):
        FAMILY.load(open_checkpoint(tmp_path / "own.safetensors"))


def test_a_folder_of_another_model_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba2", "hidden_size": 8}')
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    raw = open_checkpoint(tmp_path)
    assert FAMILY.recognise(raw) is None
    with pytest.raises(CheckpointError, match="mamba2"):
        FAMILY.load(raw)


def test_a_wrong_shape_is_refused_by_tensor_name(tmp_path: Path) -> None:
    save_hugging_face(tmp_path)
    row = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**row, "state_size": 6}))
    with pytest.raises(CheckpointError, match="A_log"):
        FAMILY.load(open_checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("preset", "millions"), [("130m", 129.135360), ("370m", 371.516416), ("790m", 793.204224)]
)
def test_presets_have_the_published_parameter_counts(preset: str, millions: float) -> None:
    with torch.device("meta"):
        module = FAMILY.build(FAMILY.presets[preset])
    tied = module.lm_head.weight.numel()
    assert sum(p.numel() for p in module.parameters()) - tied == round(millions * 1e6)
