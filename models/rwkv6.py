"""RWKV-6 "Finch" (x060): matrix-valued state whose decay, like the token shift, depends on the token.

Sources:
    [1] B. Peng et al., "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence",
        arXiv 2404.05892: section 4.2, equations 11 to 19; table 2 (presets).
    [2] github BlinkDL/RWKV-LM, RWKV-v5/src/model.py, x060: key layout, initial values.
    [3] PyPI rwkv 0.8.32, version 6.0: the inference rule.

Symbols (B batch, T tokens, C width, A width of time mixing, H heads, N head size, V vocabulary):
    time_maa_*   how much of the token before against this one, [1,1,C], to which a low-rank map of the
                 token (time_maa_w1 [C,5R], time_maa_w2 [5,R,C]) adds, in the order w, k, v, r, g
    r, k, v      receptance, key, value                              [B,T,H,N]
    g            silu of the gate's projection                       [B,T,A]
    w            exp(-exp(time_decay + a low-rank map)), the decay   [B,T,H,N]
    u            time_faaaa, the bonus of the current token          [H,N]

State per layer: ``att_shift`` [B,C] and ``ffn_shift`` [B,C] (the last normed input of each half), and
``wkv`` [B,H,N,N] read S[k,v].

Departure: the five mixed inputs are made as one tensor [5,B,T,C], which is a third of the nodes at T = 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xexport.core.checkpoint import RawCheckpoint, own_config, require_keys
from xexport.core.family import Family, LoadedModel
from xexport.models._chunk import FromFirstState
from xexport.models._rwkv import (
    HeadedRwkv,
    HeadedTimeMix,
    bonus_init,
    count_layers,
    decay_init,
    matrix_init,
    parameter,
    published_tensors,
    shifted,
    tokens_of,
)
from xexport.ops.wkv6.reference import wkv6

__all__ = ["FAMILY", "Rwkv6", "Rwkv6Config", "Rwkv6Training"]


@dataclass(frozen=True)
class Rwkv6Config:
    """Sizes of one RWKV-6 model.

    Attributes:
        layers, width, vocab_size: L, C, V.
        head_size: N; the width of time mixing is a multiple of it.
        att_width: A, the width unless given.
        ffn_width: hidden width of channel mixing, 3.5 C unless given.
        mix_rank, decay_rank: low-rank sizes of the token shift (R) and of the decay.
        group_norm_eps: of ``ln_x``; 64e-5 in everything published by [2].
    """

    layers: int
    width: int
    vocab_size: int = 65536
    head_size: int = 64
    att_width: int = 0
    ffn_width: int = 0
    mix_rank: int = 32
    decay_rank: int = 64
    group_norm_eps: float = 64e-5

    @property
    def attention(self) -> int:
        """A."""
        return self.att_width or self.width

    @property
    def heads(self) -> int:
        """H."""
        return self.attention // self.head_size

    @property
    def hidden(self) -> int:
        """Hidden width of channel mixing, a multiple of 32 unless given."""
        return self.ffn_width or int(3.5 * self.width) // 32 * 32


PRESETS = {
    "tiny": Rwkv6Config(2, 32, 61, 8, 24, 72, 5, 7),
    "zoo": Rwkv6Config(5, 160, 256, 32, mix_rank=16, decay_rank=32),
    "1.6B": Rwkv6Config(24, 2048),
    "3B": Rwkv6Config(32, 2560),
    "7B": Rwkv6Config(32, 4096, mix_rank=64, decay_rank=128),
}


class _TimeMix(HeadedTimeMix):
    def __init__(self, config: Rwkv6Config) -> None:
        super().__init__(config)
        C, A, R, D = config.width, config.attention, config.mix_rank, config.decay_rank
        self.time_maa_x, self.time_maa_w, self.time_maa_k = (parameter(1, 1, C) for _ in range(3))
        self.time_maa_v, self.time_maa_r, self.time_maa_g = (parameter(1, 1, C) for _ in range(3))
        self.time_maa_w1, self.time_maa_w2 = parameter(C, 5 * R), parameter(5, R, C)
        self.time_decay = parameter(1, 1, A)
        self.time_decay_w1, self.time_decay_w2 = parameter(C, D), parameter(D, A)
        self.time_faaaa = parameter(config.heads, config.head_size)
        self.gate = nn.Linear(C, A, bias=False)

    def _mixed(self, x: Tensor, step: Tensor) -> tuple[Tensor, ...]:
        """The inputs of w, k, v, r and g, each between this token and the one before."""
        low = torch.tanh((x + step * self.time_maa_x) @ self.time_maa_w1)
        low = torch.unflatten(low, -1, (5, -1)).permute(2, 0, 1, 3)
        own = (self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)
        share = low @ self.time_maa_w2.unsqueeze(1) + torch.cat(own, 0).unsqueeze(1)
        return (x + step * share).unbind(0)

    def forward(self, x: Tensor, last: Tensor, wkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x [B,T,C], last [B,C], S [B,H,N,N]) -> (y, new last, new S)."""
        xw, xk, xv, xr, xg = self._mixed(x, shifted(x, last) - x)
        r, k, v = self.split(self.receptance(xr)), self.split(self.key(xk)), self.split(self.value(xv))
        decay = self.time_decay + torch.tanh(xw @ self.time_decay_w1) @ self.time_decay_w2
        w = self.split(torch.exp(-torch.exp(decay)))
        y, wkv = wkv6(r, w, k, v, self.time_faaaa, wkv)
        return self.output(self.joined(y) * F.silu(self.gate(xg))), x[:, -1], wkv


class _ChannelMix(nn.Module):
    def __init__(self, config: Rwkv6Config) -> None:
        super().__init__()
        C = config.width
        self.time_maa_k, self.time_maa_r = parameter(1, 1, C), parameter(1, 1, C)
        self.key = nn.Linear(C, config.hidden, bias=False)
        self.receptance = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(config.hidden, C, bias=False)

    def forward(self, x: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """(x [B,T,C], last [B,C]) -> (y, new last)."""
        step = shifted(x, last) - x
        hidden = torch.relu(self.key(x + step * self.time_maa_k))
        r = torch.sigmoid(self.receptance(x + step * self.time_maa_r))
        return r * self.value(hidden * hidden), x[:, -1]


class Rwkv6(HeadedRwkv):
    """RWKV-6 in the chunk form; parameter names are those of [2]."""

    def __init__(self, config: Rwkv6Config) -> None:
        super().__init__(config, _TimeMix, _ChannelMix)


class Rwkv6Training(FromFirstState, Rwkv6):
    """The same parameters, whole sequences from the first state."""


def _layout(raw: RawCheckpoint) -> str | None:
    att = "blocks.0.att."
    if att + "time_maa_w1" in raw.tensors and att + "time_decay_w1" in raw.tensors:
        return "it has blocks.0.att.time_maa_w1 and .time_decay_w1, the RWKV-6 layout"
    return None


def _config_from_shapes(raw: RawCheckpoint) -> Rwkv6Config:
    """All sizes of a published checkpoint are in its shapes."""
    t, att = raw.tensors, "blocks.0.att."
    names = ("time_maa_w1", "time_decay_w1", "time_faaaa", "key.weight")
    needed = ("emb.weight", "head.weight", *(att + n for n in names), "blocks.0.ffn.key.weight")
    require_keys(raw, needed, "rwkv6")
    vocab, width = t["emb.weight"].shape
    return Rwkv6Config(
        layers=count_layers(t),
        width=width,
        vocab_size=vocab,
        head_size=t[att + "time_faaaa"].shape[-1],
        att_width=t[att + "key.weight"].shape[0],
        ffn_width=t["blocks.0.ffn.key.weight"].shape[0],
        mix_rank=t[att + "time_maa_w1"].shape[-1] // 5,
        decay_rank=t[att + "time_decay_w1"].shape[-1],
    )


def _load(raw: RawCheckpoint) -> LoadedModel:
    """Read the layout of [2] (.pth or .safetensors) or a file of our own training."""
    config = own_config(raw, "rwkv6", Rwkv6Config) or _config_from_shapes(raw)
    with torch.device("meta"):
        wanted = Rwkv6(config)
    return LoadedModel(
        family="rwkv6",
        config=config,
        tensors=published_tensors(raw, dict(raw.tensors), wanted),
        tokenizer=tokens_of(config.vocab_size),
        source=str(raw.path),
    )


def _vector_init(leaf: str, c: Rwkv6Config, depth: float, height: float, att: bool) -> Tensor:
    """The vectors of [2] that are neither norms nor matrices."""
    if leaf == "time_decay":
        return decay_init(c.attention, depth)
    if leaf == "time_faaaa":
        return bonus_init(c.attention, depth)
    channel = torch.arange(c.width) / c.width
    power = 0.5 * height if leaf[-1] in "rg" and att else height
    return 1 - (channel**power + (0.3 * depth if leaf == "time_maa_v" else 0.0))


@torch.no_grad()
def _init(module: Rwkv6, seed: int) -> None:
    """The initial values of [2], deterministic in ``seed`` (matrices: models/_rwkv.py).

    Where [2] starts a low-rank factor at zero, it is small and random here, as in models/_rwkv.py.
    """
    generator = torch.Generator().manual_seed(seed)
    c = module.config
    for name, p in module.named_parameters():
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else 0
        depth, height = layer / max(c.layers - 1, 1), 1 - layer / c.layers
        leaf = name.rsplit(".", 1)[-1]
        if leaf.endswith(("_w1", "_w2")):
            value = torch.empty(p.shape).uniform_(-0.01, 0.01, generator=generator)
        elif leaf.startswith("time_"):
            value = _vector_init(leaf, c, depth, height, ".att." in name)
        elif p.dim() == 1:
            value = torch.full(p.shape, 0.0 if leaf == "bias" else 1.0)
            if name.endswith("ln_x.weight"):
                value.fill_(((1 + layer) / c.layers) ** 0.7)
        else:
            value = matrix_init(name, p.shape, generator)
        p.copy_(value.reshape(p.shape))


FAMILY = Family(
    name="rwkv6",
    title="RWKV-6 (Finch): matrix-valued state, decay per token and channel",
    sources=("arXiv 2404.05892", "github BlinkDL/RWKV-LM", "PyPI rwkv 0.8.32"),
    config=Rwkv6Config,
    presets=PRESETS,
    build=Rwkv6,
    load=_load,
    layout=_layout,
    reads="BlinkDL's RWKV-6 keys blocks.0.att.time_maa_w1 and .time_decay_w1",
    train_form=Rwkv6Training,
    init=_init,
    roles=(
        ("emb.*", "embedding"),
        ("head.*", "head"),
        ("*.ln*", "norm"),
        ("ln_out.*", "norm"),
        ("*.time_decay*", "decay"),
        ("*.time_maa_w[12]", "low_rank"),
        ("*.time_faaaa", "gate"),
        ("*.time_maa_?", "gate"),
        ("*.att.*.weight", "projection"),
        ("*.ffn.*.weight", "projection"),
        ("*", "other"),
    ),
    state_note="constant: 2 vectors of width C and H matrices N x N a layer",
)
