"""GTrXL: Transformer-XL's attention over a bounded memory, with gated recurrent units for residuals.

Sources:
    1. E. Parisotto et al., Stabilizing Transformers for Reinforcement Learning, arXiv 1910.06764: section 3.1
       (norms in front of the parts, ReLU behind them), 3.2 (GRU gating; b_g > 0 begins near the identity).
    2. Z. Dai et al., Transformer-XL, arXiv 1901.02860: section 3.3 (relative positions), 3.2 (memory).

Glossary:
    B batch, T tokens, d width, H heads, K head size, M memory: a token sees itself and the M before it.

One block, E the stream of the layer below:
    Y = gate(E, relu(attention(LN(E)))),  E' = gate(Y, relu(W_2 relu(W_1 LN(Y) + b_1) + b_2))
    gate(x, y) = (1 - z) x + z h,  r = sigmoid(W_r y + U_r x),  z = sigmoid(W_z y + U_z x - b_g),
                 h = tanh(W_g y + U_g (r x))
Attention of one head: softmax over s of ((q_t + u).k_s + (q_t + v).W_R R_{t-s}) / sqrt(K), where R_j is the
sinusoid of the distance, sin(j f_i) and then cos(j f_i), f_i = 10000^(-2i/d).

In [2] a token sees the memory and its segment so far, so how much depends on where it stands in the segment.
Here, in training too, each sees as much: the result does not depend on where segments begin. The memory holds
hidden states there; here their keys and values, which is the same once weights don't change. At the beginning
there is nothing in it: rows that hold no token are not seen.

The chunk form holds W_R R_j for j = 0 .. M as a table, made in double precision. [1] has policies on top;
here a token embedding below and a head for tokens on top, without a norm between.

State: ``layers.<i>.keys``, ``.values`` [B,H,M,K], the last in the last row; ``filled`` [1] int64, how many
rows hold a token, shared by the batch. Constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xexport.core.checkpoint import RawCheckpoint
from xexport.core.errors import InputError
from xexport.core.family import Family, LoadedModel
from xexport.core.state import StateSpec
from xexport.models._chunk import FromFirstState, layer_states
from xexport.models._fill import fill, fill_by_training
from xexport.models._own import load_own

__all__ = ["FAMILY", "Gtrxl", "GtrxlConfig", "GtrxlTraining"]


@dataclass(frozen=True)
class GtrxlConfig:
    """Sizes of a GTrXL.

    Attributes:
        vocab_size, width, layers, heads: V, d, number of blocks, H.
        head_size: K; 0 is d/H.
        ffn: inner width of the feed-forward network.
        memory: M.
        gate_bias: first value of b_g.
        eps: epsilon of the layer norms.
    """

    vocab_size: int = 256
    width: int = 160
    layers: int = 4
    heads: int = 5
    head_size: int = 0
    ffn: int = 320
    memory: int = 256
    gate_bias: float = 2.0
    eps: float = 1e-5

    def __post_init__(self) -> None:
        sizes = (self.vocab_size, self.width, self.layers, self.heads, self.ffn, self.memory)
        if min(sizes) < 1 or self.head_size < 0:
            raise InputError("a GTrXL size is too small", got=self)
        if self.width % 2 or (not self.head_size and self.width % self.heads):
            raise InputError(
                "the width of a GTrXL must be even, and a multiple of its heads unless they have a size",
                got=(self.width, self.heads, self.head_size),
            )

    @property
    def size(self) -> int:
        """K."""
        return self.head_size or self.width // self.heads

    @property
    def inner(self) -> int:
        """HK."""
        return self.heads * self.size


class _Gate(nn.Module):
    """The gated recurrent unit of [1], with its six matrices in three."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.of_branch = nn.Linear(width, 3 * width, bias=False)  # W_r, W_z, W_g
        self.of_stream = nn.Linear(width, 2 * width, bias=False)  # U_r, U_z
        self.of_reset = nn.Linear(width, width, bias=False)  # U_g
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y [B,T,d] -> [B,T,d]."""
        reset_y, update_y, new_y = self.of_branch(y).chunk(3, -1)
        reset_x, update_x = self.of_stream(x).chunk(2, -1)
        update = torch.sigmoid(update_y + update_x - self.bias)
        new = torch.tanh(new_y + self.of_reset(torch.sigmoid(reset_y + reset_x) * x))
        out: Tensor = x + update * (new - x)
        return out


class _Places:
    """Which rows of memory and chunk each token of a chunk sees, and at which distance."""

    def __init__(self, memory: int, filled: Tensor, length: int) -> None:
        row = torch.arange(memory + length, device=filled.device)
        ahead = row - torch.arange(length, device=filled.device)[:, None]
        #: 0 is M tokens ago, M is the token itself
        self.distance = ahead.clamp(0, memory)
        self.seen = (ahead >= 0) & (ahead <= memory) & (row >= memory - filled)


class _Attention(nn.Module):
    relative: Tensor

    def __init__(self, c: GtrxlConfig) -> None:
        super().__init__()
        self.c = c
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(c.width, c.inner, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(c.inner, c.width, bias=False)
        self.u, self.v = (nn.Parameter(torch.zeros(c.inner)) for _ in range(2))
        self._positions()

    def _positions(self) -> None:
        self.register_buffer("relative", torch.zeros(self.c.heads, self.c.size, self.c.memory + 1))

    def table(self) -> Tensor:
        """W_R R_j of every head, the largest distance first: [H,K,M+1]."""
        return self.relative

    def forward(self, x: Tensor, places: _Places, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """x [B,T,d], keys and values [B,H,M,K] -> (y [B,T,d], new keys, new values)."""
        c, length = self.c, x.shape[1]
        q = self.q_proj(x) * c.size**-0.5
        keys = torch.cat((keys, self._heads(self.k_proj(x))), 2)
        values = torch.cat((values, self._heads(self.v_proj(x))), 2)
        by_content = self._heads(q + self.u * c.size**-0.5) @ keys.transpose(-1, -2)
        by_distance = self._heads(q + self.v * c.size**-0.5) @ self.table()
        index = places.distance.expand(x.shape[0], c.heads, -1, -1)
        scores = by_content + by_distance.gather(-1, index)
        shares = scores.masked_fill(~places.seen, float("-inf")).softmax(-1)
        y = (shares @ values).transpose(1, 2).flatten(2)
        return self.o_proj(y), keys[:, :, length:], values[:, :, length:]

    def _heads(self, x: Tensor) -> Tensor:
        """[B,T,HK] -> [B,H,T,K]."""
        return torch.unflatten(x, -1, (self.c.heads, -1)).transpose(1, 2)


class _TrainedAttention(_Attention):
    def _positions(self) -> None:
        self.r_proj = nn.Linear(self.c.width, self.c.inner, bias=False)

    def table(self) -> Tensor:
        return _relative(self.c, self.r_proj.weight)


def _relative(c: GtrxlConfig, weight: Tensor) -> Tensor:
    """The table of one layer from W_R [HK,d], in the weight's dtype: [H,K,M+1]."""
    place = {"dtype": torch.float64, "device": weight.device}
    distance = torch.arange(c.memory, -1, -1, **place)  # type: ignore[call-overload]
    rate = 10000 ** (-torch.arange(0, c.width, 2, **place) / c.width)  # type: ignore[call-overload]
    angle = rate[:, None] * distance
    sinusoids = torch.cat((angle.sin(), angle.cos())).to(weight.dtype)
    return torch.unflatten(weight @ sinusoids, 0, (c.heads, c.size))


class _Block(nn.Module):
    def __init__(self, c: GtrxlConfig, attention: _Attention) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(c.width, c.eps)
        self.attention = attention
        self.attention_gate = _Gate(c.width)
        self.ffn_norm = nn.LayerNorm(c.width, c.eps)
        self.fc1 = nn.Linear(c.width, c.ffn)
        self.fc2 = nn.Linear(c.ffn, c.width)
        self.ffn_gate = _Gate(c.width)

    def forward(self, x: Tensor, places: _Places, *memory: Tensor) -> tuple[Tensor, ...]:
        """x [B,T,d] -> (x, new keys, new values)."""
        y, *new = self.attention(self.attention_norm(x), places, *memory)
        x = self.attention_gate(x, F.relu(y))
        y = self.fc2(F.relu(self.fc1(self.ffn_norm(x))))
        return (self.ffn_gate(x, F.relu(y)), *new)


class Gtrxl(nn.Module):
    """The chunk form: ``forward(tokens [B,T] int64, *state) -> (logits [B,T,V], *new_state)``."""

    max_tokens: int | None = None
    attention: type[_Attention] = _Attention

    def __init__(self, config: GtrxlConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(_Block(config, self.attention(config)) for _ in range(config.layers))
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)

    def state_spec(self) -> list[StateSpec]:
        """Keys and values of every layer, then how many rows hold a token."""
        c = self.config
        rows: tuple[int | str, ...] = ("B", c.heads, c.memory, c.size)
        specs = layer_states(c.layers, {"keys": rows, "values": rows})
        return [*specs, StateSpec("filled", (1,), "int64")]

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        *memory, filled = state
        length = tokens.shape[1]
        places = _Places(self.config.memory, filled, length)
        x, new = self.embed(tokens), []
        for i, block in enumerate(self.layers):
            x, *after = block(x, places, *memory[2 * i : 2 * i + 2])
            new += after
        return (self.head(x), *new, (filled + length).clamp(max=self.config.memory))


class GtrxlTraining(FromFirstState, Gtrxl):
    """The training form: the same parameters, but for W_R in place of the table; from an empty memory."""

    attention = _TrainedAttention


def _from_training(config: GtrxlConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, with the table that W_R makes in its place."""
    result = {name: value.detach() for name, value in tensors.items()}
    for i in range(config.layers):
        prefix = f"layers.{i}.attention."
        weight = result.pop(prefix + "r_proj.weight").double()
        result[prefix + "relative"] = _relative(config, weight).float()
    return result


def _init(module: nn.Module, seed: int) -> None:
    """Fill a GTrXL (either form) with weights to train from: the variance 1/fan_in, b_g as configured."""
    assert isinstance(module, Gtrxl)
    if not isinstance(module, GtrxlTraining):
        return fill_by_training(FAMILY, module, seed)
    vectors = {"*gate.bias": module.config.gate_bias, "*norm.weight": 1.0, "*": 0.0}
    fill(module, seed, writes={}, vectors=vectors)


def _load(raw: RawCheckpoint) -> LoadedModel:
    return load_own(FAMILY, raw, title="a GTrXL", fix="the paper's authors published no weights")


FAMILY = Family(
    name="gtrxl",
    title="GTrXL: Transformer-XL's memory with gated recurrent units (arXiv 1910.06764)",
    sources=("https://arxiv.org/abs/1910.06764", "https://arxiv.org/abs/1901.02860"),
    config=GtrxlConfig,
    presets={
        "tiny": GtrxlConfig(29, 32, 2, 4, ffn=48, memory=9),
        "zoo": GtrxlConfig(),
        # as deep as in section 4 of [1]; its other sizes could not be read, these are ours
        "12-layers": GtrxlConfig(256, 256, 12, 8, head_size=64, ffn=1024, memory=512),
    },
    build=Gtrxl,
    load=_load,
    train_form=GtrxlTraining,
    from_training=_from_training,
    init=_init,
    roles=(
        ("embed.*", "embedding"),
        ("head.*", "head"),
        ("*norm.*", "norm"),
        ("*gate.bias", "gate"),
        ("*gate.of_*.weight", "projection"),
        ("*.relative", "filter"),
        ("*.r_proj.weight", "filter"),
        ("*_proj.weight", "projection"),
        ("*.fc?.weight", "projection"),
        ("*", "other"),
    ),
    state_note="keys and values of the last M tokens a layer: constant",
)
