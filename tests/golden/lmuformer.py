"""Make lmuformer.npz again: ``python tests/golden/lmuformer.py FOLDER``, a checkout of zeyuliu1037/LMUFormer.

The authors' own embedding, block and memory, as they stand in FOLDER, with scipy (their discretisation), on
the CPU. timm's initialiser and stochastic depth, their registry and activations other than ReLU and GELU are
replaced by PyTorch's or by nothing: no weight here is theirs, and nothing is dropped or spikes.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["make"]

HERE = Path(__file__).parent
#: the length is fixed in their memory
WIDTH, LENGTH = 12, 128
#: their gsc.yml, for the non-spiking model
PUBLISHED = {"embed_dims": 256, "mlp_ratios": 4, "in_channels": 128, "depths": 1, "num_heads": 16}


def _module(name: str, **members: Any) -> None:
    module = ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module


def _stand_ins() -> None:
    for name in ("timm", "timm.models"):
        _module(name)
    _module("timm.models.layers", to_2tuple=None, trunc_normal_=nn.init.trunc_normal_, DropPath=nn.Identity)
    _module("timm.models.registry", register_model=lambda f: f)
    _module("timm.models.vision_transformer", _cfg=dict)
    acts = {"relu": nn.ReLU, "gelu": nn.GELU, "spike": nn.Identity}
    _module("utilities", get_act=lambda kind, **_: acts[kind]())


def _random(module: nn.Module) -> Any:
    """Random weights and statistics of batch norms, in evaluation mode."""
    for name, p in module.state_dict().items():
        if name.endswith(("running_var", "bn.weight", "3.weight")):
            p.copy_(0.5 + torch.rand(p.shape))
        elif p.is_floating_point() and name.split(".")[-1] not in ("A", "B", "H"):
            p.copy_(torch.randn(p.shape) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.3))
    return module.eval().requires_grad_(False)


def make(folder: Path) -> dict[str, np.ndarray]:
    """Names of the file -> arrays."""
    _stand_ins()
    sys.path.insert(0, str(folder / "src"))
    theirs: Any = importlib.import_module("lmu_rnn")
    torch.manual_seed(0)
    relu = {"act_type": "relu"}
    embedding = _random(theirs.Tokenizer(in_channels=7, embed_dims=WIDTH, n_conv_layers=3))
    block = _random(theirs.Block(WIDTH, 1, **relu, attn=theirs.LMU, mlp=theirs.ConvFFN))
    model = theirs.ConvLMU(**PUBLISHED, **relu, patch_embed=theirs.Tokenizer, attn=theirs.LMU)
    signal, features = torch.randn(1, LENGTH, WIDTH), torch.randn(2, 30, 7)
    convolved = embedding.conv_layers(features.mT).mT
    arrays = {
        "block.in": signal,
        "block.out": block(signal.mT).mT,
        "memory.recurrent": block.attn.forward_recurrent(signal.mT).mT,
        "A": block.attn.lmu.A,
        "B": block.attn.lmu.B[:, 0],
        "embedding.in": features,
        "embedding.convolved": convolved,
        "embedding.out": embedding(features[:, None]).mT,
        "parameters": torch.tensor(sum(p.numel() for p in model.parameters())),
    }
    skipped = (".A", ".B", "H", "num_batches_tracked")
    for prefix, module in (("block.0", block), ("patch_embed", embedding)):
        state = module.state_dict().items()
        arrays |= {f"weight.{prefix}.{k}": v for k, v in state if not k.endswith(skipped)}
    return {name: value.numpy() for name, value in arrays.items()}


if __name__ == "__main__":
    np.savez_compressed(HERE / "lmuformer.npz", **make(Path(sys.argv[1])))
