"""SLAB: the papers' formulas in double precision, folded norms, refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chunk_form import (
    check_own_file,
    chunk_form,
    draw_tokens,
    error,
    new_state,
    operators,
    trained,
)
from safetensors.torch import save_file
from tolerances import TOLERANCES
from torch import Tensor

from xexport.core.checkpoint import open_checkpoint
from xexport.core.registry import get_family
from xexport.models.slab import SlabConfig, SlabTraining

FAMILY = get_family("slab")
TINY: SlabConfig = FAMILY.presets["tiny"]


def settled(config: SlabConfig = TINY) -> SlabTraining:
    """The training form with weights and running statistics of which none is at its first value."""
    module: SlabTraining = trained(FAMILY, config)
    for name, b in module.named_buffers():
        if name.endswith("mean"):
            b.normal_()
        elif name.endswith("var"):
            b.uniform_(0.3, 3)
    return module


def rep_bn(w: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    """Section 3.2: BN(x) + alpha x, unfolded."""
    g, b, a, mean, var = (w[f"{name}.{leaf}"] for leaf in ("weight", "bias", "alpha", "mean", "var"))
    return (x - mean) / (var + eps).sqrt() * g + b + a * x


def turned(x: Tensor, position: int, base: float) -> Tensor:
    """x [K] with its halves as the parts of complex numbers, turned."""
    half = x.shape[0] // 2
    rates = base ** (-torch.arange(half, dtype=torch.float64) * 2 / x.shape[0])
    z = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(rates), rates * position)
    return torch.cat((z.real, z.imag))


def by_formulas(module: SlabTraining, tokens: Tensor) -> Tensor:
    """Logits [T,V] of tokens [T]: every pair of tokens by itself, in double precision."""
    c, w = module.config, {k: v.double() for k, v in module.state_dict().items()}
    x = w["embed.weight"][tokens]
    for i in range(c.layers):
        of = {k.removeprefix(f"layers.{i}."): v for k, v in w.items() if k.startswith(f"layers.{i}.")}
        h = rep_bn(of, "attention_norm", x, c.eps)
        wq, wk, wv = of["attention.qkv_proj.weight"].split(c.width)
        bq, bk, bv = of["attention.qkv_proj.bias"].split(c.width)
        q, k, v = h @ wq.T + bq, h @ wk.T + bk, h @ wv.T + bv
        taps, bias = of["attention.conv_weight"], of["attention.conv_bias"]
        rows = []
        for t in range(len(tokens)):
            heads = []
            for n in range(c.heads):
                part = slice(n * c.size, (n + 1) * c.size)
                key = [turned(k[s, part], s, c.rope_base).clamp(min=0) for s in range(t + 1)]
                query = turned(q[t, part], t, c.rope_base).clamp(min=0)
                scores = torch.stack([query @ y for y in key])
                mixed = scores @ v[: t + 1, part] / (scores.sum() + 1e-6)
                near = sum(taps[-1 - j] * v[t - j, part] for j in range(min(c.taps, t + 1)))
                heads.append(mixed + near + bias)
            rows.append(torch.cat(heads))
        x = x + torch.stack(rows) @ of["attention.o_proj.weight"].T + of["attention.o_proj.bias"]
        both = rep_bn(of, "ffn_norm", x, c.eps) @ of["up_proj.weight"].T + of["up_proj.bias"]
        gate, up = both.split(c.ffn, 1) if c.gated else (both, both)
        inner = gate * gate.sigmoid() * up if c.gated else up * (1 + torch.erf(up / 2**0.5)) / 2
        x = x + inner @ of["down_proj.weight"].T + of["down_proj.bias"]
    return (rep_bn(w, "norm", x, c.eps) @ w["head.weight"].T + w["head.bias"]).float()


@pytest.mark.oracle
@pytest.mark.parametrize("preset", ["tiny", "tiny-gelu"])
def test_formulas_of_the_paper(preset: str) -> None:
    module, tokens = settled(FAMILY.presets[preset]), draw_tokens(1, 19)
    made = chunk_form(FAMILY, module)
    got = made(tokens, *new_state(made, 1))[0][0]
    assert error(got, by_formulas(module, tokens[0])) < TOLERANCES["oracle_fp32"]


def test_the_chunk_form_has_no_norm_and_is_the_training_form_in_eval_mode() -> None:
    module = settled()
    made, tokens = chunk_form(FAMILY, module), draw_tokens(2, 37)
    assert not any("norm" in name for name in made.state_dict())
    assert error(module(tokens), made(tokens, *new_state(made, 2))[0]) < TOLERANCES["model_fp32"]


def test_a_norm_goes_from_rms_norm_to_repbn() -> None:
    """Section 3.2, with the statistics of the batch, at the first step, half way and at the end."""
    module = settled()
    norm: Any = module.norm.train()
    x = torch.randn(3, 7, 32)
    rms = x / (x.square().mean(-1, keepdim=True) + TINY.eps).sqrt() * norm.rms_weight
    rows = x.reshape(-1, 32)
    spread = (rows.var(0, correction=0) + TINY.eps).sqrt()
    bn = (x - rows.mean(0)) / spread * norm.weight + norm.bias + norm.alpha * x
    for share in (1.0, 0.5, 0.0):
        got = norm(x, torch.tensor(share))
        assert error(got, share * rms + (1 - share) * bn) < TOLERANCES["model_fp32"]


def test_training_moves_from_the_first_norm_to_what_is_exported() -> None:
    """After ``norm_steps`` calls, and with running statistics of the batch, training mode is eval mode."""
    module = settled()
    tokens = draw_tokens(4, 33)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    module(tokens)
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    module.train()
    shares = [float((1 - module.steps / TINY.norm_steps).clamp(min=0))]
    for _ in range(150):
        logits = module(tokens)
        shares.append(float((1 - module.steps / TINY.norm_steps).clamp(min=0)))
    assert shares[:10] == pytest.approx([1 - i / 8 for i in range(9)] + [0])
    # the running variance is the unbiased one
    n = tokens.numel()
    for name, b in module.named_buffers():
        if name.endswith("var"):
            b.mul_((n - 1) / n)
    assert error(module.eval()(tokens), logits) < TOLERANCES["model_fp32"]


def test_every_parameter_gets_a_gradient_half_way() -> None:
    module = FAMILY.train_form(TINY)
    FAMILY.init(module, 0)
    module.steps.fill_(TINY.norm_steps // 2)
    module(draw_tokens(2, 20)).log_softmax(-1)[..., 3].mean().backward()
    without = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_export_is_one_operator_a_layer_and_no_norm() -> None:
    names = operators(FAMILY, TINY)
    assert names.count("xexport.linear_attention.default") == TINY.layers
    assert names.count("xexport.causal_conv1d.default") == TINY.layers
    assert not any("norm" in name for name in names)


def test_own_checkpoint_loads_and_says_if_norms_were_left(tmp_path: Path) -> None:
    module = settled()
    check_own_file(FAMILY, TINY, module.state_dict(), chunk_form(FAMILY, module).state_dict(), tmp_path)
    assert "0 of the 8 steps" in FAMILY.load(open_checkpoint(tmp_path / "slab.safetensors")).notes[0]
    metadata = {"xexport.layout": "training", "xexport.config": json.dumps(dataclasses.asdict(TINY))}
    module.steps.fill_(8)
    save_file(module.state_dict(), tmp_path / "done.safetensors", {**metadata, "xexport.family": "slab"})
    assert FAMILY.load(open_checkpoint(tmp_path / "done.safetensors")).notes == ()
