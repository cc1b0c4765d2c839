"""Linformer: equation 7 of the paper, another implementation, every sharing of the projections."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chunk_form import check_whole_export, error, load_module, random_model, role
from safetensors.torch import save_file
from tolerances import TOLERANCES
from torch import Tensor

import xexport
from xexport.core.checkpoint import open_checkpoint
from xexport.core.errors import CheckpointError, FormError, InputError
from xexport.core.registry import get_family

FAMILY = get_family("linformer")
TINY = FAMILY.presets["tiny"]
SHARING = ("none", "headwise", "kv", "layerwise")
each_sharing = pytest.mark.parametrize("sharing", SHARING)


def made(sharing: str, **changes: Any) -> Any:
    return random_model(FAMILY, dataclasses.replace(TINY, sharing=sharing, **changes))


def tokens(batch: int) -> Tensor:
    return torch.randint(0, 29, (batch, TINY.length), generator=torch.Generator().manual_seed(1))


def projections(module: Any, layer: int) -> tuple[Tensor, Tensor]:
    """E and F ``[k,n]``, or ``[H,k,n]``, of one layer."""
    attention = module.layers[layer].attention
    e = module.rows if attention.rows_of_keys is None else attention.rows_of_keys
    return e, e if attention.rows_of_values is None else attention.rows_of_values


@each_sharing
def test_heads_are_equation_seven(sharing: str) -> None:
    """softmax(Q_i (E_i K_i)^T / sqrt K) (F_i V_i), head by head, in double precision."""
    module = made(sharing).double()
    attention, (e, f) = module.layers[0].attention, projections(module, 0)
    x = torch.randn(2, TINY.length, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    heads = []
    for i in range(2):
        part = slice(16 * i, 16 * (i + 1))
        q, k, v = (x @ p.weight[part].t() for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        ei, fi = (e[i], f[i]) if sharing == "none" else (e, f)
        weights = torch.softmax(q @ (ei @ k).transpose(1, 2) / 4, -1)
        heads.append(weights @ (fi @ v))
    want = attention.o_proj(torch.cat(heads, -1))
    assert error(attention(x, module.rows), want) < TOLERANCES["op_fp64"]


@pytest.mark.oracle
@pytest.mark.parametrize("sharing", SHARING[1:])
def test_linformer_package(sharing: str) -> None:
    """The whole model; it has one projection for all heads, and no norm before the logits."""
    theirs = pytest.importorskip("linformer").LinformerLM
    module = made(sharing, final_norm=False, ffn=4 * 32)
    other = theirs(29, 32, TINY.length, 2, k=TINY.rows, heads=2).eval().requires_grad_(False)
    other.token_emb.weight.copy_(module.embed.weight)
    other.pos_emb.weight.copy_(module.positions)
    other.to_logits.load_state_dict(module.head.state_dict())
    for i, (mine, (attention, ffn)) in enumerate(zip(module.layers, other.linformer.net.layers, strict=True)):
        attention.norm.load_state_dict(mine.attention_norm.state_dict())
        for name in ("q", "k", "v"):
            getattr(attention.fn, f"to_{name}").weight.copy_(getattr(mine.attention, f"{name}_proj").weight)
        attention.fn.to_out.load_state_dict(mine.attention.o_proj.state_dict())
        e, f = projections(module, i)
        attention.fn.proj_k.copy_(e.t())
        attention.fn.proj_v.copy_(f.t())
        ffn.norm.load_state_dict(mine.ffn_norm.state_dict())
        ffn.fn.w1.load_state_dict(mine.fc1.state_dict())
        ffn.fn.w2.load_state_dict(mine.fc2.state_dict())
    assert error(module(tokens(2))[0], other(tokens(2))) < TOLERANCES["oracle_fp32"]


def test_sharing_saves_projections() -> None:
    one = TINY.rows * TINY.length
    counts = {s: sum(p.numel() for n, p in made(s).named_parameters() if "rows" in n) for s in SHARING}
    assert counts == {"none": 2 * 2 * 2 * one, "headwise": 2 * 2 * one, "kv": 2 * one, "layerwise": one}


@each_sharing
def test_training_form_and_initial_values(sharing: str) -> None:
    config = dataclasses.replace(TINY, sharing=sharing)
    module, train = made(sharing), FAMILY.train_form(config)
    train.load_state_dict(module.state_dict())
    assert error(train(tokens(2)).detach(), module(tokens(2))[0]) < TOLERANCES["model_fp32"]
    FAMILY.init(train, 0)
    train(tokens(2)).log_softmax(-1)[..., 3].mean().backward()
    assert [n for n, p in train.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_every_parameter_has_a_role() -> None:
    for sharing in SHARING:
        config = dataclasses.replace(TINY, sharing=sharing)
        assert {role(FAMILY, config, n) for n in FAMILY.build(config).state_dict()} >= {"other", "projection"}


def test_own_checkpoint_loads(tmp_path: Path) -> None:
    module = made("kv")
    metadata = {
        "xexport.family": "linformer",
        "xexport.layout": "training",
        "xexport.config": json.dumps(dataclasses.asdict(module.config)),
    }
    save_file(module.state_dict(), tmp_path / "own.safetensors", metadata)
    loaded = load_module(FAMILY, tmp_path / "own.safetensors")
    assert torch.equal(loaded(tokens(1))[0], module(tokens(1))[0])
    save_file({"embed.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not a Linformer"):
        FAMILY.load(open_checkpoint(tmp_path / "other.safetensors"))


@pytest.mark.parametrize("target", ["cpu-fp32", "cpu-int8"])
def test_export(exporter: Any, target: str) -> None:
    check_whole_export(exporter, "linformer", target)
    bundle = xexport.load(exporter("linformer", target))
    assert bundle.manifest.model.fixed_length == TINY.length
    stream = bundle.stream()
    with pytest.raises(InputError, match="one length: 24 tokens"):
        stream.feed([1, 2, 3])
    with pytest.raises(FormError, match="can't generate"):
        stream.generate([1])


@pytest.mark.parametrize("sharing", ["none", "kv"])
def test_other_sharings_export(sharing: str, exporter: Any, tmp_path: Path) -> None:
    """As a user's own module, which says its form and length itself."""
    module = made(sharing)
    bundle = xexport.load(exporter.export(module, "cpu-fp32", tmp_path / "out", name="linformer"))
    got = torch.from_numpy(bundle.stream(batch=2).feed(tokens(2).numpy()))
    assert error(got, module(tokens(2))[0]) < TOLERANCES["model_fp32"]
