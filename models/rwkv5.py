"""RWKV-5 "Eagle": heads with a matrix-valued state, one learned decay and bonus per key channel.

Sources:
    [1] B. Peng et al., "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence",
        arXiv 2404.05892: section 4.1, equations 3 to 10; table 2 (presets).
    [2] github BlinkDL/RWKV-LM, RWKV-v5/src/model.py, x052: key layout, initial values.
    [3] PyPI rwkv 0.8.32, versions 5.0, 5.1 and 5.2: what earlier checkpoints do differently.

Symbols (B batch, T tokens, C width, A width of time mixing, H heads, N head size, V vocabulary):
    time_mix_*   how much of this token against the one before, [1,1,C]
    r, k, v      receptance, key, value                    [B,T,H,N]
    g            silu of the gate's projection             [B,T,A]
    w            exp(-exp(time_decay)), the decay          [H,N]
    u            the bonus of the current token            [H,N]

State per layer: ``att_shift`` [B,C] and ``ffn_shift`` [B,C] (the last normed input of each half), and
``wkv`` [B,H,N,N] read S[k,v].

Versions, which [3] tells apart by the keys: 5.2 is the one of [1]. 5.1 has one decay and one bonus a head,
5.0 has no gate either. Their bonus is called ``time_first`` and stored as its logarithm, unless it is called
``time_faaaa``, which is the bonus itself. [2] divides by 8 before a norm of eps 1e-5; that is eps 64e-5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xexport.core.checkpoint import RawCheckpoint, own_config, require_keys
from xexport.core.errors import CheckpointError
from xexport.core.family import Family, LoadedModel
from xexport.models._chunk import FromFirstState
from xexport.models._rwkv import (
    ChannelMix,
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

__all__ = ["FAMILY", "Rwkv5", "Rwkv5Config", "Rwkv5Training"]


@dataclass(frozen=True)
class Rwkv5Config:
    """Sizes of one RWKV-5 model.

    Attributes:
        layers, width, vocab_size: L, C, V.
        head_size: N; the width of time mixing is a multiple of it.
        att_width: A, the width unless given.
        ffn_width: hidden width of channel mixing, 3.5 C unless given.
        group_norm_eps: of ``ln_x``; 64e-5 in everything published by [2].
        per_channel: a decay and a bonus for every key channel (5.2), else for every head.
        gate: the output is gated (5.1 and 5.2).
        log_bonus: the bonus is stored as its logarithm, called ``time_first``.
    """

    layers: int
    width: int
    vocab_size: int = 65536
    head_size: int = 64
    att_width: int = 0
    ffn_width: int = 0
    group_norm_eps: float = 64e-5
    per_channel: bool = True
    gate: bool = True
    log_bonus: bool = False

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

    @property
    def bonus(self) -> str:
        """The name of the parameter u comes from."""
        return "time_first" if self.log_bonus else "time_faaaa"


PRESETS = {
    "tiny": Rwkv5Config(2, 32, 61, 8, 24, 72),
    "zoo": Rwkv5Config(5, 160, 256, 32),
    "0.4B": Rwkv5Config(24, 1024),
    "1.5B": Rwkv5Config(24, 2048),
    "3B": Rwkv5Config(32, 2560),
    "7B": Rwkv5Config(32, 4096),
}


class _TimeMix(HeadedTimeMix):
    def __init__(self, config: Rwkv5Config) -> None:
        super().__init__(config)
        C, H = config.width, config.heads
        columns = config.head_size if config.per_channel else 1
        self.bonus, self.log_bonus = config.bonus, config.log_bonus
        self.time_decay = parameter(H, columns)
        setattr(self, config.bonus, parameter(H, columns))
        self.time_mix_k, self.time_mix_v, self.time_mix_r = (parameter(1, 1, C) for _ in range(3))
        self.gate = nn.Linear(C, config.attention, bias=False) if config.gate else None
        if config.gate:
            self.time_mix_g = parameter(1, 1, C)

    def forward(self, x: Tensor, last: Tensor, wkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x [B,T,C], last [B,C], S [B,H,N,N]) -> (y, new last, new S)."""
        before = shifted(x, last)
        step = x - before
        r = self.split(self.receptance(before + step * self.time_mix_r))
        k = self.split(self.key(before + step * self.time_mix_k))
        v = self.split(self.value(before + step * self.time_mix_v))
        size = (self.heads, self.head_size)
        w = torch.exp(-torch.exp(self.time_decay)).expand(size)
        u: Tensor = getattr(self, self.bonus)
        u = (torch.exp(u) if self.log_bonus else u).expand(size)
        y, wkv = wkv6(r, w.unsqueeze(0).unsqueeze(0), k, v, u, wkv)
        y = self.joined(y)
        if self.gate is not None:
            y = y * F.silu(self.gate(before + step * self.time_mix_g))
        return self.output(y), x[:, -1], wkv


class Rwkv5(HeadedRwkv):
    """RWKV-5 in the chunk form; parameter names are those of [2]."""

    def __init__(self, config: Rwkv5Config) -> None:
        super().__init__(config, _TimeMix, lambda c: ChannelMix(c.width, c.hidden))


class Rwkv5Training(FromFirstState, Rwkv5):
    """The same parameters, whole sequences from the first state."""


def _layout(raw: RawCheckpoint) -> str | None:
    att = "blocks.0.att."
    if att + "ln_x.weight" in raw.tensors and att + "time_mix_k" in raw.tensors:
        return "it has blocks.0.att.ln_x and .time_mix_k, the RWKV-5 layout"
    return None


def _config_from_shapes(raw: RawCheckpoint) -> Rwkv5Config:
    """The version and all sizes of a published checkpoint are in its keys and shapes."""
    t, att = raw.tensors, "blocks.0.att."
    needed = (att + "time_mix_k", att + "ln_x.weight", att + "time_decay", att + "key.weight")
    require_keys(raw, ("emb.weight", "head.weight", *needed, "blocks.0.ffn.key.weight"), "rwkv5")
    vocab, width = t["emb.weight"].shape
    attention, decay = t[att + "key.weight"].shape[0], t[att + "time_decay"]
    heads = decay.shape[0]
    if attention % heads:
        raise CheckpointError(
            "the width of time mixing is no multiple of the number of heads",
            got=f"{attention} channels, {heads} rows of {att}time_decay in {raw.path.name}",
        )
    return Rwkv5Config(
        layers=count_layers(t),
        width=width,
        vocab_size=vocab,
        head_size=attention // heads,
        att_width=attention,
        ffn_width=t["blocks.0.ffn.key.weight"].shape[0],
        per_channel=decay.numel() > heads,
        gate=att + "gate.weight" in t,
        log_bonus=att + "time_faaaa" not in t,
    )


def _load(raw: RawCheckpoint) -> LoadedModel:
    """Read the layout of [2] and [3] (.pth or .safetensors) or a file of our own training."""
    config = own_config(raw, "rwkv5", Rwkv5Config) or _config_from_shapes(raw)
    by_head = ("time_decay", "time_first", "time_faaaa")
    tensors = {  # one number a head may be stored as [H] or [H,1,1]
        name: value.reshape(value.shape[0], -1) if name.endswith(by_head) else value
        for name, value in raw.tensors.items()
    }
    with torch.device("meta"):
        wanted = Rwkv5(config)
    return LoadedModel(
        family="rwkv5",
        config=config,
        tensors=published_tensors(raw, tensors, wanted),
        tokenizer=tokens_of(config.vocab_size),
        source=str(raw.path),
    )


@torch.no_grad()
def _init(module: Rwkv5, seed: int) -> None:
    """The initial values of [2], deterministic in ``seed`` (matrices: models/_rwkv.py)."""
    generator = torch.Generator().manual_seed(seed)
    c = module.config
    channel = torch.arange(c.width) / c.width
    for name, p in module.named_parameters():
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else 0
        depth, height = layer / max(c.layers - 1, 1), 1 - layer / c.layers
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "time_decay":
            value = decay_init(p.numel(), depth)
        elif leaf in ("time_first", "time_faaaa"):
            value = bonus_init(p.numel(), depth)
        elif leaf == "time_mix_v":
            value = channel**height + 0.3 * depth
        elif leaf.startswith("time_mix"):
            value = channel ** (0.5 * height if leaf[-1] in "rg" and ".att." in name else height)
        elif p.dim() == 1:
            value = torch.full(p.shape, 0.0 if leaf == "bias" else 1.0)
            if name.endswith("ln_x.weight"):
                value.fill_(((1 + layer) / c.layers) ** 0.7)
        else:
            value = matrix_init(name, p.shape, generator)
        p.copy_(value.reshape(p.shape))


FAMILY = Family(
    name="rwkv5",
    title="RWKV-5 (Eagle): matrix-valued state, constant decay per channel",
    sources=("arXiv 2404.05892", "github BlinkDL/RWKV-LM", "PyPI rwkv 0.8.32"),
    config=Rwkv5Config,
    presets=PRESETS,
    build=Rwkv5,
    load=_load,
    layout=_layout,
    reads="BlinkDL's RWKV-5 keys blocks.0.att.ln_x and .time_mix_k",
    train_form=Rwkv5Training,
    init=_init,
    roles=(
        ("emb.*", "embedding"),
        ("head.*", "head"),
        ("*.ln*", "norm"),
        ("ln_out.*", "norm"),
        ("*.time_decay", "decay"),
        ("*.time_first", "gate"),
        ("*.time_faaaa", "gate"),
        ("*.time_mix_?", "gate"),
        ("*.att.*.weight", "projection"),
        ("*.ffn.*.weight", "projection"),
        ("*", "other"),
    ),
    state_note="constant: 2 vectors of width C and H matrices N x N a layer",
)
