"""Mamba-2: parity with transformers, the chunk law, exports, loading a Hugging Face folder, roles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chunk_form import (
    TARGETS,
    check_cuts,
    check_export,
    error,
    load_module,
    new_state,
    operators,
    random_model,
    recognised_by,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tolerances import TOLERANCES

from xexport.core.checkpoint import open_checkpoint
from xexport.core.errors import CheckpointError
from xexport.core.registry import get_family
from xexport.models.mamba2 import Mamba2Config
from xexport.ops.linear_attention.parallel import gated_parallel
from xexport.ops.linear_attention.reference import linear_attention

FAMILY = get_family("mamba2")
TINY = FAMILY.presets["tiny"]


@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 13), min_size=1, max_size=4),
    kernel=st.integers(2, 5),
    groups=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 50),
)
def test_any_cut_gives_the_same_logits_and_state(
    batch: int, lengths: list[int], kernel: int, groups: int, seed: int
) -> None:
    config = Mamba2Config(2, 20, 31, 4, 10, 6, groups, kernel)
    check_cuts(random_model(FAMILY, config, seed), batch, lengths)


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 150])
def test_parallel_form_is_the_operator(T: int) -> None:
    g = torch.Generator().manual_seed(T)
    q, k, v, state, decay = (
        torch.randn(*shape, generator=g, dtype=torch.float64)
        for shape in ((2, T, 3, 4), (2, T, 3, 4), (2, T, 3, 5), (2, 3, 4, 5), (2, T, 3))
    )
    decay = -decay.exp()
    got = gated_parallel(q, k, v, state, decay, 0.7)
    packed = (x.flatten(-2) for x in (q, k, v))
    out, end = linear_attention(*packed, state, decay, 3, 3, 0.7, "gated")
    assert error(got[0].flatten(-2), out) < TOLERANCES["op_fp64"]
    assert error(got[1], end) < TOLERANCES["op_fp64"]


def test_export_keeps_two_operators_a_layer_and_dynamic_axes() -> None:
    found = operators(FAMILY, TINY)
    assert found.count("xexport.linear_recurrence.default") == TINY.layers
    assert found.count("xexport.causal_conv1d.default") == TINY.layers


@pytest.mark.parametrize("target", TARGETS)
def test_bundle_is_pytorch(exporter: Any, target: str) -> None:
    check_export(exporter, "mamba2", target)


def save_hugging_face(folder: Path, **changes: Any) -> Any:
    """A tiny random transformers model with a published layout, saved into ``folder``."""
    transformers = pytest.importorskip("transformers", reason="the oracle is not installed")
    row = {
        "vocab_size": 41,
        "hidden_size": 24,
        "num_heads": 6,
        "head_dim": 8,
        "state_size": 5,
        "num_hidden_layers": 2,
        "n_groups": 2,
        "chunk_size": 4,
        "initializer_range": 0.5,
        "layer_norm_epsilon": 1e-4,
        **changes,
    }
    torch.manual_seed(0)
    model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**row)).eval()
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
        {"tie_word_embeddings": True, "n_groups": 1},
        {
            "use_bias": True,
            "use_conv_bias": False,
            "expand": 3,
            "num_heads": 9,
            "n_groups": 3,
            "conv_kernel": 3,
        },
    ],
    ids=["untied", "tied, one group", "other sizes and biases"],
)
def test_parity_with_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = save_hugging_face(tmp_path, **changes)
    raw = open_checkpoint(tmp_path)
    assert recognised_by(raw) == {"mamba2"}
    loaded = FAMILY.load(raw)
    assert any("tied" in note for note in loaded.notes) == changes.get("tie_word_embeddings", False)
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


@pytest.mark.oracle
def test_parity_where_the_step_size_is_limited(tmp_path: Path) -> None:
    model = save_hugging_face(tmp_path, time_step_limit=(0.3, 0.9))
    module = load_module(FAMILY, tmp_path)
    assert (module.config.dt_min, module.config.dt_max) == (0.3, 0.9)
    tokens = torch.randint(0, 41, (2, 11))
    with torch.no_grad():
        want = model(tokens).logits
    assert error(module(tokens, *new_state(module, 2))[0], want) < TOLERANCES["oracle_fp32"]


def test_loads_a_file_of_our_own_training(tmp_path: Path) -> None:
    config = {"layers": 2, "width": 24, "vocab_size": 61, "head_size": 12, "state_size": 8, "groups": 2}
    metadata = {
        "xexport.family": "mamba2",
        "xexport.layout": "training",
        "xexport.config": json.dumps(config),
    }
    tensors = {k: v.half() for k, v in random_model(FAMILY, TINY).state_dict().items()}
    save_file(tensors, tmp_path / "own.safetensors", metadata)
    raw = open_checkpoint(tmp_path / "own.safetensors")
    assert "metadata" in str(FAMILY.recognise(raw))
    loaded = FAMILY.load(raw)
    assert loaded.config == TINY
    assert set(loaded.tensors) == set(tensors)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"model_type": "mamba"}, "mamba2"),
        ({"model_type": "mamba2"}, "lacks a size"),
        ({"model_type": "mamba2", "hidden_act": "gelu"}, "gelu"),
        ({"model_type": "mamba2", "time_step_limit": 3}, "time_step_limit"),
    ],
    ids=["Mamba-1", "no sizes", "another activation", "no pair"],
)
def test_a_folder_that_is_none_is_refused(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(row))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=says):
        FAMILY.load(open_checkpoint(tmp_path))


def test_a_wrong_shape_is_refused_by_tensor_name(tmp_path: Path) -> None:
    save_hugging_face(tmp_path)
    row = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**row, "state_size": 6}))
    with pytest.raises(CheckpointError, match="conv1d"):
        FAMILY.load(open_checkpoint(tmp_path))


@pytest.mark.parametrize(("preset", "millions"), [("130m", 128.989632), ("2.7b", 2702.599680)])
def test_presets_have_the_published_parameter_counts(preset: str, millions: float) -> None:
    with torch.device("meta"):
        module = FAMILY.build(FAMILY.presets[preset])
    tied = module.lm_head.weight.numel()
    assert sum(p.numel() for p in module.parameters()) - tied == round(millions * 1e6)
