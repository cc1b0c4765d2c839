"""StripedHyena: the chunk law, its training form, the authors' own model, checkpoints, exports."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chunk_form import (
    TARGETS,
    check_cuts,
    check_export,
    check_gradients,
    draw_tokens,
    error,
    load_module,
    new_state,
    operators,
    random_model,
)
from safetensors.torch import save_file
from tolerances import TOLERANCES
from torch import Tensor, nn

from xexport.core.checkpoint import open_checkpoint
from xexport.core.errors import CheckpointError
from xexport.core.registry import get_family
from xexport.models.striped_hyena import StripedHyenaConfig

FAMILY = get_family("striped_hyena")
TINY: StripedHyenaConfig = FAMILY.presets["tiny"]
VARIANTS = {
    "tiny": TINY,
    "convolutions-only": dataclasses.replace(TINY, attention=()),
    "outside-gelu-biases": dataclasses.replace(
        TINY, eps_inside=False, activation="gelu", qkv_bias=True, out_bias=True, short_filter=4
    ),
}


def model(config: StripedHyenaConfig, seed: int = 0) -> Any:
    """Noise on the initial weights, but poles inside the circle."""
    module = random_model(FAMILY, config, seed)
    for name, p in module.named_parameters():
        if name.endswith("poles"):
            p.div_(p.norm(dim=1, keepdim=True).clamp(min=1.0) * 1.01)
    return module


@pytest.mark.parametrize("variant", VARIANTS)
def test_chunk_law(variant: str) -> None:
    check_cuts(model(VARIANTS[variant]), 2, [1, 6, 1, 17])


def test_biases_get_gradients() -> None:
    check_gradients(FAMILY, dataclasses.replace(TINY, qkv_bias=True, out_bias=True))


def test_no_limit_without_attention() -> None:
    assert model(TINY).max_tokens == TINY.max_tokens
    assert model(VARIANTS["convolutions-only"]).max_tokens is None


def test_operators_are_few() -> None:
    found = operators(FAMILY, TINY)
    assert found.count("xexport.modal_conv.default") == 2
    assert found.count("xexport.causal_conv1d.default") == 2
    assert found.count("xexport.cached_attention.default") == 1


class _Rotary(nn.Module):
    inv_freq: Tensor

    def __init__(self, size: int, base: float) -> None:
        super().__init__()
        rates = base ** (-torch.arange(0, size, 2) / size)
        self.register_buffer("inv_freq", rates, persistent=False)


class _Attention(nn.Module):
    """Flash-attention's MHA by its formulas: complex rotation, explicit softmax, repeated heads."""

    def __init__(self, embed_dim: int, num_heads: int, num_heads_kv: int, **o: Any) -> None:
        super().__init__()
        self.heads, self.shared, self.size = num_heads, num_heads_kv, embed_dim // num_heads
        width = (num_heads + 2 * num_heads_kv) * self.size
        self.Wqkv = nn.Linear(embed_dim, width, bias=o["qkv_proj_bias"])
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=o["out_proj_bias"])
        self.rotary_emb = _Rotary(self.size, o["rotary_emb_base"])

    def forward(self, x: Tensor, inference_params: Any = None) -> Tensor:
        B, T, d = x.shape
        rows = self.Wqkv(x).view(B, T, -1, self.size).double()
        q, k, v = rows.split([self.heads, self.shared, self.shared], 2)
        angle = torch.arange(T)[:, None, None] * self.rotary_emb.inv_freq.double()
        turn = torch.polar(torch.ones_like(angle), angle)

        def turned(y: Tensor) -> Tensor:
            z = torch.complex(*y.chunk(2, -1)) * turn
            return torch.cat((z.real, z.imag), -1)

        q, k = turned(q), turned(k).repeat_interleave(self.heads // self.shared, 2)
        v = v.repeat_interleave(self.heads // self.shared, 2)
        scores = torch.einsum("bthk,bshk->bhts", q, k) * self.size**-0.5
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        y = torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v)
        out: Tensor = self.out_proj(y.reshape(B, T, d).to(x.dtype))
        return out


@pytest.fixture
def published() -> Iterator[Any]:
    """The authors' model file; it wants flash-attention for its attention, which needs a GPU."""
    theirs = pytest.importorskip("stripedhyena.model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "MHA", _Attention, raising=False)
        yield theirs
    assert "flash_attn" not in sys.modules


def row_of(attention: list[int], tied: bool) -> dict[str, Any]:
    """A config.json of the published layout."""
    return {
        "model_type": "stripedhyena",
        "vocab_size": 61,
        "hidden_size": 24,
        "num_filters": 24,
        "num_layers": 3,
        "attn_layer_idxs": attention,
        "hyena_layer_idxs": [i for i in range(3) if i not in attention],
        "num_attention_heads": 4,
        "proj_groups": 2,
        "inner_mlp_size": 40,
        "state_size": 3,
        "short_filter_length": 3,
        "short_filter_bias": True,
        "qkv_proj_bias": True,
        "mha_out_proj_bias": False,
        "rotary_emb_base": 500.0,
        "eps": 1e-3,
        "tie_embeddings": tied,
        "max_seqlen": 64,
        "hyena_filter_groups": 1,
        "column_split_hyena": True,
        "use_flashfft": False,
        "use_flash_attn": False,
        "model_parallel_size": 1,
        "final_norm": True,
    }


def authors_model(theirs: Any, row: dict[str, Any]) -> Any:
    """Their module with random weights and poles inside the circle."""
    from stripedhyena.utils import dotdict

    floats = ("attn_block_dtype", "mlp_dtype", "hyena_block_dtype", "params_dtype")
    config = dotdict(row | dict.fromkeys(floats, torch.float32) | {"inference_mode": False})
    torch.manual_seed(0)
    module = theirs.StripedHyena(config).eval().requires_grad_(False)
    for name, p in module.named_parameters():
        if name.endswith("poles"):
            size, angle = torch.rand(p.shape[:-1]) * 0.98, 3 * torch.randn(p.shape[:-1])
            p.copy_(torch.stack((size * angle.cos(), size * angle.sin()), -1))
        elif p.dim() == 1:
            p.add_(0.3 * torch.randn_like(p))
    return module


def folder_of(where: Path, row: dict[str, Any], tensors: dict[str, Tensor], prefix: str) -> Path:
    where.mkdir()
    (where / "config.json").write_text(json.dumps(row))
    kept = {f"{prefix}{k}": v.clone().contiguous() for k, v in tensors.items()}
    save_file(kept, where / "model.safetensors")
    return where


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("attention", "tied", "prefix"),
    [([1], False, "backbone."), ([0, 2], True, ""), ([], False, "")],
    ids=["striped", "tied", "hyena-only"],
)
def test_authors_model(published: Any, tmp_path: Path, attention: list[int], tied: bool, prefix: str) -> None:
    """The published layout and its logits; their long convolution is an FFT."""
    row = row_of(attention, tied)
    theirs = authors_model(published, row)
    folder = folder_of(tmp_path / "sh", row, theirs.state_dict(), prefix)
    raw = open_checkpoint(folder)
    assert FAMILY.recognise(raw) == "its config.json says stripedhyena"
    ours = load_module(FAMILY, folder)
    tokens = draw_tokens(2, 37, vocab=61)
    want = theirs(tokens)[0]
    got = ours(tokens, *new_state(ours, 2))[0]
    assert error(got, want) < TOLERANCES["oracle_fp32"]


@pytest.mark.oracle
def test_authors_recurrence(published: Any) -> None:
    """Their step of the modes, which is how they generate, against our operator's."""
    from stripedhyena.engine import HyenaInferenceEngine

    from xexport.ops.modal_conv.reference import modal_conv

    module = model(TINY).blocks[0].filter
    rng = np.random.default_rng(0)
    packed, state = (
        torch.from_numpy(rng.standard_normal(s).astype(np.float32)) for s in ((2, 1, 72), (2, 3, 2, 24))
    )
    theirs = [x.permute(2, 0, 1)[:, :, None].contiguous() for x in (module.poles, module.residues)]
    poles, residues = theirs
    start = torch.view_as_complex(state.permute(0, 3, 1, 2).contiguous())
    x2, x1, v = packed[:, 0].chunk(3, -1)
    want, end = HyenaInferenceEngine().step_iir(x2, x1, v, module.D, residues, poles, start)
    got, after = modal_conv(packed, module.poles, module.residues, module.D, state)
    assert error(got[:, 0], want) < TOLERANCES["op_fp32"]
    assert error(after, torch.view_as_real(end).permute(0, 2, 3, 1)) < TOLERANCES["op_fp32"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hyena_filter_groups": 4}, "hyena_filter_groups"),
        ({"smeared_gqa": True}, "smeared_gqa"),
        ({"num_layers": None}, "malformed"),
        ({"model_type": "llama"}, "not a Hugging Face folder of a StripedHyena"),
    ],
)
def test_what_is_not_computed_is_refused(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    tensors = {"embedding_layer.weight": torch.zeros(61, 24), "blocks.0.mlp.l1.weight": torch.zeros(40, 24)}
    folder = folder_of(tmp_path / "sh", row_of([1], False) | change, tensors, "")
    with pytest.raises(CheckpointError, match=match):
        FAMILY.load(open_checkpoint(folder))


def test_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    tensors = {"embedding_layer.weight": torch.zeros(61, 24), "blocks.0.mlp.l1.weight": torch.zeros(40, 24)}
    with pytest.raises(CheckpointError, match="missing"):
        FAMILY.load(open_checkpoint(folder_of(tmp_path / "sh", row_of([1], False), tensors, "")))


def test_published_size() -> None:
    """The 7B model: 7.65 billion parameters by its authors."""
    with torch.device("meta"):
        count = sum(p.numel() for p in FAMILY.build(FAMILY.presets["7b"]).parameters())
    assert count == pytest.approx(7.65e9, rel=0.02)


@pytest.mark.parametrize("target", TARGETS)
def test_export(exporter: Any, target: str) -> None:
    check_export(exporter, "striped_hyena", target)
