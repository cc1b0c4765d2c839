"""Reading Hyena: files of our own training, HyenaDNA; and distilling what was read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from xexport.core.checkpoint import RawCheckpoint, own_config, require_keys, unreadable
from xexport.core.errors import CheckpointError, InputError
from xexport.core.family import LoadedModel
from xexport.core.progress import Progress
from xexport.models._distill import Modes, distill_filters
from xexport.models._hyena import Hyena, HyenaConfig, HyenaTrain
from xexport.models._implicit import ImplicitFilter, published_filters

__all__ = ["distill", "dna_layout", "from_training", "load_hyena", "load_own"]


def from_training(config: HyenaConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, with every filter FFN replaced by the filters it makes (in float64)."""
    result = {k: v.detach() for k, v in tensors.items() if ".filters." not in k}
    with torch.device("cpu"):
        ffn = ImplicitFilter(config.filter_sizes).double()
    for i in range(config.layers):
        prefix = f"layers.{i}.filters."
        ffn.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        with torch.no_grad():
            for j, h in enumerate(ffn(config.max_tokens)):
                result[f"{prefix}{j}"] = h.float().contiguous()
    return result


_DNA = "hyena.backbone."
_DNA_TOKENS = (12, 16)  # without and with the rows that only pad its table


def dna_layout(raw: RawCheckpoint) -> str | None:
    if raw.config.get("model_type") == "hyenadna" or f"{_DNA}ln_f.weight" in _dna_names(raw.tensors):
        return "it has the layout of HyenaDNA"
    return None


def load_own(raw: RawCheckpoint, family: str, kind: type[HyenaConfig]) -> LoadedModel | None:
    """The model in a file of our own training of ``family``, with the filters that it makes, or None."""
    config = own_config(raw, family, kind)
    if config is None:
        return None
    with torch.device("meta"):
        wanted = HyenaTrain(config).state_dict()
    require_keys(raw, tuple(wanted), family)
    _check_shapes(raw.tensors, wanted)
    tensors = from_training(config, {k: raw.tensors[k] for k in wanted})
    return LoadedModel(family, config, tensors, source=str(raw.path))


def load_hyena(raw: RawCheckpoint) -> LoadedModel:
    own = load_own(raw, "hyena", HyenaConfig)
    if own is not None:
        return own
    raw = dataclasses.replace(raw, tensors=_dna_names(raw.tensors))
    if f"{_DNA}ln_f.weight" not in raw.tensors:
        raise unreadable(
            raw,
            "a Hyena",
            "a Hugging Face folder of HyenaDNA, or a safetensors file from xexport's own training",
        )
    config, tensors = _read_dna(raw)
    tokenizer = "dna" if config.vocab_size in _DNA_TOKENS else None
    return LoadedModel("hyena", config, tensors, tokenizer, source=str(raw.path))


def _dna_names(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The names of its Hugging Face folders, also where the authors' own training gave others.

    There the language model is ``model.``, and blocks that were recomputed have a ``layer.`` between.
    """
    if not any(k.startswith("model.backbone.") for k in tensors):
        return tensors
    names = {k: k.replace(".mixer.layer.", ".mixer.").replace(".mlp.layer.", ".mlp.") for k in tensors}
    return {
        f"hyena.{n.removeprefix('model.')}"
        if n.startswith("model.backbone.")
        else n.removeprefix("model."): t
        for n, t in ((names[k], v) for k, v in tensors.items())
    }


def _check_shapes(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for key, tensor in wanted.items():
        if found[key].shape != tensor.shape:
            raise CheckpointError(
                f"tensor {key!r} has a wrong shape", got=tuple(found[key].shape), allowed=tuple(tensor.shape)
            )


#: HyenaDNA's block -> here
_DNA_BLOCK = {
    "norm1": "hyena_norm",
    "norm2": "mlp_norm",
    "mixer.in_proj": "hyena.in_proj",
    "mixer.out_proj": "hyena.out_proj",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
}


def _read_dna(raw: RawCheckpoint) -> tuple[HyenaConfig, dict[str, Tensor]]:
    """A HyenaDNA language model: sizes from the shapes, filters from the stored features and window."""
    t, first = raw.tensors, f"{_DNA}layers.0."
    names = ("mixer.filter_fn.pos_emb.z", "mixer.filter_fn.modulation.deltas", "mixer.in_proj.weight")
    needed = tuple(first + n for n in (*names, "mlp.fc1.weight", "mixer.filter_fn.implicit_filter.0.weight"))
    require_keys(raw, (f"{_DNA}embeddings.word_embeddings.weight", *needed), "hyena (HyenaDNA)")
    embed = t[f"{_DNA}embeddings.word_embeddings.weight"]
    linear = [
        k for k in t if k.startswith(f"{first}mixer.filter_fn.implicit_filter.") and k.endswith("weight")
    ]
    config = HyenaConfig(
        vocab_size=embed.shape[0],
        width=embed.shape[1],
        layers=1 + max(int(k.split(".")[3]) for k in t if k.startswith(f"{_DNA}layers.")),
        ffn=t[f"{first}mlp.fc1.weight"].shape[0],
        max_tokens=t[f"{first}mixer.filter_fn.pos_emb.z"].shape[1],
        order=t[f"{first}mixer.in_proj.weight"].shape[0] // embed.shape[1] - 1,
        filter_width=t[f"{first}mixer.filter_fn.implicit_filter.0.weight"].shape[0],
        filter_inner=len(linear) - 2,
        filter_features=t[f"{first}mixer.filter_fn.implicit_filter.0.weight"].shape[1],
        filter_shift=0.05,
    )
    if config.order != 2:
        raise CheckpointError("HyenaDNA exists with order 2 only", got=config.order)
    result = {"embed.weight": embed, "head.weight": t.get("lm_head.weight", embed)}
    for kind in ("weight", "bias"):
        result[f"norm.{kind}"] = t[f"{_DNA}ln_f.{kind}"]
    for i in range(config.layers):
        block = {
            k.removeprefix(f"{_DNA}layers.{i}."): v
            for k, v in t.items()
            if k.startswith(f"{_DNA}layers.{i}.")
        }
        result |= {f"layers.{i}.{k}": v for k, v in _dna_block(config, block).items()}
    with torch.device("meta"):
        wanted = Hyena(config).state_dict()
    _check_shapes(result, wanted)
    return config, result


def _dna_block(config: HyenaConfig, t: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One block in this file's names, the filters made in float64."""
    try:
        result = {
            f"{ours}.{k}": t[f"{its}.{k}"] for its, ours in _DNA_BLOCK.items() for k in ("weight", "bias")
        }
        result["hyena.conv_weight"] = t["mixer.short_filter.weight"][:, 0].T
        result["hyena.conv_bias"] = t["mixer.short_filter.bias"]
        result["hyena.filter_skip"] = t["mixer.filter_fn.bias"].view(config.order - 1, config.width)
    except KeyError as error:
        raise CheckpointError("a HyenaDNA block lacks a tensor", got=error, fix="is it truncated?") from error
    filters = published_filters(t, config.filter_sizes, "mixer.filter_fn.")
    return result | {f"filters.{j}": h.float().contiguous() for j, h in enumerate(filters)}


def distill(
    config: Any, tensors: Mapping[str, Tensor], order: int, progress: Progress
) -> tuple[HyenaConfig, dict[str, Tensor], tuple[str, ...]]:
    """Replace every filter ``[d,L]`` of the chunk form by ``order`` modes a channel.

    Returns:
        the configuration, tensors of :class:`HyenaDistilled`, and the errors in words, a row a convolution.
    """
    if config.distilled_order:
        raise InputError("this model is distilled already", got=f"{config.distilled_order} modes a filter")
    progress.stage(f"distill filters to {order} modes", config.layers * (config.order - 1) * config.width)
    result = {k: v for k, v in tensors.items() if ".filters." not in k}
    notes = []
    for i in range(config.layers):
        skip = []
        for j in range(config.order - 1):
            name = f"layers.{i}.filters.{j}"
            modes = distill_filters(tensors[name], order, progress)
            result[f"{name}.poles"] = torch.view_as_real(modes.poles.T).transpose(1, 2).float().contiguous()
            result[f"{name}.residues"] = (
                torch.view_as_real(modes.residues.T).transpose(1, 2).float().contiguous()
            )
            skip.append(tensors[f"layers.{i}.hyena.filter_skip"][j] + modes.direct.float())
            notes.append(_error_note(name, modes))
        result[f"layers.{i}.hyena.filter_skip"] = torch.stack(skip)
    return dataclasses.replace(config, distilled_order=order), result, tuple(notes)


def _error_note(name: str, modes: Modes) -> str:
    errors, norms = modes.errors, modes.norms
    together = ((errors * norms).norm() / norms.norm()).item() if norms.any() else 0.0
    return (
        f"{name}: relative L2 error of the {len(errors)} distilled filters {100 * together:.2g}% together, "
        f"median {100 * errors.median().item():.2g}%, largest {100 * errors.max().item():.2g}%"
    )
