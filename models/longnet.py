"""LongNet: dilated attention, whose cache is bounded by the segments, in the chunk form.

Sources:
    1. Ding et al., LongNet: Scaling Transformers to 1,000,000,000 Tokens, arXiv 2307.02486: section 2.2
       (equations 2 to 12), section 2.3 (heads begin at different places), section 4.1 (sizes, segments).
    2. microsoft/torchscale, ``dilated_attention.py``, ``decoder.py``, ``xpos_relative_position.py`` (MIT):
       the checkpoint's layout, the block, the order of heads.
    3. Sun et al., A Length-Extrapolatable Transformer, arXiv 2212.10554, section 2.2: xPos.
    4. Wang et al., Foundation Transformers, arXiv 2210.06423 (sub-layer norms, ``subln``), and DeepNet,
       arXiv 2203.00555 (``deepnorm``: norms behind, the residual times (2 layers)^(1/4)).

Glossary:
    B batch, T tokens, d width, H heads, K = d/H head size, P pairs of a segment length w and a rate r,
    R = sum of ceil(w/r), the rows of a head's cache.

One block (pre-norm, X the residual stream):
    Y = DA(LN(X)) + X        X' = FFN(LN(Y)) + Y        FFN(Z) = N(gelu(Z W1 + b1)) W2 + b2
    DA(X) = N(concat_h(o_h)) W_O + b_O,  o_h dilated attention (ops/dilated_attention) of q, k, v = X W + b
where N is a layer norm with ``subln`` and nothing without. Of the pair (w, r) head h takes every r-th token
of a segment of w, from token ``h mod r`` on [1], or from ``h // ceil(H/r)`` on, as [2] has it (``spread``).

Where this differs from [2]: a decoding step of [2] pads and masks by the length so far and is not what its
training computes; here every cut gives what the whole gives. A softmax's denominator of exactly 1 counts as
nothing in [2], and it misplaces the outputs of a pair whose rate does not divide its segment. The gradient
goes through the shares of the pairs, which [2] holds fixed.

xPos scales pair i of q by s_i^(n/base) and of k by s_i^(-n/base), n the position; only the difference of two
positions matters, and both lie in one segment, so n is counted from the middle of the least common multiple
of the segments: nothing grows with the stream. Angles are exact (models/_rotary.py).

State: ``layers.<i>.keys``, ``.values`` [B,H,R,K] float32: for every pair the last token at each place.
``position`` [1] int64, shared by the batch. Constant in the length of the stream.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xexport.core.checkpoint import RawCheckpoint, match_tensors, own_config, require_keys
from xexport.core.errors import CheckpointError, InputError
from xexport.core.family import Family, LoadedModel
from xexport.core.state import StateSpec
from xexport.models._fill import fill
from xexport.models._rotary import rope_angles, rotate_pairs, turns_of
from xexport.ops.dilated_attention.parallel import dilated_parallel
from xexport.ops.dilated_attention.reference import cache_rows, dilated_attention

__all__ = ["FAMILY", "LongNet", "LongNetConfig", "LongNetTrain"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "swish": F.silu}
_SPREADS = ("modulo", "blocks")
#: e^60 is far from the ends of float32 at either side
_LARGEST = 60.0


@dataclass(frozen=True)
class LongNetConfig:
    """Sizes and options of a LongNet decoder.

    Attributes:
        vocab_size, width, layers, heads: V, d, number of blocks, H.
        ffn: inner width of the feed-forward network.
        segments, rates: w and r of every pair; one rate is 1, so that every token sees itself.
        spread: where a head begins in a segment: ``modulo`` as in the paper, ``blocks`` as in torchscale.
        xpos: rotate and scale by position; xpos_base: tokens over which the scale has its full power.
        positions: trained positions, the stream's maximum; 0 for none.
        activation: ``gelu``, ``relu`` or ``swish``.
        subln: layer norms before the attention's output projection and inside the feed-forward network.
        deepnorm: norms behind the sub-layers, the residual scaled up, no last norm.
        scale_embedding: times sqrt(d); embedding_norm: a layer norm behind the embedding.
        tied: the head is the embedding.
        eps: epsilon of every norm.
    """

    vocab_size: int = 256
    width: int = 192
    layers: int = 4
    heads: int = 6
    ffn: int = 768
    segments: tuple[int, ...] = (64, 128, 256)
    rates: tuple[int, ...] = (1, 2, 4)
    spread: str = "modulo"
    xpos: bool = True
    xpos_base: int = 512
    positions: int = 0
    activation: str = "gelu"
    subln: bool = True
    deepnorm: bool = False
    scale_embedding: bool = False
    embedding_norm: bool = False
    tied: bool = False
    eps: float = 1e-5

    def __post_init__(self) -> None:
        sizes = (self.vocab_size, self.width, self.layers, self.heads, self.ffn, self.xpos_base)
        if min(sizes) < 1 or self.positions < 0:
            raise InputError("a LongNet size is too small", got=self)
        if self.width % (2 * self.heads):
            raise InputError(
                "the width of a LongNet must be an even multiple of its heads", got=(self.width, self.heads)
            )
        if len(self.segments) != len(self.rates) or min((*self.segments, *self.rates), default=0) < 1:
            raise InputError(
                "segments and rates come in pairs of 1 and more", got=(self.segments, self.rates)
            )
        if 1 not in self.rates:
            raise InputError("one of the rates must be 1: some tokens would see nothing", got=self.rates)
        if self.spread not in _SPREADS or self.activation not in _ACTIVATIONS:
            raise InputError(
                "unknown spread or activation",
                got=(self.spread, self.activation),
                allowed=(_SPREADS, tuple(_ACTIVATIONS)),
            )
        if self.xpos and -math.log(_scale(self, 0)) * self.period / (2 * self.xpos_base) > _LARGEST:
            raise InputError(
                "xPos leaves the range of float32 in so long a segment",
                got=f"segments whose least common multiple is {self.period}",
                fix="choose segments that divide one another, shorter ones, or a larger xpos_base",
            )

    @property
    def size(self) -> int:
        """K."""
        return self.width // self.heads

    @property
    def rows(self) -> int:
        """R."""
        return sum(map(cache_rows, self.segments, self.rates))

    @property
    def period(self) -> int:
        """Tokens after which all segments begin together."""
        return math.lcm(*self.segments)

    @property
    def residual(self) -> float:
        """What the residual is multiplied by."""
        return (2.0 * self.layers) ** 0.25 if self.deepnorm else 1.0


class _Attention(nn.Module):
    """The projections around dilated attention; the attention itself is handed in by the caller."""

    def __init__(self, c: LongNetConfig) -> None:
        super().__init__()
        self.c = c
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(c.width, c.width) for _ in "qkvo")
        self.inner_attn_ln = nn.LayerNorm(c.width, c.eps) if c.subln else None

    def projected(self, x: Tensor, places: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """q, k ``[B,T,H,K]``, placed, and v ``[B,T,d]`` of ``x [B,T,d]``."""
        q, k = (torch.unflatten(p(x), -1, (self.c.heads, -1)) for p in (self.q_proj, self.k_proj))
        if places:
            q, k = rotate_pairs(q, *places[:2]), rotate_pairs(k, *places[2:])
        return q, k, self.v_proj(x)

    def finish(self, o: Tensor) -> Tensor:
        """Norm and output projection of the heads' outputs ``o [B,T,d]``."""
        y: Tensor = self.out_proj(o if self.inner_attn_ln is None else self.inner_attn_ln(o))
        return y


class _FeedForward(nn.Module):
    """Two biased products, the activation and perhaps a norm between them."""

    def __init__(self, c: LongNetConfig) -> None:
        super().__init__()
        self.act = _ACTIVATIONS[c.activation]
        self.fc1 = nn.Linear(c.width, c.ffn)
        self.fc2 = nn.Linear(c.ffn, c.width)
        self.ffn_layernorm = nn.LayerNorm(c.ffn, c.eps) if c.subln else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.fc1(x))
        y: Tensor = self.fc2(h if self.ffn_layernorm is None else self.ffn_layernorm(h))
        return y


class _Block(nn.Module):
    """Names as in torchscale."""

    def __init__(self, c: LongNetConfig) -> None:
        super().__init__()
        self.behind, self.residual = c.deepnorm, c.residual
        self.self_attn = _Attention(c)
        self.self_attn_layer_norm = nn.LayerNorm(c.width, c.eps)
        self.ffn = _FeedForward(c)
        self.final_layer_norm = nn.LayerNorm(c.width, c.eps)

    def attended(self, x: Tensor) -> Tensor:
        """What the attention reads."""
        return x if self.behind else self.self_attn_layer_norm(x)

    def finish(self, x: Tensor, o: Tensor) -> Tensor:
        """The block's output from its input and the attention's output."""
        x = x * self.residual + self.self_attn.finish(o)
        if self.behind:
            x = self.self_attn_layer_norm(x)
            y: Tensor = self.final_layer_norm(x * self.residual + self.ffn(x))
        else:
            y = x + self.ffn(self.final_layer_norm(x))
        return y


class LongNet(nn.Module):
    """The chunk form: ``forward(tokens [B,T] int64, *state) -> (logits [B,T,V], *new_state)``.

    The buffers ``segments``, ``rates`` [P], ``offsets`` [P,H], ``turns`` [K/2] (all int64) and ``powers``
    [K/2] (float32) are constants of the configuration, kept with the weights so that a module on the meta
    device has them too.
    """

    segments: Tensor
    rates: Tensor
    offsets: Tensor
    turns: Tensor
    powers: Tensor

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__()
        c = self.config = config
        self.vocab_size = c.vocab_size
        self.max_tokens = c.positions or None
        self.embed_tokens = nn.Embedding(c.vocab_size, c.width)
        self.embed_positions = nn.Embedding(c.positions, c.width) if c.positions else None
        self.layernorm_embedding = nn.LayerNorm(c.width, c.eps) if c.embedding_norm else None
        self.layers = nn.ModuleList(_Block(c) for _ in range(c.layers))
        self.layer_norm = None if c.deepnorm else nn.LayerNorm(c.width, c.eps)
        self.output_projection = None if c.tied else nn.Linear(c.width, c.vocab_size, bias=False)
        for name, table in _tables(c).items():
            self.register_buffer(name, torch.tensor(table.tolist(), dtype=table.dtype))

    def state_spec(self) -> list[StateSpec]:
        """Keys and values per layer, then the position."""
        c = self.config
        shape = ("B", c.heads, c.rows, c.size)
        specs = [StateSpec(f"layers.{i}.{n}", shape) for i in range(c.layers) for n in ("keys", "values")]
        return [*specs, StateSpec("position", (1,), "int64")]

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        c = self.config
        *caches, position = state
        here = position + torch.arange(tokens.shape[1], device=tokens.device)
        places, x = self.places(here), self.embedded(tokens, here)
        pairs = (self.segments, self.rates, self.offsets)
        after: list[Tensor] = []
        for i, block in enumerate(self._blocks()):
            q, k, v = block.self_attn.projected(block.attended(x), places)
            q, k, cache = q.flatten(-2), k.flatten(-2), caches[2 * i : 2 * i + 2]
            o, *now = dilated_attention(q, k, v, *cache, position, *pairs, c.heads, c.size**-0.5)
            after += now
            x = block.finish(x, o)
        return self.logits(x), *after, position + tokens.shape[1]

    def _blocks(self) -> list[_Block]:
        return list(self.layers)  # type: ignore[arg-type]

    def embedded(self, tokens: Tensor, here: Tensor) -> Tensor:
        """``[B,T,d]`` of tokens at the positions ``here [T]``."""
        x: Tensor = self.embed_tokens(tokens)
        if self.config.scale_embedding:
            x = x * self.config.width**0.5
        if self.embed_positions is not None:
            x = x + self.embed_positions(here)
        if self.layernorm_embedding is not None:
            x = self.layernorm_embedding(x)
        return x

    def places(self, here: Tensor) -> tuple[Tensor, ...]:
        """cos and sin for queries, then for keys, ``[T,1,K/2]``, at int64 positions ``[T]`` below 2^31."""
        c = self.config
        if not c.xpos:
            return ()
        cos, sin = rope_angles(self.turns, here, self.powers.dtype)
        middle = (here % c.period - c.period // 2).to(self.powers.dtype)
        up = (middle[:, None, None] * self.powers).exp()
        return cos * up, sin * up, cos / up, sin / up

    def logits(self, x: Tensor) -> Tensor:
        """``[B,T,V]`` of the last block's output."""
        weight = self.embed_tokens.weight if self.output_projection is None else self.output_projection.weight
        return F.linear(x if self.layer_norm is None else self.layer_norm(x), weight)


class LongNetTrain(LongNet):
    """The training form: ``forward(tokens [B,T]) -> logits [B,T,V]``, differentiable, segment by segment.

    Same parameters as the chunk form. Needs ``T <= positions`` where positions are trained.
    """

    def forward(self, tokens: Tensor, *state: Tensor) -> Tensor:  # type: ignore[override]
        c = self.config
        here = torch.arange(tokens.shape[1], device=tokens.device)
        places, x = self.places(here), self.embedded(tokens, here)
        pairs = (self.segments, self.rates, self.offsets)
        for block in self._blocks():
            q, k, v = block.self_attn.projected(block.attended(x), places)
            o = dilated_parallel(q, k, torch.unflatten(v, -1, (c.heads, -1)), *pairs, c.size**-0.5)
            x = block.finish(x, o.flatten(-2))
        return self.logits(x)


def _scale(c: LongNetConfig, pair: int) -> float:
    """xPos: what pair i is multiplied by over xpos_base tokens."""
    return (2 * pair + 0.4 * c.size) / (1.4 * c.size)


def _tables(c: LongNetConfig) -> dict[str, Tensor]:
    """The constant buffers, always on the CPU."""
    pairs = range(c.size // 2)
    if c.spread == "modulo":
        offsets = [[h % r for h in range(c.heads)] for r in c.rates]
    else:
        offsets = [[h // -(-c.heads // r) for h in range(c.heads)] for r in c.rates]
    turns = turns_of([10000.0 ** (-2 * i / c.size) for i in pairs])
    with torch.device("cpu"):
        return {
            "segments": torch.tensor(c.segments),
            "rates": torch.tensor(c.rates),
            "offsets": torch.tensor(offsets),
            "turns": torch.tensor(turns),
            "powers": torch.tensor([math.log(_scale(c, i)) / c.xpos_base for i in pairs]),
        }


def _init(module: nn.Module, seed: int) -> None:
    """Fill a LongNet (either form) with weights to train from.

    Projections have the variance 1/fan_in; those that write to the residual stream are smaller by
    sqrt(2 * layers), so that its variance does not grow with depth. The head starts small.
    """
    assert isinstance(module, LongNet)
    c = module.config
    fixed, small = {"embed_positions.weight": 0.1}, ["output_projection.weight"]
    if c.tied:
        small.append("embed_tokens.weight")
    else:
        fixed["embed_tokens.weight"] = 0.5 * (c.width**-0.5 if c.scale_embedding else 1.0)
    writes = dict.fromkeys(("*out_proj.weight", "*fc2.weight"), c.layers)
    fill(module, seed, writes=writes, small=small, fixed=fixed)
    for name, table in _tables(c).items():
        module.get_buffer(name).copy_(table)


def _from_training(config: LongNetConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The two forms have the same parameters; the constant tables are made anew."""
    return {**{k: v.detach() for k, v in tensors.items()}, **_tables(config)}


#: in config.json, torchscale's own names; a state dict holds none of them
_SEGMENTS, _RATES, _HEADS = "segment_length", "dilated_ratio", "decoder_attention_heads"


def _layout(raw: RawCheckpoint) -> str | None:
    if _SEGMENTS in raw.config and _RATES in raw.config:
        return f"its config.json has torchscale's {_SEGMENTS} and {_RATES}"
    return None


def _load(raw: RawCheckpoint) -> LoadedModel:
    """torchscale's LongNetDecoder in a folder with its arguments, or a file of xexport's own training."""
    config, found = own_config(raw, "longnet", LongNetConfig), dict(raw.tensors)
    if config is None:
        config, found = _from_torchscale(raw)
    with torch.device("meta"):
        wanted = LongNet(config)
    tensors = match_tensors(_from_training(config, found), wanted, raw.path.name)
    tokenizer = "bytes" if config.vocab_size == 256 else None
    return LoadedModel("longnet", config, tensors, tokenizer, str(raw.path))


def _from_torchscale(raw: RawCheckpoint) -> tuple[LongNetConfig, dict[str, Tensor]]:
    """Sizes from the shapes, what shapes don't say from config.json; positions lose fairseq's first rows."""
    last = "embed_tokens.weight"
    prefix = next((k.removesuffix(last) for k in raw.tensors if k.endswith(last)), "")
    found = {k.removeprefix(prefix): v for k, v in raw.tensors.items() if k.startswith(prefix)}
    needed = (last, "layers.0.self_attn.q_proj.bias", "layers.0.self_attn_layer_norm.weight")
    require_keys(raw, tuple(prefix + key for key in needed), "longnet (torchscale)")
    _refuse(raw, found)
    c = raw.config
    positions = found.get("embed_positions.weight")
    if positions is not None:
        found["embed_positions.weight"] = positions[2:]
    vocab, width = found[last].shape
    try:
        config = LongNetConfig(
            vocab_size=vocab,
            width=width,
            layers=1 + max(int(k.split(".")[1]) for k in found if k.startswith("layers.")),
            heads=int(c[_HEADS]),
            ffn=found["layers.0.ffn.fc1.weight"].shape[0],
            segments=_numbers(c[_SEGMENTS]),
            rates=_numbers(c[_RATES]),
            spread="blocks",
            xpos="layers.0.self_attn.xpos.scale" in found,
            xpos_base=int(c.get("xpos_scale_base", 512)),
            positions=0 if positions is None else len(positions) - 2,
            activation=str(c.get("activation_fn", "gelu")),
            subln="layers.0.self_attn.inner_attn_ln.weight" in found,
            deepnorm=bool(c.get("deepnorm", False)),
            scale_embedding=not c.get("no_scale_embedding", True),
            embedding_norm="layernorm_embedding.weight" in found,
            tied="output_projection.weight" not in found,
            eps=float(c.get("layernorm_eps", 1e-5)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            "config.json lacks what a LongNet's weights don't say, or has it malformed",
            got=f"{type(error).__name__}: {error}",
            allowed=f"{_HEADS}, {_SEGMENTS} and {_RATES}, the latter lists of the same length",
            fix="put the arguments of the training beside the weights, in a folder, as config.json",
        ) from error
    return config, found


def _refuse(raw: RawCheckpoint, found: Mapping[str, Tensor]) -> None:
    """Raise for options of torchscale that would change the function."""
    odd = {
        "a mixture of experts": ".moe_layer.",
        "multiway networks": "q_proj.A.",
        "relative position biases": "relative_position.",
        "cross-attention": ".encoder_attn.",
        "positions of sines, whose table is not stored": "embed_positions._float_tensor",
    }
    for what, key in odd.items():
        hit = next((k for k in found if key in k), None)
        if hit is not None:
            raise CheckpointError(f"a LongNet with {what} can't be read", got=f"{hit!r} in {raw.path.name}")
    if "layer_norm.weight" not in found and not raw.config.get("deepnorm"):
        raise CheckpointError(
            "a LongNet with norms behind its sub-layers can be read with deepnorm only",
            got=f"{raw.path.name}: no layer_norm.weight, and config.json does not say deepnorm",
        )


def _numbers(value: Any) -> tuple[int, ...]:
    """A list, or torchscale's text of one."""
    return tuple(int(v) for v in (json.loads(value) if isinstance(value, str) else value))


def _paper(layers: int, width: int, heads: int) -> LongNetConfig:
    """Section 4.1: vocabulary of 64 K, five pairs up to 32 768 tokens."""
    return LongNetConfig(
        vocab_size=64000,
        width=width,
        layers=layers,
        heads=heads,
        ffn=4 * width,
        segments=(2048, 4096, 8192, 16384, 32768),
        rates=(1, 2, 4, 6, 12),
    )


_TINY: dict[str, Any] = {
    "vocab_size": 29,
    "width": 32,
    "layers": 2,
    "heads": 4,
    "ffn": 48,
    "segments": (4, 8, 16),
    "rates": (1, 2, 4),
}

FAMILY = Family(
    name="longnet",
    title="LongNet: dilated attention over segments (arXiv 2307.02486)",
    sources=("https://arxiv.org/abs/2307.02486", "https://github.com/microsoft/torchscale"),
    config=LongNetConfig,
    presets={
        "tiny": LongNetConfig(**_TINY),
        "tiny-deepnorm": LongNetConfig(
            **_TINY
            | {"segments": (5, 9), "rates": (1, 3), "spread": "blocks", "xpos": False, "positions": 64}
            | {"subln": False, "deepnorm": True, "embedding_norm": True}
            | {"scale_embedding": True, "tied": True}
        ),
        "zoo": LongNetConfig(),
        "125m": _paper(12, 768, 12),
        "2.7b": _paper(32, 2560, 32),
    },
    build=LongNet,
    load=_load,
    layout=_layout,
    reads=f"a folder of torchscale's LongNetDecoder with {_SEGMENTS} and {_RATES} in config.json",
    train_form=LongNetTrain,
    from_training=_from_training,
    init=_init,
    roles=(
        ("embed_tokens.*", "embedding"),
        ("embed_positions.*", "embedding"),
        ("output_projection.*", "head"),
        ("*norm.*", "norm"),
        ("*inner_attn_ln.*", "norm"),
        ("*layernorm_embedding.*", "norm"),
        ("*_proj.weight", "projection"),
        ("*.fc?.weight", "projection"),
        ("*", "other"),
    ),
    state_note="keys and values of the going segments, thinned by their rates: constant in the stream",
)
