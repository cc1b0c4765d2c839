"""LMUFormer: Legendre memories of one signal a layer, convolutions over three tokens, channel mixers.

Sources:
    1. Z. Liu et al., LMUFormer, arXiv 2402.04882: section 3.2 (embedding, block, channel mixer), and
       its code, github zeyuliu1037/LMUFormer: names of parameters, order of norms and activations, sizes.
    2. A. Voelker et al., Legendre Memory Units, NeurIPS 2019: equations 1 and 2 (the memory's A and B).
    3. N. Chilkuri and C. Eliasmith, arXiv 2102.11417: equations 18 to 20 (the cell), 23 to 26 (the memory as
       a convolution with its impulse response).

Glossary:
    B batch, T tokens, d width, n order of the memory, theta its span in tokens, u_t one number a token and
    layer, m_t the memory, N horizon: tokens after which u is forgotten.

    x = Embedding(tokens), then four times BN(relu(conv(x))), then x + conv(x)          conv: three tokens
    block:  x = x + BN(W_p relu(W_h [m_t; x] + b_h) + b_p),  x = x + relu(BN(W_2 gelu(BN(W_1 x))))
    memory: u_t = relu(W_u x_t + b_u),  m_t = A m_{t-1} + B u_t
where A, B are those of [2], exact for a u that is constant between tokens (zero-order hold).

The memory in one graph for every T. A and B are constants, so m_t = sum_j (A^j B) u_{t-j}; the poles of A lie
well inside the unit circle, and what A^j B sums up to after N = 1.4 theta (n = 256, theta = 128) to 3.3 theta
(n = 8) tokens is 10^-6 of the whole. So the state is the last N-1 values of u: as many numbers as m has. All
m_t of a chunk are one product, windows of u by the response [N,n], which is made in double precision:
streaming adds up no rounding errors, and no cut of a sequence is another computation. One core of a Zen 3,
n = 256, theta = 128, N = 179, microseconds for the memory of one layer (medians of 30 alternating runs on a
machine that others used too):

    T     windows (here)   A m, a Scan if T > 1   fft_conv from an empty memory, native
    1     38               26                     -
    512   1753             4851                   808 (with N-1 earlier u in front: 1.35 times the points)
    4096  12922            -                      6075 (all of it, with a spectrum kept from call to call)
A layer's other products take some 10 000 at T = 512.

Departures. [1] classifies: it sees one token ahead in each of its convolutions (padding 1) and takes the mean
over tokens. Here convolutions see the past alone (two tokens), every position has logits, and tokens are
embedded. Batch norms have their running statistics in the chunk form, which holds them inside the products
before them. The spiking model is not done.

State: ``conv.<i>`` [B,2,C], the inputs of a convolution; ``layers.<i>.signal`` [B,N-1], the last u. Constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xexport.core.checkpoint import RawCheckpoint
from xexport.core.errors import InputError
from xexport.core.family import Family, LoadedModel
from xexport.core.state import StateSpec
from xexport.models._chunk import FromFirstState
from xexport.models._fill import fill_by_training
from xexport.models._own import load_own

__all__ = ["FAMILY", "LmuFormer", "LmuFormerConfig", "LmuFormerTraining", "legendre"]

_TAPS = 3
#: the part of an impulse response that may be cut off
_CUT = 1e-6


@dataclass(frozen=True)
class LmuFormerConfig:
    """Sizes of an LMUFormer.

    Attributes:
        vocab_size, width, layers: V, d, number of blocks.
        ffn: inner width of the channel mixer.
        memory, theta: n, and the span of the memory in tokens.
        inputs: width of the token embedding, the width unless given.
        convolutions: of the embedding, before the residual one.
        eps: epsilon of the batch norms.
    """

    vocab_size: int = 256
    width: int = 160
    layers: int = 5
    ffn: int = 640
    memory: int = 160
    theta: int = 128
    inputs: int = 0
    convolutions: int = 4
    eps: float = 1e-5

    def __post_init__(self) -> None:
        sizes = (self.vocab_size, self.width, self.layers, self.ffn, self.memory, self.convolutions)
        if min(sizes) < 1 or self.inputs < 0:
            raise InputError("an LMUFormer size is too small", got=self)
        if self.theta < 2:
            raise InputError(
                "the span of a Legendre memory is too short", got=self.theta, allowed="2 tokens or more"
            )

    @property
    def horizon(self) -> int:
        """N."""
        return len(_response(self.memory, self.theta))

    @property
    def widths(self) -> list[int]:
        """Channels into each convolution, the residual one last."""
        return [self.inputs or self.width] + [self.width] * self.convolutions


def legendre(order: int, theta: float) -> tuple[Tensor, Tensor]:
    """A [n,n] and B [n] of a Legendre memory for steps of one token, float64.

    [2], equation 2: with i, j = 0 .. n-1, A_ij = (2i+1)/theta * (-1 if i < j else (-1)^(i-j+1)) and
    B_i = (2i+1)/theta * (-1)^i in continuous time; then exp of [[A, B], [0, 0]]: a zero-order hold.
    """
    with torch.device("cpu"):
        i = torch.arange(order, dtype=torch.float64)
        sign = 1 - 2 * (i % 2)
        below = -sign[:, None] * sign
        block = torch.zeros(order + 1, order + 1, dtype=torch.float64)
        block[:order, :order] = torch.where(i[:, None] < i, -1.0, below)
        block[:order, order] = sign
        block[:order] *= (2 * i[:, None] + 1) / theta
        exponential = torch.linalg.matrix_exp(block)
    return exponential[:order, :order], exponential[:order, order]


@lru_cache(maxsize=8)
def _response(order: int, theta: int) -> Tensor:
    """A^j B for j = 0 .. N-1, float64 [N,n]."""
    a, column = legendre(order, theta)
    rows, left, total = [], 0.0, 0.0
    # every pole decays by e^-3 or more in theta tokens, so 24 theta are more than enough
    for _ in range(24 * theta):
        rows.append(column)
        total += float(column.abs().max())
        column = a @ column
        if len(rows) % theta == 0 and float(column.abs().max()) * theta < _CUT * _CUT * total:
            break
    keep = len(rows)
    while keep > 1 and left + float(rows[keep - 1].abs().max()) < _CUT * total:
        left += float(rows[keep - 1].abs().max())
        keep -= 1
    return torch.stack(rows[:keep])


class _Convolution(nn.Module):
    """Three tokens as one product; what comes out goes through ReLU and the batch norm's line."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Linear(_TAPS * inputs, width, bias=False)
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Three tokens side by side [B,T,3C] -> [B,T,d]."""
        return F.relu(self.conv(x)) * self.scale + self.shift


def _window(length: int, size: int, like: Tensor) -> Tensor:
    """Which of size-1+length rows each of ``length`` tokens sees, row after row: int64 [length*size]."""
    first, inside = (torch.arange(n, device=like.device) for n in (length, size))
    return (first[:, None] + inside).flatten()


def _seen(x: Tensor, state: Tensor, window: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """x [B,T,...] behind state [B,size-1,...] as windows of tokens [B,T,size,...], and the new state."""
    past = torch.cat((state, x), 1)
    return torch.unflatten(past.index_select(1, window), 1, (-1, size)), past[:, x.shape[1] :]


class _Embedding(nn.Module):
    def __init__(self, c: LmuFormerConfig) -> None:
        super().__init__()
        self.conv_layers = nn.ModuleList(_Convolution(w, c.width) for w in c.widths[:-1])
        self.rpe_conv = nn.Linear(_TAPS * c.width, c.width, bias=False)

    def forward(self, x: Tensor, *state: Tensor) -> tuple[Tensor, list[Tensor]]:
        """x [B,T,C] -> ([B,T,d], new state)."""
        window, new = _window(x.shape[1], _TAPS, x), []
        for layer, before in zip(self.conv_layers, state[:-1], strict=True):
            three, after = _seen(x, before, window, _TAPS)
            x = layer(three.flatten(2))
            new.append(after)
        three, after = _seen(x, state[-1], window, _TAPS)
        return x + self.rpe_conv(three.flatten(2)), [*new, after]


class _Cell(nn.Module):
    """The projections of [3], equations 18 and 20."""

    def __init__(self, c: LmuFormerConfig) -> None:
        super().__init__()
        self.W_u = nn.Linear(c.width, 1)
        self.W_h = nn.Linear(c.memory + c.width, c.width)

    def forward(self, x: Tensor, response: Tensor, window: Tensor, signal: Tensor) -> tuple[Tensor, Tensor]:
        """x [B,T,d], response [N,n], window [T*N], signal [B,N-1] -> (h [B,T,d], new signal)."""
        u = F.relu(self.W_u(x)).squeeze(-1)
        rows, after = _seen(u, signal, window, response.shape[0])
        return F.relu(self.W_h(torch.cat((rows @ response, x), -1))), after


class _Attention(nn.Module):
    def __init__(self, c: LmuFormerConfig) -> None:
        super().__init__()
        self.lmu = _Cell(c)
        self.proj_conv = nn.Linear(c.width, c.width)


class _Mixer(nn.Module):
    def __init__(self, c: LmuFormerConfig) -> None:
        super().__init__()
        self.fc1_conv = nn.Linear(c.width, c.ffn)
        self.fc2_conv = nn.Linear(c.ffn, c.width)

    def forward(self, x: Tensor) -> Tensor:
        """[B,T,d] -> [B,T,d]."""
        return F.relu(self.fc2_conv(F.gelu(self.fc1_conv(x))))


class _Block(nn.Module):
    attn: Any
    mlp: Any

    def __init__(self, attn: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.attn, self.mlp = attn, mlp

    def forward(self, x: Tensor, *cell: Tensor) -> tuple[Tensor, Tensor]:
        """x [B,T,d] and what the cell needs -> (x, new signal)."""
        h, signal = self.attn.lmu(x, *cell)
        x = x + self.attn.proj_conv(h)
        return x + self.mlp(x), signal


class LmuFormer(nn.Module):
    """The chunk form: ``forward(tokens [B,T] int64, *state) -> (logits [B,T,V], *new_state)``."""

    max_tokens: int | None = None
    response: Tensor
    patch_embed: Any

    def __init__(self, config: LmuFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.embed = nn.Embedding(config.vocab_size, config.widths[0])
        self.patch_embed = self._embedding()
        self.block = nn.ModuleList(self._block() for _ in range(config.layers))
        self.head = nn.Linear(config.width, config.vocab_size)
        self.register_buffer("response", torch.zeros(config.horizon, config.memory))
        self.response.copy_(_taps(config))

    def _embedding(self) -> nn.Module:
        return _Embedding(self.config)

    def _block(self) -> nn.Module:
        return _Block(_Attention(self.config), _Mixer(self.config))

    def state_spec(self) -> list[StateSpec]:
        """The two last inputs of every convolution, then the last signals of every layer."""
        c = self.config
        specs = [StateSpec(f"conv.{i}", ("B", _TAPS - 1, width)) for i, width in enumerate(c.widths)]
        return specs + [StateSpec(f"layers.{i}.signal", ("B", c.horizon - 1)) for i in range(c.layers)]

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        c = self.config
        count = len(c.widths)
        x, new = self.patch_embed(self.embed(tokens), *state[:count])
        window = _window(tokens.shape[1], c.horizon, x)
        for block, signal in zip(self.block, state[count:], strict=True):
            x, after = block(x, self.response, window, signal)
            new.append(after)
        return (self.head(x), *new)


def _taps(c: LmuFormerConfig) -> Tensor:
    """The impulse response, the oldest token's first: float32 [N,n]."""
    return _response(c.memory, c.theta).flip(0).float()


class _NormedEmbedding(_Embedding):
    """[1]'s embedding: convolution, ReLU, nothing, batch norm; its names."""

    def __init__(self, c: LmuFormerConfig) -> None:
        super().__init__(c)
        self.conv_layers = nn.ModuleList(
            nn.ModuleList(
                (
                    nn.Conv1d(w, c.width, _TAPS, bias=False),
                    nn.ReLU(),
                    nn.Identity(),
                    nn.BatchNorm1d(c.width, c.eps),
                )
            )
            for w in c.widths[:-1]
        )
        self.rpe_conv: Any = nn.Conv1d(c.width, c.width, _TAPS, bias=False)

    def forward(self, x: Tensor, *state: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = x.mT
        layers: Any = self.conv_layers
        for conv, relu, _, norm in layers:
            x = norm(relu(conv(F.pad(x, (_TAPS - 1, 0)))))
        return (x + self.rpe_conv(F.pad(x, (_TAPS - 1, 0)))).mT, list(state)


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    """A batch norm of channels last."""
    y: Tensor = norm(x.mT).mT
    return y


class _NormedAttention(_Attention):
    def __init__(self, c: LmuFormerConfig) -> None:
        super().__init__(c)
        self.proj_bn = nn.BatchNorm1d(c.width, c.eps)


class _NormedMixer(_Mixer):
    def __init__(self, c: LmuFormerConfig) -> None:
        super().__init__(c)
        self.fc1_bn = nn.BatchNorm1d(c.ffn, c.eps)
        self.fc2_bn = nn.BatchNorm1d(c.width, c.eps)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(_normed(self.fc1_bn, self.fc1_conv(x)))
        return F.relu(_normed(self.fc2_bn, self.fc2_conv(x)))


class _NormedBlock(_Block):
    def forward(self, x: Tensor, *cell: Tensor) -> tuple[Tensor, Tensor]:
        h, signal = self.attn.lmu(x, *cell)
        x = x + _normed(self.attn.proj_bn, self.attn.proj_conv(h))
        return x + self.mlp(x), signal


class LmuFormerTraining(FromFirstState, LmuFormer):
    """The training form, with [1]'s batch norms and names; its 1x1 convolutions are matrices here.

    In training mode a batch norm takes its mean over all tokens of the batch, as [1] has it.
    """

    def _embedding(self) -> nn.Module:
        return _NormedEmbedding(self.config)

    def _block(self) -> nn.Module:
        return _NormedBlock(_NormedAttention(self.config), _NormedMixer(self.config))


def _line(tensors: Mapping[str, Tensor], norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm with its running statistics, float64."""
    weight, bias, mean, variance = (
        tensors[f"{norm}.{name}"].detach().double()
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = weight / (variance + eps).sqrt()
    return scale, bias - mean * scale


def _from_training(config: LmuFormerConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Batch norms go into the products before them, filters become matrices; the response is made anew."""
    plain = [n for n in tensors if n.startswith(("embed.", "head.")) or ".lmu." in n]
    result = {name: tensors[name].detach() for name in plain}
    for i in range(config.convolutions):
        source, to = f"patch_embed.conv_layers.{i}", f"patch_embed.conv_layers.{i}"
        result[f"{to}.conv.weight"] = _beside_each_other(tensors[f"{source}.0.weight"])
        scale, shift = _line(tensors, f"{source}.3", config.eps)
        result[f"{to}.scale"], result[f"{to}.shift"] = scale.float(), shift.float()
    result["patch_embed.rpe_conv.weight"] = _beside_each_other(tensors["patch_embed.rpe_conv.weight"])
    for i in range(config.layers):
        for name in ("attn.proj", "mlp.fc1", "mlp.fc2"):
            key = f"block.{i}.{name}"
            scale, shift = _line(tensors, f"{key}_bn", config.eps)
            weight = tensors[f"{key}_conv.weight"].detach().double()
            bias = tensors[f"{key}_conv.bias"].detach().double()
            result[f"{key}_conv.weight"] = (weight * scale[:, None]).float()
            result[f"{key}_conv.bias"] = (bias * scale + shift).float()
    return {**result, "response": _taps(config)}


def _beside_each_other(filters: Tensor) -> Tensor:
    """Filters [d,C,3] as a matrix over three tokens side by side, [d,3C]."""
    return filters.detach().transpose(1, 2).flatten(1)


@torch.no_grad()
def _init(module: nn.Module, seed: int) -> None:
    """Fill an LMUFormer (either form) with weights to train from.

    Matrices have the variance 1/fan_in (2/fan_in before a ReLU of the embedding); batch norms that end a
    branch begin at (2 layers)^-1/2; the head starts small.
    """
    assert isinstance(module, LmuFormer)
    if not isinstance(module, LmuFormerTraining):
        return fill_by_training(FAMILY, module, seed)
    c, rng = module.config, torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if p.ndim < 2:
            ends = name.endswith(("proj_bn.weight", "fc2_bn.weight"))
            p.fill_(0.0 if name.endswith("bias") else (2 * c.layers) ** -0.5 if ends else 1.0)
            continue
        std = p[0].numel() ** -0.5
        if name == "embed.weight":
            std = 0.5
        elif name == "head.weight":
            std *= 0.25
        elif ".conv_layers." in name:
            std *= 2**0.5
        p.copy_(torch.randn(p.shape, generator=rng) * std)
    module.response.copy_(_taps(c))


def _load(raw: RawCheckpoint) -> LoadedModel:
    return load_own(
        FAMILY,
        raw,
        title="an LMUFormer",
        fix="the published classifiers look five tokens ahead: they are no causal language models",
        tables=lambda config: {"response": _taps(config)},
    )


FAMILY = Family(
    name="lmuformer",
    title="LMUFormer: Legendre memory of one signal a layer (arXiv 2402.04882)",
    sources=(
        "https://arxiv.org/abs/2402.04882",
        "https://arxiv.org/abs/2102.11417",
        "github zeyuliu1037/LMUFormer",
    ),
    config=LmuFormerConfig,
    presets={
        "tiny": LmuFormerConfig(29, 32, 2, 48, memory=8, theta=6, convolutions=2),
        "zoo": LmuFormerConfig(),
        # the sizes of the Speech Commands model of [1], as a language model of bytes
        "speech-commands": LmuFormerConfig(256, 256, 1, 1024, memory=256, theta=128, inputs=128),
    },
    build=LmuFormer,
    load=_load,
    train_form=LmuFormerTraining,
    from_training=_from_training,
    init=_init,
    roles=(
        ("embed.*", "embedding"),
        ("head.weight", "head"),
        ("response", "filter"),
        ("*.W_u.*", "gate"),
        ("*.scale", "norm"),
        ("*.shift", "norm"),
        ("*.weight", "projection"),
        ("*.bias", "norm"),
    ),
    state_note="the last signals of every layer, one number a token, and two tokens a convolution: constant",
)
