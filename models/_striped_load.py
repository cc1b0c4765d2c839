"""Reading StripedHyena: Hugging Face folders of the published layout, and files of our own training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from xexport.core.checkpoint import RawCheckpoint, match_tensors, own_config
from xexport.core.errors import CheckpointError
from xexport.core.family import LoadedModel

__all__ = ["load_with", "striped_layout"]

#: rows of a cache that a checkpoint gets unless its own maximum is shorter
_DEFAULT_BOUND = 4096
_BYTES = (256, 512)  # vocabularies of bytes: our own, and Evo's
#: keys of config.json whose other values this family does not compute
_ALLOWED: Mapping[str, tuple[Any, ...]] = {
    "hyena_filter_groups": (1,),
    "final_norm": (True,),
    "smeared_gqa": (False,),
    "long_fir_threshold": (None,),
}


def striped_layout(raw: RawCheckpoint) -> str | None:
    """Why this is a published StripedHyena, or None."""
    return "its config.json says stripedhyena" if raw.config.get("model_type") == "stripedhyena" else None


def load_with(
    config_type: type, module: Callable[[Any], torch.nn.Module], finish: Callable[[Any, Any], Any]
) -> Callable[[RawCheckpoint], LoadedModel]:
    """The family's loader, from its configuration, its module and what adds its constants."""

    def load(raw: RawCheckpoint) -> LoadedModel:
        config, tensors = own_config(raw, "striped_hyena", config_type), dict(raw.tensors)
        notes: tuple[str, ...] = ()
        if config is None:
            config, tensors, notes = _published(raw, config_type)
        with torch.device("meta"):
            wanted = module(config)
        return LoadedModel(
            family="striped_hyena",
            config=config,
            tensors=match_tensors(finish(config, tensors), wanted, raw.path.name),
            tokenizer="bytes" if config.vocab_size in _BYTES else None,
            source=str(raw.path),
            notes=notes,
        )

    return load


def _published(raw: RawCheckpoint, config_type: type) -> tuple[Any, dict[str, Tensor], tuple[str, ...]]:
    row = raw.config
    if row.get("model_type") != "stripedhyena":
        raise CheckpointError(
            "this checkpoint is not a Hugging Face folder of a StripedHyena",
            got=f"{raw.path.name}: model_type {row.get('model_type')!r}",
            allowed="a folder whose config.json says stripedhyena, or a file of our own training",
        )
    for key, allowed in _ALLOWED.items():
        if row.get(key, allowed[0]) not in allowed:
            raise CheckpointError(
                f"config.json has a {key} that this family does not compute",
                got=row[key],
                allowed=", ".join(map(str, allowed)),
            )
    tensors = {k.removeprefix("backbone."): v for k, v in raw.tensors.items()}
    try:
        config = config_type(**_sizes(row, tensors))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError("config.json lacks a size, or has a malformed one", got=error) from error
    notes = []
    if config.attention and int(row.get("max_seqlen", 0)) > config.max_tokens:
        notes.append(f"the cache holds {config.max_tokens} of the {row['max_seqlen']} tokens it was made for")
    if "unembed.weight" not in tensors and "embedding_layer.weight" in tensors:
        tensors["unembed.weight"] = tensors["embedding_layer.weight"]
        notes.append("the head is tied to the embedding: both are written")
    order = _order(config) if row.get("column_split_hyena", True) else None
    return config, {k: v for name in tensors for k, v in _renamed(name, tensors[name], order)}, tuple(notes)


def _sizes(row: Mapping[str, Any], t: Mapping[str, Tensor]) -> dict[str, Any]:
    """What config.json and the shapes say."""
    heads = int(row["num_attention_heads"])
    scaled = bool(row.get("use_interpolated_rotary_pos_emb", False))
    return {
        "layers": int(row["num_layers"]),
        "width": int(row["hidden_size"]),
        "vocab_size": t["embedding_layer.weight"].shape[0],
        "attention": tuple(int(i) for i in row["attn_layer_idxs"]),
        "heads": heads,
        "kv_heads": heads // int(row.get("proj_groups", 1)),
        "ffn": t["blocks.0.mlp.l1.weight"].shape[0],
        "state_size": int(row["state_size"]),
        "short_filter": int(row.get("short_filter_length", 3)),
        "max_tokens": min(int(row.get("max_seqlen", _DEFAULT_BOUND)), _DEFAULT_BOUND),
        "rope_base": float(row.get("rotary_emb_base", 10000.0)),
        "rope_scale": float(row.get("rotary_emb_scaling_factor", 1.0)) if scaled else 1.0,
        "eps": float(row.get("eps", 1e-5)),
        "eps_inside": bool(row.get("use_flash_rmsnorm", False)),
        "activation": str(row.get("mlp_activation", "silu")),
        "qkv_bias": bool(row.get("qkv_proj_bias", True)),
        "out_bias": bool(row.get("mha_out_proj_bias", True)),
    }


def _order(config: Any) -> Tensor:
    """Where x2, x1 and v, each in one piece, are in rows that hold them a head at a time."""
    rows = torch.arange(3 * config.width, device="cpu")
    return rows.view(config.heads, 3, config.head_size).transpose(0, 1).flatten()


def _renamed(name: str, value: Tensor, order: Tensor | None) -> list[tuple[str, Tensor]]:
    """A published tensor under this family's name, sorted and laid out as the operators want it."""
    place, _, leaf = name.rpartition(".")
    if order is not None and (place.endswith(".projections") or leaf.startswith("short_filter")):
        value = value[order]
    if leaf in ("poles", "residues"):  # [d,S,1,2] -> [S,2,d]
        return [(name, value[:, :, 0].permute(1, 2, 0).contiguous())]
    if leaf == "short_filter_weight":  # [3d,1,K] -> [K,3d]
        return [(f"{place}.conv_weight", value[:, 0].T.contiguous())]
    if leaf == "short_filter_bias":
        return [(f"{place}.conv_bias", value)]
    return [(name, value)]
