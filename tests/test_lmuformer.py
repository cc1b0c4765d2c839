"""LMUFormer: the authors' own code (golden tensors), the recurrence it stands for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from chunk_form import chunk_form, error, new_state, operators
from tolerances import TOLERANCES
from torch import Tensor

from xexport.core.registry import get_family
from xexport.models.lmuformer import LmuFormer, LmuFormerConfig, LmuFormerTraining, _window, legendre

FAMILY = get_family("lmuformer")
TINY: LmuFormerConfig = FAMILY.presets["tiny"]


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    path = Path(__file__).parent / "golden" / "lmuformer.npz"
    return {name: torch.from_numpy(value) for name, value in np.load(path).items()}


def trained(config: LmuFormerConfig = TINY, seed: int = 0) -> LmuFormerTraining:
    """The training form with weights and statistics of which none is trivial."""
    module: LmuFormerTraining = FAMILY.train_form(config)
    FAMILY.init(module, seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in module.state_dict().items():
            if p.is_floating_point() and name != "response":
                p.add_(torch.rand_like(p) * 0.3)
    return module.eval()


def published(golden: dict[str, Tensor]) -> LmuFormer:
    """The chunk form with the authors' weights, under the authors' names."""
    config = LmuFormerConfig(5, 12, 1, 48, memory=12, theta=128, inputs=7, convolutions=3)
    module: LmuFormerTraining = FAMILY.train_form(config)
    weights = {k.removeprefix("weight."): v for k, v in golden.items() if k.startswith("weight.")}
    shapes = {name: p.shape for name, p in module.named_parameters()}
    assert {n for n in shapes if not n.startswith(("embed.", "head."))} <= set(weights)
    weights = {k: v.squeeze(-1) if v.shape != shapes.get(k, v.shape) else v for k, v in weights.items()}
    missing, unexpected = module.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert all(name.startswith(("embed.", "head.", "response")) or "num_batches" in name for name in missing)
    return chunk_form(FAMILY, module)


@pytest.mark.oracle
def test_legendre_matrices_are_the_authors(golden: dict[str, Tensor]) -> None:
    a, b = legendre(12, 128)
    assert error(a.float(), golden["A"]) < TOLERANCES["op_fp32"]
    assert error(b.float(), golden["B"]) < TOLERANCES["op_fp32"]


@pytest.mark.oracle
@pytest.mark.parametrize("cuts", [[128], [1] * 128, [5, 100, 23]], ids=["whole", "steps", "chunks"])
def test_block_is_the_authors(golden: dict[str, Tensor], cuts: list[int]) -> None:
    """Their block convolves the whole sequence through FFTs; their recurrent step gives the same."""
    module = published(golden)
    c, block = module.config, module.block[0]
    signal, outs, hidden = new_state(module, 1)[-1], [], []
    for x in golden["block.in"].split(cuts, 1):
        window = _window(x.shape[1], c.horizon, x)
        hidden.append(block.attn.proj_conv(block.attn.lmu(x, module.response, window, signal)[0]))  # type: ignore[union-attr, operator]
        y, signal = block(x, module.response, window, signal)
        outs.append(y)
    assert error(torch.cat(outs, 1), golden["block.out"]) < TOLERANCES["oracle_fp32"]
    assert error(torch.cat(hidden, 1), golden["memory.recurrent"]) < TOLERANCES["oracle_fp32"]


@pytest.mark.oracle
def test_embedding_is_the_authors_later(golden: dict[str, Tensor]) -> None:
    """They see one token ahead a convolution: here the same comes out that much later, but for the ends."""
    module, theirs = published(golden), golden["embedding.convolved"]
    states = new_state(module, 2)[:4]
    with_last = module.patch_embed(golden["embedding.in"], *states)[0]
    module.patch_embed.rpe_conv.weight.zero_()
    convolved = module.patch_embed(golden["embedding.in"], *states)[0]
    assert error(convolved[:, 6:], theirs[:, 3:-3]) < TOLERANCES["oracle_fp32"]
    last = golden["embedding.out"] - theirs
    assert error((with_last - convolved)[:, 8:], last[:, 4:-4]) < TOLERANCES["oracle_fp32"]


def test_preset_has_the_published_size(golden: dict[str, Tensor]) -> None:
    """Table 2 of [1] says 1.622 million; with 35 classes in place of embedding and head."""
    config = FAMILY.presets["speech-commands"]
    with torch.device("meta"):
        module = FAMILY.train_form(config)
    ours = sum(p.numel() for n, p in module.named_parameters() if not n.startswith(("embed.", "head.")))
    assert ours + 35 * 257 == int(golden["parameters"])


@pytest.mark.parametrize(("order", "theta"), [(1, 2), (8, 6), (16, 20), (32, 9)])
def test_windows_are_the_recurrence(order: int, theta: int) -> None:
    """m_t = A m_{t-1} + B u_t, a token at a time in double precision."""
    config = dataclasses.replace(TINY, memory=order, theta=theta)
    module: LmuFormer = FAMILY.build(config)
    a, b = legendre(order, theta)
    signal = torch.rand(6 * config.horizon)
    m, rows = torch.zeros(order, dtype=torch.float64), []
    for u in signal:
        m = a @ m + b * u
        rows.append(m)
    padded = torch.cat((torch.zeros(config.horizon - 1), signal))
    got = padded.unfold(0, config.horizon, 1) @ module.response
    assert error(got, torch.stack(rows).float()) < TOLERANCES["op_fp32"]


def test_training_form_is_the_chunk_form_from_the_first_state() -> None:
    module = trained()
    made, tokens = chunk_form(FAMILY, module), torch.randint(0, 29, (2, 37))
    want = made(tokens, *new_state(made, 2))[0]
    assert error(module(tokens).detach(), want) < TOLERANCES["model_fp32"]


def test_export_has_dynamic_axes_and_no_loop() -> None:
    assert not any("scan" in name or "while" in name for name in operators(FAMILY, TINY))
