"""Make m2_bert.npz again: ``python tests/golden/m2_bert.py CLONE``, CLONE a checkout of HazyResearch/m2.

A tiny M2-BERT with random weights by the authors' own code, in float64: its tensors under their published
names, two sequences, and the logits. Needs torch, einops and transformers.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["make"]

HERE = Path(__file__).parent
SIZES = {
    "vocab_size": 29,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 20,
    "long_conv_l_max": 20,
    "hyena_emb_dim": 5,
    "hyena_filter_order": 6,
    "hyena_w": 10,
    "monarch_mlp_nblocks": 2,
    "hidden_dropout_prob": 0.0,
    "hyena_filter_dropout": 0.0,
}
CHOICES = {
    "monarch_mixer_sequence_mixing": True,
    "bidirectional": True,
    "residual_long_conv": True,
    "use_glu_mlp": True,
    "use_monarch_mlp": True,
    "use_positional_encodings": True,
    "use_flash_mm": False,
    "use_flash_fft": False,
    "hyena_training_additions": False,
    "hyena_w_mod": 1,
    "hyena_wd": 0.1,
    "hyena_lr_pos_emb": 1e-5,
    "long_conv_kernel_learning_rate": 1e-3,
    "expand_positional_embeddings": False,
}


def _modules(clone: Path) -> tuple[Any, Any]:
    """The authors' layers and configuration, without their training framework."""
    source = clone / "bert" / "src"
    package = types.ModuleType("src")
    package.__path__ = [str(source)]
    einsum = types.ModuleType("opt_einsum")
    einsum.contract = None  # type: ignore[attr-defined]
    sys.modules |= {"src": package, "opt_einsum": einsum}
    sys.path.insert(0, str(source))
    import bert_layers  # type: ignore[import-not-found]
    import configuration_bert  # type: ignore[import-not-found]

    return bert_layers, configuration_bert


def make(clone: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Tensors, tokens and logits."""
    import torch

    layers, configuration = _modules(clone)
    torch.manual_seed(0)
    config = configuration.BertConfig(**SIZES)
    for name, value in (SIZES | CHOICES).items():
        setattr(config, name, value)
    embeddings = layers.BertEmbeddings(config)
    encoder = layers.BertEncoder(config)
    head = layers.BertLMPredictionHead(config, embeddings.word_embeddings.weight)
    parts = {"bert.embeddings": embeddings, "bert.encoder": encoder, "cls.predictions": head}
    tokens = torch.randint(0, SIZES["vocab_size"], (2, 17))
    with torch.no_grad():
        for part in parts.values():
            part.eval().double()
            for name, p in part.named_parameters():
                if not any(w in name for w in ("freq", "pos_emb", "modulation")):
                    noise = torch.randn_like(p) * (0.3 if p.ndim == 1 else 0.5 * p.shape[-1] ** -0.5)
                    p.copy_((p + noise).float())  # as it is stored
        first = torch.zeros_like(tokens)
        x = encoder(embeddings(tokens, first), torch.ones_like(tokens), output_all_encoded_layers=False)[-1]
        logits = head(x)
    made = {f"{room}.{k}": v for room, part in parts.items() for k, v in part.state_dict().items()}
    arrays = {k: v.numpy().astype("float32") for k, v in made.items() if v.is_floating_point()}
    return arrays | {"tokens": tokens.numpy(), "logits": logits.numpy()}


if __name__ == "__main__":
    np.savez_compressed(HERE / "m2_bert.npz", **make(Path(sys.argv[1])))
