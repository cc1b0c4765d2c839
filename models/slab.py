"""SLAB: simplified linear attention, with batch norms that disappear into the linear layers behind them.

Sources:
    1. Guo et al., SLAB, arXiv 2405.11582: section 3.2 (progressive re-parameterized batch norm, PRepBN) and
       3.3 (simplified linear attention: ReLU features and a depthwise convolution of the values).
    2. github xinghaochen/SLAB: classification/models (attention, its epsilon, one filter for all heads; the
       norm's first values), llama/modeling (PRepBN after RMS norms in a Llama, rotary positions).

Glossary:
    B batch, T tokens, d width, H heads, K = d/H head size, C taps of the convolution.

One block: Y = X + A(N(X)) W_O,  X' = Y + F(N(Y)). F is [1]'s Llama's, (silu(Y W_g) * Y W_u) W_d, or that of
its vision models, gelu(Y W_u) W_d. Attention of one head:
    o_t = phi(q_t)^T S_t / (phi(q_t)^T z_t + 1e-6) + sum_{c<C} w_c v_{t-c} + b,   phi = relu
    S_t = S_{t-1} + phi(k_t) v_t^T,   z_t = z_{t-1} + phi(k_t)
Norm, while it is trained, n steps of N done:
    N(x) = l rms_norm(x) + (1 - l) RepBN(x),  l = max(0, 1 - n/N)
    RepBN(x) = (x - mean)/sqrt(var + eps) g + b + a x, with the mean and variance of the batch
Afterwards (``eval``) only RepBN with the running mean and variance is left: x s + t for every channel, so a
linear layer behind it has the weight W diag(s) and the bias b + W t. The chunk form has no norm at all.

Departures: [1] has attention in vision models, with softmax left in its Llama; here that Llama has the linear
attention. It is causal, running sums and a convolution of the last C tokens (in [1] 5 x 5 pixels around one).
A learned table of positions, added to k, has a last row: rotary positions take its place, before the ReLU.
In training a batch norm sees all tokens, those to come too; afterwards nothing of that is left. No norm is
left either: what is larger than anything in training stays so, and a gated F squares it in every block. gelu
does not, so models trained for a few minutes have it.

State: ``layers.<i>.sums`` [B,H,K,K+1], S and, in the last column, z; ``layers.<i>.values`` [B,C-1,d], the
last values, oldest first; ``position`` [1] int64, shared by the batch. Constant in the length of the stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xexport.core.checkpoint import RawCheckpoint
from xexport.core.errors import InputError
from xexport.core.family import Family, LoadedModel
from xexport.core.state import StateSpec
from xexport.models._chunk import layer_states
from xexport.models._fill import fill, fill_by_training
from xexport.models._own import load_own
from xexport.models._rotary import rope_angles, rotate, turns_of
from xexport.ops.causal_conv1d.reference import causal_conv1d
from xexport.ops.linear_attention.parallel import gated_parallel
from xexport.ops.linear_attention.reference import linear_attention

__all__ = ["FAMILY", "Slab", "SlabConfig", "SlabTraining"]

#: added to the normaliser, as [2] has it
_ADDED = 1e-6


@dataclass(frozen=True)
class SlabConfig:
    """Sizes of a SLAB.

    Attributes:
        vocab_size, width, layers, heads: V, d, number of blocks, H.
        ffn: inner width of the feed-forward network.
        gated: whether that is the Llama's, with a gate, not the vision models'.
        taps: C.
        norm_steps: N, the steps of training in which the RMS norms give way to RepBN.
        rope_base: base of the rotation's frequencies.
        eps: epsilon of the norms.
    """

    vocab_size: int = 256
    width: int = 160
    layers: int = 6
    heads: int = 5
    ffn: int = 432
    gated: bool = True
    taps: int = 5
    norm_steps: int = 1000
    rope_base: float = 10000.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        sizes = (self.vocab_size, self.width, self.layers, self.heads, self.ffn, self.norm_steps)
        if min(sizes) < 1 or self.taps < 2:
            raise InputError("a SLAB size is too small", got=self)
        if self.width % (2 * self.heads):
            raise InputError(
                "the width of a SLAB must be an even multiple of its heads", got=(self.width, self.heads)
            )

    @property
    def size(self) -> int:
        """K."""
        return self.width // self.heads


class _Norm(nn.Module):
    """PRepBN over the last axis: what [1] trains."""

    mean: Tensor
    var: Tensor

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.rms_weight = nn.Parameter(torch.ones(width))
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.alpha = nn.Parameter(torch.ones(1))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))

    def forward(self, x: Tensor, share: Tensor) -> Tensor:
        """x [B,T,d], share l [] of the RMS norm while training -> the same shape."""
        flat = x.flatten(0, 1)
        y = F.batch_norm(flat, self.mean, self.var, self.weight, self.bias, self.training, 0.1, self.eps)
        y = torch.unflatten(y, 0, x.shape[:2]) + self.alpha * x
        if not self.training:
            return y
        return share * F.rms_norm(x, self.weight.shape, self.rms_weight, self.eps) + (1 - share) * y


class _NoNorm(nn.Module):
    """What is left of a norm once it is in the linear layer behind it."""

    def forward(self, x: Tensor, share: Tensor | None) -> Tensor:
        """x as it is."""
        return x


class _Attention(nn.Module):
    """Projections, features and the convolution around the sums, which the caller runs."""

    def __init__(self, c: SlabConfig) -> None:
        super().__init__()
        self.c = c
        self.qkv_proj = nn.Linear(c.width, 3 * c.width)
        self.o_proj = nn.Linear(c.width, c.width)
        self._convolution(c)

    def _convolution(self, c: SlabConfig) -> None:
        self.conv_weight = nn.Parameter(torch.zeros(c.taps, c.width))
        self.conv_bias = nn.Parameter(torch.zeros(c.width))

    def filters(self) -> tuple[Tensor, Tensor]:
        """Weight [C,d], the oldest tap first, and bias [d]."""
        return self.conv_weight, self.conv_bias

    def terms(self, x: Tensor, rope: tuple[Tensor, Tensor], last: Tensor) -> tuple[Tensor, ...]:
        """x [B,T,d], last values [B,C-1,d] -> phi(q), phi(k) [B,T,H,K], v and a column of ones [B,T,H,K+1],
        the convolution [B,T,d], new last values."""
        q, k, v = self.qkv_proj(x).chunk(3, -1)
        near, last = causal_conv1d(v, *self.filters(), last)
        q, k, v = (torch.unflatten(y, -1, (self.c.heads, -1)) for y in (q, k, v))
        v = torch.cat((v, torch.ones_like(v[..., :1])), -1)
        return F.relu(rotate(q, rope)), F.relu(rotate(k, rope)), v, near, last

    def finish(self, o: Tensor, near: Tensor) -> Tensor:
        """The layer's output from sums over values and features ``o [B,T,H,K+1]`` and the convolution."""
        y: Tensor = self.o_proj((o[..., :-1] / (o[..., -1:] + _ADDED)).flatten(-2) + near)
        return y


class _TrainedAttention(_Attention):
    """One filter for all heads, as in [2]."""

    def _convolution(self, c: SlabConfig) -> None:
        self.conv_weight = nn.Parameter(torch.zeros(c.taps, c.size))
        self.conv_bias = nn.Parameter(torch.zeros(c.size))

    def filters(self) -> tuple[Tensor, Tensor]:
        return self.conv_weight.repeat(1, self.c.heads), self.conv_bias.repeat(self.c.heads)


class _Block(nn.Module):
    def __init__(self, c: SlabConfig, trained: bool) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = _norm(c, trained), _norm(c, trained)
        self.attention = _TrainedAttention(c) if trained else _Attention(c)
        self.gated = c.gated
        self.up_proj = nn.Linear(c.width, 2 * c.ffn if c.gated else c.ffn)  # W_g and W_u, or W_u
        self.down_proj = nn.Linear(c.ffn, c.width)

    def ffn(self, x: Tensor, share: Tensor | None) -> Tensor:
        """``x`` with the feed-forward network's output added."""
        inner = self.up_proj(self.ffn_norm(x, share))
        if self.gated:
            gate, up = inner.chunk(2, -1)
            inner = F.silu(gate) * up
        else:
            inner = F.gelu(inner)
        y: Tensor = self.down_proj(inner)
        return x + y


def _norm(c: SlabConfig, trained: bool) -> nn.Module:
    return _Norm(c.width, c.eps) if trained else _NoNorm()


class Slab(nn.Module):
    """The chunk form: ``forward(tokens [B,T] int64, *state) -> (logits [B,T,V], *new_state)``."""

    max_tokens: int | None = None
    trained = False
    turns: Tensor

    def __init__(self, config: SlabConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(_Block(config, self.trained) for _ in range(config.layers))
        self.norm = _norm(config, self.trained)
        self.head = nn.Linear(config.width, config.vocab_size)
        self.register_buffer("turns", torch.tensor(_turns(config), dtype=torch.int64))

    def state_spec(self) -> list[StateSpec]:
        """The sums and the last values per layer, then the position."""
        c = self.config
        shapes: dict[str, tuple[int | str, ...]] = {
            "sums": ("B", c.heads, c.size, c.size + 1),
            "values": ("B", c.taps - 1, c.width),
        }
        return [*layer_states(c.layers, shapes), StateSpec("position", (1,), "int64")]

    def blocks(self) -> list[_Block]:
        """The blocks in their order."""
        return list(self.layers)  # type: ignore[arg-type]

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin ``[T,1,K/2]`` of the rotation at int64 positions ``[T]``."""
        return rope_angles(self.turns, positions, self.head.weight.dtype)

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        *rest, position = state
        (batch, length), heads = tokens.shape, self.config.heads
        x, after = self.embed(tokens), []
        rope = self.angles(position + torch.arange(length, device=tokens.device))
        decay = x.new_zeros(batch, length, heads)
        for i, block in enumerate(self.blocks()):
            sums, last = rest[2 * i : 2 * i + 2]
            q, k, v, near, last = block.attention.terms(block.attention_norm(x, None), rope, last)
            q, k, v = (y.flatten(-2) for y in (q, k, v))
            o, sums = linear_attention(q, k, v, sums, decay, heads, heads, 1.0, "gated")
            after += [sums, last]
            x = block.ffn(x + block.attention.finish(torch.unflatten(o, -1, (heads, -1)), near), None)
        return self.head(self.norm(x, None)), *after, position + length


class SlabTraining(Slab):
    """The training form: ``forward(tokens [B,T]) -> logits [B,T,V]``, differentiable, with norms.

    In training mode every call is one step of the norms' way to RepBN, and moves their running statistics.
    In ``eval`` mode it is the function that is exported.
    """

    trained = True
    steps: Tensor

    def __init__(self, config: SlabConfig) -> None:
        super().__init__(config)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: Tensor, *state: Tensor) -> Tensor:  # type: ignore[override]
        c = self.config
        x = self.embed(tokens)
        share = (1 - self.steps.to(x.dtype) / c.norm_steps).clamp(min=0)
        rope = self.angles(torch.arange(tokens.shape[1], device=tokens.device))
        empty = x.new_zeros(x.shape[0], c.heads, c.size, c.size + 1)
        for block in self.blocks():
            last = x.new_zeros(x.shape[0], c.taps - 1, c.width)
            q, k, v, near, _ = block.attention.terms(block.attention_norm(x, share), rope, last)
            o, _ = gated_parallel(q, k, v, empty, x.new_zeros(q.shape[:3]))
            x = block.ffn(x + block.attention.finish(o, near), share)
        if self.training:
            self.steps += 1
        logits: Tensor = self.head(self.norm(x, share))
        return logits


def _turns(c: SlabConfig) -> list[int]:
    """The rotation's frequencies base^(-2i/K) in units of 2^-32 turns a token."""
    return turns_of([c.rope_base ** (-2 * i / c.size) for i in range(c.size // 2)])


def _fold(tensors: dict[str, Tensor], norm: str, linear: str, eps: float) -> None:
    """Put one RepBN into the linear layer that reads it, in double precision."""
    leaves = ("weight", "bias", "alpha", "mean", "var", "rms_weight")
    g, b, a, mean, var, _ = (tensors.pop(f"{norm}.{leaf}").double() for leaf in leaves)
    slope = g / (var + eps).sqrt()
    weight, bias = (tensors[f"{linear}.{leaf}"] for leaf in ("weight", "bias"))
    tensors[f"{linear}.bias"] = (bias.double() + weight.double() @ (b - slope * mean)).to(bias.dtype)
    tensors[f"{linear}.weight"] = (weight.double() * (slope + a)).to(weight.dtype)


def _from_training(config: SlabConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The norms in the linear layers behind them, the filter once for every head, the table made anew."""
    result = {name: value.detach() for name, value in tensors.items() if name != "steps"}
    for i in range(config.layers):
        layer = f"layers.{i}."
        _fold(result, layer + "attention_norm", layer + "attention.qkv_proj", config.eps)
        _fold(result, layer + "ffn_norm", layer + "up_proj", config.eps)
        for name in ("conv_weight", "conv_bias"):
            one = result[f"{layer}attention.{name}"]
            result[f"{layer}attention.{name}"] = torch.cat([one] * config.heads, -1)
    _fold(result, "norm", "head", config.eps)
    return {**result, "turns": torch.tensor(_turns(config), dtype=torch.int64, device="cpu")}


@torch.no_grad()
def _init(module: nn.Module, seed: int) -> None:
    """Fill a SLAB (either form) with weights to train from; the norms as in [2]'s classification models.

    Projections that read the residual stream have the variance 1/fan_in, those that write to it are smaller
    by sqrt(2 * layers); the head starts small; the filter is random, of variance 1/C.
    """
    assert isinstance(module, Slab)
    if not isinstance(module, SlabTraining):
        return fill_by_training(FAMILY, module, seed)
    c = module.config
    writes = dict.fromkeys(("*o_proj.weight", "*down_proj.weight"), c.layers)
    fill(module, seed, writes=writes, fixed={"embed.weight": 0.5, "*conv_weight": c.taps**-0.5})
    for name, b in module.named_buffers():
        if name != "turns":
            b.fill_(1 if name.endswith("var") else 0)
    module.turns.copy_(torch.tensor(_turns(c), dtype=torch.int64, device="cpu"))


def _load(raw: RawCheckpoint) -> LoadedModel:
    loaded = load_own(
        FAMILY, raw, title="a SLAB", fix="published weights are vision models, which see the whole image"
    )
    steps, needed = int(raw.tensors["steps"]), loaded.config.norm_steps
    early = f"trained for {steps} of the {needed} steps that replace RMS norms: RepBN alone is used"
    return replace(loaded, notes=(early,) if steps < needed else ())


FAMILY = Family(
    name="slab",
    title="SLAB: simplified linear attention, batch norms folded away (arXiv 2405.11582)",
    sources=("https://arxiv.org/abs/2405.11582", "https://github.com/xinghaochen/SLAB"),
    config=SlabConfig,
    presets={
        "tiny": SlabConfig(29, 32, 2, 2, 48, norm_steps=8),
        "tiny-gelu": SlabConfig(29, 32, 2, 2, 48, gated=False, norm_steps=8),
        "zoo": SlabConfig(ffn=640, gated=False, norm_steps=300),  # three quarters of a short run
        # the sizes of [2]'s Llama, with the paper's attention in it; the norms' steps are [2]'s too
        "350m": SlabConfig(32000, 1024, 18, 8, 4096, norm_steps=18000 * 16),
    },
    build=Slab,
    load=_load,
    train_form=SlabTraining,
    from_training=_from_training,
    init=_init,
    roles=(
        ("embed.*", "embedding"),
        ("head.*", "head"),
        ("turns", "other"),
        ("*.conv_*", "conv"),
        ("*_proj.*", "projection"),
        ("*", "other"),
    ),
    state_note="one matrix a head and layer, the last C-1 values, and the position: constant",
)
