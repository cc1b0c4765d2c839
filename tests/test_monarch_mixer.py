"""Monarch Mixer: the authors' own logits, dense matrices on both axes, the training form, checkpoints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chunk_form import TARGETS, check_whole_export, chunk_form, error
from safetensors.torch import save_file
from tolerances import TOLERANCES
from torch import Tensor

from xexport.core.checkpoint import RawCheckpoint, open_checkpoint
from xexport.core.errors import CheckpointError, LimitError
from xexport.core.registry import get_family
from xexport.models.monarch_mixer import MonarchMixer, MonarchMixerConfig, MonarchMixerTrain

FAMILY = get_family("monarch_mixer")
TINY: MonarchMixerConfig = FAMILY.presets["tiny"]
KINDS = {k: c for k, c in FAMILY.presets.items() if k.startswith("tiny")}
GOLDEN = Path(__file__).parent / "golden" / "m2_bert.npz"


def made(config: MonarchMixerConfig = TINY, seed: int = 0) -> tuple[MonarchMixer, MonarchMixerTrain]:
    """Both forms with the same weights, biases and gains other than 0 and 1."""
    train: MonarchMixerTrain = FAMILY.train_form(config)
    FAMILY.init(train, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in train.named_parameters():
            if ".networks." not in name:
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return chunk_form(FAMILY, train), train.eval()


def golden() -> tuple[RawCheckpoint, Tensor, Tensor]:
    """A published checkpoint's layout, tokens, and the authors' logits."""
    with np.load(GOLDEN) as file:
        arrays = {k: torch.from_numpy(file[k]) for k in file.files}
    tokens, logits = arrays.pop("tokens"), arrays.pop("logits")
    return RawCheckpoint(GOLDEN, arrays), tokens, logits


@pytest.mark.oracle
def test_the_authors_code() -> None:
    raw, tokens, want = golden()
    assert FAMILY.recognise(raw)
    loaded = FAMILY.load(raw)
    module = FAMILY.build(loaded.config)
    module.load_state_dict(loaded.tensors)
    assert error(module(tokens)[0].detach(), want.float()) < TOLERANCES["oracle_fp32"]


def test_names_of_the_authors_trainer() -> None:
    raw, *_ = golden()
    prefixed = dataclasses.replace(raw, tensors={f"model.{k}": v for k, v in raw.tensors.items()})
    assert FAMILY.recognise(prefixed)
    want = FAMILY.load(raw).tensors
    assert all(torch.equal(v, want[k]) for k, v in FAMILY.load(prefixed).tensors.items())


def both_sides(h: Tensor, length: int) -> Tensor:
    """``[d,T,T]``: the matrices of a convolution that sees both sides, h+ and moved h- stacked ``[2d,L]``."""
    before, after = h.double().chunk(2)
    lag = torch.arange(length)[:, None] - torch.arange(length)
    return torch.where(lag >= 0, before[:, lag.clamp(min=0)], 0.0) + torch.where(
        lag <= 0, after[:, (-lag).clamp(min=0)], 0.0
    )


def by_hand(c: MonarchMixerConfig, module: Any, tokens: Tensor) -> Tensor:
    """Logits ``[T,V]`` in float64 with dense matrices on both axes."""
    w = {k: v.double() for k, v in module.state_dict().items()}
    T = len(tokens)

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + c.eps).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return x * (1 + torch.special.erf(x / 2**0.5)) / 2

    def dense(name: str) -> Tensor:
        return torch.block_diag(*(w[f"{name}.parts.{k}.weight"] for k in range(c.blocks)))

    x = norm(w["embed.weight"][tokens] + w["positions"][:T], "embed_norm")
    for i in range(c.layers):
        p = f"layers.{i}."
        u = x @ w[f"{p}in_proj.weight"].T + w[f"{p}in_proj.bias"]
        s = w[f"{p}conv_bias"].expand_as(u).clone()
        for lag in range(3):
            s[lag:] += w[f"{p}conv_weight"][2 - lag] * u[: T - lag]
        x1, x2, v = s.chunk(3, -1)
        inputs = torch.cat((x1 * v, x), -1) if c.residual else x1 * v
        y = torch.einsum("ctu,uc->tc", both_sides(w[f"{p}filters"], T), inputs)
        mixed = x2 * y[:, : c.width] + (y[:, c.width :] if c.residual else 0)
        mixed = mixed @ w[f"{p}out_proj.weight"].T + w[f"{p}out_proj.bias"]
        a, b = (mixed @ dense(f"{p}mlp.gated_layers").T).chunk(2, -1)
        done = (gelu(a) * b) @ dense(f"{p}mlp.wo").T + w[f"{p}mlp.wo.bias"]
        x = norm(mixed + done, f"{p}norm")
    x = norm(gelu(x @ w["transform.weight"].T + w["transform.bias"]), "norm")
    return x @ w["embed.weight"].T + w["head_bias"]


@pytest.mark.oracle
@pytest.mark.parametrize("length", [1, 2, 31])
@pytest.mark.parametrize("kind", KINDS)
def test_dense_matrices_on_both_axes(kind: str, length: int) -> None:
    module, _ = made(KINDS[kind], 3)
    tokens = torch.randint(0, TINY.vocab_size, (length,))
    want = by_hand(KINDS[kind], module, tokens).float()
    assert error(module(tokens[None])[0][0], want) < TOLERANCES["oracle_fp32"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 40, 150])
def test_training_form_is_the_same_function(kind: str, length: int) -> None:
    module, train = made(KINDS[kind])
    tokens = torch.randint(0, TINY.vocab_size, (2, length))
    assert error(train(tokens).detach(), module(tokens)[0]) < TOLERANCES["model_fp32"]


def test_longer_than_the_filters_is_refused() -> None:
    for module in made():
        with pytest.raises(LimitError, match="longer than the filters"):
            module(torch.zeros(1, 151, dtype=torch.int64))


def test_own_checkpoint(tmp_path: Path) -> None:
    module, train = made(seed=5)
    config = json.dumps(dataclasses.asdict(TINY))
    metadata = {"xexport.family": "monarch_mixer", "xexport.layout": "training", "xexport.config": config}
    save_file(train.state_dict(), tmp_path / "a.safetensors", metadata)
    raw = open_checkpoint(tmp_path / "a.safetensors")
    assert FAMILY.recognise(raw)
    loaded = FAMILY.load(raw)
    assert loaded.config == TINY
    assert all(torch.equal(v, loaded.tensors[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: {k: v for k, v in t.items() if "implicit_filter_rev" not in k}, "not a Monarch Mixer"),
        (lambda t: {k: v for k, v in t.items() if "layer.1.attention.filter_fn.pos_emb.z" not in k}, "lacks"),
        (lambda t: {k: v for k, v in t.items() if not k.startswith("cls.")}, "for masked tokens"),
        (lambda t: {k: v for k, v in t.items() if "layer.0.mlp.wo.weight" not in k}, "missing"),
        (lambda t: t | {"bert.encoder.layer.0.mlp.gated_layers.weight": torch.zeros(2, 8, 6)}, "gated"),
        (lambda t: t | {"bert.encoder.layer.0.attention.layernorm.weight": torch.zeros(12)}, "norm in its"),
        (lambda t: t | {"bert.encoder.layer.1.mlp.wo.bias": torch.zeros(13)}, "wrong shape"),
    ],
)
def test_other_checkpoints_are_refused(change: Any, match: str) -> None:
    raw, *_ = golden()
    with pytest.raises(CheckpointError, match=match):
        FAMILY.load(dataclasses.replace(raw, tensors=change(dict(raw.tensors))))


def test_published_sizes() -> None:
    for preset, millions in (("80m", 80), ("110m", 110), ("260m", 260), ("341m", 341)):
        with torch.device("meta"):
            count = sum(p.numel() for p in FAMILY.train_form(FAMILY.presets[preset]).parameters())
        assert count == pytest.approx(millions * 1e6, rel=0.06)


@pytest.mark.parametrize("target", TARGETS)
def test_exports(exporter: Any, target: str) -> None:
    check_whole_export(exporter, "monarch_mixer", target)
