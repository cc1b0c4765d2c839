"""M2-GPT: the chunk law, dense matrices on both axes as a second derivation, exports, its own checkpoints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chunk_form import (
    TARGETS,
    check_cuts,
    check_export,
    chunk_form,
    error,
    new_state,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tolerances import TOLERANCES
from torch import Tensor

from xexport.core.checkpoint import open_checkpoint
from xexport.core.errors import CheckpointError, LimitError
from xexport.core.registry import get_family
from xexport.models.m2_gpt import M2GPTConfig

FAMILY = get_family("m2_gpt")
TINY: M2GPTConfig = FAMILY.presets["tiny"]


def made(seed: int = 0) -> tuple[Any, Any]:
    """The chunk form and the training form with the same weights, biases and gains other than 0 and 1."""
    train = FAMILY.train_form(TINY)
    FAMILY.init(train, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in train.named_parameters():
            if p.ndim == 1 and ".filters." not in name:
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return chunk_form(FAMILY, train), train.eval()


@settings(max_examples=6, deadline=None)
@given(lengths=st.lists(st.integers(1, 15), min_size=1, max_size=3), batch=st.integers(1, 2))
def test_chunk_law(lengths: list[int], batch: int) -> None:
    check_cuts(made()[0], batch, lengths)


@pytest.mark.parametrize("length", [1, 17, 50])
def test_training_form_is_the_same_function(length: int) -> None:
    module, train = made()
    tokens = torch.randint(0, TINY.vocab_size, (2, length))
    want = module(tokens, *new_state(module, 2))[0]
    assert error(train(tokens).detach(), want) < TOLERANCES["model_fp32"]


def dense(blocks: Any) -> Tensor:
    """The whole matrix of a block-diagonal map."""
    return torch.block_diag(*(p.weight.double() for p in blocks.parts))


def toeplitz(h: Tensor, length: int) -> Tensor:
    """``[d,T,T]``, the causal convolutions by filters ``[d,L]`` as matrices."""
    lag = torch.arange(length)[:, None] - torch.arange(length)
    return torch.where(lag >= 0, h.double()[:, lag.clamp(min=0)], 0.0)


def layer_norm(x: Tensor, norm: Any) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight.double() + norm.bias.double()


def by_hand(module: Any, tokens: Tensor) -> Tensor:
    """Logits ``[T,V]`` by the formulas, with dense matrices on both axes, in float64."""
    x, T, d = module.embed.weight.double()[tokens], len(tokens), TINY.width
    for layer in module.layers:
        u = layer_norm(x, layer.hyena_norm) @ layer.hyena.in_proj.weight.double().T
        u = u + layer.hyena.in_proj.bias
        taps = layer.hyena.conv_weight.double().T.flip(1)
        s = torch.einsum("ctu,uc->tc", toeplitz(torch.nn.functional.pad(taps, (0, T)), T), u)
        x0, x1, v = (s + layer.hyena.conv_bias).split(d, -1)
        z = x1 * v
        y = torch.einsum("ctu,uc->tc", toeplitz(layer.filters[0], T), z) + layer.hyena.filter_skip[0] * z
        x = x + (x0 * y) @ layer.hyena.out_proj.weight.double().T + layer.hyena.out_proj.bias
        a, b = (layer_norm(x, layer.mlp_norm) @ dense(layer.blocks.gated_layers).T).chunk(2, -1)
        gelu = a * (1 + torch.special.erf(a / 2**0.5)) / 2
        x = x + (gelu * b) @ dense(layer.blocks.wo).T + layer.blocks.wo.bias
    return layer_norm(x, module.norm) @ module.head.weight.double().T


@pytest.mark.oracle
def test_dense_matrices_on_both_axes() -> None:
    module, _ = made(3)
    tokens = torch.randint(0, TINY.vocab_size, (50,))
    got = module(tokens[None], *new_state(module, 1))[0][0]
    assert error(got, by_hand(module, tokens).float()) < TOLERANCES["oracle_fp32"]


def test_longer_than_the_filters_is_refused() -> None:
    module, _ = made()
    with pytest.raises(LimitError):
        module(torch.zeros(1, 51, dtype=torch.int64), *new_state(module, 1))


@pytest.mark.parametrize("target", TARGETS)
def test_exports(exporter: Any, target: str) -> None:
    check_export(exporter, "m2_gpt", target)


def write(path: Path, family: str) -> Path:
    metadata = {
        "xexport.family": family,
        "xexport.layout": "training",
        "xexport.config": json.dumps(dataclasses.asdict(TINY)),
    }
    save_file(made()[1].state_dict(), path, metadata)
    return path


def test_own_checkpoint(tmp_path: Path) -> None:
    raw = open_checkpoint(write(tmp_path / "a.safetensors", "m2_gpt"))
    assert FAMILY.recognise(raw)
    assert get_family("hyena").recognise(raw) is None
    loaded = FAMILY.load(raw)
    assert loaded.config == TINY
    want = made()[0].state_dict()
    assert all(torch.equal(v, loaded.tensors[k]) for k, v in want.items())
    with pytest.raises(CheckpointError, match="not an M2-GPT"):
        FAMILY.load(open_checkpoint(write(tmp_path / "b.safetensors", "hyena")))


def test_published_sizes() -> None:
    for preset, millions in (("145m", 145), ("360m", 360)):
        with torch.device("meta"):
            count = sum(p.numel() for p in FAMILY.train_form(FAMILY.presets[preset]).parameters())
        assert count == pytest.approx(millions * 1e6, rel=0.05)
