"""Mamba-2: a state space with one decay a head (SSD), which is gated linear attention with a convolution.

Sources:
    [1] T. Dao and A. Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through
        Structured State Space Duality", arXiv 2405.21060: section 7 (the block), section 6 (SSD).
    [2] Hugging Face transformers, models/mamba2: the checkpoint layout read here.
    [3] github state-spaces/mamba, modules/mamba2.py: initial values; the sizes of the published models.

Symbols and the mixer's formulas: models/_ssd.py.

State per layer: ``conv`` [B,K-1,D+2GN], the last inputs of the short convolution (channels last, oldest
first; [2] keeps K of them, channels first), and ``ssm`` [B,H,N,P] ([2] has [B,H,P,N]).

Departure: [2] does not clamp the step size when it feeds one token at a time; here it is clamped always.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from xexport.core.checkpoint import RawCheckpoint, match_tensors, own_config
from xexport.core.errors import CheckpointError
from xexport.core.family import Family, LoadedModel
from xexport.models._chunk import FromFirstState
from xexport.models._mamba import MambaFrame, tied_head
from xexport.models._ssd import SSD_ROLES, SsdMixer, SsdSizes, parse_limit, split_in_proj, ssd_init

__all__ = ["FAMILY", "Mamba2", "Mamba2Config", "Mamba2Training"]


@dataclass(frozen=True)
class Mamba2Config:
    """Sizes of one Mamba-2 model.

    Attributes:
        layers, width, vocab_size: number of blocks, d, V.
        heads: H, as many as make the inner width 2 d unless given.
        head_size, state_size, groups, conv_kernel: P, N, G, K.
        norm_eps: of every RMS norm.
        conv_bias, projection_bias: biases of the convolution, and of in_proj and out_proj.
        dt_min, dt_max: limits of the step size; a maximum of 0 is none.
    """

    layers: int
    width: int
    vocab_size: int = 50288
    heads: int = 0
    head_size: int = 64
    state_size: int = 128
    groups: int = 1
    conv_kernel: int = 4
    norm_eps: float = 1e-5
    conv_bias: bool = True
    projection_bias: bool = False
    dt_min: float = 0.0
    dt_max: float = 0.0

    @property
    def sizes(self) -> SsdSizes:
        """The sizes of a mixer."""
        return SsdSizes(
            self.width,
            self.heads or 2 * self.width // self.head_size,
            self.head_size,
            self.state_size,
            groups=self.groups,
            conv_kernel=self.conv_kernel,
            norm_groups=self.groups,
            norm_eps=self.norm_eps,
            conv_bias=self.conv_bias,
            projection_bias=self.projection_bias,
            dt_min=self.dt_min,
            dt_max=self.dt_max,
        )


PRESETS = {
    "tiny": Mamba2Config(2, 24, 61, head_size=12, state_size=8, groups=2),
    "zoo": Mamba2Config(6, 160, 256, head_size=32, state_size=32),
    "130m": Mamba2Config(24, 768),
    "370m": Mamba2Config(48, 1024),
    "780m": Mamba2Config(48, 1536),
    "1.3b": Mamba2Config(48, 2048),
    "2.7b": Mamba2Config(64, 2560),
}


class Mamba2(MambaFrame):
    """Mamba-2 in the chunk form; parameter names are those of [2] but for the mixers' ``dt_proj``."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__(config, lambda: SsdMixer(config.sizes), config.sizes.states)


class Mamba2Training(FromFirstState, Mamba2):
    """The same parameters, whole sequences from the first state."""


def _layout(raw: RawCheckpoint) -> str | None:
    if raw.config.get("model_type") == "mamba2":
        return "its config.json says mamba2"
    return None


def _config_from_hugging_face(raw: RawCheckpoint) -> Mamba2Config:
    """config.json has the sizes; keys it may leave out have the defaults of [2]."""
    row = raw.config
    if row.get("model_type") != "mamba2":
        raise CheckpointError(
            "this checkpoint is not a Hugging Face folder of a Mamba-2 model",
            got=f"{raw.path.name}: model_type {row.get('model_type')!r}",
            allowed='a folder whose config.json has "model_type": "mamba2", or a file of our own training',
        )
    if row.get("hidden_act", "silu") != "silu":
        raise CheckpointError("unknown activation", got=row["hidden_act"], allowed="silu")
    low, high = parse_limit(raw)
    try:
        return Mamba2Config(
            layers=int(row["num_hidden_layers"]),
            width=int(row["hidden_size"]),
            vocab_size=int(row["vocab_size"]),
            heads=int(row.get("num_heads", 128)),
            head_size=int(row.get("head_dim", 64)),
            state_size=int(row.get("state_size", 128)),
            groups=int(row.get("n_groups", 8)),
            conv_kernel=int(row.get("conv_kernel", 4)),
            norm_eps=float(row.get("layer_norm_epsilon", 1e-5)),
            conv_bias=bool(row.get("use_conv_bias", True)),
            projection_bias=bool(row.get("use_bias", False)),
            dt_min=low,
            dt_max=high,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError("config.json lacks a size, or has a malformed one", got=error) from error


def _load(raw: RawCheckpoint) -> LoadedModel:
    """Read a Hugging Face folder or a file of our own training; a tied head is the embedding."""
    config = own_config(raw, "mamba2", Mamba2Config)
    tensors: Mapping[str, Tensor] = raw.tensors
    if config is None:
        config = _config_from_hugging_face(raw)
        tensors = split_in_proj(dict(tensors))
    tensors, notes = tied_head(raw, tensors, "mamba2")
    with torch.device("meta"):
        wanted = Mamba2(config)
    return LoadedModel(
        family="mamba2",
        config=config,
        tensors=match_tensors(tensors, wanted, raw.path.name),
        tokenizer="bytes" if config.vocab_size == 256 else None,
        source=str(raw.path),
        notes=tuple(notes),
    )


@torch.no_grad()
def _init(module: Mamba2, seed: int) -> None:
    """The initial values of [3], deterministic in ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if name in ("backbone.embeddings.weight", "lm_head.weight"):
            p.copy_(torch.empty(p.shape).normal_(0, 0.02, generator=generator))
        else:
            p.copy_(ssd_init(name, p.shape, module.config.layers, generator))


FAMILY = Family(
    name="mamba2",
    title="Mamba-2: state space with one decay a head (SSD)",
    sources=("arXiv 2405.21060", "github state-spaces/mamba", "transformers models/mamba2"),
    config=Mamba2Config,
    presets=PRESETS,
    build=Mamba2,
    load=_load,
    layout=_layout,
    reads="a Hugging Face folder with model_type mamba2",
    train_form=Mamba2Training,
    init=_init,
    roles=(
        ("backbone.embeddings.*", "embedding"),
        ("lm_head.*", "head"),
        ("*norm*", "norm"),
        *SSD_ROLES,
        ("*", "other"),
    ),
    state_note="constant: H matrices N x P and (K-1) x (D + 2 G N) numbers a layer",
)
