"""Mamba-1: a selective state-space model; the step size, input and output maps depend on the token.

Sources:
    [1] A. Gu and T. Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
        arXiv 2312.00752: figure 3 (the block), algorithm 2, section 3.6 (real A, initial dt).
    [2] github state-spaces/mamba, mamba_simple.py and mixer_seq_simple.py: initial values.
    [3] Hugging Face transformers, models/mamba and models/falcon_mamba: the checkpoint layouts read here.

Symbols (B batch, T tokens, d width, D inner width, N state size, K kernel, R rank of dt):
    x, z       the two halves of in_proj: the path through the scan and its gate   [B,T,D]
    dt         step size, softplus(dt_proj(...)) > 0                              [B,T,D]
    A          -exp(A_log), the diagonal of the state matrix                      [D,N]
    B, C       input and output maps of the state, from the token                 [B,T,N]

State per layer: ``conv`` [B,K-1,D], the last inputs of the short convolution (channels last, oldest
first; [3] keeps K of them, channels first), and ``ssm`` [B,D,N].

The depthwise convolution and its SiLU are the operator causal_conv1d, channels last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xexport.core.checkpoint import RawCheckpoint, match_tensors, own_config
from xexport.core.errors import CheckpointError
from xexport.core.family import Family, LoadedModel
from xexport.models._chunk import FromFirstState
from xexport.models._mamba import MIXER_ROLES, MambaFrame, SelectiveMixer, first_value, tied_head

__all__ = ["FAMILY", "Mamba", "MambaConfig", "MambaTraining"]


@dataclass(frozen=True)
class MambaConfig:
    """Sizes of one Mamba-1 model.

    Attributes:
        layers, width, vocab_size: number of blocks, d, V.
        inner_width: D, 2 d unless given.
        state_size, conv_kernel: N, K.
        dt_rank: R, ceil(d / 16) unless given.
        norm_eps: of every RMS norm.
        conv_bias, projection_bias: biases of the convolution, and of in_proj and out_proj.
        mixer_norm_eps: Falcon-Mamba's RMS norms (without a weight) of dt before its projection, B and C
            have this eps; 0 is none, as in Mamba.
    """

    layers: int
    width: int
    vocab_size: int = 50280
    inner_width: int = 0
    state_size: int = 16
    conv_kernel: int = 4
    dt_rank: int = 0
    norm_eps: float = 1e-5
    conv_bias: bool = True
    projection_bias: bool = False
    mixer_norm_eps: float = 0.0

    @property
    def inner(self) -> int:
        """D."""
        return self.inner_width or 2 * self.width

    @property
    def rank(self) -> int:
        """R."""
        return self.dt_rank or -(-self.width // 16)


PRESETS = {
    "tiny": MambaConfig(2, 24, 61, state_size=4, dt_rank=3),
    "zoo": MambaConfig(6, 160, 256),
    "130m": MambaConfig(24, 768),
    "370m": MambaConfig(48, 1024),
    "790m": MambaConfig(48, 1536),
    "1.4b": MambaConfig(48, 2048),
    "2.8b": MambaConfig(64, 2560),
    "falcon-7b": MambaConfig(64, 4096, 65024, mixer_norm_eps=1e-6),
}


class Mamba(MambaFrame):
    """Mamba-1 in the chunk form; parameter names are those of [3]."""

    def __init__(self, config: MambaConfig) -> None:
        states = {
            "conv": ("B", config.conv_kernel - 1, config.inner),
            "ssm": ("B", config.inner, config.state_size),
        }
        super().__init__(config, lambda: SelectiveMixer(config), states)


class MambaTraining(FromFirstState, Mamba):
    """The same parameters, whole sequences from the first state."""


_MODEL_TYPES = ("mamba", "falcon_mamba")


def _layout(raw: RawCheckpoint) -> str | None:
    if raw.config.get("model_type") in _MODEL_TYPES:
        return f"its config.json says {raw.config['model_type']}"
    return None


def _config_from_hugging_face(raw: RawCheckpoint) -> MambaConfig:
    """config.json has the sizes; keys it may leave out have the defaults of [3]."""
    row = raw.config
    if row.get("model_type") not in _MODEL_TYPES:
        raise CheckpointError(
            "this checkpoint is not a Hugging Face folder of a Mamba-1 model",
            got=f"{raw.path.name}: model_type {row.get('model_type')!r}",
            allowed='a folder whose config.json has "model_type": "mamba" or "falcon_mamba", or a file '
            "of our own training",
        )
    if row.get("hidden_act", "silu") != "silu":
        raise CheckpointError("unknown activation", got=row["hidden_act"], allowed="silu")
    rank = row.get("time_step_rank", "auto")
    try:
        width = int(row["hidden_size"])
        return MambaConfig(
            layers=int(row.get("num_hidden_layers") or row["n_layer"]),
            width=width,
            vocab_size=int(row["vocab_size"]),
            inner_width=int(row.get("expand", 2) * width),
            state_size=int(row.get("state_size", 16)),
            conv_kernel=int(row.get("conv_kernel", 4)),
            dt_rank=-(-width // 16) if rank == "auto" else int(rank),
            norm_eps=float(row.get("layer_norm_epsilon", 1e-5)),
            conv_bias=bool(row.get("use_conv_bias", True)),
            projection_bias=bool(row.get("use_bias", False)),
            mixer_norm_eps=float(row.get("mixer_rms_eps", 1e-6)) if row["model_type"] != "mamba" else 0.0,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError("config.json lacks a size, or has a malformed one", got=error) from error


def _load(raw: RawCheckpoint) -> LoadedModel:
    """Read a Hugging Face folder or a file of our own training; a tied head is the embedding."""
    config = own_config(raw, "mamba", MambaConfig) or _config_from_hugging_face(raw)
    tensors, notes = tied_head(raw, raw.tensors, "mamba")
    with torch.device("meta"):
        wanted = Mamba(config)
    return LoadedModel(
        family="mamba",
        config=config,
        tensors=match_tensors(tensors, wanted, raw.path.name),
        tokenizer="bytes" if config.vocab_size == 256 else None,
        source=str(raw.path),
        notes=tuple(notes),
    )


@torch.no_grad()
def _init(module: Mamba, seed: int) -> None:
    """The initial values of [2] (dt between 0.001 and 0.1, A = -1..-N), deterministic in ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if name in ("backbone.embeddings.weight", "lm_head.weight"):
            p.copy_(torch.empty(p.shape).normal_(0, 0.02, generator=generator))
        else:
            p.copy_(first_value(module.config, name, p, generator))


FAMILY = Family(
    name="mamba",
    title="Mamba-1: selective state space",
    sources=("arXiv 2312.00752", "github state-spaces/mamba", "transformers models/mamba"),
    config=MambaConfig,
    presets=PRESETS,
    build=Mamba,
    load=_load,
    layout=_layout,
    reads="a Hugging Face folder with model_type mamba or falcon_mamba",
    train_form=MambaTraining,
    init=_init,
    roles=(
        ("backbone.embeddings.*", "embedding"),
        ("lm_head.*", "head"),
        ("*norm*", "norm"),
        *MIXER_ROLES,
    ),
    state_note="constant: D x N and (K-1) x D numbers a layer",
)
