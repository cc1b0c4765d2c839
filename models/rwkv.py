"""RWKV-7 "Goose" (x070): time mixing by a generalised delta rule with vector-valued decay.

Sources:
    [1] B. Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution", arXiv 2503.14456:
        section 4 and figure 2 (the block), appendix on low-rank sizes (presets).
    [2] github BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py: key layout, initial values.
    [3] PyPI rwkv 0.8.32, x070 branch: the inference rule the published checkpoints are run with.

Symbols (B batch, T tokens, C width, H heads, N head size, V vocabulary):
    x_*        lerp weights of the token shift, [1,1,C]
    r, k, v    receptance, key, value                       [B,T,H,N]
    w          decay in (exp(-exp(-0.5)), 1)                 [B,T,H,N]
    a          in-context learning rate in (0, 1)            [B,T,H,N]
    kk         the key direction that is removed, unit norm  [B,T,H,N]
    g          output gate                                   [B,T,C]
    v_first    the value of block 0, mixed into later ones (inside one call only: no state)

State per layer: ``att_shift`` [B,C] and ``ffn_shift`` [B,C] (the last normed input of each half),
``wkv`` [B,H,N,N] read S[v,k].

Departures: group norm is a layer norm over the axis of N followed by the affine map of ``ln_x``, which is
the same number and one kernel in ONNX Runtime. The decay constant is exp(-0.5) where [3] writes 0.606531.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xexport.core.checkpoint import RawCheckpoint, match_tensors, own_config, require_keys
from xexport.core.family import Family, LoadedModel
from xexport.core.state import StateSpec
from xexport.models._chunk import FromFirstState, layer_states
from xexport.models._rwkv import tokens_of
from xexport.ops.wkv7.reference import wkv7

__all__ = ["FAMILY", "Rwkv", "RwkvConfig", "RwkvTraining"]

_DECAY_SCALE = -math.exp(-0.5)
_HEAD_SIZE = 64


@dataclass(frozen=True)
class RwkvConfig:
    """Sizes of one RWKV-7 model.

    Attributes:
        layers, width, vocab_size: L, C, V.
        head_size: N; the width is a multiple of it.
        ffn_width: hidden width of channel mixing.
        decay_rank, iclr_rank, value_rank, gate_rank: low-rank sizes of w, a, v and g.
        group_norm_eps: of ``ln_x``; 64e-5 in everything published by [2], some relatives use 1e-5.
        ln0: a layer norm directly after the embedding.
        head_bias, att_output_bias: extra biases that some relatives have.
    """

    layers: int
    width: int
    vocab_size: int = 65536
    head_size: int = _HEAD_SIZE
    ffn_width: int = 0
    decay_rank: int = 64
    iclr_rank: int = 64
    value_rank: int = 32
    gate_rank: int = 128
    group_norm_eps: float = 64e-5
    ln0: bool = True
    head_bias: bool = False
    att_output_bias: bool = False

    @property
    def heads(self) -> int:
        """H."""
        return self.width // self.head_size

    @property
    def hidden(self) -> int:
        """Hidden width of channel mixing, 4 C unless given."""
        return self.ffn_width or 4 * self.width


PRESETS = {
    "tiny": RwkvConfig(2, 32, 61, 16, 72, 8, 8, 4, 12),
    "zoo": RwkvConfig(4, 160, 256, 32, 480, 32, 16, 16, 32),
    "0.1B": RwkvConfig(12, 768),
    "0.4B": RwkvConfig(24, 1024),
    "1.5B": RwkvConfig(24, 2048, decay_rank=96, iclr_rank=96, value_rank=64, gate_rank=256),
    "2.9B": RwkvConfig(32, 2560, decay_rank=96, iclr_rank=96, value_rank=64, gate_rank=320),
}


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape))


def _shift(x: Tensor, last: Tensor) -> Tensor:
    """The input one token earlier, minus the input: [B,T,C] with ``last`` [B,C] before the first."""
    # cut after joining: x[:, :-1] would make torch.export guard against T = 2
    return torch.cat((last.unsqueeze(1), x), 1)[:, :-1] - x


class _TimeMix(nn.Module):
    def __init__(self, config: RwkvConfig, layer: int) -> None:
        super().__init__()
        C, H, N = config.width, config.heads, config.head_size
        self.heads, self.head_size, self.eps = H, N, config.group_norm_eps
        self.x_r, self.x_w, self.x_k = _parameter(1, 1, C), _parameter(1, 1, C), _parameter(1, 1, C)
        self.x_v, self.x_a, self.x_g = _parameter(1, 1, C), _parameter(1, 1, C), _parameter(1, 1, C)
        self.w0, self.w1, self.w2 = self._low_rank(C, config.decay_rank)
        self.a0, self.a1, self.a2 = self._low_rank(C, config.iclr_rank)
        self.first = layer == 0
        if not self.first:
            self.v0, self.v1, self.v2 = self._low_rank(C, config.value_rank)
        self.g1, self.g2 = _parameter(C, config.gate_rank), _parameter(config.gate_rank, C)
        self.k_k, self.k_a, self.r_k = _parameter(1, 1, C), _parameter(1, 1, C), _parameter(H, N)
        self.receptance = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.output = nn.Linear(C, C, bias=config.att_output_bias)
        self.ln_x = nn.GroupNorm(H, C, eps=config.group_norm_eps)

    @staticmethod
    def _low_rank(width: int, rank: int) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        return _parameter(1, 1, width), _parameter(width, rank), _parameter(rank, width)

    def _split(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, -1, (self.heads, self.head_size))

    def forward(
        self, x: Tensor, last: Tensor, wkv: Tensor, v_first: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(x [B,T,C], last [B,C], S [B,H,N,N], v_first) -> (y, new last, new S, v_first)."""
        delta = _shift(x, last)
        r = self.receptance(x + delta * self.x_r)
        k = self.key(x + delta * self.x_k)
        xv = x + delta * self.x_v
        v = self.value(xv)
        decay = self.w0 + torch.tanh((x + delta * self.x_w) @ self.w1) @ self.w2
        w = torch.exp(_DECAY_SCALE * torch.sigmoid(decay))
        a = torch.sigmoid(self.a0 + ((x + delta * self.x_a) @ self.a1) @ self.a2)
        g = torch.sigmoid((x + delta * self.x_g) @ self.g1) @ self.g2
        if self.first or v_first is None:
            v_first = v
        else:
            v = v + (v_first - v) * torch.sigmoid(self.v0 + (xv @ self.v1) @ self.v2)
        kk = self._split(k * self.k_k)
        kk = kk / kk.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        k = k * (1 + (a - 1) * self.k_a)
        r, k, v, a = self._split(r), self._split(k), self._split(v), self._split(a)
        y, wkv = wkv7(r, self._split(w), k, v, -kk, kk * a, wkv)
        y = F.layer_norm(y, (self.head_size,), eps=self.eps).flatten(-2) * self.ln_x.weight + self.ln_x.bias
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v
        y = self.output((y + bonus.flatten(-2)) * g)
        return y, x[:, -1], wkv, v_first


class _ChannelMix(nn.Module):
    def __init__(self, config: RwkvConfig) -> None:
        super().__init__()
        self.x_k = _parameter(1, 1, config.width)
        self.key = nn.Linear(config.width, config.hidden, bias=False)
        self.value = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """(x [B,T,C], last [B,C]) -> (y, new last)."""
        hidden = torch.relu(self.key(x + _shift(x, last) * self.x_k))
        return self.value(hidden * hidden), x[:, -1]


class _Block(nn.Module):
    def __init__(self, config: RwkvConfig, layer: int) -> None:
        super().__init__()
        self.ln0 = nn.LayerNorm(config.width) if config.ln0 and layer == 0 else None
        self.ln1 = nn.LayerNorm(config.width)
        self.ln2 = nn.LayerNorm(config.width)
        self.att = _TimeMix(config, layer)
        self.ffn = _ChannelMix(config)


class Rwkv(nn.Module):
    """RWKV-7 in the chunk form; parameter names are those of the published checkpoints."""

    max_tokens: int | None = None

    def __init__(self, config: RwkvConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.emb = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(_Block(config, i) for i in range(config.layers))
        self.ln_out = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=config.head_bias)

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """(tokens [B,T] int64, state as :meth:`state_spec`) -> (logits [B,T,V], new state)."""
        x = self.emb(tokens)
        v_first: Tensor | None = None
        new: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            assert isinstance(block, _Block)
            att_shift, wkv, ffn_shift = state[3 * index : 3 * index + 3]
            if block.ln0 is not None:
                x = block.ln0(x)
            y, att_shift, wkv, v_first = block.att(block.ln1(x), att_shift, wkv, v_first)
            x = x + y
            y, ffn_shift = block.ffn(block.ln2(x), ffn_shift)
            x = x + y
            new += [att_shift, wkv, ffn_shift]
        return (self.head(self.ln_out(x)), *new)

    def state_spec(self) -> Sequence[StateSpec]:
        """Three tensors a layer, all float32, all zero before the first token."""
        C, H, N = self.config.width, self.config.heads, self.config.head_size
        shapes: dict[str, tuple[int | str, ...]] = {
            "att_shift": ("B", C),
            "wkv": ("B", H, N, N),
            "ffn_shift": ("B", C),
        }
        return layer_states(self.config.layers, shapes)


class RwkvTraining(FromFirstState, Rwkv):
    """The same parameters, whole sequences from the first state."""


def _layout(raw: RawCheckpoint) -> str | None:
    if "blocks.0.att.r_k" in raw.tensors and "blocks.0.att.w1" in raw.tensors:
        return "it has blocks.0.att.r_k and .w1, the RWKV-7 layout"
    return None


def _config_from_shapes(raw: RawCheckpoint) -> RwkvConfig:
    """All sizes of a published checkpoint are in its shapes and in which keys it has."""
    t = raw.tensors
    att = "blocks.0.att."
    needed = ("r_k", "w1", "a1", "g1")
    require_keys(
        raw,
        ("emb.weight", "head.weight", *(att + name for name in needed), "blocks.0.ffn.key.weight"),
        "rwkv",
    )
    layers = 1 + max(int(m[1]) for name in t if (m := re.match(r"blocks\.(\d+)\.", name)))
    vocab, width = t["emb.weight"].shape
    return RwkvConfig(
        layers=layers,
        width=width,
        vocab_size=vocab,
        head_size=t[att + "r_k"].shape[-1],
        ffn_width=t["blocks.0.ffn.key.weight"].shape[0],
        decay_rank=t[att + "w1"].shape[-1],
        iclr_rank=t[att + "a1"].shape[-1],
        value_rank=t["blocks.1.att.v1"].shape[-1] if "blocks.1.att.v1" in t else 32,
        gate_rank=t[att + "g1"].shape[-1],
        ln0="blocks.0.ln0.weight" in t,
        head_bias="head.bias" in t,
        att_output_bias=att + "output.bias" in t,
    )


def _load(raw: RawCheckpoint) -> LoadedModel:
    """Read the published layout (.pth or .safetensors) or a file of our own training.

    Block 0 may carry att.v0, v1, v2 (published files do): nothing reads them, so they are left out.
    """
    own = own_config(raw, "rwkv", RwkvConfig)
    config = own or _config_from_shapes(raw)
    with torch.device("meta"):
        wanted = Rwkv(config)
    tensors = match_tensors(raw.tensors, wanted, raw.path.name)
    unread = sorted(set(raw.tensors) - set(tensors) - {f"blocks.0.att.v{i}" for i in range(3)})
    notes = (f"{len(unread)} tensors of the file are not read, as {', '.join(unread[:3])}",) if unread else ()
    return LoadedModel(
        family="rwkv",
        config=config,
        tensors=tensors,
        tokenizer=tokens_of(config.vocab_size),
        source=str(raw.path),
        notes=notes,
    )


_SHIFT_POWER = {"x_r": 0.2, "x_w": 0.9, "x_k": 0.7, "x_v": 0.7, "x_a": 0.9, "x_g": 0.2}


def _linear(C: int) -> Tensor:
    return torch.arange(C) / max(C - 1, 1) - 0.5


def _zigzag(C: int, N: int) -> Tensor:
    """-1 to 1 along each head, squared with its sign."""
    half = max((N - 1) / 2, 0.5)
    z = (torch.arange(C) % N - half) / half
    return z * z.abs()


_VECTOR_INIT = {
    "w0": lambda C, N, depth: -5.5 + 6 * (_linear(C) + 0.5) ** (1 + depth**0.3) + 2.5 * _zigzag(C, N),
    "a0": lambda C, N, depth: -0.19 + 0.3 * _zigzag(C, N) + 0.4 * _linear(C),
    "v0": lambda C, N, depth: 0.73 - 0.4 * _linear(C),
    "k_k": lambda C, N, depth: 0.71 - 0.1 * _linear(C),
    "k_a": lambda C, N, depth: torch.full((C,), 1.02),
}


def _matrix_init(leaf: str, shape: torch.Size, C: int, generator: torch.Generator) -> Tensor:
    """Uniform for projections, orthogonal for the second low-rank factors and the head."""
    bound = {"key.weight": 0.5, "receptance.weight": 0.5, "value.weight": 0.5}.get(leaf, 0.05) / C**0.5
    value = torch.empty(shape)
    if leaf in ("w2", "a2", "v2", "g2", "head.weight"):
        gain = (0.5 if leaf == "head.weight" else 0.1) * max(1.0, (shape[0] / shape[1]) ** 0.5)
        if value.numel() < 1 << 22:
            nn.init.orthogonal_(value, gain=gain, generator=generator)
            return value
        # a QR of a large head takes a minute; a normal matrix of the same row norm does as well
        return value.normal_(0, gain / max(shape) ** 0.5, generator=generator)
    if leaf == "emb.weight":
        bound = 0.02
    return value.uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def _init(module: Rwkv, seed: int) -> None:
    """The initial values of [2], deterministic in ``seed``.

    Where [2] starts a matrix at zero (w1, a1, v1, g1, output, ffn.value) a small random value is used:
    training is the same after a few steps, and a random-weights export exercises every path.
    """
    generator = torch.Generator().manual_seed(seed)
    C, L = module.config.width, module.config.layers
    ramp = torch.arange(C) / C
    for name, p in module.named_parameters():
        leaf = name.rsplit("att.", 1)[-1].rsplit("ffn.", 1)[-1]
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else 0
        depth, height = layer / max(L - 1, 1), 1 - layer / L
        if leaf.startswith("x_"):
            power = height**4 if ".ffn." in name else height * _SHIFT_POWER[leaf]
            value = 1 - ramp**power
        elif leaf in _VECTOR_INIT:
            value = _VECTOR_INIT[leaf](C, module.config.head_size, depth)  # type: ignore[no-untyped-call]
        elif leaf == "r_k":
            value = torch.full(p.shape, -0.04)
        elif p.dim() == 1:
            value = torch.full(p.shape, 0.0 if name.endswith("bias") else 1.0)
            if leaf == "ln_x.weight":
                value.fill_(((1 + layer) / L) ** 0.7)
        else:
            value = _matrix_init(leaf, p.shape, C, generator)
        p.copy_(value.reshape(p.shape))


FAMILY = Family(
    name="rwkv",
    title="RWKV-7 (x070): generalised delta rule, vector-valued decay",
    sources=("arXiv 2503.14456", "github BlinkDL/RWKV-LM", "PyPI rwkv 0.8.32"),
    config=RwkvConfig,
    presets=PRESETS,
    build=Rwkv,
    load=_load,
    layout=_layout,
    reads="BlinkDL's RWKV-7 keys blocks.0.att.r_k and .w1",
    train_form=RwkvTraining,
    init=_init,
    roles=(
        ("emb.*", "embedding"),
        ("head.*", "head"),
        ("*.ln*", "norm"),
        ("ln_out.*", "norm"),
        ("*.att.w[0-9]", "decay"),
        ("*.att.[avg][12]", "low_rank"),
        ("*.att.[av]0", "gate"),
        ("*.att.receptance.weight", "projection"),
        ("*.att.key.weight", "projection"),
        ("*.att.value.weight", "projection"),
        ("*.att.output.weight", "projection"),
        ("*.ffn.*.weight", "projection"),
        ("*.x_?", "gate"),
        ("*.k_?", "gate"),
        ("*.r_k", "gate"),
        ("*", "other"),
    ),
    aliases=("rwkv7",),
    state_note="constant: 2 vectors of width C and H matrices N x N a layer",
)
