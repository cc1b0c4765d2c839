"""Hourglass: layers on all tokens around layers on shortened sequences, causal by shifted pooling.

Sources:
    1. Nawrot et al., Hierarchical Transformers Are More Efficient Language Models, arXiv 2110.13711,
       section 2: shortening, upsampling, attention resampling; section 2.1: the shift that keeps it causal.
    2. lucidrains/hourglass-transformer-pytorch 0.0.6 (MIT): the blocks and the layout read here.

Glossary:
    B batch, T tokens, d width, s shortening factor of a level, N rows of a level, g a group of s rows,
    H heads, K head size, L longest stream.

One level over rows x_0, x_1, ...:
    y = pre(x)
    group g = (y_{gs-s+1} .. y_{gs}), zeros before the first row: complete as soon as row gs is there
    d_g = mean(group), or W concat(group) + b
          with attention resampling  d = d + A(LN(d), group), d = d + F(LN(d))
    v = the next level, or the valley's layers, over d_0, d_1, ...
    u_i = y_i + v_{i//s}, or y_i + (W' v_{i//s} + b')_{i mod s}
          with attention resampling  u = u + A'(LN(u), v_{i//s}), u = u + F'(LN(u))
    output = post(u)
A' attends to a single row, so its softmax is 1 and it is W_o W_v v + b_o: its norm, queries and keys do
nothing and are not kept. Blocks: X + A(LN(X)), then X + F(LN(X)), F = W_2 gelu(W_1 X). The positions are
trained embeddings of tokens, as in [2] (the paper's model has relative attention).

A group is needed from its last row on, and made then: a step runs a level of 1/s of the rows in one step of s
(models/_patches.py).

State, level n: ``<n>.pre.<i>.keys``, ``.values`` [B,H,L_n,K], ``<n>.recent`` [B,s-1,d], the last rows of y;
``<n>.context`` [B,C,d], what the current group gives to its rows (C = 1, or s if linear; one more with
attention resampling); ``<n>.post.<i>.*``; of the valley ``valley.<i>.*``; ``position`` [1] int64. L_n is L
divided by all factors before, rounded up. There is no token L+1 (LimitError).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xexport.core.checkpoint import RawCheckpoint, match_tensors, own_config, require_keys, unreadable
from xexport.core.errors import CheckpointError, InputError
from xexport.core.family import Family, LoadedModel
from xexport.core.state import StateSpec
from xexport.models._chunk import FromFirstState
from xexport.models._fill import fill
from xexport.models._patches import Everything, Place, Span, recent

__all__ = ["FAMILY", "Hourglass", "HourglassConfig", "HourglassTrain"]


@dataclass(frozen=True)
class HourglassConfig:
    """Sizes and options of an Hourglass.

    Attributes:
        vocab_size, width, heads: V, d, H.
        head_size: K; 0 is d/H.
        factors: s of every level, the outermost first.
        pre, post: layers of every level before and after the shortened part.
        valley: layers of the most shortened part.
        linear: shorten and lengthen by a matrix instead of mean and repetition.
        attention: attention resampling.
        ffn_factor: inner width of the feed-forward networks over d.
        max_tokens: L.
        eps: epsilon of the layer norms.
    """

    vocab_size: int = 256
    width: int = 128
    heads: int = 4
    head_size: int = 0
    factors: tuple[int, ...] = (2, 2)
    pre: tuple[int, ...] = (1, 1)
    post: tuple[int, ...] = (1, 1)
    valley: int = 1
    linear: bool = True
    attention: bool = True
    ffn_factor: int = 4
    max_tokens: int = 2048
    eps: float = 1e-5

    def __post_init__(self) -> None:
        sizes = (self.vocab_size, self.width, self.heads, self.valley, self.ffn_factor, self.max_tokens)
        if min(*sizes, *self.pre, *self.post) < 1:
            raise InputError("an Hourglass size is below 1", got=self)
        if not self.factors or min(self.factors) < 2:
            raise InputError("shortening factors are 2 or more, one a level", got=self.factors)
        if not len(self.factors) == len(self.pre) == len(self.post):
            raise InputError(
                "every level has a factor and layers before and after",
                got=(self.factors, self.pre, self.post),
            )
        if not self.head_size and self.width % self.heads:
            raise InputError("the width is not a multiple of the heads", got=(self.width, self.heads))

    @property
    def size(self) -> int:
        """K."""
        return self.head_size or self.width // self.heads

    def rows(self, level: int) -> int:
        """L_n."""
        return math.ceil(self.max_tokens / math.prod(self.factors[:level]))


class _FeedForward(nn.Module):
    """X + F(LN(X))."""

    def __init__(self, c: HourglassConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(c.width, c.eps)
        self.fc1 = nn.Linear(c.width, c.ffn_factor * c.width)
        self.fc2 = nn.Linear(c.ffn_factor * c.width, c.width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm(x))))
        return y


class _Block(nn.Module):
    """A causal layer."""

    def __init__(self, c: HourglassConfig) -> None:
        super().__init__()
        self.heads, self.size = c.heads, c.size
        self.norm = nn.LayerNorm(c.width, c.eps)
        self.qkv_proj = nn.Linear(c.width, 3 * c.heads * c.size, bias=False)
        self.o_proj = nn.Linear(c.heads * c.size, c.width)
        self.ffn = _FeedForward(c)

    def forward(self, x: Tensor, place: Place, state: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        q, k, v = torch.unflatten(self.qkv_proj(self.norm(x)), -1, (3, self.heads, self.size)).unbind(2)
        o, new = place.attend(q, k, v, state)
        return self.ffn(x + self.o_proj(o)), new


class _Gathering(nn.Module):
    """The attention of a shortened row to its group."""

    def __init__(self, c: HourglassConfig) -> None:
        super().__init__()
        self.heads, self.size = c.heads, c.size
        self.norm = nn.LayerNorm(c.width, c.eps)
        self.q_proj = nn.Linear(c.width, c.heads * c.size, bias=False)
        self.kv_proj = nn.Linear(c.width, 2 * c.heads * c.size, bias=False)
        self.o_proj = nn.Linear(c.heads * c.size, c.width)
        self.ffn = _FeedForward(c)

    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        """``x [B,N,d]`` and ``group [B,N,s,d]``."""
        q = torch.unflatten(self.q_proj(self.norm(x)) * self.size**-0.5, -1, (self.heads, 1, self.size))
        k, v = torch.unflatten(self.kv_proj(group), -1, (2, self.heads, self.size)).unbind(3)
        share = (q @ k.permute(0, 1, 3, 4, 2)).softmax(-1)
        o = (share @ v.transpose(2, 3)).flatten(2)
        y: Tensor = self.ffn(x + self.o_proj(o))
        return y


class _Spreading(nn.Module):
    """The attention of rows to the one shortened row that they share."""

    def __init__(self, c: HourglassConfig) -> None:
        super().__init__()
        self.v_proj = nn.Linear(c.width, c.heads * c.size, bias=False)
        self.o_proj = nn.Linear(c.heads * c.size, c.width)
        self.ffn = _FeedForward(c)


class _Level(nn.Module):
    """One level, and within it the next or the valley."""

    def __init__(self, c: HourglassConfig, level: int) -> None:
        super().__init__()
        self.c, self.level, self.factor = c, level, c.factors[level]
        self.pre = nn.ModuleList(_Block(c) for _ in range(c.pre[level]))
        self.down = nn.Linear(self.factor * c.width, c.width) if c.linear else None
        self.gather = _Gathering(c) if c.attention else None
        last = level + 1 == len(c.factors)
        self.valley = nn.ModuleList(_Block(c) for _ in range(c.valley)) if last else None
        self.inner = None if last else _Level(c, level + 1)
        self.up = nn.Linear(c.width, self.factor * c.width) if c.linear else None
        self.spread = _Spreading(c) if c.attention else None
        self.post = nn.ModuleList(_Block(c) for _ in range(c.post[level]))

    def state_spec(self) -> list[StateSpec]:
        """The level's tensors, with those of what is within it between."""
        c, n = self.c, self.level

        def caches(name: str, layers: int, rows: int) -> list[StateSpec]:
            shape = ("B", c.heads, rows, c.size)
            return [StateSpec(f"{name}.{i}.{k}", shape) for i in range(layers) for k in ("keys", "values")]

        pieces = (self.factor if c.linear else 1) + c.attention
        within = caches("valley", c.valley, c.rows(n + 1)) if self.inner is None else self.inner.state_spec()
        return [
            *caches(f"{n}.pre", c.pre[n], c.rows(n)),
            StateSpec(f"{n}.recent", ("B", self.factor - 1, c.width)),
            StateSpec(f"{n}.context", ("B", pieces, c.width)),
            *within,
            *caches(f"{n}.post", c.post[n], c.rows(n)),
        ]

    def forward(self, x: Tensor, span: Span, state: list[Tensor], whole: bool) -> tuple[Tensor, list[Tensor]]:
        """Rows ``x [B,N,d]`` at ``span`` -> the same shape, and the new state."""
        s = self.factor
        place = Everything(span, None, x.dtype, whole)
        after = len(state) - 2 * len(self.post)
        x, new = _through(self.pre, x, place, state)
        before, context, *within = state[len(new) : after]
        rows = Span.between((span.begin + (s - 1)) // s, (span.end + (s - 1)) // s)
        made, inner = self._shortened(x, before, span, rows, within, whole)
        context = torch.cat((context[:, None], made), 1)
        new += [self._last(before, x), context[:, -1], *inner]
        x = self._lengthened(x, context, span, rows)
        x, post = _through(self.post, x, place, state[after:])
        return x, [*new, *post]

    def _last(self, before: Tensor, x: Tensor) -> Tensor:
        """The last s-1 rows; ``x`` may have fewer, or none."""
        index = torch.arange(self.factor - 1, device=x.device) + x.shape[1]
        return recent(before, x, index)

    def _shortened(
        self, x: Tensor, before: Tensor, span: Span, rows: Span, state: list[Tensor], whole: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """What the new groups give to their rows ``[B,N',C,d]``, and the state of what is within."""
        s, d = self.factor, self.c.width
        index = (rows.index * s - span.begin)[:, None] + torch.arange(s, device=x.device)
        # of concat(the s-1 rows before the chunk, chunk)
        group = recent(before, x, index.flatten()).view(x.shape[0], rows.count, s, d)
        y = group.mean(2) if self.down is None else self.down(group.flatten(2))
        if self.gather is not None:
            y = self.gather(y, group)
        if self.inner is not None:
            y, new = self.inner(y, rows, state, whole)
        else:
            assert self.valley is not None
            y, new = _through(self.valley, y, Everything(rows, None, y.dtype, whole), state)
        given = y[:, :, None] if self.up is None else self.up(y).view(x.shape[0], rows.count, s, d)
        if self.spread is not None:
            attended = self.spread.o_proj(self.spread.v_proj(y))
            given = torch.cat((given, attended[:, :, None]), 2)
        return given, new

    def _lengthened(self, x: Tensor, context: Tensor, span: Span, rows: Span) -> Tensor:
        """Rows ``x`` with what their groups give to them; ``context [B,1+N',C,d]``."""
        s, pieces = self.factor, context.shape[2]
        first = (span.index // s - rows.begin + 1) * pieces
        flat = context.flatten(1, 2)
        x = x + torch.index_select(flat, 1, first if self.up is None else first + span.index % s)
        if self.spread is not None:
            x = self.spread.ffn(x + torch.index_select(flat, 1, first + (pieces - 1)))
        return x


def _through(
    blocks: nn.ModuleList, x: Tensor, place: Place, state: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """``x`` through blocks, of which each has two tensors at the begin of ``state``."""
    new: list[Tensor] = []
    for i, block in enumerate(blocks):
        x, now = block(x, place, state[2 * i : 2 * i + 2])
        new += now
    return x, new


class Hourglass(nn.Module):
    """The chunk form: ``forward(tokens [B,T] int64, *state) -> (logits [B,T,V], *new_state)``.

    ``position + T`` must not exceed ``max_tokens``: LimitError in PyTorch and from a runtime.
    """

    whole = False

    def __init__(self, config: HourglassConfig) -> None:
        super().__init__()
        c = self.config = config
        self.vocab_size, self.max_tokens = c.vocab_size, c.max_tokens
        self.embed = nn.Embedding(c.vocab_size, c.width)
        self.places = nn.Embedding(c.max_tokens, c.width)
        self.level = _Level(c, 0)
        self.norm = nn.LayerNorm(c.width, c.eps)
        self.head = nn.Linear(c.width, c.vocab_size)

    def state_spec(self) -> list[StateSpec]:
        """The levels' tensors, then the position."""
        return [*self.level.state_spec(), StateSpec("position", (1,), "int64")]

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        *rest, position = state
        index = position + torch.arange(tokens.shape[1], device=tokens.device)
        span = Span(position, position + tokens.shape[1], index)
        # beyond the last place the caches refuse
        x = self.embed(tokens) + self.places(index.clamp(max=self.max_tokens - 1))
        x, new = self.level(x, span, rest, self.whole)
        return self.head(self.norm(x)), *new, span.end


class HourglassTrain(FromFirstState, Hourglass):
    """The training form: ``forward(tokens [B,T]) -> logits [B,T,V]``, differentiable; the same parameters."""

    whole = True


def _init(module: nn.Module, seed: int) -> None:
    """Fill an Hourglass (either form) with weights to train from.

    Projections that read the residual stream have the variance 1/fan_in, those that write to it are smaller
    by sqrt(2 * layers); the head starts small.
    """
    assert isinstance(module, Hourglass)
    c = module.config
    writes = dict.fromkeys(("*o_proj.weight", "*fc2.weight"), sum(c.pre) + sum(c.post) + c.valley)
    fill(module, seed, writes=writes, fixed={"embed.weight": 0.5, "places.weight": 0.5})


_KNOWN = "transformer.pre_transformer.layers.0.0.fn.to_q.weight"
_HEAD_SIZE = 64


def _layout(raw: RawCheckpoint) -> str | None:
    return f"it has hourglass-transformer-pytorch's {_KNOWN}" if _KNOWN in raw.tensors else None


def _load(raw: RawCheckpoint) -> LoadedModel:
    """A state_dict of HourglassTransformerLM, or a file of xexport's own training."""
    config = own_config(raw, "hourglass", HourglassConfig)
    tensors = dict(raw.tensors)
    notes: tuple[str, ...] = ()
    if config is None:
        if _KNOWN not in tensors:
            raise unreadable(
                raw,
                "an Hourglass",
                "a state_dict of hourglass-transformer-pytorch with linear resampling, or a "
                "safetensors file from xexport's own training",
            )
        config = _config_of(raw)
        tensors = _renamed(tensors, config)
        notes = (f"the file does not tell the head size, taken as {_HEAD_SIZE}, the package's default",)
    with torch.device("meta"):
        wanted = Hourglass(config)
    found = match_tensors({k: v.detach() for k, v in tensors.items()}, wanted, raw.path.name)
    tokenizer = "bytes" if config.vocab_size == 256 else None
    return LoadedModel("hourglass", config, found, tokenizer, source=str(raw.path), notes=notes)


def _levels(config_levels: int) -> list[str]:
    """Where the levels of [2] are."""
    return ["transformer." + "valley_transformer." * i for i in range(config_levels)]


def _config_of(raw: RawCheckpoint) -> HourglassConfig:
    """Sizes from the shapes of a state_dict of [2]."""
    keys = raw.tensors
    require_keys(raw, ("token_emb.weight", "pos_emb.weight", "to_logits.weight"), "hourglass")
    levels = 1
    while f"{_levels(levels + 1)[-1]}pre_transformer.layers.0.0.norm.weight" in keys:
        levels += 1
    paths = _levels(levels)
    if f"{paths[0]}downsample.proj.weight" not in keys:
        raise CheckpointError(
            "this Hourglass shortens by means, and its file does not tell the factors",
            got=raw.path.name,
            allowed="updown_sample_type='linear'",
            fix="save it through xexport's own training layout, whose metadata holds the configuration",
        )

    def count(path: str) -> int:
        return 1 + max(int(k.removeprefix(path).split(".")[0]) for k in keys if k.startswith(path))

    vocab, width = keys["token_emb.weight"].shape
    inner = keys[_KNOWN].shape[0]
    if inner % _HEAD_SIZE:
        raise CheckpointError("the inner width is not a multiple of the head size", got=(inner, _HEAD_SIZE))
    return HourglassConfig(
        vocab_size=vocab,
        width=width,
        heads=inner // _HEAD_SIZE,
        head_size=_HEAD_SIZE,
        factors=tuple(keys[f"{p}downsample.proj.weight"].shape[1] // width for p in paths),
        pre=tuple(count(f"{p}pre_transformer.layers.") for p in paths),
        post=tuple(count(f"{p}post_transformer.layers.") for p in paths),
        valley=count(f"{paths[-1]}valley_transformer.layers."),
        attention=f"{paths[0]}attn_resampling_pre_valley.layers.0.0.norm.weight" in keys,
        ffn_factor=keys[f"{paths[0]}pre_transformer.layers.0.1.fn.0.weight"].shape[0] // width,
        max_tokens=keys["pos_emb.weight"].shape[0],
    )


#: a layer of [2] -> here
_LAYER = {
    "0.norm.": "norm.",
    "0.fn.to_out.": "o_proj.",
    "1.norm.": "ffn.norm.",
    "1.fn.0.": "ffn.fc1.",
    "1.fn.3.": "ffn.fc2.",
}


def _renamed(tensors: dict[str, Tensor], c: HourglassConfig) -> dict[str, Tensor]:
    """Tensors of [2] under their names here."""
    outside = {
        "token_emb.": "embed.",
        "pos_emb.": "places.",
        "to_logits.": "head.",
        "transformer.norm_out.": "norm.",
    }
    found = _moved(tensors, outside)
    ours = "level."
    for n, theirs in enumerate(_levels(len(c.factors))):
        found |= _moved(
            tensors, {f"{theirs}downsample.proj.": f"{ours}down.", f"{theirs}upsample.proj.": f"{ours}up."}
        )
        stacks = {"pre_transformer": ("pre", c.pre[n]), "post_transformer": ("post", c.post[n])}
        if n + 1 == len(c.factors):
            stacks["valley_transformer"] = ("valley", c.valley)
        for stack, (name, layers) in stacks.items():
            for i in range(layers):
                found |= _layer(tensors, f"{theirs}{stack}.layers.{i}.", f"{ours}{name}.{i}.", ("qkv",))
        if c.attention:
            one = "layers.0."
            found |= _layer(
                tensors, f"{theirs}attn_resampling_pre_valley.{one}", f"{ours}gather.", ("q", "kv")
            )
            found |= _layer(tensors, f"{theirs}attn_resampling_post_valley.{one}", f"{ours}spread.", ("v",))
        ours += "inner."
    return found


def _layer(
    tensors: dict[str, Tensor], theirs: str, ours: str, projections: tuple[str, ...]
) -> dict[str, Tensor]:
    """One layer's tensors, its projections together as they are wanted."""
    found = _moved(tensors, {theirs + a: ours + b for a, b in _LAYER.items()})
    q, kv = (tensors[f"{theirs}0.fn.to_{p}.weight"] for p in ("q", "kv"))
    parts = {"q": q, "kv": kv, "v": kv[kv.shape[0] // 2 :], "qkv": torch.cat((q, kv))}
    return found | {f"{ours}{p}_proj.weight": parts[p] for p in projections}


def _moved(tensors: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Tensors whose names begin in one of the given ways, with their new beginning."""
    return {
        new + key.removeprefix(old): tensor
        for old, new in names.items()
        for key, tensor in tensors.items()
        if key.startswith(old)
    }


def _tiny(**changes: object) -> HourglassConfig:
    """A size for tests: two levels with different factors."""
    sizes: dict[str, object] = {
        "vocab_size": 29,
        "width": 16,
        "heads": 2,
        "factors": (3, 2),
        "ffn_factor": 2,
        "max_tokens": 96,
    }
    return HourglassConfig(**(sizes | changes))  # type: ignore[arg-type]


FAMILY = Family(
    name="hourglass",
    title="Hourglass: layers on shortened sequences, shifted pooling (arXiv 2110.13711)",
    sources=(
        "https://arxiv.org/abs/2110.13711",
        "https://github.com/lucidrains/hourglass-transformer-pytorch",
    ),
    config=HourglassConfig,
    presets={
        "tiny": _tiny(),
        "tiny-mean": _tiny(factors=(4,), pre=(1,), post=(2,), linear=False, attention=False),
        "tiny-mean-attention": _tiny(factors=(2,), pre=(1,), post=(1,), linear=False),
        "zoo": HourglassConfig(),
        # 2@1 8@3 2@1 in the notation of [1]
        "46m": HourglassConfig(256, 512, 8, 0, (3,), (2,), (2,), 8, max_tokens=2048),
    },
    build=Hourglass,
    load=_load,
    layout=_layout,
    reads=f"hourglass-transformer-pytorch's key {_KNOWN}",
    train_form=HourglassTrain,
    init=_init,
    roles=(
        ("embed.*", "embedding"),
        ("places.*", "embedding"),
        ("head.*", "head"),
        ("*norm.*", "norm"),
        ("*bias", "norm"),
        ("*.weight", "projection"),
    ),
    state_note="keys and values of every token and of every group up to the bound",
)
