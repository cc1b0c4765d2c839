"""Reading microsoft/torchscale's RetNetDecoder: what its tensors say, what config.json beside them says, and
what neither says and is assumed, which every note names.

Four options leave no trace in a state dict: the feed-forward network's activation, the embedding's factor,
the norms' epsilon, and deepnorm's weight of the residual stream. Two programs that make such files differ in
their defaults: torchscale's RetNetConfig (gelu, no factor, 1e-6), and its example for fairseq (swish, a
factor of sqrt(d)). The arguments of the training, under torchscale's names, in config.json in the weights'
folder, settle it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from xexport.core.checkpoint import RawCheckpoint, require_keys
from xexport.core.errors import CheckpointError

__all__ = ["HEADS_KEY", "from_torchscale"]

#: log gamma of every head; no other model has it
HEADS_KEY = "retnet_rel_pos.decay"

#: torchscale's RetNetDecoder -> ours; the first that fits
_NAMES = (
    ("embed_tokens.", "embed."),
    ("output_projection.", "head."),
    ("layernorm_embedding.", "embed_norm."),
    (".retention_layer_norm.", ".retention_norm."),
    (".final_layer_norm.", ".ffn_norm."),
    ("layer_norm.", "norm."),
)
#: what no tensor says: torchscale's name, its RetNetConfig's default
_UNSAID: dict[str, Any] = {
    "activation_fn": "gelu",
    "no_scale_embedding": True,
    "layernorm_eps": 1e-6,
    "deepnorm": False,
}
_CONFIG_FIX = (
    "put the arguments of the training beside the weights, in a folder, as config.json: "
    '{"deepnorm": ..., "activation_fn": ..., "no_scale_embedding": ..., "layernorm_eps": ...}'
)


def from_torchscale(raw: RawCheckpoint) -> tuple[dict[str, Any], dict[str, Tensor], tuple[str, ...]]:
    """The fields of a RetNetConfig, the tensors under our names, and what was assumed.

    Raises:
        CheckpointError: tensors are missing; an option that is not computed here; norms behind the layers
            without a word on deepnorm; a malformed config.json.
    """
    prefix = next(key for key in raw.tensors if key.endswith(HEADS_KEY)).removesuffix(HEADS_KEY)
    found = {k.removeprefix(prefix): v for k, v in raw.tensors.items() if k.startswith(prefix)}
    notes: list[str] = []
    _refuse(raw, found)
    first = ("retention.v_proj.weight", "ffn.fc1.weight", "retention_layer_norm.weight")
    needed = ("embed_tokens.weight", *(f"layers.0.{k}" for k in first))
    require_keys(raw, tuple(prefix + key for key in needed), "retnet (torchscale)")
    others = [k for k in raw.tensors if not k.startswith(prefix)]
    if others:
        notes.append(f"{len(others)} tensors outside the decoder are left out, as {others[0]}")
    if "output_projection.weight" not in found:
        notes.append("there is no output_projection: the head is taken to be the embedding")
        found["output_projection.weight"] = found["embed_tokens.weight"]
    fields = {**_sizes(found), **_said(raw, found, notes)}
    return fields, {_renamed(k): v for k, v in found.items()}, tuple(notes)


def _refuse(raw: RawCheckpoint, found: Mapping[str, Tensor]) -> None:
    """Raise for what would be another function."""
    hit = next((k for k in found if ".moe_layer." in k), None)
    if hit is not None:
        raise CheckpointError(
            "a RetNet with torchscale's experts can't be read: each takes a share of a call's tokens and "
            "drops the rest, so that a token's result depends on how the sequence is cut",
            got=f"{hit!r} in {raw.path.name}",
        )
    hit = next((k for k in found if ".q_proj.A." in k), None)
    if hit is not None:  # torchscale itself can't build it: its RMS norm can't be doubled
        raise CheckpointError(
            "a RetNet with multiway networks can't be read", got=f"{hit!r} in {raw.path.name}"
        )
    if raw.config.get("no_output_layer"):
        raise CheckpointError("a RetNet without a head can't be read", got="no_output_layer in config.json")


def _sizes(found: Mapping[str, Tensor]) -> dict[str, Any]:
    """What shapes and names of the tensors say."""
    vocab, width = found["embed_tokens.weight"].shape
    return {
        "vocab_size": vocab,
        "width": width,
        "layers": 1 + max(int(k.split(".")[1]) for k in found if k.startswith("layers.")),
        "heads": found[HEADS_KEY].shape[0],
        "ffn": found["layers.0.ffn.fc1.weight"].shape[0],
        "value_factor": found["layers.0.retention.v_proj.weight"].shape[0] / width,
        "rms": "layers.0.retention_layer_norm.bias" not in found,
        "glu": "layers.0.ffn.gate.weight" in found,
        "norms_behind": "layer_norm.weight" not in found,
        "embedding_norm": "layernorm_embedding.weight" in found,
    }


def _said(raw: RawCheckpoint, found: Mapping[str, Tensor], notes: list[str]) -> dict[str, Any]:
    """The options that no tensor shows: config.json's, or torchscale's defaults, which are noted."""
    row = {k: v for k, v in raw.config.items() if v is not None}
    behind = "layer_norm.weight" not in found
    if behind and ("deepnorm" not in row or row.get("decoder_normalize_before") is True):
        raise CheckpointError(
            "this RetNet has no norm behind its last layer, so each layer's norms are behind it; whether "
            "with deepnorm (a residual stream weighted by (2 layers)^(1/4)) no tensor says",
            got=f"{raw.path.name}: no layer_norm.weight, and config.json "
            + ("says decoder_normalize_before" if "deepnorm" in row else "does not say deepnorm"),
            fix=_CONFIG_FIX,
        )
    assumed = {k: v for k, v in _UNSAID.items() if k not in row}
    if assumed:
        what = ", ".join(f"{k} = {v}" for k, v in assumed.items())
        notes.append(
            f"the checkpoint does not say {what}: torchscale's defaults, assumed. Else {_CONFIG_FIX}"
        )
    row = {**assumed, **row}
    for key in ("no_scale_embedding", "deepnorm"):
        if not isinstance(row[key], bool):
            raise CheckpointError(f"config.json has a malformed {key}", got=row[key], allowed="true or false")
    try:
        eps = float(row["layernorm_eps"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            "config.json has a malformed layernorm_eps", got=row["layernorm_eps"]
        ) from error
    return {
        "activation": str(row["activation_fn"]),
        "scale_embedding": not row["no_scale_embedding"],
        "deepnorm": row["deepnorm"],
        "eps": eps,
    }


def _renamed(key: str) -> str:
    for theirs, ours in _NAMES:
        if theirs in key:
            return key.replace(theirs, ours)
    return key
