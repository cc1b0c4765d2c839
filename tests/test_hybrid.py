"""The Mamba-2 hybrid: parity with transformers' Bamba and Granite, the chunk law, exports, the bound."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chunk_form import (
    TARGETS,
    check_cuts,
    check_export,
    check_gradients,
    check_training_form,
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

import xexport
from xexport.core.checkpoint import open_checkpoint
from xexport.core.errors import CheckpointError, InputError, LimitError
from xexport.core.registry import family_names, get_family

FAMILY = get_family("hybrid")
TINY = FAMILY.presets["tiny"]
SHORT = replace(TINY, max_tokens=64)
OPTIONS = {
    "as it is": {},
    "no rotation, factors": {
        "rotary": 0,
        "embedding_factor": 3.0,
        "residual_factor": 0.5,
        "score_factor": 0.2,
        "logits_divisor": 4.0,
    },
    "whole head rotated": {"rotary": 12, "attention": (0, 2)},
    "no attention": {"attention": ()},
    "experts": {"experts": 5, "experts_used": 2, "expert_ffn": 16},
}


@settings(max_examples=12, deadline=None)
@given(
    options=st.sampled_from(sorted(OPTIONS)),
    batch=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 13), min_size=1, max_size=4),
    seed=st.integers(0, 50),
)
def test_any_cut_gives_the_same_logits_and_state(
    options: str, batch: int, lengths: list[int], seed: int
) -> None:
    check_cuts(random_model(FAMILY, replace(SHORT, **OPTIONS[options]), seed), batch, lengths)


@pytest.mark.parametrize("options", OPTIONS)
def test_training_form_is_the_chunk_form_from_the_first_state(options: str) -> None:
    config = replace(SHORT, **OPTIONS[options])
    check_training_form(FAMILY, config)
    check_gradients(FAMILY, config)


def test_export_keeps_one_operator_a_layer_and_dynamic_axes() -> None:
    found = operators(FAMILY, SHORT)
    assert found.count("xexport.linear_recurrence.default") == 2
    assert found.count("xexport.cached_attention.default") == 1


@pytest.mark.parametrize("target", TARGETS)
def test_bundle_is_pytorch(exporter: Any, target: str) -> None:
    check_export(exporter, "hybrid", target)


def test_a_stream_longer_than_the_cache_is_refused(exporter: Any) -> None:
    module = random_model(FAMILY, replace(TINY, max_tokens=8))
    tokens = torch.zeros(1, 9, dtype=torch.int64)
    with pytest.raises(LimitError):
        module(tokens, *new_state(module, 1))
    bundle = xexport.load(exporter("hybrid", "cpu-fp32"))
    assert bundle.manifest.model.max_tokens == TINY.max_tokens
    with pytest.raises(LimitError):
        bundle.stream().feed([1] * (TINY.max_tokens + 1))


SIZES = {
    "vocab_size": 41,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "mamba_n_heads": 6,
    "mamba_d_head": 8,
    "mamba_d_state": 5,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bamba": ("Bamba", {"intermediate_size": 40, "attn_layer_indices": [1]}),
    "bamba with biases": (
        "Bamba",
        {
            "intermediate_size": 40,
            "attn_layer_indices": [0, 2],
            "attention_bias": True,
            "mlp_bias": True,
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
            "tie_word_embeddings": True,
        },
    ),
    "granite": (
        "GraniteMoeHybrid",
        {
            "shared_intermediate_size": 40,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 5.0,
        },
    ),
}
LAYOUTS["granite with experts"] = (
    "GraniteMoeHybrid",
    {**LAYOUTS["granite"][1], "num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 20},
)
LAYOUTS["granite with rope"] = (
    "GraniteMoeHybrid",
    {**LAYOUTS["granite"][1], "position_embedding_type": "rope"},
)


def save_hugging_face(folder: Path, layout: str) -> Any:
    """A tiny random transformers model with a published layout, saved into ``folder``."""
    transformers = pytest.importorskip("transformers", reason="the oracle is not installed")
    name, changes = LAYOUTS[layout]
    config = getattr(transformers, f"{name}Config")(**SIZES, **changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)
    return model


@pytest.mark.oracle
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parity_with_transformers(tmp_path: Path, layout: str) -> None:
    model = save_hugging_face(tmp_path, layout)
    raw = open_checkpoint(tmp_path)
    assert {n for n in family_names() if get_family(n).recognise(raw)} == {"hybrid"}
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


@pytest.mark.oracle
def test_experts_under_the_names_that_transformers_keeps_them(tmp_path: Path) -> None:
    """A state dict has other names than a saved folder, and the same tensors; the copy is noted."""
    model = save_hugging_face(tmp_path, "granite with experts")
    loaded = FAMILY.load(open_checkpoint(tmp_path))
    assert any("all 6 experts" in note for note in loaded.notes)
    save_file({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    again = FAMILY.load(open_checkpoint(tmp_path)).tensors
    assert all(torch.equal(again[k], v) for k, v in loaded.tensors.items())


def test_experts_are_chosen_by_token() -> None:
    """Each alone by its own weights, in double precision; gates of all others are 0."""
    module = random_model(FAMILY, replace(SHORT, **OPTIONS["experts"]))
    experts = module.model.layers[0].experts.double()
    x = torch.randn(7, 24, dtype=torch.float64)
    scores = x @ experts.router.weight.T
    inner = experts.gate_up_proj.weight.view(5, 2, 16, 24)
    rows = []
    for token, score in zip(x, scores, strict=True):
        best = sorted(range(5), key=lambda e: -float(score[e]))[:2]
        share = torch.softmax(score[best], 0)
        y = torch.zeros(24, dtype=torch.float64)
        for part, e in zip(share, best, strict=True):
            gate, up = inner[e, 0] @ token, inner[e, 1] @ token
            y += part * (experts.down_proj.weight[:, e * 16 : e * 16 + 16] @ (gate * gate.sigmoid() * up))
        rows.append(y)
    assert error(experts(x), torch.stack(rows)) < TOLERANCES["op_fp32"]
    assert (experts.gates(x) > 0).sum(-1).tolist() == [2] * 7


@pytest.mark.parametrize("target", ["cpu-fp32", "cpu-int8"])
def test_experts_export(exporter: Any, tmp_path: Path, target: str) -> None:
    preset = "tiny-experts"
    bundle = xexport.load(exporter.export("hybrid", target, tmp_path / "out", preset=preset))
    module = FAMILY.build(FAMILY.presets[preset]).eval().requires_grad_(False)
    FAMILY.init(module, 0)
    tokens = torch.randint(0, 61, (1, 30), generator=torch.Generator().manual_seed(1))
    want = module(tokens, *new_state(module, 1))[0].numpy()
    stream = bundle.stream()
    parts = [
        stream.feed(tokens[:, :20].numpy()),
        *(stream.feed(tokens[:, i : i + 1].numpy()) for i in range(20, 30)),
    ]
    got = np.concatenate(parts, 1)
    allowed = TOLERANCES[f"tiny_logits_{target.removeprefix('cpu-')}"]
    assert np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)) < allowed
    assert bundle.manifest.checks["chunk_error_onnx"] < TOLERANCES["model_fp32"]


def test_loads_a_file_of_our_own_training(tmp_path: Path) -> None:
    row = {k: v for k, v in vars(TINY).items() if v != vars(type(TINY)).get(k)}
    metadata = {
        "xexport.family": "hybrid",
        "xexport.layout": "training",
        "xexport.config": json.dumps(row),
    }
    tensors = {k: v.half() for k, v in random_model(FAMILY, TINY).state_dict().items() if k != "model.turns"}
    save_file(tensors, tmp_path / "own.safetensors", metadata)
    raw = open_checkpoint(tmp_path / "own.safetensors")
    assert "metadata" in str(FAMILY.recognise(raw))
    assert FAMILY.load(raw).config == TINY


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "mamba2"}, "hybrid"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type"),
        ({"model_type": "granitemoehybrid", "num_local_experts": None}, "lacks a size"),
        ({"mamba_n_heads": None}, "lacks a size"),
        ({"time_step_limit": [1, 2, 3]}, "time_step_limit"),
    ],
    ids=["Mamba-2", "another activation", "scaled rotation", "experts", "no size", "no pair"],
)
def test_a_folder_that_is_none_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    row = {**SIZES, "model_type": "bamba", "intermediate_size": 40, **change}
    (tmp_path / "config.json").write_text(json.dumps(row))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=says):
        FAMILY.load(open_checkpoint(tmp_path))


@pytest.mark.parametrize(
    "change",
    [{"heads": 5}, {"kv_heads": 3}, {"rotary": 5}, {"rotary": 14}, {"attention": (3,)}, {"experts": 2}],
)
def test_a_bad_configuration_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        replace(TINY, **change)


def test_preset_has_the_published_parameter_count() -> None:
    with torch.device("meta"):
        module = FAMILY.build(FAMILY.presets["bamba-9b"])
    assert sum(p.numel() for p in module.parameters()) == pytest.approx(9.78e9, rel=1e-3)
