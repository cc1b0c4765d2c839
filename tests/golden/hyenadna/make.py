"""What the authors' own HyenaDNA gives for small random weights: ``python make.py standalone_hyenadna.py``.

The argument is that file of github.com/HazyResearch/hyena-dna at d553021b (Apache-2.0), which stays outside
of this repository. It asks for torchvision for one layer that drops nothing in evaluation, and for the base
class of transformers' tokenizers, whose interface has changed since: both are replaced by what is needed of
them. The checkpoint has the names of the Hugging Face folders: ``hyena.`` before those of the file.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["TEXT", "make"]

TEXT = "ACGTNNTTGACaGXC"
_LAYER = {
    "l_max": 40,
    "order": 2,
    "filter_order": 8,
    "emb_dim": 5,
    "num_inner_mlps": 2,
    "w": 10,
    "shift": 0.05,
}


class _Whole(torch.nn.Module):
    """StochasticDepth of probability 0."""

    def __init__(self, p: float, mode: str) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class _Tokenizer:
    """The base class of a tokenizer, of which only the subclass's own methods are used."""

    def __init__(self, **kwargs: Any) -> None:
        pass


def _published(path: str) -> Any:
    ops: Any = types.ModuleType("torchvision.ops")
    ops.StochasticDepth = _Whole
    base: Any = types.ModuleType("transformers.tokenization_utils")
    base.PreTrainedTokenizer, base.AddedToken = _Tokenizer, lambda text, **kwargs: text
    sys.modules |= {
        "torchvision": types.ModuleType("torchvision"),
        "torchvision.ops": ops,
        "transformers": types.ModuleType("transformers"),
        "transformers.tokenization_utils": base,
    }
    spec = importlib.util.spec_from_file_location("standalone_hyenadna", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def make(path: str) -> None:
    """Weights, tokens of a whole window, last hidden states, and the ids of TEXT, in golden.npz."""
    published = _published(path)
    torch.manual_seed(0)
    sizes: Any = {"d_model": 12, "n_layer": 2, "d_inner": 20, "vocab_size": 12, "pad_vocab_size_multiple": 8}
    model = published.HyenaDNAModel(**sizes, layer=dict(_LAYER), resid_dropout=0.0, embed_dropout=0.1).eval()
    for name, p in model.named_parameters():
        if "pos_emb" not in name and "freq" not in name:
            p.add_(torch.randn_like(p) * (0.2 if p.dim() == 1 else p.shape[-1] ** -0.5))
    tokens = torch.randint(0, 12, (2, _LAYER["l_max"]))
    tokenizer = published.CharacterTokenizer(["A", "C", "G", "T", "N"], 42)
    ids = [tokenizer._convert_token_to_id(c) for c in tokenizer._tokenize(TEXT)]
    rows = {f"hyena.{k}": v.numpy() for k, v in model.state_dict().items()}
    # in double, as its filters are sines of sines of 10: in float32 those alone move the result by 1e-4
    hidden = model.double()(tokens).float()
    out = {"tokens": tokens.numpy(), "hidden": hidden.numpy(), "ids": np.array(ids)}
    np.savez_compressed(Path(__file__).parent / "golden.npz", **rows, **out)


if __name__ == "__main__":
    make(sys.argv[1])
