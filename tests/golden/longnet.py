"""Make longnet.npz again: ``python tests/golden/longnet.py FOLDER``, a checkout of microsoft/torchscale.

torchscale's own LongNetDecoder, as it stands in FOLDER (the release on PyPI, 0.3.0, has none), with einops,
on the CPU. It calls flash attention, which needs a GPU: equation 1 of arXiv 1706.03762 and the logarithm of
its denominator stand in for it here. What it imports for distributed training is replaced by nothing.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

__all__ = ["CASES", "make"]

HERE = Path(__file__).parent
SIZES: dict[str, Any] = {
    "decoder_embed_dim": 12,
    "decoder_attention_heads": 3,
    "decoder_ffn_embed_dim": 10,
    "decoder_layers": 2,
    "vocab_size": 13,
    "flash_attention": True,
    "activation_fn": "gelu",
}
#: what a user's config.json says beside the sizes
CASES: dict[str, dict[str, Any]] = {
    "xpos": {"segment_length": "[4,8,16]", "dilated_ratio": "[1,2,4]", "xpos_rel_pos": True},
    "odd": {"segment_length": "[5,10]", "dilated_ratio": "[1,2]", "subln": False, "activation_fn": "relu"}
    | {"layernorm_embedding": True, "no_scale_embedding": False},
    "deepnorm": {"segment_length": "[6]", "dilated_ratio": "[1]", "deepnorm": True, "subln": False}
    | {"decoder_normalize_before": False, "share_decoder_input_output_embed": True},
}
LENGTH = 37


def _attention(q: Any, k: Any, v: Any, dropout: float, bias: Any, scale: Any, is_causal: bool) -> Any:
    """[B,L,H,K] each -> the output and the logarithm of the denominators [B,H,L]."""
    assert bias is None
    assert is_causal
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), float("-inf"))
    return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v), scores.logsumexp(-1)


def _decoder(checkout: Path) -> Any:
    for name, parts in {
        "fairscale": (),
        "fairscale.nn": ("checkpoint_wrapper", "wrap"),
        "timm": (),
        "timm.models": (),
        "timm.models.layers": ("drop_path",),
    }.items():
        sys.modules[name] = ModuleType(name)
        for part in parts:
            setattr(sys.modules[name], part, None)
    sys.path.insert(0, str(checkout))
    importlib.import_module("torchscale.component.multihead_attention").flash_attn_func = _attention
    return importlib.import_module("torchscale.model.LongNet").LongNetDecoder


def make(checkout: Path, to: Path) -> None:
    """Every case's state dict, tokens and logits."""
    decoder = _decoder(checkout)
    config = importlib.import_module("torchscale.architecture.config").DecoderConfig
    arrays: dict[str, np.ndarray] = {}
    for seed, (case, options) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        args = config(**SIZES | options)
        module = decoder(args, torch.nn.Embedding(args.vocab_size, args.decoder_embed_dim)).eval()
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p) * (0.2 if p.dim() == 1 else 0.5 * p.shape[-1] ** -0.5))
            tokens = torch.randint(0, args.vocab_size, (2, LENGTH))
            logits = module(tokens)[0]
        arrays |= {f"{case} {k}": v.numpy() for k, v in module.state_dict().items()}
        arrays |= {f"{case} tokens": tokens.numpy(), f"{case} logits": logits.numpy()}
    np.savez_compressed(to, **arrays)


if __name__ == "__main__":
    make(Path(sys.argv[1]), HERE / "longnet.npz")
