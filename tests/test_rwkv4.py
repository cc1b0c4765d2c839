"""RWKV-4: parity with rwkv 0.8.32, transformers and published weights, loading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chunk_form import (
    error,
    load_module,
    new_state,
    operators,
    random_model,
)
from reversal import need
from rwkv_package import rwkv_package
from safetensors.torch import save_file
from tolerances import TOLERANCES

import xexport
from xexport.core.checkpoint import open_checkpoint
from xexport.core.errors import CheckpointError
from xexport.core.registry import get_family

FAMILY = get_family("rwkv4")
TINY = FAMILY.presets["tiny"]


def test_export_keeps_one_operator_a_layer_and_dynamic_axes() -> None:
    assert operators(FAMILY, TINY).count("xexport.wkv4.default") == TINY.layers


@pytest.mark.oracle
def test_parity_with_the_rwkv_package(tmp_path: Path) -> None:
    module = random_model(FAMILY, FAMILY.config(3, 48, 50), 3)
    tokens = torch.randint(0, 50, (1, 19))
    want, step, oracle = rwkv_package(dict(module.state_dict()), tokens[0].tolist(), tmp_path)
    logits, *state = module(tokens, *new_state(module, 1))
    assert error(logits[0], want) < TOLERANCES["oracle_fp32"]
    logits, *state = module(torch.tensor([[5]]), *state)
    assert error(logits[0, 0], step) < TOLERANCES["oracle_fp32"]
    assert len(oracle) == len(state)
    for mine, theirs in zip(state, oracle, strict=True):
        assert error(mine[0], theirs.flatten()) < TOLERANCES["oracle_fp32"]


@pytest.mark.oracle
def test_parity_with_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the oracle is not installed")
    # seven layers: it halves the residual stream after the sixth
    row = {"vocab_size": 41, "hidden_size": 24, "num_hidden_layers": 7, "intermediate_size": 40}
    config = transformers.RwkvConfig(**row, layer_norm_epsilon=1e-4)
    torch.manual_seed(0)
    model = transformers.RwkvForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(tmp_path)
    raw = open_checkpoint(tmp_path)
    assert "config.json" in str(FAMILY.recognise(raw))
    assert FAMILY.load(raw).config.norm_eps == 1e-4
    module = load_module(FAMILY, tmp_path)
    tokens = torch.randint(0, 41, (1, 9))
    with torch.no_grad():
        want = model(tokens, use_cache=True)
        then = model(torch.tensor([[3]]), state=[s.clone() for s in want.state], use_cache=True)
    logits, *state = module(tokens, *new_state(module, 1))
    assert error(logits, want.logits) < TOLERANCES["oracle_fp32"]
    assert error(module(torch.tensor([[3]]), *state)[0], then.logits) < TOLERANCES["oracle_fp32"]


@pytest.mark.oracle
def test_logits_of_the_published_test_model() -> None:
    raw = open_checkpoint(need("rwkv4-660k.pth"))
    assert "RWKV-4" in str(FAMILY.recognise(raw))
    module = load_module(FAMILY, raw.path)
    expected = np.load(need("rwkv4-660k.expected-logits.npy"))
    logits = module(torch.tensor([list(b'"in')]), *new_state(module, 1))[0][0, -1]
    assert np.abs(logits.numpy() - expected).max() < TOLERANCES["oracle_fp32"]


@pytest.mark.oracle
@pytest.mark.parametrize("target", ["cpu-fp32", "cpu-int8"])
def test_exported_test_model_gives_the_expected_logits(exporter: Any, tmp_path: Path, target: str) -> None:
    expected = np.load(need("rwkv4-660k.expected-logits.npy"))
    text = tmp_path / "english.txt"
    text.write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 8, encoding="utf-8")
    weights = need("rwkv4-660k.pth")
    folder = exporter.export("rwkv4", target, tmp_path / "out", weights=weights, eval_text=text)
    stream = xexport.load(folder).stream()
    whole = stream.feed(list(b'"in'))[0, -1]
    stream.reset()
    steps = [stream.feed([byte])[0, -1] for byte in b'"in'][-1]
    for got in (whole, steps):
        if target == "cpu-fp32":
            assert np.abs(got - expected).max() < TOLERANCES["oracle_fp32"]
        off = np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))
        assert off < TOLERANCES[f"tiny_logits_{target.removeprefix('cpu-')}"]


def test_loads_a_file_of_our_own_training(tmp_path: Path) -> None:
    tensors = {k: v.half() for k, v in random_model(FAMILY, TINY).state_dict().items()}
    config = {"layers": 2, "width": 32, "vocab_size": 61, "att_width": 24, "ffn_width": 72}
    metadata = {
        "xexport.family": "rwkv4",
        "xexport.layout": "training",
        "xexport.config": json.dumps(config),
    }
    save_file(tensors, tmp_path / "own.safetensors", metadata)
    raw = open_checkpoint(tmp_path / "own.safetensors")
    assert "metadata" in str(FAMILY.recognise(raw))
    assert FAMILY.load(raw).config == TINY


def test_loads_bfloat16_without_the_leading_axes(tmp_path: Path) -> None:
    tensors = {k: v.bfloat16().squeeze() for k, v in random_model(FAMILY, TINY).state_dict().items()}
    torch.save(tensors, tmp_path / "model.pth")
    assert FAMILY.load(open_checkpoint(tmp_path / "model.pth")).config == TINY


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("head.weight"), "head.weight"),
        (lambda t: t.pop("blocks.1.att.time_first"), "blocks.1.att.time_first"),
        (lambda t: t.update({"blocks.1.att.time_decay": torch.zeros(3)}), "blocks.1.att.time_decay"),
        (lambda t: t.update({"blocks.1.tiny_q.weight": torch.zeros(3)}), "no place in this model"),
        (lambda t: t.update({"blocks.0.att.ln_x.weight": torch.zeros(24)}), "later RWKV than version 4"),
    ],
    ids=["no head", "a tensor missing", "a wrong width", "an optional part", "version 5"],
)
def test_a_bad_checkpoint_is_refused_by_tensor_name(
    tmp_path: Path, change: Callable[[Any], None], says: str
) -> None:
    tensors = dict(random_model(FAMILY, TINY).state_dict())
    change(tensors)
    torch.save(tensors, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError) as caught:
        FAMILY.load(open_checkpoint(tmp_path / "bad.pth"))
    assert says in str(caught.value)


@pytest.mark.parametrize("preset", ["169m", "430m", "1.5b", "3b", "7b"])
def test_presets_have_the_published_parameter_counts(preset: str) -> None:
    """The count of arXiv 2305.13048, appendix: 2 V D + 13 D^2 L + D (11 L + 4)."""
    c = FAMILY.presets[preset]
    with torch.device("meta"):
        module = FAMILY.build(c)
    D, L = c.width, c.layers
    assert sum(p.numel() for p in module.parameters()) == 2 * 50277 * D + 13 * D * D * L + D * (11 * L + 4)
