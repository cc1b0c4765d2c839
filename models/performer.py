"""Performer: softmax attention by positive orthogonal random features (FAVOR+), as running sums or whole.

Sources:
    1. Choromanski et al., Rethinking Attention with Performers, arXiv 2009.14794: lemma 1 (positive
       features), section 2.4 (orthogonal features), algorithm 1 and appendix B.1 (prefix sums).
    2. google-research/performer, fast_attention.py, and lucidrains/performer-pytorch (MIT): the number of
       features, K ln K, and the ReLU kernel's constant.
    3. Su et al., RoFormer, arXiv 2104.09864: rotary positions before the features, as [2] has them.

Glossary:
    B batch, T tokens, d width, H heads, K = d/H head size, M features, w_i [K] the i-th random direction.

One block (pre-norm): Y = X + A(LN(X)) W_O,  X' = Y + gelu(LN(Y) W_1) W_2. Attention of one head:
    o_t = (phi(q_t)^T S_t) / (phi(q_t)^T z_t),   S_t = S_{t-1} + phi(k_t) v_t^T,   z_t = z_{t-1} + phi(k_t)
    softmax kernel:  phi(x)_i = M^-1/2 exp(w_i.x - |x|^2/2)  with x = K^-1/4 times q or k
    relu kernel:     phi(x)_i = relu(w_i.x) + 0.001
The w_i are rows of orthogonal matrices with lengths of their own, drawn once and stored as weights.

Departure of the causal form: [2] keeps exp in range by subtracting the largest exponent, of the keys over the
whole sequence, and adds 1e-4 to every feature. The first looks ahead, and with it the second depends on what
comes later: no stream can do that. A feature's exponent is at most |w_i|^2/2 (where x = w_i), a constant:
here the keys' are lowered by a constant so that none is above 60, the queries' by their own largest, and
nothing is added. Both factors cancel in o_t.

Bidirectional (``causal=False``, algorithm 1): S and z are sums over all positions of the sequence,
    o_t = (phi(q_t)^T S) / (phi(q_t)^T z),   S = sum_s phi(k_s) v_s^T,   z = sum_s phi(k_s),
so there is no stream: the whole-sequence form. There nothing is ahead, and [2] is followed to the letter: the
keys' exponents are lowered by their largest w_i.x over the sequence, and 1e-4 is added to every feature.

State of the causal form: ``layers.<i>.sums`` [B,H,M,K+1] float32, S and, in the last column, z; ``position``
[1] int64, shared by the batch. Constant in the length of the stream.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xexport.core.checkpoint import RawCheckpoint
from xexport.core.errors import InputError
from xexport.core.family import Family, LoadedModel
from xexport.core.state import StateSpec
from xexport.models._fill import fill
from xexport.models._own import load_own
from xexport.models._rotary import rope_angles, rotate, turns_of
from xexport.ops.linear_attention.parallel import gated_parallel
from xexport.ops.linear_attention.reference import linear_attention

__all__ = ["FAMILY", "Performer", "PerformerConfig", "PerformerTrain"]

_KERNELS = ("softmax", "relu")
#: of a key's exponents: e^60 times 10^9 tokens is a tenth of a percent of float32's range
_LARGEST = 60.0
_TINY = 1e-30
#: to every exponential feature of the bidirectional form, as [2] has it
_ADDED = 1e-4


@dataclass(frozen=True)
class PerformerConfig:
    """Sizes of a Performer.

    Attributes:
        vocab_size, width, layers, heads: V, d, number of blocks, H.
        ffn: inner width of the feed-forward network.
        features: M; 0 is K ln K.
        kernel: ``softmax`` or ``relu``.
        rope_base: base of the rotation's frequencies.
        eps: epsilon of the layer norms.
        causal: False is the bidirectional form, which sees whole sequences.
    """

    vocab_size: int = 256
    width: int = 160
    layers: int = 4
    heads: int = 5
    ffn: int = 640
    features: int = 0
    kernel: str = "softmax"
    rope_base: float = 10000.0
    eps: float = 1e-5
    causal: bool = True

    def __post_init__(self) -> None:
        sizes = (self.vocab_size, self.width, self.layers, self.heads, self.ffn)
        if min(sizes) < 1 or self.features < 0:
            raise InputError("a Performer size is too small", got=self)
        if self.width % (2 * self.heads):
            raise InputError(
                "the width of a Performer must be an even multiple of its heads", got=(self.width, self.heads)
            )
        if self.kernel not in _KERNELS:
            raise InputError("unknown kernel", got=self.kernel, allowed=", ".join(_KERNELS))

    @property
    def size(self) -> int:
        """K."""
        return self.width // self.heads

    @property
    def count(self) -> int:
        """M."""
        return self.features or max(1, int(self.size * math.log(self.size)))


class _Attention(nn.Module):
    """Projections and features around the recurrence, which the caller runs."""

    directions: Tensor

    def __init__(self, c: PerformerConfig) -> None:
        super().__init__()
        self.c = c
        self.q_proj = nn.Linear(c.width, c.width, bias=False)
        self.k_proj = nn.Linear(c.width, c.width, bias=False)
        self.v_proj = nn.Linear(c.width, c.width, bias=False)
        self.o_proj = nn.Linear(c.width, c.width)
        self.register_buffer("directions", torch.zeros(c.count, c.size))

    def terms(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """phi(q), phi(k) ``[B,T,H,M]`` and v with a column of ones ``[B,T,H,K+1]``, of ``x [B,T,d]``."""
        q, k, v = (
            torch.unflatten(p(x), -1, (self.c.heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        v = torch.cat((v, torch.ones_like(v[..., :1])), -1)
        return self.features(rotate(q, rope), True), self.features(rotate(k, rope), False), v

    def features(self, x: Tensor, query: bool) -> Tensor:
        """phi of ``x [B,T,H,K]``, but for a factor: of each query, and one for all keys of a head."""
        x = x * self.c.size**-0.25
        along = x @ self.directions.t()
        if self.c.kernel == "relu":
            return F.relu(along) + 1e-3
        exponent = along - x.square().sum(-1, keepdim=True) * 0.5
        if not self.c.causal:
            return (exponent - along.amax(-1 if query else (1, -1), keepdim=True)).exp() + _ADDED
        if query:
            return (exponent - exponent.amax(-1, keepdim=True)).exp()
        largest = self.directions.square().sum(-1).amax(-1) * 0.5
        return (exponent - (largest - _LARGEST).clamp(min=0)).exp()

    def whole(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Sums over the whole sequence for every query: ``[B,T,H,M]`` twice, ``[B,T,H,K+1]`` -> that."""
        sums = k.permute(0, 2, 3, 1) @ v.transpose(1, 2)
        return (q.transpose(1, 2) @ sums).transpose(1, 2)

    def finish(self, o: Tensor) -> Tensor:
        """The layer's output from sums over values and features ``o [B,T,H,K+1]``."""
        # where every key is so long that all its features are zero there is nothing to average: 0, not NaN
        y: Tensor = self.o_proj((o[..., :-1] / (o[..., -1:] + _TINY)).flatten(-2))
        return y


class _Block(nn.Module):
    def __init__(self, c: PerformerConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(c.width, c.eps)
        self.attention = _Attention(c)
        self.ffn_norm = nn.LayerNorm(c.width, c.eps)
        self.fc1 = nn.Linear(c.width, c.ffn)
        self.fc2 = nn.Linear(c.ffn, c.width)

    def ffn(self, x: Tensor) -> Tensor:
        """``x`` with the feed-forward network's output added."""
        y: Tensor = self.fc2(F.gelu(self.fc1(self.ffn_norm(x))))
        return x + y


class Performer(nn.Module):
    """``forward(tokens [B,T] int64, *state) -> (logits [B,T,V], *new_state)``; no state if not causal."""

    max_tokens: int | None = None
    turns: Tensor
    form: str

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__()
        self.config = config
        self.form = "chunk" if config.causal else "whole"
        self.vocab_size = config.vocab_size
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, config.eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.register_buffer("turns", torch.tensor(_turns(config), dtype=torch.int64))

    def state_spec(self) -> list[StateSpec]:
        """The sums per layer, then the position."""
        c = self.config
        if not c.causal:
            return []
        shape = ("B", c.heads, c.count, c.size + 1)
        specs = [StateSpec(f"layers.{i}.sums", shape) for i in range(c.layers)]
        return [*specs, StateSpec("position", (1,), "int64")]

    def blocks(self) -> list[_Block]:
        """The blocks in their order."""
        return list(self.layers)  # type: ignore[arg-type]

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        c = self.config
        if not c.causal:
            return (self.whole(tokens),)
        *sums, position = state
        batch, length = tokens.shape
        rope = self.angles(position + torch.arange(length, device=tokens.device))
        x = self.embed(tokens)
        decay = x.new_zeros(batch, length, c.heads)
        after = []
        for block, before in zip(self.blocks(), sums, strict=True):
            q, k, v = (y.flatten(-2) for y in block.attention.terms(block.attention_norm(x), rope))
            o, now = linear_attention(q, k, v, before, decay, c.heads, c.heads, 1.0, "gated")
            after.append(now)
            x = block.ffn(x + block.attention.finish(torch.unflatten(o, -1, (c.heads, -1))))
        return self.head(self.norm(x)), *after, position + length

    def whole(self, tokens: Tensor) -> Tensor:
        """The bidirectional form: tokens ``[B,T]`` -> logits ``[B,T,V]``."""
        rope = self.angles(torch.arange(tokens.shape[1], device=tokens.device))
        x = self.embed(tokens)
        for block in self.blocks():
            attention = block.attention
            o = attention.whole(*attention.terms(block.attention_norm(x), rope))
            x = block.ffn(x + attention.finish(o))
        logits: Tensor = self.head(self.norm(x))
        return logits

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin ``[T,1,K/2]`` of the rotation at int64 positions ``[T]``: exact, as RetNet's."""
        return rope_angles(self.turns, positions, self.norm.weight.dtype)


class PerformerTrain(Performer):
    """The training form: ``forward(tokens [B,T]) -> logits [B,T,V]``, differentiable, in chunks if causal."""

    def forward(self, tokens: Tensor, *state: Tensor) -> Tensor:  # type: ignore[override]
        c = self.config
        if not c.causal:
            return self.whole(tokens)
        rope = self.angles(torch.arange(tokens.shape[1], device=tokens.device))
        x = self.embed(tokens)
        for block in self.blocks():
            q, k, v = block.attention.terms(block.attention_norm(x), rope)
            empty = x.new_zeros(x.shape[0], c.heads, c.count, c.size + 1)
            o, _ = gated_parallel(q, k, v, empty, x.new_zeros(q.shape[:3]))
            x = block.ffn(x + block.attention.finish(o))
        logits: Tensor = self.head(self.norm(x))
        return logits


def _turns(c: PerformerConfig) -> list[int]:
    """The rotation's frequencies base^(-2i/K) in units of 2^-32 turns a token."""
    rates = [c.rope_base ** (-2 * i / c.size) for i in range(c.size // 2)]
    return turns_of(rates)


def _directions(count: int, size: int, rng: torch.Generator) -> Tensor:
    """Random directions ``[M,K]``: orthogonal in blocks of K, as long as Gaussian vectors (section 2.4)."""
    gaussian = torch.randn(-(-count // size), size, size, generator=rng, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    # the signs make them uniform among the orthogonal matrices; as LAPACK leaves them they are not
    rows = (q * r.diagonal(dim1=1, dim2=2).sign()[:, None]).flatten(0, 1)
    lengths = torch.randn(count, size, generator=rng, dtype=torch.float64).norm(dim=1, keepdim=True)
    made: Tensor = rows[:count] * lengths
    return made.float()


def _init(module: nn.Module, seed: int) -> None:
    """Fill a Performer (either form) with weights to train from, and draw its features.

    Projections that read the residual stream have the variance 1/fan_in, those that write to it are smaller
    by sqrt(2 * layers); the head starts small.
    """
    assert isinstance(module, Performer)
    c = module.config
    rng = fill(module, seed, writes=dict.fromkeys(("*o_proj.weight", "*fc2.weight"), c.layers))
    for block in module.blocks():
        block.attention.directions.copy_(_directions(c.count, c.size, rng))
    module.turns.copy_(_table(c)["turns"])


def _from_training(config: PerformerConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The two forms have the same parameters and features; the constant table is made anew."""
    return {**{k: v.detach() for k, v in tensors.items()}, **_table(config)}


def _table(config: PerformerConfig) -> dict[str, Tensor]:
    return {"turns": torch.tensor(_turns(config), dtype=torch.int64, device="cpu")}


def _load(raw: RawCheckpoint) -> LoadedModel:
    return load_own(
        FAMILY,
        raw,
        title="a Performer",
        fix="published causal Performers look ahead in their keys' normaliser: they can't be streamed",
        tables=_table,
    )


FAMILY = Family(
    name="performer",
    title="Performer: FAVOR+ attention, causal or bidirectional (arXiv 2009.14794)",
    sources=("https://arxiv.org/abs/2009.14794", "https://github.com/google-research/google-research"),
    config=PerformerConfig,
    presets={
        "tiny": PerformerConfig(vocab_size=29, width=32, layers=2, heads=2, ffn=48),
        "tiny-relu": PerformerConfig(vocab_size=29, width=32, layers=2, heads=2, ffn=48, kernel="relu"),
        "tiny-whole": PerformerConfig(vocab_size=29, width=32, layers=2, heads=2, ffn=48, causal=False),
        "zoo": PerformerConfig(kernel="relu"),  # the one that learned here; the paper's best for proteins too
        "zoo-whole": PerformerConfig(causal=False),
        # the paper's protein model: appendix A.3 of [1]
        "trembl": PerformerConfig(vocab_size=30, width=512, layers=36, heads=8, ffn=1024, features=256),
        "trembl-whole": PerformerConfig(
            vocab_size=30, width=512, layers=36, heads=8, ffn=1024, features=256, causal=False
        ),
    },
    build=Performer,
    load=_load,
    train_form=PerformerTrain,
    from_training=_from_training,
    init=_init,
    roles=(
        ("embed.*", "embedding"),
        ("head.*", "head"),
        ("turns", "other"),
        ("*norm.*", "norm"),
        ("*.directions", "filter"),
        ("*_proj.weight", "projection"),
        ("*.fc?.weight", "projection"),
        ("*.bias", "norm"),
    ),
    state_note="one matrix of features and values a head and layer, and the position: constant; "
    "bidirectional: none",
)
