"""Monarch Mixer: M2-BERT, Monarch matrices on both axes of a sequence, seen as a whole (arXiv 2310.12109).

Sources:
    1. Fu et al., Monarch Mixer, arXiv 2310.12109: section 3 (Monarch matrices), 5.1 (M2-BERT).
    2. HazyResearch/m2 (Apache-2.0), ``bert/src``: ``bert_layers.py``, ``mm/monarch_mixer_sequence_mixer.py``,
       ``mm/hyena_utils.py``, ``mm/blockdiag_linear.py``: the form that was trained, followed here, and the
       layout of the published checkpoints.
    3. Poli et al., Hyena, arXiv 2302.10866: the implicit filters (models/_implicit.py).

Glossary:
    B batch, T tokens, d width, L = max_tokens, the filters' length.

X = LN(word + position), then in every block (norms stand after, and the mixer has no skip of its own):
    x_1, x_2, v = shortconv(X W_in)              depthwise, this token and the two before it, with bias
    M  = (x_2 * conv(x_1 v; h) + conv(X; g)) W_out         the second convolution with ``residual`` only
    X' = LN(M + (gelu(a) b) W_o + bias),  [a, b] = M W_g   W_g, W_o block-diagonal
and logits = LN(gelu(X W_t + b_t)) E^T + b with E the word embedding. A convolution sees both sides:
    conv(z; h)_t = sum_{s<=t} h+_{t-s} z_s + sum_{s>t} h-_{s-t-1} z_s + D z_t
[2] takes it as one circular convolution of 2T points, which is the same sum. Here it is two causal ones, the
second of the reversed sequence, with h- moved by one place and D added to h+_0: all channels of both
directions and both convolutions are one ``fft_conv``, whose function body is the product of Monarch matrices
that gives [1] its name. The filters are made once, in float64, from the networks of the training form.

Not causal, so there is no chunk form; models/m2_gpt.py is the causal variant. A sequence may have any length
up to L; nothing is padded. Token types other than the first, and poolers, are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xexport.core.checkpoint import RawCheckpoint, match_tensors, own_config, require_keys, unreadable
from xexport.core.errors import CheckpointError, InputError, LimitError
from xexport.core.family import Family, LoadedModel
from xexport.core.state import StateSpec
from xexport.models._fill import fill_by_training
from xexport.models._implicit import FilterSizes, ImplicitFilter, published_filters
from xexport.models._monarch import GatedBlocks, split_weight
from xexport.ops.causal_conv1d.reference import causal_conv1d
from xexport.ops.fft_conv.reference import causal_conv, fft_conv, fft_sizes

__all__ = ["FAMILY", "MonarchMixer", "MonarchMixerConfig", "MonarchMixerTrain"]


@dataclass(frozen=True)
class MonarchMixerConfig:
    """Sizes of an M2-BERT.

    Attributes:
        vocab_size, width, layers: V, d, number of blocks.
        ffn: inner width of the feed-forward network. blocks: of its block-diagonal matrices.
        max_tokens: L, the filters' length and the longest sequence.
        residual: whether a second convolution of the block's input is added.
        filter_width, filter_inner, filter_features, filter_frequency: as Hyena's.
        eps: epsilon of the layer norms.
    """

    vocab_size: int = 256
    width: int = 192
    layers: int = 6
    ffn: int = 512
    blocks: int = 4
    max_tokens: int = 512
    residual: bool = True
    filter_width: int = 64
    filter_inner: int = 2
    filter_features: int = 5
    filter_frequency: float = 10.0
    eps: float = 1e-12

    def __post_init__(self) -> None:
        sizes = (self.vocab_size, self.width, self.layers, self.ffn, self.blocks, self.filter_width)
        if min(sizes) < 1 or self.max_tokens < 2 or self.filter_inner < 0:
            raise InputError("a Monarch Mixer size is too small", got=self)
        if self.width % self.blocks or self.ffn % self.blocks:
            raise InputError(
                "the widths of a Monarch Mixer are not whole blocks",
                got=(self.width, self.ffn),
                allowed=f"multiples of blocks = {self.blocks}",
            )
        if self.filter_features < 3 or self.filter_features % 2 == 0:
            raise InputError(
                "filter_features holds time and pairs", got=self.filter_features, allowed="3, 5, 7 ..."
            )

    @property
    def convolutions(self) -> int:
        """Long convolutions in a block."""
        return 2 if self.residual else 1

    @property
    def filter_sizes(self) -> FilterSizes:
        """What a filter's network is made of."""
        inner, features = self.filter_inner, self.filter_features
        return FilterSizes(self.width, 1, self.max_tokens, self.filter_width, inner, features)


class _Networks(nn.Module):
    """The training form's filters of a block: a network for each direction of each convolution, and D."""

    def __init__(self, c: MonarchMixerConfig) -> None:
        super().__init__()
        self.before = nn.ModuleList(ImplicitFilter(c.filter_sizes) for _ in range(c.convolutions))
        self.after = nn.ModuleList(ImplicitFilter(c.filter_sizes) for _ in range(c.convolutions))
        self.skip = nn.Parameter(torch.zeros(c.convolutions, c.width))

    def forward(self, length: int) -> Tensor:
        """``[2n*d,length]``: see :func:`_joined`."""
        before, after = (torch.cat([make(length)[0] for make in side]) for side in (self.before, self.after))
        return _joined(before, after, self.skip.flatten())


def _joined(before: Tensor, after: Tensor, skip: Tensor) -> Tensor:
    """h+ with D in its first place, then h- moved by one place, of all convolutions: ``[2n*d,L]``."""
    first = before[:, :1] + skip[:, None]
    moved = torch.cat((torch.zeros_like(first), after[:, :-1]), 1)
    return torch.cat((torch.cat((first, before[:, 1:]), 1), moved))


class _Block(nn.Module):
    """One block; ``filters`` is a table in the whole form, networks in the training form."""

    filters: Tensor

    def __init__(self, c: MonarchMixerConfig) -> None:
        super().__init__()
        self.residual = c.residual
        self.in_proj = nn.Linear(c.width, 3 * c.width)
        self.conv_weight = nn.Parameter(torch.zeros(3, 3 * c.width))
        self.conv_bias = nn.Parameter(torch.zeros(3 * c.width))
        self.out_proj = nn.Linear(c.width, c.width)
        self.mlp = GatedBlocks(c.width, c.ffn, c.blocks)
        self.norm = nn.LayerNorm(c.width, c.eps)

    def forward(self, x: Tensor) -> Tensor:
        """[B,T,d] -> the same shape."""
        nothing = x.new_zeros(x.shape[0], 2, self.conv_bias.shape[0])
        u, _ = causal_conv1d(self.in_proj(x), self.conv_weight, self.conv_bias, nothing)
        x1, x2, v = u.chunk(3, -1)
        z = x1 * v
        if self.residual:
            y, more = self.both_sides(torch.cat((z, x), -1)).chunk(2, -1)
            y = x2 * y + more
        else:
            y = x2 * self.both_sides(z)
        mixed = self.out_proj(y)
        done: Tensor = self.norm(mixed + self.mlp(mixed))
        return done

    def both_sides(self, z: Tensor) -> Tensor:
        """The convolutions of ``z [B,T,n*d]`` with what comes before and after a token."""
        u = torch.cat((z, z.flip(1)), -1).transpose(1, 2)
        before, after = self.convolved(u).transpose(1, 2).chunk(2, -1)
        return before + after.flip(1)

    def convolved(self, u: Tensor) -> Tensor:
        """``u [B,2n*d,T]`` with the block's filters, causally."""
        n1, n2 = fft_sizes(self.filters.shape[1])
        y: Tensor = fft_conv(u, self.filters, n1, n2)
        return y


class _Table(_Block):
    def __init__(self, c: MonarchMixerConfig) -> None:
        super().__init__(c)
        self.filters = nn.Parameter(torch.zeros(2 * c.convolutions * c.width, c.max_tokens))


class _Trained(_Block):
    networks: _Networks

    def __init__(self, c: MonarchMixerConfig) -> None:
        super().__init__(c)
        self.networks = _Networks(c)

    def convolved(self, u: Tensor) -> Tensor:
        """The same with filters as long as the sequence, differentiable."""
        return causal_conv(u, self.networks(u.shape[-1]))


class MonarchMixer(nn.Module):
    """The whole form: ``forward(tokens [B,T] int64) -> (logits [B,T,V],)`` for T <= max_tokens.

    A longer sequence is a LimitError in PyTorch and from a runtime.
    """

    form = "whole"
    predicts_next = False
    _block: type[_Block] = _Table

    def __init__(self, config: MonarchMixerConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.max_tokens = config.max_tokens
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Parameter(torch.zeros(config.max_tokens, config.width))
        self.embed_norm = nn.LayerNorm(config.width, config.eps)
        self.layers = nn.ModuleList(self._block(config) for _ in range(config.layers))
        self.transform = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, config.eps)
        self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))

    def state_spec(self) -> list[StateSpec]:
        """Nothing is carried."""
        return []

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        # a graph serves every length, and its runtime knows the limit
        if not torch.compiler.is_compiling() and tokens.shape[1] > self.max_tokens:
            raise LimitError(
                "a sequence is longer than the filters", got=tokens.shape[1], allowed=self.max_tokens
            )
        x = self.embed_norm(self.embed(tokens) + self.positions[: tokens.shape[1]])
        for layer in self.layers:
            x = layer(x)
        x = self.norm(F.gelu(self.transform(x)))
        return (F.linear(x, self.embed.weight, self.head_bias),)


class MonarchMixerTrain(MonarchMixer):
    """The training form: ``forward(tokens [B,T]) -> logits [B,T,V]`` for T <= max_tokens."""

    _block = _Trained

    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(tokens)[0]


def _init(module: nn.Module, seed: int) -> None:
    """Fill a Monarch Mixer (either form) with weights to train from.

    Projections have the variance 1/fan_in, the short convolutions begin near the identity, a filter's norm is
    about 1, and the embedding is small, as it is the head too. The whole form gets the filters that the
    training form would have.
    """
    assert isinstance(module, MonarchMixer)
    if not isinstance(module, MonarchMixerTrain):
        return fill_by_training(FAMILY, module, seed)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(_first_value(module.config, name, torch.randn(p.shape, generator=rng)))


def _first_value(c: MonarchMixerConfig, name: str, noise: Tensor) -> Tensor:
    """The initial value of one parameter of the training form, from normal ``noise`` of its shape."""
    if name.endswith("frequency"):
        return torch.full(noise.shape, c.filter_frequency)
    if name.endswith("conv_weight"):
        return noise * 0.2 + torch.tensor([0.0, 0.0, 1.0])[:, None]
    if name.endswith("skip"):
        return noise
    if ".networks." in name:
        fan_in = noise.shape[-1] if noise.ndim == 2 else c.filter_width
        return noise * float(0.5 * fan_in**-0.5 * (c.max_tokens**-0.5 * 8 if ".last." in name else 1.0))
    if noise.ndim < 2:
        return torch.full(noise.shape, 0.0 if name.endswith("bias") else 1.0)
    if name in ("embed.weight", "positions"):
        return noise * float(0.25 * c.width**-0.5)
    # the gates begin small beside the second convolution: their product is of the third degree
    return noise * float((0.5 if name.endswith("in_proj.weight") else 1.0) * noise.shape[1] ** -0.5)


def _from_training(config: MonarchMixerConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, with every block's networks replaced by the filters they make (in float64)."""
    result = {k: v.detach() for k, v in tensors.items() if ".networks." not in k}
    with torch.device("cpu"):
        networks = _Networks(config).double()
    for i in range(config.layers):
        prefix = f"layers.{i}.networks."
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        networks.load_state_dict(state)
        with torch.no_grad():
            result[f"layers.{i}.filters"] = networks(config.max_tokens).float().contiguous()
    return result


#: one of the tensors that only an M2-BERT with filters in both directions has
_MARK = "bert.encoder.layer.0.attention.filter_fn.implicit_filter_rev.0.weight"


def _plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trainer of [2] puts ``model.`` before every name."""
    return {k.removeprefix("model."): v for k, v in tensors.items()}


def _layout(raw: RawCheckpoint) -> str | None:
    return "it has the keys of M2-BERT" if _MARK in _plain_names(raw.tensors) else None


def _load(raw: RawCheckpoint) -> LoadedModel:
    config = own_config(raw, "monarch_mixer", MonarchMixerConfig)
    notes: tuple[str, ...] = ()
    if config is not None:
        with torch.device("meta"):
            trained = MonarchMixerTrain(config)
        tensors = _from_training(config, match_tensors(raw.tensors, trained, raw.path.name))
    elif _layout(raw) is not None:
        config, tensors = _published(raw)
        notes = ("the filters are made from the file's networks; its token types and pooler are left out",)
    else:
        raise unreadable(
            raw,
            "a Monarch Mixer",
            "keys of M2-BERT with filters in both directions (bert.encoder.layer.<i>.attention."
            "filter_fn.implicit_filter_rev), or a safetensors file from xexport's own training",
        )
    with torch.device("meta"):
        wanted = MonarchMixer(config)
    found = match_tensors(tensors, wanted, raw.path.name)
    return LoadedModel("monarch_mixer", config, found, source=str(raw.path), notes=notes)


def _published(raw: RawCheckpoint) -> tuple[MonarchMixerConfig, dict[str, Tensor]]:
    """An M2-BERT with its head for masked tokens: sizes from the shapes."""
    t = _plain_names(raw.tensors)
    config = _published_sizes(raw, t)
    head, embeddings = "cls.predictions.", "bert.embeddings."
    try:
        kinds = t[f"{embeddings}token_type_embeddings.weight"][0]
        table = t.get(f"{embeddings}position_embeddings.weight")
        places = torch.zeros(config.max_tokens, config.width) if table is None else table[: config.max_tokens]
        result = {
            "embed.weight": t[f"{embeddings}word_embeddings.weight"],
            "positions": places + kinds,  # every token is of the first type
            "head_bias": t.get(f"{head}decoder.bias", t.get(f"{head}bias")),
        }
        for kind in ("weight", "bias"):
            result[f"embed_norm.{kind}"] = t[f"{embeddings}LayerNorm.{kind}"]
            result[f"transform.{kind}"] = t[f"{head}transform.dense.{kind}"]
            result[f"norm.{kind}"] = t[f"{head}transform.LayerNorm.{kind}"]
        for i in range(config.layers):
            prefix = f"bert.encoder.layer.{i}."
            block = {k.removeprefix(prefix): v for k, v in t.items() if k.startswith(prefix)}
            scale = float(raw.config.get("hyena_w_mod", 1))
            made = _published_block(config, block, scale)
            result |= {f"layers.{i}.{k}": v for k, v in made.items()}
    except KeyError as error:
        raise CheckpointError(
            "an M2-BERT lacks a tensor",
            got=error,
            fix="a model for retrieval has no head for masked tokens, and can't be read",
        ) from error
    return config, {k: v for k, v in result.items() if v is not None}


def _published_sizes(raw: RawCheckpoint, t: Mapping[str, Tensor]) -> MonarchMixerConfig:
    first = "bert.encoder.layer.0."
    filters = f"{first}attention.filter_fn."
    names = ("mlp.wo.weight", "mlp.gated_layers.weight", "attention.in_linear.weight")
    embed = "bert.embeddings.word_embeddings.weight"
    require_keys(
        dataclasses.replace(raw, tensors=t),
        (embed, f"{filters}pos_emb.z", *(first + n for n in names)),
        "M2-BERT",
    )
    wo, gated = t[f"{first}mlp.wo.weight"], t[f"{first}mlp.gated_layers.weight"]
    blocks = len(wo) if wo.ndim == 3 else 1
    ffn = blocks * wo.shape[-1]
    if gated.numel() * blocks != 2 * ffn * t[embed].shape[1]:
        raise CheckpointError(
            "an M2-BERT without a gated feed-forward network can't be read", got=raw.path.name
        )
    if f"{first}attention.layernorm.weight" in t:
        raise CheckpointError("an M2-BERT with a norm in its mixer can't be read", got=raw.path.name)
    layers = {int(k.split(".")[3]) for k in t if k.startswith("bert.encoder.layer.")}
    linear = [k for k in t if k.startswith(f"{filters}implicit_filter.") and k.endswith("weight")]
    inner = t[f"{filters}implicit_filter_rev.0.weight"]
    return MonarchMixerConfig(
        vocab_size=t[embed].shape[0],
        width=t[embed].shape[1],
        layers=1 + max(layers),
        ffn=ffn,
        blocks=blocks,
        max_tokens=t[f"{filters}pos_emb.z"].shape[1],
        residual=f"{first}attention.filter_fn2.bias" in t,
        filter_width=inner.shape[0],
        filter_inner=len(linear) - 2,
        filter_features=inner.shape[1],
        eps=float(raw.config.get("layer_norm_eps", 1e-12)),
    )


def _published_block(c: MonarchMixerConfig, t: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """One block in this file's names; ``scale`` multiplies the frequencies of the filters' networks."""
    result = {"conv_weight": t["attention.short_filter.weight"][:, 0].T}
    result["conv_bias"] = t["attention.short_filter.bias"]
    for kind in ("weight", "bias"):
        result[f"in_proj.{kind}"] = t[f"attention.in_linear.{kind}"]
        result[f"out_proj.{kind}"] = t[f"attention.out_linear.{kind}"]
        result[f"norm.{kind}"] = t[f"mlp.layernorm.{kind}"]
    for name in ("gated_layers", "wo"):
        weight = t[f"mlp.{name}.weight"]
        result |= split_weight(weight if weight.ndim == 3 else weight[None], f"mlp.{name}")
    result["mlp.wo.bias"] = t["mlp.wo.bias"]
    scaled = {k: v * scale if k.endswith("freq") else v for k, v in t.items()}
    prefixes = ("attention.filter_fn.", "attention.filter_fn2.")[: c.convolutions]
    before, after = (
        torch.cat([published_filters(scaled, c.filter_sizes, p, network)[0] for p in prefixes])
        for network in ("implicit_filter", "implicit_filter_rev")
    )
    skip = torch.cat([t[f"{p}bias"] for p in prefixes]).double()
    result["filters"] = _joined(before, after, skip).float().contiguous()
    return result


def _bert(layers: int, width: int, max_tokens: int = 128) -> MonarchMixerConfig:
    """A size of [2]; BERT's vocabulary, padded to a multiple of 8."""
    return MonarchMixerConfig(30528, width, layers, 4 * width, 4, max_tokens, filter_width=128)


FAMILY = Family(
    name="monarch_mixer",
    title="Monarch Mixer: M2-BERT, whole sequences (arXiv 2310.12109)",
    sources=(
        "https://arxiv.org/abs/2310.12109",
        "https://github.com/HazyResearch/m2",
        "https://arxiv.org/abs/2302.10866",
    ),
    config=MonarchMixerConfig,
    presets={
        "tiny": MonarchMixerConfig(29, 24, 2, 32, 2, 150, filter_width=8),
        "tiny-one": MonarchMixerConfig(29, 24, 2, 32, 1, 150, residual=False, filter_width=8),
        "zoo": MonarchMixerConfig(),
        "80m": _bert(12, 768),
        "110m": _bert(12, 960),
        "260m": _bert(12, 1536),
        "341m": _bert(12, 1792),
        "80m-2k": _bert(12, 768, 2048),
    },
    build=MonarchMixer,
    load=_load,
    layout=_layout,
    reads="keys of M2-BERT (bert.encoder.layer.0.attention.filter_fn.implicit_filter_rev)",
    train_form=MonarchMixerTrain,
    from_training=_from_training,
    init=_init,
    roles=(
        ("embed.*", "embedding"),
        ("positions", "other"),
        ("*norm.*", "norm"),
        ("*.filters", "filter"),
        ("*.conv_*", "conv"),
        ("*_proj.weight", "projection"),
        ("transform.weight", "projection"),
        ("*.parts.*", "projection"),
    ),
    state_note="none: the whole sequence at once",
)
