"""MambaMixer: the papers' formulas in double precision, refusals."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from chunk_form import (
    draw_tokens,
    error,
    new_state,
    operators,
    random_model,
)
from tolerances import TOLERANCES
from torch import Tensor

from xexport.core.registry import get_family
from xexport.models.mamba_mixer import MambaMixerConfig

FAMILY = get_family("mamba_mixer")
TINY: MambaMixerConfig = FAMILY.presets["tiny"]
SINGLE = dataclasses.replace(TINY, width=6, group=1)


def part(w: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a name."""
    return {k.removeprefix(prefix): v for k, v in w.items() if k.startswith(prefix)}


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def scanned(w: dict[str, Tensor], x: list[Tensor], rank: int, size: int) -> list[Tensor]:
    """Convolution, SiLU and the state space of [2], place by place, from zero."""
    taps = w["conv1d.weight"][:, 0]
    h, rows = torch.zeros(len(taps), size, dtype=torch.float64), []
    for t in range(len(x)):
        reach = range(min(taps.shape[1], t + 1))
        u = silu(sum((taps[:, -1 - j] * x[t - j] for j in reach), w["conv1d.bias"]))
        low, b, c = (w["x_proj.weight"] @ u).split((rank, size, size))
        dt = (1 + (w["dt_proj.weight"] @ low + w["dt_proj.bias"]).exp()).log()
        a_bar = (-dt[:, None] * w["A_log"].exp()).exp()
        h = a_bar * h + (dt * u)[:, None] * b
        rows.append(h @ c + w["D"] * u)
    return rows


def token_mixer(c: MambaMixerConfig, w: dict[str, Tensor], x: Tensor) -> Tensor:
    """x [T,d] -> [T,d]."""
    to_x, to_z = w["in_proj.weight"].chunk(2)
    y = scanned(w, [to_x @ row for row in x], c.token.rank, c.state_size)
    return torch.stack([w["out_proj.weight"] @ (a * silu(to_z @ row)) for a, row in zip(y, x, strict=True)])


def channel_mixer(c: MambaMixerConfig, w: dict[str, Tensor], x: Tensor) -> Tensor:
    """x [T,d] -> [T,d]: section 3.2's forward scan and the backward one, turned round, times one gate."""
    to_f, to_b, to_z = w["in_proj.weight"].chunk(3)
    rows = []
    for row in x:
        places = row.split(c.group)
        rank, size = c.channel.rank, c.state_size
        forth = scanned(part(w, "forth."), [to_f @ p for p in places], rank, size)
        back = scanned(part(w, "back."), [to_b @ p for p in reversed(places)], rank, size)[::-1]
        gates = [silu(to_z @ p) for p in places]
        y = [w["out_proj.weight"] @ (f * z + b * z) for f, b, z in zip(forth, back, gates, strict=True)]
        rows.append(torch.cat(y))
    return torch.stack(rows)


def by_formulas(module: Any, tokens: Tensor) -> Tensor:
    """Logits [T,V] of tokens [T] with the two sums of section 3.2 apart, in double precision."""
    c, w = module.config, {k: v.double() for k, v in module.state_dict().items()}

    def read(name: str, of_tokens: list[Tensor], of_channels: list[Tensor]) -> Tensor:
        # stored in the order in which the outputs come: T_0 (and C_0), T_1, C_1, T_2 ..
        weight = w[f"{name}.weight"]
        x = weight[0] * of_tokens[0]
        x = x + sum(weight[2 * i - 1] * y for i, y in enumerate(of_tokens) if i)
        x = x + sum(weight[2 * i] * y for i, y in enumerate(of_channels) if i)
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * w[f"{name}.norm.weight"]

    start = w["embed.weight"][tokens]
    T, C = [start], [start]
    for i in range(c.layers):
        layer = f"layers.{i}."
        T.append(token_mixer(c, part(w, layer + "token_mixer."), read(layer + "token_average", T, C)))
        C.append(channel_mixer(c, part(w, layer + "channel_mixer."), read(layer + "channel_average", T, C)))
    return (read("average", T, C) @ w["head.weight"].T).float()


@pytest.mark.oracle
@pytest.mark.parametrize("config", [TINY, SINGLE], ids=["groups of channels", "single channels"])
def test_formulas_of_the_papers(config: MambaMixerConfig) -> None:
    module, tokens = random_model(FAMILY, config), draw_tokens(1, 13)
    got = module(tokens, *new_state(module, 1))[0][0]
    assert error(got, by_formulas(module, tokens[0])) < TOLERANCES["oracle_fp32"]


def test_channels_are_mixed_both_ways_and_tokens_are_not() -> None:
    mixer = random_model(FAMILY, TINY).layers[0].channel_mixer
    x = torch.randn(1, 3, 24)
    for channel in (0, 23):
        other = x.clone()
        other[0, 1, channel] += 1
        changed = (mixer(x) - mixer(other))[0].abs() > 0
        assert bool(changed[1].all())
        assert not bool(changed[0].any() or changed[2].any())


def test_export_is_three_scans_a_layer() -> None:
    assert operators(FAMILY, TINY).count("xexport.selective_scan.default") == 3 * TINY.layers
