"""GTrXL: another implementation (golden tensors), the equations, the memory, refusals."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from chunk_form import (
    chunk_form,
    error,
    new_state,
    operators,
    trained,
)
from tolerances import TOLERANCES
from torch import Tensor

from xexport.core.registry import get_family
from xexport.models.gtrxl import Gtrxl, GtrxlConfig, GtrxlTraining

FAMILY = get_family("gtrxl")
TINY: GtrxlConfig = FAMILY.presets["tiny"]


def gated(w: dict[str, Tensor], name: str, x: Tensor, y: Tensor) -> Tensor:
    """The gate of [1], section 3.2."""
    w_r, w_z, w_g = w[f"{name}.of_branch.weight"].chunk(3)
    u_r, u_z = w[f"{name}.of_stream.weight"].chunk(2)
    r, z = (torch.sigmoid(a @ y + b @ x - c) for a, b, c in ((w_r, u_r, 0), (w_z, u_z, w[f"{name}.bias"])))
    return (1 - z) * x + z * torch.tanh(w_g @ y + w[f"{name}.of_reset.weight"] @ (r * x))


def normed(w: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def by_equations(module: GtrxlTraining, x: Tensor) -> Tensor:
    """One layer of x [T,d], one token, head and distance at a time, in double precision."""
    c = module.config
    w = {k.removeprefix("layers.0."): v.double() for k, v in module.state_dict().items()}
    a = {k.removeprefix("attention."): v for k, v in w.items() if k.startswith("attention.")}
    z = [normed(w, "attention_norm", row, c.eps) for row in x.double()]
    rates = torch.tensor([10000 ** (-2 * i / c.width) for i in range(c.width // 2)], dtype=torch.float64)
    rows = []
    for t, row in enumerate(x.double()):
        heads = []
        for h in range(c.heads):
            part = slice(h * c.size, (h + 1) * c.size)
            q, k, v, r = (a[f"{name}_proj.weight"][part] for name in "qkvr")
            scores, values = [], []
            for s in range(max(0, t - c.memory), t + 1):
                place = torch.cat(((rates * (t - s)).sin(), (rates * (t - s)).cos()))
                score = (q @ z[t] + a["u"][part]) @ (k @ z[s]) + (q @ z[t] + a["v"][part]) @ (r @ place)
                scores.append(score / math.sqrt(c.size))
                values.append(v @ z[s])
            heads.append(torch.stack(scores).softmax(0) @ torch.stack(values))
        y = gated(w, "attention_gate", row, (a["o_proj.weight"] @ torch.cat(heads)).relu())
        f = (w["fc1.weight"] @ normed(w, "ffn_norm", y, c.eps) + w["fc1.bias"]).relu()
        rows.append(gated(w, "ffn_gate", y, (w["fc2.weight"] @ f + w["fc2.bias"]).relu()))
    return torch.stack(rows).float()


def layers(module: Gtrxl, x: Tensor) -> Tensor:
    """All blocks of x [B,T,d] in place of embedded tokens, without the head."""
    identity = torch.nn.Identity()
    module.embed, module.head = identity, identity  # type: ignore[assignment]
    out: Tensor = module(x, *new_state(module, x.shape[0]))[0]
    return out


@pytest.mark.oracle
def test_formulas_of_the_papers() -> None:
    module = trained(FAMILY, dataclasses.replace(TINY, layers=1))
    x = torch.randn(25, 32)
    got = layers(chunk_form(FAMILY, module), x[None])[0]
    assert error(got, by_equations(module, x)) < TOLERANCES["oracle_fp32"]


@pytest.mark.oracle
def test_another_implementation() -> None:
    path = Path(__file__).parent / "golden" / "gtrxl.npz"
    golden = {k: torch.from_numpy(v) for k, v in np.load(path).items()}
    module = FAMILY.train_form(GtrxlConfig(5, 12, 2, 3, head_size=5, ffn=10, memory=20))
    tensors = dict(module.state_dict())
    for i in range(2):
        to, w = f"layers.{i}.", {k: v for k, v in golden.items() if k.startswith(f"weight.layers.{i}.")}
        w = {k.removeprefix(f"weight.layers.{i}."): v for k, v in w.items()}
        k, v = w["mha.linear_kv.weight"].chunk(2)
        q, r, o = (w[f"mha.{name}.weight"] for name in ("linear_q", "linear_p", "lout"))
        for name, value in (("q", q), ("k", k), ("v", v), ("r", r), ("o", o)):
            tensors[f"{to}attention.{name}_proj.weight"] = value
        for ours, theirs in (("attention_norm", "norm1"), ("ffn_norm", "norm2"), ("fc1", "ff.ff.0")):
            for leaf in ("weight", "bias"):
                tensors[f"{to}{ours}.{leaf}"] = w[f"{theirs}.{leaf}"]
        for leaf in ("weight", "bias"):
            tensors[f"{to}fc2.{leaf}"] = w[f"ff.ff.3.{leaf}"]
        for ours, theirs in (("attention_gate", "gate1"), ("ffn_gate", "gate2")):
            for part, names in (("branch", ("Wr", "Wz", "Wg")), ("stream", ("Ur", "Uz")), ("reset", ("Ug",))):
                tensors[f"{to}{ours}.of_{part}.weight"] = torch.cat(
                    [w[f"{theirs}.{n}.weight"] for n in names]
                )
            tensors[f"{to}{ours}.bias"] = torch.full((12,), 0.1)
        for name in "uv":
            tensors[f"{to}attention.{name}"] = golden[f"weight.{name}"].flatten()
    module.load_state_dict(tensors)
    got = layers(chunk_form(FAMILY, module.requires_grad_(False)), golden["in"])
    assert error(got, golden["out"]) < TOLERANCES["oracle_fp32"]


def test_training_form_is_the_chunk_form_from_the_first_state() -> None:
    module = trained(FAMILY, TINY)
    made, tokens = chunk_form(FAMILY, module), torch.randint(0, 29, (2, 37))
    assert error(module(tokens), made(tokens, *new_state(made, 2))[0]) < TOLERANCES["model_fp32"]


def test_a_token_beyond_the_memory_has_no_effect() -> None:
    """Two layers of memory 9 reach 18 tokens back."""
    module = chunk_form(FAMILY, trained(FAMILY, TINY))
    tokens = torch.randint(0, 29, (1, 40))
    other = tokens.clone()
    other[0, 20] = (other[0, 20] + 1) % 29
    change = (module(tokens, *new_state(module, 1))[0] - module(other, *new_state(module, 1))[0]).abs()
    affected = change.amax(-1)[0] > 0
    assert bool(affected[20:39].all())
    assert not bool(affected[:20].any())
    assert not bool(affected[39:].any())


def test_export_has_dynamic_axes_and_no_loop() -> None:
    assert not any("scan" in name or "while" in name for name in operators(FAMILY, TINY))
