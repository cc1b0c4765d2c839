"""MegaByte: the paper's equations, MEGABYTE-pytorch, a batch in their style, the bound."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chunk_form import error, in_chunks, load_module, new_state, random_model, recognised_by
from tolerances import TOLERANCES
from torch import Tensor

import xexport
from xexport.core.checkpoint import open_checkpoint
from xexport.core.errors import CheckpointError, InputError, LimitError
from xexport.core.registry import get_family
from xexport.models.megabyte import MegaByteConfig

FAMILY = get_family("megabyte")
TINY: MegaByteConfig = FAMILY.presets["tiny"]
THEIRS: MegaByteConfig = FAMILY.presets["tiny-lucidrains"]


# The equations of the paper a second time, in float64, all of them for every byte


class Paper:
    """A MegaByte of the paper's style, from its tensors."""

    def __init__(self, config: MegaByteConfig, tensors: dict[str, Tensor]) -> None:
        self.c = config
        self.t = {k: v.double() for k, v in tensors.items()}

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.c.eps).sqrt() * self.t[f"{name}.weight"]

    def shift(self, x: Tensor) -> Tensor:
        if not self.c.shift:
            return x
        half = x.shape[-1] // 2
        return torch.cat((x[:, :half], torch.cat((torch.zeros_like(x[:1, half:]), x[:-1, half:]))), -1)

    def attention(self, name: str, x: Tensor, heads: int) -> Tensor:
        z = self.norm(f"{name}.attention_norm", x)
        q, k, v = (z @ self.t[f"{name}.qkv_proj.weight"].t()).chunk(3, -1)
        size, rows = q.shape[-1] // heads, []
        for h in range(heads):
            qh, kh, vh = (y[:, h * size : (h + 1) * size] for y in (q, k, v))
            if self.c.rotary:
                qh, kh = rotated(qh), rotated(kh)
            scores = (qh @ kh.t() / size**0.5).masked_fill(torch.ones(len(x), len(x)).triu(1) > 0, -1e30)
            rows.append(scores.softmax(-1) @ vh)
        return torch.cat(rows, -1) @ self.t[f"{name}.o_proj.weight"].t()

    def model(self, name: str, x: Tensor, layers: int, heads: int) -> Tensor:
        for i in range(layers):
            block = f"{name}.blocks.{i}"
            x = x + self.attention(block, self.shift(x), heads)
            h = self.norm(f"{block}.ffn_norm", self.shift(x)) @ self.t[f"{block}.fc1.weight"].t()
            h = torch.nn.functional.gelu(h + self.t[f"{block}.fc1.bias"])
            x = x + h @ self.t[f"{block}.fc2.weight"].t() + self.t[f"{block}.fc2.bias"]
        return self.norm(f"{name}.norm", x)

    def logits(self, x: list[int]) -> Tensor:
        """Of the byte after ``x``."""
        c, t = self.c, self.t
        k, p = divmod(len(x), c.patch)
        patches = [t["patch_start"]]
        for j in range(k):
            place = range(j * c.patch, (j + 1) * c.patch)
            patches.append(
                torch.cat([t["patch_embed.weight"][x[i]] + t["patch_places.weight"][i] for i in place])
            )
        h = self.model("coarse", torch.stack(patches), c.layers, c.heads)[k].view(c.patch, -1)
        read = h @ t["context_proj.weight"].t()
        before = [t["start"], *(t["embed.weight"][b] for b in x[k * c.patch :])]
        local = torch.stack([read[i] + before[i] for i in range(p + 1)])
        return t["embed.weight"] @ self.model("local", local, c.local_layers, c.local_heads)[p]


def rotated(x: Tensor) -> Tensor:
    """RoFormer, equation 15, of ``[N,K]``, for pairs (i, i + K/2)."""
    half = x.shape[-1] // 2
    rate = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(len(x), dtype=torch.float64)[:, None] * rate
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1)


@pytest.mark.parametrize(
    "changes", [{}, {"shift": True}, {"rotary": False, "patch": 4}, {"patch": 1}], ids=str
)
def test_the_papers_equations(changes: dict[str, Any]) -> None:
    config = replace(TINY, **changes)
    module = random_model(FAMILY, config)
    tokens = torch.randint(0, 29, (1, 11))
    got = module(tokens, *new_state(module, 1))[0][0]
    paper = Paper(config, module.state_dict())
    want = torch.stack([paper.logits(tokens[0, : t + 1].tolist()) for t in range(11)])
    assert error(got, want) < TOLERANCES["model_fp32"]


def their_file(folder: Path, **options: Any) -> tuple[Any, Path]:
    """A random model of MEGABYTE-pytorch and its state_dict as a file."""
    package = pytest.importorskip("MEGABYTE_pytorch", reason="the oracle is not installed")
    torch.manual_seed(0)
    sizes = {"num_tokens": 29, "dim": (24, 16), "depth": (2, 1), "max_seq_len": (8, 4), "ff_mult": 2}
    model = package.MEGABYTE(**sizes, dim_head=64, heads=1, **options).eval()
    torch.save(model.state_dict(), folder / "model.pt")
    return model, folder / "model.pt"


@pytest.mark.oracle
@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
def test_parity_with_megabyte_pytorch(tmp_path: Path, rotary: bool) -> None:
    model, path = their_file(tmp_path, rel_pos=rotary)
    assert recognised_by(open_checkpoint(path)) == {"megabyte"}
    module = load_module(FAMILY, path)
    assert module.config.rotary == rotary
    tokens = torch.randint(0, 29, (2, 23))
    with torch.no_grad():
        want = model(tokens)
    got = in_chunks(module, tokens, new_state(module, 2), [1, 2, 8, 10])[0]
    assert error(got, want) < TOLERANCES["oracle_fp32"]


@pytest.mark.oracle
def test_their_options_that_are_not_computed_are_refused(tmp_path: Path) -> None:
    _, path = their_file(tmp_path, pos_emb=True)
    with pytest.raises(CheckpointError, match="options"):
        FAMILY.load(open_checkpoint(path))


def test_their_style_exports_and_streams_in_a_batch(exporter: Any, tmp_path: Path) -> None:
    folder = exporter.export("megabyte", "cpu-fp32", tmp_path / "out", preset="tiny-lucidrains")
    module: Any = FAMILY.build(THEIRS).requires_grad_(False)
    FAMILY.init(module, 0)
    tokens = torch.randint(0, 29, (2, 22))
    want = module(tokens, *new_state(module, 2))[0]
    stream = xexport.load(folder).stream(batch=2)
    got = [torch.from_numpy(stream.feed(p.numpy())) for p in tokens.split([1, 1, 1, 1, 1, 6, 11], 1)]
    assert error(torch.cat(got, 1), want) < TOLERANCES["model_fp32"]


@pytest.mark.parametrize(
    "config", [replace(TINY, patches=3), replace(THEIRS, patches=2)], ids=["paper", "theirs"]
)
def test_the_longest_stream(config: MegaByteConfig) -> None:
    """G*P bytes, to the last, and no more."""
    module = random_model(FAMILY, config)
    longest = config.patch * config.patches
    assert module.max_tokens == longest
    tokens = torch.randint(0, 29, (1, longest + 1))
    _, *state = module(tokens[:, :longest], *new_state(module, 1))
    over = torch.zeros(1, config.patch + 1, dtype=torch.int64)
    with pytest.raises(LimitError):
        module(over, *state)


@pytest.mark.parametrize(
    "change",
    [{"patch": 0}, {"patch": 5}, {"heads": 5}, {"style": "other"}, {"local_width": 6, "local_heads": 2}],
    ids=str,
)
def test_a_bad_configuration_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        replace(TINY, **change)
