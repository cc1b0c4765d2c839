"""TokenFormer: the chunk law, the formulas in float64, the published layout, exports."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from chunk_form import (
    TARGETS,
    check_cuts,
    check_export,
    error,
    new_state,
    random_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import TOLERANCES
from torch import Tensor

from xexport.core.checkpoint import open_checkpoint
from xexport.core.errors import CheckpointError, LimitError
from xexport.core.registry import get_family
from xexport.models.tokenformer import TokenFormerConfig

FAMILY = get_family("tokenformer")
TINY: TokenFormerConfig = FAMILY.presets["tiny"]
KINDS = {k: c for k, c in FAMILY.presets.items() if k.startswith("tiny")}


@settings(max_examples=6, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    batch=st.integers(1, 2),
)
def test_chunk_law(kind: str, lengths: list[int], batch: int) -> None:
    check_cuts(random_model(FAMILY, KINDS[kind]), batch, lengths)


def theta(a: Tensor, kind: str) -> Tensor:
    """Equations 5 and 6, a row at a time."""
    n = a.shape[-1]

    def gelu(x: Tensor) -> Tensor:
        return x * (1 + torch.special.erf(x / math.sqrt(2))) / 2

    rows = []
    for row in a:
        if kind == "softmax":
            rows.append(n * row.exp() / row.exp().sum())
        elif kind == "l2_norm_gelu":
            rows.append(gelu(row * math.sqrt(n) / math.sqrt(float((row * row).sum()))))
        else:
            g = gelu(row)
            rows.append(g * math.sqrt(n) / math.sqrt(float((g * g).sum())))
    return torch.stack(rows)


def by_hand(c: TokenFormerConfig, w: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits ``[T,V]`` in float64, head by head and pair by pair."""

    def norm(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + c.eps).sqrt()

    def pattention(x: Tensor, name: str) -> Tensor:
        return theta(x @ w[f"{name}.key_param_tokens"].T, c.activation) @ w[f"{name}.value_param_tokens"]

    def turned(x: Tensor) -> Tensor:
        y, half = x.clone(), c.rotated // 2
        for t in range(len(x)):
            for i in range(half):
                angle = t * c.rope_base ** (-2 * i / c.rotated)
                a, b = x[t, i], x[t, i + half]
                y[t, i] = a * math.cos(angle) - b * math.sin(angle)
                y[t, i + half] = b * math.cos(angle) + a * math.sin(angle)
        return y

    x = w["word_embeddings.weight"][tokens]
    later = torch.ones(len(x), len(x)).triu(1).bool()
    for i in range(c.layers):
        p = f"layers.{i}.attention."
        parts = (pattention(norm(x), f"{p}{n}").split(c.size, -1) for n in ("query", "key", "value"))
        heads = []
        for q, k, v in zip(*parts, strict=True):
            scores = turned(q) @ turned(k).T / math.sqrt(c.size)
            heads.append(scores.masked_fill(later, -math.inf).softmax(-1) @ v)
        x = x + pattention(torch.cat(heads, -1), f"{p}proj")
        x = x + pattention(norm(x), f"layers.{i}.mlp")
    x = norm(x) * w["norm.weight"] + w["norm.bias"]
    return x @ w.get("output.weight", w["word_embeddings.weight"]).T


@pytest.mark.oracle
@pytest.mark.parametrize("kind", KINDS)
def test_formulas(kind: str) -> None:
    module = random_model(FAMILY, KINDS[kind], 3)
    weights = {k: v.double() for k, v in module.state_dict().items()}
    tokens = torch.randint(0, module.vocab_size, (31,))
    got = module(tokens[None], *new_state(module, 1))[0][0]
    assert error(got, by_hand(KINDS[kind], weights, tokens).float()) < TOLERANCES["oracle_fp32"]


def test_a_zero_vector_stays_zero() -> None:
    module = random_model(FAMILY, TINY).layers[0].mlp
    assert torch.equal(module(torch.zeros(1, TINY.width)), torch.zeros(1, TINY.width))


def published(path: Path, **changes: Any) -> tuple[Path, Any]:
    """A checkpoint in the layout of the authors' code, at the width that says 12 heads."""
    c = dataclasses.replace(TINY, width=768, heads=12, layers=2, max_tokens=2048, **changes)
    module = random_model(FAMILY, c)
    out = {}
    for name, tensor in module.state_dict().items():
        if name == "word_embeddings.weight":
            out[f"sequential.0.{name}"] = tensor
        elif name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            out[f"sequential.{int(number) + 2}.{rest}"] = tensor
        elif name.startswith("norm."):
            out[f"sequential.{c.layers + 3}.{name}"] = tensor
        elif name.startswith("output."):
            out[name] = tensor
    torch.save(out, path)
    return path, module


@pytest.mark.parametrize("tied", [True, False])
def test_published_layout(tmp_path: Path, tied: bool) -> None:
    path, module = published(tmp_path / "pytorch_model.bin", tied=tied)
    raw = open_checkpoint(path)
    assert FAMILY.recognise(raw)
    loaded = FAMILY.load(raw)
    assert loaded.config == module.config
    assert "12 heads" in loaded.notes[0]
    assert all(torch.equal(v, loaded.tensors[k]) for k, v in module.state_dict().items())
    less = {k: v for k, v in raw.tensors.items() if not k.startswith("sequential.3.mlp")}
    with pytest.raises(CheckpointError, match="missing"):
        FAMILY.load(dataclasses.replace(raw, tensors=less))
    without = {k: v for k, v in raw.tensors.items() if "attention.query" not in k or "3." in k}
    assert FAMILY.recognise(dataclasses.replace(raw, tensors=without)) is None
    with pytest.raises(CheckpointError, match="not a TokenFormer"):
        FAMILY.load(dataclasses.replace(raw, tensors=without))


@pytest.mark.parametrize("target", TARGETS)
def test_exports(exporter: Any, target: str) -> None:
    check_export(exporter, "tokenformer", target)


def test_the_cache_has_an_end() -> None:
    module = random_model(FAMILY, TINY)
    with pytest.raises(LimitError):
        module(torch.zeros(1, 97, dtype=torch.int64), *new_state(module, 1))


def test_published_sizes() -> None:
    for preset, millions in (("150m", 150), ("450m", 450), ("900m", 900), ("1.5b", 1500)):
        with torch.device("meta"):
            count = sum(p.numel() for p in FAMILY.train_form(FAMILY.presets[preset]).parameters())
        assert count == pytest.approx(millions * 1e6, rel=0.1)
