"""Transformer: softmax attention with a bounded cache, Llama-style, and its published variations.

Sources:
    1. Vaswani et al., Attention Is All You Need, arXiv 1706.03762: equation 1, the block.
    2. Touvron et al., LLaMA, arXiv 2302.13971, section 2.2 (RMS norm before each part, SwiGLU, RoPE), and
       Hugging Face transformers, models/llama, mistral and qwen2: the checkpoint layouts read here.
    3. Su et al., RoFormer, arXiv 2104.09864, section 3.2.2; the order of its pairs is that of [2].
    4. Shazeer, arXiv 1911.02150 (one head of keys for all), and Ainslie et al., arXiv 2305.13245 (a few).
    5. Xiao et al., Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453, section 3.2.
    6. Pires et al., One Wide Feedforward is All You Need, arXiv 2309.01826: one FFN for all layers.
    7. He and Hofmann, Simplifying Transformer Blocks, arXiv 2311.01906: equations 7, 12 and 13, section 4.3.
    8. Zhang et al., MASFormer, arXiv 2310.12442: a few layers see everything, the rest a short span.

Glossary:
    B batch, T tokens, d width, H heads, G heads of keys and values, K head size, L = max_tokens,
    W window: a token sees itself and the W-1 before it, S sinks: the first S tokens, always seen.

The block of [2], X the residual stream:
    Y = X + concat_h(softmax(K^-1/2 rot(q_h) rot(k_g)^T) v_g) W_O,  X' = Y + (silu(Z W_g) * Z W_u) W_d
with q, k, v = norm(X) W, Z = norm(Y). ``block="simplified"`` is SAS-P of [7], without any skip:
    Z = norm(X),  X' = b_f FFN(Z) + b_a concat_h((alpha_h I + beta_h A_h - gamma_h C) V_h)
where A_h is the softmax attention matrix, C the same for scores of zero (the mean of what a token sees) and
V = Z, in the first layer Z W_V (appendix C, "Using the first value matrix"). Departures: RoPE in place of
trained positions, and the FFN is whatever the configuration says.

Windows and sinks: [5] numbers positions inside the cache. In a window of consecutive tokens that leaves all
distances as they are; a query at position t is min(t, S+W-1) in the cache, so it is min(t, S+W-1) - j from
sink j. Keys are therefore stored rotated once, by their position in the stream, and a query is rotated twice:
by t for the window, by min(t, S+W-1) for the sinks. A chunk may be longer than the window: every token sees
its own. [8] attends in blocks; here a short span is a sliding window, so that the result does not depend on
where blocks begin. Which layers see everything is a list.

Positions are exact at any distance: see models/_rotary.py.

State, for a layer that sees everything: ``layers.<i>.keys``, ``.values`` [B,G,L,K] float32, and there is no
token L+1 (LimitError). With a window: the same of S+W rows, sinks first, then a ring in which token s has
row S + (s-S) mod W (ops/window_attention). Simplified and seeing everything: ``layers.<i>.sum`` [B,d], the
sum of all values. ``position`` [1] int64, shared by the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xexport.core.checkpoint import RawCheckpoint, match_tensors, own_config, require_keys
from xexport.core.errors import CheckpointError, InputError
from xexport.core.family import Family, LoadedModel
from xexport.core.state import StateSpec
from xexport.models._chunk import RMSNorm
from xexport.models._rotary import rope_angles, rotate, turns_of
from xexport.ops.cached_attention.reference import cached_attention
from xexport.ops.window_attention.reference import window_attention

__all__ = [
    "FAMILY",
    "Transformer",
    "TransformerConfig",
    "TransformerTrain",
    "fused_attention",
]

_BLOCKS = ("llama", "simplified")
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and options of a Transformer.

    Attributes:
        vocab_size, width, layers, heads: V, d, number of blocks, H.
        ffn: inner width of the feed-forward network.
        kv_heads: G, a divisor of H; 0 is H, 1 is multi-query attention.
        head_size: K; 0 is d/H.
        max_tokens: L, the longest stream, unless every layer has a window.
        windows: W of each layer, 0 to see everything; a shorter list is repeated, an empty one is all 0.
        sinks: S, for layers with a window.
        block: ``llama`` or ``simplified``.
        activation: ``silu``, ``gelu`` or ``relu``; gated: multiply it by a second projection (SwiGLU).
        shared_ffn: one feed-forward network for all layers.
        tied: the head is the embedding.
        qkv_bias: biases of the q, k and v projections (Qwen2).
        rope_base, rope_factor: frequencies base^(-2i/K) / factor.
        rope_bands: Llama 3's (low, high, length): waves longer than length/low are divided by
            ``rope_factor``, those shorter than length/high are not; empty to divide all.
        eps: epsilon of the norms.
    """

    vocab_size: int = 256
    width: int = 160
    layers: int = 4
    heads: int = 5
    ffn: int = 432
    kv_heads: int = 0
    head_size: int = 0
    max_tokens: int = 2048
    windows: tuple[int, ...] = ()
    sinks: int = 0
    block: str = "llama"
    activation: str = "silu"
    gated: bool = True
    shared_ffn: bool = False
    tied: bool = False
    qkv_bias: bool = False
    rope_base: float = 10000.0
    rope_factor: float = 1.0
    rope_bands: tuple[float, ...] = ()
    eps: float = 1e-5

    def __post_init__(self) -> None:
        sizes = (self.vocab_size, self.width, self.layers, self.heads, self.ffn, self.max_tokens)
        if min(sizes) < 1 or min(self.kv_heads, self.head_size, self.sinks) < 0:
            raise InputError("a Transformer size is too small", got=self)
        if self.heads % self.groups:
            raise InputError(
                "the heads of a Transformer are not a multiple of its kv_heads", got=(self.heads, self.groups)
            )
        if (not self.head_size and self.width % self.heads) or self.size % 2:
            raise InputError("the head size must be whole and even", got=(self.width, self.heads, self.size))
        if any(w < 0 or w == 1 for w in self.windows) or len(self.windows) > self.layers:
            raise InputError(
                "bad attention windows", got=self.windows, allowed="0 or at least 2 tokens, one a layer"
            )
        if self.sinks and not any(self.windows):
            raise InputError("attention sinks need a window", got=self.windows)
        if self.block not in _BLOCKS or self.activation not in _ACTIVATIONS:
            raise InputError(
                "unknown kind of block or activation",
                got=(self.block, self.activation),
                allowed=(_BLOCKS, tuple(_ACTIVATIONS)),
            )
        if self.block == "simplified" and (self.groups != self.heads or self.size * self.heads != self.width):
            raise InputError("a simplified block's values are its input: no kv_heads, no head_size")
        if len(self.rope_bands) not in (0, 3):
            raise InputError("rope_bands are (low, high, length)", got=self.rope_bands)

    @property
    def groups(self) -> int:
        """G."""
        return self.kv_heads or self.heads

    @property
    def size(self) -> int:
        """K."""
        return self.head_size or self.width // self.heads

    def window(self, layer: int) -> int:
        """W of a layer, or 0."""
        return self.windows[layer % len(self.windows)] if self.windows else 0


class _FeedForward(nn.Module):
    """act(x W_g) * x W_u, or act(x W_u); then W_d."""

    def __init__(self, c: TransformerConfig) -> None:
        super().__init__()
        self.act = _ACTIVATIONS[c.activation]
        self.gate_proj = nn.Linear(c.width, c.ffn, bias=False) if c.gated else None
        self.up_proj = nn.Linear(c.width, c.ffn, bias=False)
        self.down_proj = nn.Linear(c.ffn, c.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up_proj(x)
        h = self.act(h) if self.gate_proj is None else self.act(self.gate_proj(x)) * h
        y: Tensor = self.down_proj(h)
        return y


@dataclass(frozen=True)
class _Places:
    """Where a chunk's tokens are, for the layers of one window: cos and sin ``[T,1,K/2]``.

    Attributes:
        rope: by position in the stream.
        sink_rope: by position in the cache, the same where there are no sinks.
    """

    rope: tuple[Tensor, Tensor]
    sink_rope: tuple[Tensor, Tensor]


class _Attention(nn.Module):
    """One layer's attention; a simplified block's has neither W_O nor, past the first layer, W_V."""

    def __init__(self, c: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.c, self.window = c, c.window(layer)
        self.simple = c.block == "simplified"
        self.q_proj = nn.Linear(c.width, c.heads * c.size, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.width, c.groups * c.size, bias=c.qkv_bias)
        has_values = not self.simple or layer == 0
        self.v_proj = nn.Linear(c.width, c.groups * c.size, bias=c.qkv_bias) if has_values else None
        self.o_proj = None if self.simple else nn.Linear(c.heads * c.size, c.width, bias=False)
        if self.simple:
            self.alpha, self.beta, self.gamma = (nn.Parameter(torch.ones(c.heads)) for _ in range(3))

    def projected(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """q ``[B,T,H,K]`` as it is, k ``[B,T,G,K]`` rotated, v ``[B,T,G*K]``."""
        q = torch.unflatten(self.q_proj(x), -1, (self.c.heads, -1))
        k = rotate(torch.unflatten(self.k_proj(x), -1, (self.c.groups, -1)), rope)
        return q, k, x if self.v_proj is None else self.v_proj(x)

    def forward(
        self, x: Tensor, places: _Places, position: Tensor, state: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Attention of a chunk ``x [B,T,d]`` after ``position`` tokens, and the new state."""
        q, k, v = self.projected(x, places.rope)
        if self.window:
            return self._windowed(q, k, v, places, position, state)
        keys, values, *rest = state
        scale = self.c.size**-0.5
        q = rotate(q, places.rope).flatten(-2)
        o, keys, values = cached_attention(
            q, k.flatten(-2), v, keys, values, position, self.c.heads, self.c.groups, scale
        )
        if self.o_proj is not None:
            return self.o_proj(o), [keys, values]
        total = v.cumsum(1) + rest[0][:, None]
        seen = position + 1 + torch.arange(v.shape[1], device=v.device)
        mean = total / seen[:, None].to(v.dtype)
        return self._shaped(v, o, mean), [keys, values, total[:, -1]]

    def _windowed(
        self, q: Tensor, k: Tensor, v: Tensor, places: _Places, position: Tensor, state: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The chunk's tokens over sinks, ring and one another."""
        c, heads = self.c, self.c.heads
        near, first = rotate(q, places.rope), rotate(q, places.sink_rope) if c.sinks else None
        queries = [near, near if first is None else first]
        if self.simple:  # a query of zeros sees the mean
            queries = [torch.stack((x, torch.zeros_like(x)), 3).flatten(2, 3) for x in queries]
            heads *= 2
        o, *now = window_attention(
            *(x.flatten(-2) for x in queries),
            k.flatten(-2),
            v,
            *state,
            position,
            heads,
            c.groups,
            self.window,
            c.sinks,
            c.size**-0.5,
        )
        if self.o_proj is not None:
            return self.o_proj(o), now
        o, mean = (x.flatten(-2) for x in torch.unflatten(o, -1, (c.heads, 2, -1)).unbind(3))
        return self._shaped(v, o, mean), now

    def _shaped(self, v: Tensor, o: Tensor, mean: Tensor) -> Tensor:
        """A simplified block's alpha V + beta A V - gamma C V, all ``[B,T,d]``."""
        a, b, g = (torch.repeat_interleave(p, self.c.size) for p in (self.alpha, self.beta, self.gamma))
        return a * v + b * o - g * mean

    def scores(self, q: Tensor, keys: Tensor) -> Tensor:
        """K^-1/2 q.k of rotated ``q [B,T,H,K]`` and ``keys [B,G,N,K]``: ``[B,G,H/G,T,N]``.

        Heads that share keys are rows of one product.
        """
        grouped = torch.unflatten(q, 2, (self.c.groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        product = (grouped * self.c.size**-0.5) @ keys.transpose(-1, -2)
        return torch.unflatten(product, 2, (self.c.heads // self.c.groups, -1))

    def mixed(self, scores: Tensor, allowed: Tensor, values: Tensor, v: Tensor) -> Tensor:
        """The layer's output ``[B,T,d]`` from scores over ``values [B,G,N,K]``; ``v [B,T,G,K]`` is the
        chunk's own.
        """
        share = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
        if self.simple:
            count = allowed.to(share.dtype)
            beta, gamma = (p[:, None, None, None] for p in (self.beta, self.gamma))
            share = beta * share - gamma * (count / count.sum(-1, keepdim=True))
        o = torch.unflatten(share.flatten(2, 3) @ values, 2, (self.c.heads // self.c.groups, -1))
        o = o.permute(0, 3, 1, 2, 4).flatten(2, 3)
        if self.o_proj is None:
            return (o + self.alpha[:, None] * v).flatten(-2)
        y: Tensor = self.o_proj(o.flatten(-2))
        return y


class _Block(nn.Module):
    """Norms, attention, and the feed-forward network unless it is shared."""

    def __init__(self, c: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.simple = c.block == "simplified"
        self.input_layernorm = RMSNorm(c.width, c.eps)
        self.self_attn = _Attention(c, layer)
        self.post_attention_layernorm = None if self.simple else RMSNorm(c.width, c.eps)
        self.mlp = None if c.shared_ffn else _FeedForward(c)
        if self.simple:
            self.ffn_gain, self.attention_gain = (nn.Parameter(torch.ones(1)) for _ in range(2))

    def finish(self, x: Tensor, z: Tensor, attended: Tensor, ffn: nn.Module) -> Tensor:
        """The block's output from its input, its normed input and the attention's output."""
        if self.post_attention_layernorm is None:
            y: Tensor = self.ffn_gain * ffn(z) + self.attention_gain * attended
            return y
        x = x + attended
        y = x + ffn(self.post_attention_layernorm(x))
        return y


class _Decoder(nn.Module):
    """Embedding, blocks, last norm, and the rotation's frequencies in units of 2^-32 turns."""

    turns: Tensor

    def __init__(self, c: TransformerConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.width)
        self.layers = nn.ModuleList(_Block(c, i) for i in range(c.layers))
        self.mlp = _FeedForward(c) if c.shared_ffn else None
        self.norm = RMSNorm(c.width, c.eps)
        self.register_buffer("turns", torch.tensor(_turns(c), dtype=torch.int64))

    def blocks(self) -> list[tuple[_Block, _FeedForward]]:
        """Every block with the feed-forward network it uses."""
        made = []
        for block in self.layers:
            assert isinstance(block, _Block)
            ffn = block.mlp if self.mlp is None else self.mlp
            assert ffn is not None
            made.append((block, ffn))
        return made


class Transformer(nn.Module):
    """The chunk form: ``forward(tokens [B,T] int64, *state) -> (logits [B,T,V], *new_state)``.

    If a layer sees everything, ``position + T`` must not exceed ``max_tokens``: LimitError in PyTorch and
    from a runtime.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        bounded = any(not config.window(i) for i in range(config.layers))
        self.max_tokens = config.max_tokens if bounded else None
        self.model = _Decoder(config)
        self.lm_head = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)

    def state_spec(self) -> list[StateSpec]:
        """Per layer keys and values, and a simplified block's sum; then the position."""
        c, specs = self.config, []
        for i in range(c.layers):
            window = c.window(i)
            shape = ("B", c.groups, c.sinks + window if window else c.max_tokens, c.size)
            specs += [StateSpec(f"layers.{i}.{name}", shape) for name in ("keys", "values")]
            if c.block == "simplified" and not window:
                specs.append(StateSpec(f"layers.{i}.sum", ("B", c.width)))
        return [*specs, StateSpec("position", (1,), "int64")]

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        c = self.config
        *rest, position = state
        places = {
            w: self._places(w, position, tokens.shape[1]) for w in {c.window(i) for i in range(c.layers)}
        }
        x = self.model.embed_tokens(tokens)
        after: list[Tensor] = []
        for i, (block, ffn) in enumerate(self.model.blocks()):
            count = 3 if c.block == "simplified" and not c.window(i) else 2
            before, rest = rest[:count], rest[count:]
            z = block.input_layernorm(x)
            attended, now = block.self_attn(z, places[c.window(i)], position, before)
            after += now
            x = block.finish(x, z, attended, ffn)
        return self.logits(x), *after, position + tokens.shape[1]

    def logits(self, x: Tensor) -> Tensor:
        """``[B,T,V]`` of the last block's output."""
        weight = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return F.linear(self.model.norm(x), weight)

    def _places(self, window: int, position: Tensor, length: int) -> _Places:
        """What layers of one window need to know of a chunk of ``length`` after ``position [1]`` tokens."""
        here = position + torch.arange(length, device=position.device)
        rope = self.angles(here)
        if not (window and self.config.sinks):
            return _Places(rope, rope)
        return _Places(rope, self.angles(here.clamp(max=self.config.sinks + window - 1)))

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin ``[T,1,K/2]`` of the rotation at int64 positions ``[T]`` below 2^31."""
        return rope_angles(self.model.turns, positions, self.model.norm.weight.dtype)


class TransformerTrain(Transformer):
    """The training form: ``forward(tokens [B,T]) -> logits [B,T,V]``, differentiable, all tokens at once.

    Same parameters as the chunk form. Layers that need no more than a mask use PyTorch's fused attention.
    """

    def forward(self, tokens: Tensor, *state: Tensor) -> Tensor:  # type: ignore[override]
        c, length = self.config, tokens.shape[1]
        here = torch.arange(length, device=tokens.device)
        rope = self.angles(here)
        x = self.model.embed_tokens(tokens)
        for i, (block, ffn) in enumerate(self.model.blocks()):
            z, attention = block.input_layernorm(x), block.self_attn
            q, k, v = attention.projected(z, rope)
            v = torch.unflatten(v, -1, (c.groups, -1))
            window = c.window(i)
            if attention.o_proj is not None and not (window and c.sinks):
                attended = attention.o_proj(fused_attention(rotate(q, rope), k, v, window))
            else:
                attended = self._masked(attention, q, k, v, here)
            x = block.finish(x, z, attended, ffn)
        return self.logits(x)

    def _masked(self, attention: _Attention, q: Tensor, k: Tensor, v: Tensor, here: Tensor) -> Tensor:
        """Attention with the whole matrix of scores, in which the sinks' columns have their own rotation."""
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
        scores = attention.scores(rotate(q, self.angles(here)), keys)
        allowed = here <= here[:, None]
        if attention.window:
            s, window = self.config.sinks, attention.window
            sink = here < s
            allowed = allowed & ((here > here[:, None] - window) | sink)
            places = here.clamp(max=s + window - 1)
            scores = torch.where(sink, attention.scores(rotate(q, self.angles(places)), keys), scores)
        return attention.mixed(scores, allowed, values, v)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Causal attention of ``q [B,T,H,K]``, ``k, v [B,T,G,K]``: ``[B,T,H*K]``."""
    place = torch.arange(q.shape[1], device=q.device)
    allowed = (place <= place[:, None]) & (place > place[:, None] - window) if window else None
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    shared = q.shape[1] != k.shape[1]
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed, is_causal=allowed is None, enable_gqa=shared
    )
    return o.transpose(1, 2).flatten(-2)


def _turns(c: TransformerConfig) -> list[int]:
    """The rotation's frequencies in units of 2^-32 turns a token."""
    rates = []
    for i in range(c.size // 2):
        rate = c.rope_base ** (-2 * i / c.size)
        share = 1.0
        if c.rope_bands:
            low, high, length = c.rope_bands
            # 0 for waves longer than length/low, 1 for those shorter than length/high, a line between
            share = (length * rate / (2 * math.pi) - low) / (high - low)
            share = 1 - min(1.0, max(0.0, share))
        rates.append(rate * (1 - share) + rate / c.rope_factor * share)
    return turns_of(rates)


def _init(module: nn.Module, seed: int) -> None:
    """Fill a Transformer (either form) with weights to train from.

    Projections that read the residual stream have the variance 1/fan_in; those that write to it are
    smaller by sqrt(2 * layers). The head starts small, and where it is the embedding both do. A simplified
    block begins as source [7] says: the attention is the identity (its queries are zero, so that A = C),
    the first W_V too, and the feed-forward network is scaled by 0.1.
    """
    assert isinstance(module, Transformer)
    c = module.config
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(_first_value(c, name, torch.randn(p.shape, generator=rng)))
        module.model.turns.copy_(torch.tensor(_turns(c), dtype=torch.int64, device="cpu"))


def _first_value(c: TransformerConfig, name: str, noise: Tensor) -> Tensor:
    """The initial value of one parameter."""
    simple = c.block == "simplified"
    if noise.ndim < 2:
        return torch.full(noise.shape, 0.0 if name.endswith("bias") else 0.1 if "ffn_gain" in name else 1.0)
    if simple and name.endswith("q_proj.weight"):
        return torch.zeros(noise.shape)
    if simple and name.endswith("v_proj.weight"):
        return torch.eye(*noise.shape)
    std: float = noise.shape[1] ** -0.5
    if name.endswith("embed_tokens.weight"):
        std = 0.25 * c.width**-0.5 if c.tied else 0.5
    elif name.endswith("lm_head.weight"):
        std *= 0.25
    elif name.endswith(("o_proj.weight", "down_proj.weight")) and not simple:
        std *= (2 * c.layers) ** -0.5
    return noise * std


def _from_training(config: TransformerConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The two forms have the same parameters; the constant table is made anew."""
    table = torch.tensor(_turns(config), dtype=torch.int64, device="cpu")
    return {**{k: v.detach() for k, v in tensors.items()}, "model.turns": table}


_HUGGING_FACE = ("llama", "mistral", "qwen2")
#: rows of a cache that a checkpoint gets unless its own maximum is shorter
_DEFAULT_BOUND = 4096


def _layout(raw: RawCheckpoint) -> str | None:
    kind = raw.config.get("model_type")
    return f"its config.json says model_type {kind}" if kind in _HUGGING_FACE else None


def _load(raw: RawCheckpoint) -> LoadedModel:
    """A Hugging Face folder of a Llama, Mistral or Qwen2, or a file of xexport's own training."""
    config = own_config(raw, "transformer", TransformerConfig)
    notes: tuple[str, ...] = ()
    if config is None:
        config, notes = _config_from_hugging_face(raw)
    tensors = {k: v for k, v in raw.tensors.items() if k not in ("model.turns",)}
    if config.tied:
        tensors.pop("lm_head.weight", None)
    with torch.device("meta"):
        wanted = Transformer(config)
    found = match_tensors(_from_training(config, tensors), wanted, raw.path.name)
    return LoadedModel(
        family="transformer",
        config=config,
        tensors=found,
        tokenizer="bytes" if config.vocab_size == 256 else None,
        source=str(raw.path),
        notes=notes,
    )


def _config_from_hugging_face(raw: RawCheckpoint) -> tuple[TransformerConfig, tuple[str, ...]]:
    """Sizes from config.json; every key that would change the function is read or refused."""
    c = raw.config
    kind = c.get("model_type")
    if kind not in _HUGGING_FACE:
        raise CheckpointError(
            "this is not a Transformer checkpoint that can be read",
            got=f"{raw.path.name}: model_type {kind!r}, tensors such as {', '.join(list(raw.tensors)[:4])}",
            allowed=f"a Hugging Face folder of {', '.join(_HUGGING_FACE)}, or a safetensors file from "
            "xexport's own training",
        )
    require_keys(raw, ("model.embed_tokens.weight", "model.norm.weight"), "transformer")
    _refuse(raw, "hidden_act", ("silu",))
    _refuse(raw, "mlp_bias", (False, None))
    try:
        base, factor, bands = _rope_from(c)
        window = int(c.get("sliding_window") or 0) if _slides(c) else 0
        longest = int(c.get("max_position_embeddings", _DEFAULT_BOUND))
        config = TransformerConfig(
            vocab_size=int(c["vocab_size"]),
            width=int(c["hidden_size"]),
            layers=int(c["num_hidden_layers"]),
            heads=int(c["num_attention_heads"]),
            ffn=int(c["intermediate_size"]),
            kv_heads=int(c.get("num_key_value_heads") or 0),
            head_size=int(c.get("head_dim") or 0),
            max_tokens=min(longest, _DEFAULT_BOUND),
            windows=(window,) if window else (),
            tied=bool(c.get("tie_word_embeddings", False)),
            qkv_bias="model.layers.0.self_attn.q_proj.bias" in raw.tensors,
            rope_base=base,
            rope_factor=factor,
            rope_bands=bands,
            eps=float(c.get("rms_norm_eps", 1e-6)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError("config.json lacks a size, or has a malformed one", got=error) from error
    notes = ["the head is the embedding"] if config.tied else []
    if not window and longest > _DEFAULT_BOUND:
        notes.append(f"the cache holds {_DEFAULT_BOUND} of the {longest} tokens that the model was made for")
    return config, tuple(notes)


def _slides(c: Mapping[str, object]) -> bool:
    """Whether all layers have the sliding window. Qwen2 names one without using it."""
    if c.get("model_type") == "qwen2" and c.get("use_sliding_window"):
        raise CheckpointError("Qwen2 with sliding windows can't be read", fix="use_sliding_window is true")
    return c.get("model_type") == "mistral"


def _refuse(raw: RawCheckpoint, key: str, allowed: tuple[object, ...]) -> None:
    """Raise unless config.json lacks ``key`` or has an allowed value."""
    if key in raw.config and raw.config[key] not in allowed:
        raise CheckpointError(
            f"config.json has a {key} that this family does not compute",
            got=raw.config[key],
            allowed=", ".join(map(str, allowed)),
        )


def _rope_from(c: Mapping[str, object]) -> tuple[float, float, tuple[float, ...]]:
    """Base, factor and bands of the rotation; transformers 5 has all in ``rope_parameters``."""
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise TypeError(f"rope parameters are a {type(rope).__name__}")
    base = float(rope.get("rope_theta", c.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return base, 1.0, ()
    if kind == "linear":
        return base, float(rope["factor"]), ()
    if kind == "llama3":
        keys = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return base, float(rope["factor"]), tuple(float(rope[k]) for k in keys)
    raise CheckpointError(
        "this kind of rope scaling is not computed here", got=kind, allowed="default, linear, llama3"
    )


def _tiny(**changes: object) -> TransformerConfig:
    """A size for tests; grouped keys unless a change says otherwise."""
    sizes: dict[str, object] = {
        "vocab_size": 29,
        "width": 32,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "ffn": 80,
        "max_tokens": 96,
    }
    return TransformerConfig(**(sizes | changes))  # type: ignore[arg-type]


PRESETS = {
    "tiny": _tiny(),
    "tiny-mqa": _tiny(kv_heads=1, tied=True),
    "tiny-window": _tiny(windows=(9,), sinks=3),
    "tiny-mixed": _tiny(layers=3, windows=(0, 6, 6)),
    "tiny-shared-ffn": _tiny(shared_ffn=True, ffn=96, activation="relu", gated=False),
    "tiny-simplified": _tiny(block="simplified", kv_heads=0, windows=(0, 7), activation="relu", gated=False),
    "zoo": TransformerConfig(kv_heads=1),
    # SmolLM-135M, TinyLlama-1.1B, Llama-2-7B
    "135m": TransformerConfig(49152, 576, 30, 9, 1536, kv_heads=3, tied=True),
    "1.1b": TransformerConfig(32000, 2048, 22, 32, 5632, kv_heads=4),
    "7b": TransformerConfig(32000, 4096, 32, 32, 11008, max_tokens=4096),
}

FAMILY = Family(
    name="transformer",
    title="Transformer: softmax attention with a bounded cache, Llama-style (arXiv 1706.03762)",
    sources=(
        "https://arxiv.org/abs/1706.03762",
        "https://arxiv.org/abs/2302.13971",
        "https://arxiv.org/abs/2104.09864",
        "https://arxiv.org/abs/1911.02150",
        "https://arxiv.org/abs/2309.17453",
        "https://arxiv.org/abs/2309.01826",
        "https://arxiv.org/abs/2311.01906",
        "https://arxiv.org/abs/2310.12442",
    ),
    config=TransformerConfig,
    presets=PRESETS,
    build=Transformer,
    load=_load,
    layout=_layout,
    reads="a Hugging Face folder of a Llama, Mistral or Qwen2",
    train_form=TransformerTrain,
    from_training=_from_training,
    init=_init,
    roles=(
        ("*embed_tokens.weight", "embedding"),
        ("lm_head.*", "head"),
        ("*norm.weight", "norm"),
        ("*_proj.weight", "projection"),
        ("*", "other"),
    ),
    state_note="keys and values of every token up to max_tokens, or of sinks and window: constant then",
)
