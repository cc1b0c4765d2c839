"""Reformer: hashed and local attention, reversible residuals, whole sequences (arXiv 2001.04451).

Sources:
    1. Kitaev, Kaiser and Levskaya, Reformer, arXiv 2001.04451: section 2 (hashing, shared queries and keys,
       sorting, chunks, rounds, the causal mask and the token itself), 3 (reversible layers).
    2. Hugging Face transformers, ``models/reformer``: the form that is computed here wherever [1] leaves a
       choice, the axial positions, and the checkpoint layout.

Glossary:
    B batch, T tokens, d width, H heads, K head size, R rounds of hashing, b buckets, c length of a chunk.

Reversible layers, computed plainly: X_1 = X_2 = embedding; Y_1 = X_1 + attention(LN X_2),
Y_2 = X_2 + FFN(LN Y_1); logits = [LN(Y_1, Y_2)] W + bias with both halves side by side.

``lsh`` attention: q and k are the same projection, k = q / |q|. In round r a token's bucket is
argmax([q W_r, -q W_r]) with a constant random matrix W_r [K,b/2]; b may be a product of factors, each with
columns of its own. Tokens are sorted by (bucket, position), cut into chunks of c, and attend to their own
chunk and the ``before`` chunks in front of it (of the first one that is the last of the round before). What
comes later is masked (causal), and a token sees itself only if it sees nothing else. The rounds' outputs are
weighted by the softmax of their normalisers. ``local`` attention: the same chunks of the unsorted sequence,
with a separate key, scores q.k / sqrt(K), and the token itself.

The matrices W_r are part of the model (``rotations``). [2] draws new ones at every call unless its
configuration has a ``hash_seed``; with one, the very same numbers are drawn here.

Not a chunk-form model: a later token can move an earlier one into another chunk of the sorted order, so
every sequence is computed as a whole, causal mask or not. Any length up to ``max_tokens`` may be given.
Inside the graph it is filled up to a multiple of both chunk lengths; the filling has a bucket of its own,
behind all others, and is masked. Where [2] falls back to plain attention (T <= c), a chunk that sees itself,
as often as there are chunks in view, is the same.

Departure: [2] takes exp(score - normaliser) for softmax. The score of a token that sees nothing but itself is
-100000, where float32 has two digits left behind the point; here the largest score is subtracted first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xexport.core.checkpoint import RawCheckpoint, match_tensors, own_config, require_keys, unreadable
from xexport.core.errors import CheckpointError, InputError, LimitError
from xexport.core.family import Family, LoadedModel
from xexport.core.state import StateSpec

__all__ = ["FAMILY", "Reformer", "ReformerConfig", "ReformerTrain"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
#: scores of what a token may not see, and of the token itself (lsh), which wins where nothing else is seen
_UNSEEN, _ITSELF = -1e9, -1e5


@dataclass(frozen=True)
class ReformerConfig:
    """Sizes of a Reformer.

    Attributes:
        vocab_size, width: V, d.
        attention: ``lsh`` or ``local`` of every layer.
        heads, head_size, ffn: H, K, inner width of the feed-forward network.
        lsh_chunk, local_chunk: c.
        lsh_before, lsh_after, local_before, local_after: chunks in view besides a token's own.
        hashes: R. buckets: b, or its factors, all even.
        axial_shape, axial_widths: (rows, columns) and the widths of their vectors, put side by side; empty
            for a vector a position.
        max_tokens: the longest sequence.
        causal: mask what comes later.
        activation: ``relu``, ``gelu`` or ``silu``.
        eps: epsilon of the layer norms.
    """

    vocab_size: int = 256
    width: int = 192
    attention: tuple[str, ...] = ("local", "lsh", "local", "lsh")
    heads: int = 4
    head_size: int = 48
    ffn: int = 768
    lsh_chunk: int = 64
    local_chunk: int = 64
    lsh_before: int = 1
    lsh_after: int = 0
    local_before: int = 1
    local_after: int = 0
    hashes: int = 2
    buckets: tuple[int, ...] = (32,)
    axial_shape: tuple[int, ...] = (32, 32)
    axial_widths: tuple[int, ...] = (64, 128)
    max_tokens: int = 1024
    causal: bool = True
    activation: str = "relu"
    eps: float = 1e-12

    def __post_init__(self) -> None:
        sizes = (self.vocab_size, self.width, self.heads, self.head_size, self.ffn, self.max_tokens)
        if min(*sizes, self.lsh_chunk, self.local_chunk, self.hashes) < 1:
            raise InputError("a Reformer size is too small", got=self)
        if not self.attention or set(self.attention) - {"lsh", "local"}:
            raise InputError("unknown attention", got=self.attention, allowed="lsh or local, one a layer")
        if not self.buckets or any(b < 2 or b % 2 for b in self.buckets):
            raise InputError("a Reformer's buckets must be even", got=self.buckets, allowed="2, 4, 6 ...")
        seen = (self.lsh_before, self.lsh_after, self.local_before, self.local_after)
        if min(seen) < 0 or max(seen) > 2:
            raise InputError("chunks in view", got=seen, allowed="0 to 2 on each side")
        if self.causal and (self.lsh_after or self.local_after):
            raise InputError(
                "a causal Reformer sees no later chunks", got=seen, allowed="lsh_after, local_after = 0"
            )
        if self.axial_shape and (len(self.axial_shape) != 2 or len(self.axial_widths) != 2):
            raise InputError("axial positions have two axes", got=(self.axial_shape, self.axial_widths))
        if self.axial_shape and sum(self.axial_widths) != self.width:
            raise InputError(
                "the axial widths do not add up to the width", got=(self.axial_widths, self.width)
            )
        if self.axial_shape and math.prod(self.axial_shape) < self.max_tokens:
            raise InputError("fewer axial positions than tokens", got=(self.axial_shape, self.max_tokens))
        if self.activation not in _ACTIVATIONS:
            raise InputError("unknown activation", got=self.activation, allowed=", ".join(_ACTIVATIONS))

    @property
    def unit(self) -> int:
        """What a sequence is filled up to a multiple of."""
        lengths = {"lsh": self.lsh_chunk, "local": self.local_chunk}
        return math.lcm(*(lengths[kind] for kind in set(self.attention)))


class _Positions(nn.Module):
    """A vector a position; of two parts, by row and by column, if axial."""

    def __init__(self, c: ReformerConfig) -> None:
        super().__init__()
        self.columns = c.axial_shape[1] if c.axial_shape else 0
        if self.columns:
            shapes = ((c.axial_shape[0], 1), (1, self.columns))
            rows = (torch.zeros(*s, w) for s, w in zip(shapes, c.axial_widths, strict=True))
            self.weights = nn.ParameterList(nn.Parameter(r) for r in rows)
        else:
            self.embedding = nn.Embedding(c.max_tokens, c.width)

    def forward(self, positions: Tensor) -> Tensor:
        """int64 [T] -> [T,d]."""
        if not self.columns:
            found: Tensor = self.embedding(positions)
            return found
        places = (torch.div(positions, self.columns, rounding_mode="floor"), positions % self.columns)
        return torch.cat(
            [F.embedding(at, w.flatten(0, 1)) for at, w in zip(places, self.weights, strict=True)], -1
        )


class _Embeddings(nn.Module):
    def __init__(self, c: ReformerConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(c.vocab_size, c.width)
        self.position_embeddings = _Positions(c)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        y: Tensor = self.word_embeddings(tokens) + self.position_embeddings(positions)
        return y


class _Attention(nn.Module):
    """What the two kinds share: heads, and chunks in view of one another."""

    chunk: int
    before: int
    after: int

    def __init__(self, c: ReformerConfig) -> None:
        super().__init__()
        self.c = c

    def heads(self, y: Tensor) -> Tensor:
        """``[B,T,H*K]`` -> ``[B,H,T,K]``."""
        return torch.unflatten(y, -1, (self.c.heads, -1)).transpose(1, 2)

    def in_view(self, x: Tensor) -> Tensor:
        """Chunks ``[...,N,c,K]`` with those around them, in a circle: ``[...,N,(1+before+after)c,K]``."""
        index = torch.arange(x.shape[-3], device=x.device)
        count = torch.full_like(index, x.shape[-3])  # a tensor: torch.onnx can't take a remainder by a length
        shifts = range(-self.before, self.after + 1)
        views = [x if n == 0 else torch.index_select(x, -3, (index + n) % count) for n in shifts]
        return torch.cat(views, -2)

    def masked(self, scores: Tensor, here: Tensor, there: Tensor, length: int) -> Tensor:
        """Scores with those of the filling and, if causal, of later tokens replaced.

        Args:
            here, there: positions of queries ``[...,N,c,1]`` and keys ``[...,N,1,w]``; length: T.
        """
        allowed = there < length
        if self.c.causal:
            allowed = allowed & (there <= here)
        return torch.where(allowed, scores, _UNSEEN)


class _Local(_Attention):
    def __init__(self, c: ReformerConfig) -> None:
        super().__init__(c)
        self.chunk, self.before, self.after = c.local_chunk, c.local_before, c.local_after
        inner = c.heads * c.head_size
        self.query, self.key, self.value = (nn.Linear(c.width, inner, bias=False) for _ in range(3))

    def forward(self, x: Tensor, length: int) -> Tensor:
        """``[B,P,d]`` of which the first ``length`` are tokens -> ``[B,P,H*K]``."""
        q, k, v = (
            torch.unflatten(self.heads(p(x)), 2, (-1, self.chunk)) for p in (self.query, self.key, self.value)
        )
        here = torch.unflatten(torch.arange(x.shape[1], device=x.device), 0, (-1, self.chunk))[..., None]
        there = self.in_view(here).transpose(-1, -2)
        scores = q @ self.in_view(k * self.c.head_size**-0.5).transpose(-1, -2)
        share = self.masked(scores, here, there, length).softmax(-1)
        return (share @ self.in_view(v)).flatten(2, 3).transpose(1, 2).flatten(2)


class _Hashed(_Attention):
    rotations: Tensor

    def __init__(self, c: ReformerConfig) -> None:
        super().__init__(c)
        self.chunk, self.before, self.after = c.lsh_chunk, c.lsh_before, c.lsh_after
        inner = c.heads * c.head_size
        self.query_key, self.value = (nn.Linear(c.width, inner, bias=False) for _ in range(2))
        self.register_buffer("rotations", torch.zeros(rotation_shape(c)))

    def forward(self, x: Tensor, length: int) -> Tensor:
        """``[B,P,d]`` of which the first ``length`` are tokens -> ``[B,P,H*K]``."""
        qk, v = self.heads(self.query_key(x)), self.heads(self.value(x))
        order = self.sorted(self.buckets(qk.detach(), length))
        o, weight = self.attended(self.chunks(qk, order), self.chunks(v, order), order, length)
        inverse = _inverse(order)
        o = self.restored(o, inverse)
        if self.c.hashes > 1:
            o = o * self.restored(weight, inverse).softmax(2)
        return o.sum(2).transpose(1, 2).flatten(2)

    def buckets(self, qk: Tensor, length: int) -> Tensor:
        """The buckets ``[B,H,R,P]`` of ``qk [B,H,P,K]``; what is no token has one behind all others."""
        turned = torch.unflatten(qk @ self.rotations.flatten(2), -1, (self.c.hashes, -1)).transpose(2, 3)
        bucket, product = None, 1
        for factor, part in zip(
            self.c.buckets, torch.split(turned, [b // 2 for b in self.c.buckets], -1), strict=True
        ):
            found = torch.cat((part, -part), -1).argmax(-1) * product
            bucket = found if bucket is None else bucket + found
            product *= factor
        assert bucket is not None
        return torch.where(torch.arange(qk.shape[2], device=qk.device) < length, bucket, product)

    def sorted(self, bucket: Tensor) -> Tensor:
        """The positions ``[B,H,R,P]`` by bucket, and in a bucket by position."""
        count = bucket.shape[-1]
        return torch.argsort(bucket * count + torch.arange(count, device=bucket.device), -1)

    def chunks(self, x: Tensor, order: Tensor) -> Tensor:
        """``x [B,H,P,K]`` in every round's order, cut into chunks: ``[B,H,N,c,K]``."""
        rows = torch.index_select(x.flatten(0, 2), 0, _rows(order, order.shape[3], rounds=False))
        return self.cut(torch.unflatten(rows, 0, (order.shape[0], order.shape[1], -1)))

    def cut(self, x: Tensor) -> Tensor:
        """``[B,H,R*P,...]`` -> ``[B,H,N,c,...]``."""
        return torch.unflatten(x, 2, (-1, self.chunk))

    def attended(self, q: Tensor, v: Tensor, order: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Outputs ``[B,H,R*P,K]`` in sorted order, and the logarithms of their normalisers, K = 1."""
        k = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + 1e-6) * self.c.head_size**-0.5
        here = self.cut(order.flatten(2))[..., None]
        there = self.in_view(here).transpose(-1, -2)
        scores = self.masked(q @ self.in_view(k).transpose(-1, -2), here, there, length)
        scores = torch.where(here == there, _ITSELF, scores)
        total = scores.logsumexp(-1, keepdim=True)
        o = scores.softmax(-1) @ self.in_view(v)
        return o.flatten(2, 3), total.flatten(2, 3)

    def restored(self, x: Tensor, inverse: Tensor) -> Tensor:
        """``x [B,H,R*P,.]`` of sorted positions, in their own order, by round: ``[B,H,R,P,.]``."""
        rows = torch.index_select(x.flatten(0, 2), 0, _rows(inverse, inverse.shape[3], rounds=True))
        return torch.unflatten(rows, 0, (inverse.shape[0], inverse.shape[1], inverse.shape[2], -1))


def _inverse(order: Tensor) -> Tensor:
    """Where each position ``[B,H,R,P]`` stands in the sorted order."""
    place = torch.arange(order.shape[3], device=order.device).expand_as(order)
    return torch.zeros_like(order).scatter(3, order, place)


def _rows(index: Tensor, count: int, rounds: bool) -> Tensor:
    """Indices ``[B,H,R,P]`` into P of a table ``[B,H,P]``, or ``[B,H,R,P]``, as rows of the flat table."""
    batch, heads, hashes = index.shape[:3]
    if rounds:
        start = torch.arange(batch * heads * hashes, device=index.device).reshape(batch, heads, hashes, 1)
    else:
        start = torch.arange(batch * heads, device=index.device).reshape(batch, heads, 1, 1)
    return (index + start * count).flatten()


def rotation_shape(c: ReformerConfig) -> tuple[int, int, int, int]:
    """Of a layer's random matrices: ``[H,K,R,columns]``."""
    return c.heads, c.head_size, c.hashes, sum(c.buckets) // 2


class _Dense(nn.Module):
    """A linear layer under the name that [2] gives it."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dense(x)
        return y


class _AttentionPart(nn.Module):
    def __init__(self, c: ReformerConfig, kind: str) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(c.width, c.eps)
        self.self_attention = _Hashed(c) if kind == "lsh" else _Local(c)
        self.output = _Dense(c.heads * c.head_size, c.width, bias=False)

    def forward(self, x: Tensor, length: int) -> Tensor:
        y: Tensor = self.output(self.self_attention(self.layer_norm(x), length))
        return y


class _FeedForward(nn.Module):
    def __init__(self, c: ReformerConfig) -> None:
        super().__init__()
        self.act = _ACTIVATIONS[c.activation]
        self.layer_norm = nn.LayerNorm(c.width, c.eps)
        self.dense = _Dense(c.width, c.ffn, bias=True)
        self.output = _Dense(c.ffn, c.width, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.output(self.act(self.dense(self.layer_norm(x))))
        return y


class _Layer(nn.Module):
    def __init__(self, c: ReformerConfig, kind: str) -> None:
        super().__init__()
        self.attention = _AttentionPart(c, kind)
        self.feed_forward = _FeedForward(c)


class _Encoder(nn.Module):
    def __init__(self, c: ReformerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(c, kind) for kind in c.attention)
        self.layer_norm = nn.LayerNorm(2 * c.width, c.eps)


class _Body(nn.Module):
    def __init__(self, c: ReformerConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(c)
        self.encoder = _Encoder(c)


class _Head(nn.Module):
    def __init__(self, c: ReformerConfig) -> None:
        super().__init__()
        self.decoder = nn.Linear(2 * c.width, c.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(c.vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.decoder(x) + self.bias
        return y


class Reformer(nn.Module):
    """The whole form: ``forward(tokens [B,T] int64) -> (logits [B,T,V],)`` for T <= max_tokens.

    A longer sequence is a LimitError in PyTorch and from a runtime.
    """

    form = "whole"

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.max_tokens = config.max_tokens
        self.predicts_next = config.causal
        self.reformer = _Body(config)
        self.lm_head = _Head(config)

    def state_spec(self) -> list[StateSpec]:
        """Nothing is carried."""
        return []

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        length, unit = tokens.shape[1], self.config.unit
        # a graph serves every length, and its runtime knows the limit
        if not torch.compiler.is_compiling() and length > self.max_tokens:
            raise LimitError("a sequence is longer than the positions", got=length, allowed=self.max_tokens)
        filled = (length + unit - 1) // unit * unit
        x = F.pad(self.reformer.embeddings(tokens), (0, 0, 0, filled - length))
        encoder, y = self.reformer.encoder, x
        for layer in encoder.layers:
            assert isinstance(layer, _Layer)
            x = x + layer.attention(y, length)
            y = y + layer.feed_forward(x)
        # rows by number: the length of a slice would be min(T, filled), for all that torch.export knows
        tokens_alone = torch.arange(length, device=tokens.device)
        both = torch.cat((x, y), -1).index_select(1, tokens_alone)
        return (self.lm_head(encoder.layer_norm(both)),)


class ReformerTrain(Reformer):
    """The training form: ``forward(tokens [B,T]) -> logits [B,T,V]``; buckets have no gradient."""

    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(tokens)[0]


def _init(module: nn.Module, seed: int) -> None:
    """Fill a Reformer (either form) with weights to train from, and draw its rotations.

    Projections have the variance 1/fan_in; those that write to a stream are smaller by sqrt(2 * layers).
    """
    assert isinstance(module, Reformer)
    c, rng = module.config, torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim < 2:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            std = float(p.shape[-1] ** -0.5)
            if "embeddings" in name:
                std = 0.5
            elif name.endswith("output.dense.weight"):
                std *= (2 * len(c.attention)) ** -0.5
            elif name.startswith("lm_head"):
                std *= 0.25
            p.copy_(torch.randn(p.shape, generator=rng) * std)
        for name, table in module.named_buffers():
            assert name.endswith("rotations")
            table.copy_(torch.randn(table.shape, generator=rng))


_KEYS = (
    "reformer.embeddings.word_embeddings.weight",
    "reformer.encoder.layer_norm.weight",
    "lm_head.decoder.weight",
)


def _layout(raw: RawCheckpoint) -> str | None:
    kind = raw.config.get("model_type")
    return "its config.json says model_type reformer" if kind == "reformer" else None


def _load(raw: RawCheckpoint) -> LoadedModel:
    """A Hugging Face folder of a Reformer with a head for text, or a file of xexport's own training."""
    config = own_config(raw, "reformer", ReformerConfig)
    tensors, notes = dict(raw.tensors), list[str]()
    if config is None:
        if _layout(raw) is None:
            raise unreadable(
                raw, "a Reformer", "a Hugging Face folder of model_type reformer, or xexport's own training"
            )
        require_keys(raw, _KEYS, "reformer")
        config, notes = _config_from_hugging_face(raw)
        tensors |= _drawn(config, raw.config.get("hash_seed"))
        tensors.setdefault("lm_head.bias", torch.zeros(config.vocab_size))
    with torch.device("meta"):
        wanted = Reformer(config)
    found = match_tensors(tensors, wanted, raw.path.name)
    bytes_alone = "bytes" if config.vocab_size == 256 else None
    return LoadedModel("reformer", config, found, bytes_alone, str(raw.path), tuple(notes))


def _drawn(c: ReformerConfig, seed: int | None) -> dict[str, Tensor]:
    """Every hashed layer's rotations: as [2] draws them from a seed, or from one of our own."""
    rng = torch.Generator(device="cpu").manual_seed(0)
    result = {}
    for i, kind in enumerate(c.attention):
        if kind == "lsh":
            if seed is not None:  # [2] starts again in every layer
                rng.manual_seed(seed)
            drawn = torch.randn(rotation_shape(c), generator=rng, device="cpu")
            result[f"reformer.encoder.layers.{i}.attention.self_attention.rotations"] = drawn
    return result


def _config_from_hugging_face(raw: RawCheckpoint) -> tuple[ReformerConfig, list[str]]:
    """Sizes from config.json, and what there is to say about them."""
    c, notes = raw.config, []
    axial = bool(c.get("axial_pos_embds", True))
    try:
        longest = int(c.get("max_position_embeddings", 4096))
        shape = tuple(map(int, c.get("axial_pos_shape", (64, 64)))) if axial else ()
        buckets = c.get("num_buckets")
        if buckets is None:
            buckets = _bucket_count(longest, int(c.get("lsh_attn_chunk_length") or 64))
            notes.append(f"num_buckets is not set: {buckets}, for the longest sequence of {longest} tokens")
        if c.get("hash_seed") is None:
            notes.append(
                "hash_seed is not set: the random rotations were drawn once and belong to the model now"
            )
        config = ReformerConfig(
            vocab_size=int(c.get("vocab_size", 320)),
            width=int(c.get("hidden_size", 256)),
            attention=tuple(c.get("attn_layers", ("local", "lsh") * 3)),
            heads=int(c.get("num_attention_heads", 12)),
            head_size=int(c.get("attention_head_size", 64)),
            ffn=int(c.get("feed_forward_size", 512)),
            lsh_chunk=int(c.get("lsh_attn_chunk_length") or 64),
            local_chunk=int(c.get("local_attn_chunk_length") or 64),
            lsh_before=int(c.get("lsh_num_chunks_before", 1)),
            lsh_after=int(c.get("lsh_num_chunks_after", 0)),
            local_before=int(c.get("local_num_chunks_before", 1)),
            local_after=int(c.get("local_num_chunks_after", 0)),
            hashes=int(c.get("num_hashes", 1)),
            buckets=(buckets,) if isinstance(buckets, int) else tuple(map(int, buckets)),
            axial_shape=shape,
            axial_widths=tuple(map(int, c.get("axial_pos_embds_dim", (64, 192)))) if axial else (),
            max_tokens=min(longest, math.prod(shape)) if axial else longest,
            causal=bool(c.get("is_decoder", False)),
            activation=str(c.get("hidden_act", "relu")),
            eps=float(c.get("layer_norm_eps", 1e-12)),
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError("config.json has a malformed size", got=error) from error
    return config, notes


def _bucket_count(length: int, chunk: int) -> int | list[int]:
    """What [2] chooses for ``length`` tokens: twice the chunks, a power of two, in two factors if large."""
    power = (2 * (length // chunk)).bit_length() - 1
    if 2**power <= 2 * max(int((length // chunk) ** 0.5), chunk):
        return int(2**power)
    return [2 ** (power // 2), 2 ** (power - power // 2)]


FAMILY = Family(
    name="reformer",
    title="Reformer: hashed and local attention, whole sequences (arXiv 2001.04451)",
    sources=("https://arxiv.org/abs/2001.04451", "https://github.com/huggingface/transformers"),
    config=ReformerConfig,
    presets={
        "tiny": ReformerConfig(
            vocab_size=29,
            width=32,
            attention=("local", "lsh"),
            heads=2,
            head_size=12,
            ffn=48,
            lsh_chunk=8,
            local_chunk=12,
            buckets=(4,),
            axial_shape=(9, 20),
            axial_widths=(12, 20),
            max_tokens=170,
        ),
        "zoo": ReformerConfig(),
        # the sizes of google/reformer-crime-and-punishment and google/reformer-enwik8
        "crime": ReformerConfig(
            vocab_size=320,
            width=256,
            attention=("local", "lsh") * 3,
            heads=2,
            head_size=64,
            ffn=512,
            hashes=1,
            buckets=(64, 128),
            axial_shape=(512, 1024),
            axial_widths=(64, 192),
            max_tokens=524288,
        ),
        "enwik8": ReformerConfig(
            vocab_size=258,
            width=1024,
            attention=("local", "local", "lsh", "local") * 3,
            heads=8,
            head_size=128,
            ffn=4096,
            lsh_chunk=256,
            local_chunk=128,
            hashes=4,
            buckets=(512,),
            axial_shape=(128, 512),
            axial_widths=(256, 768),
            max_tokens=65536,
        ),
    },
    build=Reformer,
    load=_load,
    layout=_layout,
    reads="a Hugging Face folder of model_type reformer",
    train_form=ReformerTrain,
    init=_init,
    roles=(
        ("*word_embeddings.weight", "embedding"),
        ("*position_embeddings.*", "other"),
        ("lm_head.decoder.*", "head"),
        ("*layer_norm.*", "norm"),
        ("*.rotations", "filter"),
        ("*.query_key.weight", "choice"),
        ("*.query.weight", "projection"),
        ("*.key.weight", "projection"),
        ("*.value.weight", "projection"),
        ("*.dense.weight", "projection"),
    ),
    state_note="none: the whole sequence at once",
)
