"""Hyena: gated implicit long convolutions, streamed exactly through a bounded cache of their inputs.

Sources:
    1. Poli et al., Hyena Hierarchy: Towards Larger Convolutional Language Models, arXiv 2302.10866:
       section 3.1 (the operator), 3.2 (filters and window), appendix A (sizes).
    2. HazyResearch/safari, ``hyena.py`` (Apache-2.0): the form that was trained, followed here where
       it departs from the paper.
    3. Nguyen et al., HyenaDNA, arXiv 2306.15794, and its Hugging Face checkpoints: a window that ends
       above zero, and a trained table of features.

Glossary:
    B batch, T tokens, d width, N order (projections besides v), L = max_tokens, the filters' length.

One block (pre-norm, X the residual stream): Y = Hyena(LN(X)) + X,  X' = MLP(LN(Y)) + Y.
The operator of order N:
    x_0, ..., x_{N-1}, v = shortconv(X W_in)             causal, depthwise, three taps, with bias
    for n = N-1, ..., 1:   z = x_n * v;   v = h_n * z + D_n z        (* with h: causal convolution)
    out = (x_0 v) W_out
The paper's recurrence convolves first and then gates, N times; safari (and StripedHyena) gate first,
N-1 times, as the short convolution already stands for the first. That is what is done here.

The filters are implicit, h_n[t] = window(t) * FFN(features(t)) with sine activations: models/_implicit.py.
The training form holds the FFN. The chunk form holds the filters it makes, [d,L] each, computed once in
float64: nothing of the FFN is left at run time.

Streaming: a long convolution has no finite state, so the state is the inputs so far, at most L of them.
It is exact at every token up to L and there is no token L+1: a runtime refuses it (LimitError).
The filters are functions of t/L; train at the full length, or the far end of them is untrained.

State: ``layers.<i>.short`` [B,2,(N+1)d] float32 (the last two projections), ``layers.<i>.cache.<j>``
[B,d,L] float32 for convolution j = 0 .. N-2, ``position`` [1] int64 (shared by the batch).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xexport.core.checkpoint import RawCheckpoint, own_config, require_keys
from xexport.core.errors import CheckpointError, InputError
from xexport.core.family import Family, LoadedModel
from xexport.core.state import StateSpec
from xexport.models._implicit import FilterSizes, ImplicitFilter, published_filters
from xexport.models._monarch import GatedBlocks
from xexport.ops.causal_conv1d.reference import causal_conv1d
from xexport.ops.fft_conv.reference import causal_conv, fft_sizes
from xexport.ops.fft_conv_cached.reference import fft_conv_cached
from xexport.ops.hyena_conv.reference import hyena_conv

__all__ = ["FAMILY", "Hyena", "HyenaConfig", "HyenaTrain", "load_own"]


@dataclass(frozen=True)
class HyenaConfig:
    """Sizes of a Hyena.

    Attributes:
        vocab_size, width, layers: V, d, number of blocks.
        ffn: inner width of the MLP.
        mlp_blocks: 0 for the MLP above, else the gated one of Monarch Mixer, of so many blocks (m2_gpt.py).
        max_tokens: L, the filters' length and the longest stream.
        order: N >= 2.
        filter_width, filter_inner: width of the filters' FFN, and its layers between first and last.
        filter_features: width of ``features(t)``, odd: time, and as many cosines as sines.
        filter_frequency: first value of the sine activations' frequencies.
        filter_shift: what the window ends at.
        eps: epsilon of the layer norms.
    """

    vocab_size: int = 256
    width: int = 160
    layers: int = 5
    ffn: int = 320
    max_tokens: int = 2048
    order: int = 2
    filter_width: int = 64
    filter_inner: int = 2
    filter_features: int = 33
    filter_frequency: float = 14.0
    filter_shift: float = 0.0
    eps: float = 1e-5
    mlp_blocks: int = 0

    def __post_init__(self) -> None:
        sizes = (self.vocab_size, self.width, self.layers, self.ffn, self.filter_width)
        if min(sizes) < 1 or self.max_tokens < 2 or self.filter_inner < 0:
            raise InputError("a Hyena size is too small", got=self)
        if self.order < 2:
            raise InputError("the order of a Hyena is too low", got=self.order, allowed="2 or more")
        if self.filter_features < 3 or self.filter_features % 2 == 0:
            raise InputError(
                "filter_features holds time and pairs", got=self.filter_features, allowed="3, 5, 7 ..."
            )

    @property
    def filter_sizes(self) -> FilterSizes:
        """What the filters' networks are made of."""
        inner, features = self.filter_inner, self.filter_features
        return FilterSizes(
            self.width, self.order - 1, self.max_tokens, self.filter_width, inner, features, self.filter_shift
        )


class _Mixer(nn.Module):
    """The operator without its long convolutions, which differ between the two forms."""

    def __init__(self, c: HyenaConfig) -> None:
        super().__init__()
        self.c = c
        inner = (c.order + 1) * c.width
        self.in_proj = nn.Linear(c.width, inner)
        self.out_proj = nn.Linear(c.width, c.width)
        self.conv_weight = nn.Parameter(torch.empty(3, inner))
        self.conv_bias = nn.Parameter(torch.zeros(inner))
        self.filter_skip = nn.Parameter(torch.zeros(c.order - 1, c.width))

    def projected(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """The N+1 short-convolved projections of ``x [B,T,d]`` side by side, and the last two projections."""
        return causal_conv1d(self.in_proj(x), self.conv_weight, self.conv_bias, before)


class _Block(nn.Module):
    """One block; ``filters`` is the FFN in the training form, the filters in the chunk form."""

    filters: Any

    def __init__(self, c: HyenaConfig, filters: nn.Module) -> None:
        super().__init__()
        self.hyena_norm = nn.LayerNorm(c.width, c.eps)
        self.hyena = _Mixer(c)
        self.filters = filters
        self.mlp_norm = nn.LayerNorm(c.width, c.eps)
        self.blocks = GatedBlocks(c.width, c.ffn, c.mlp_blocks) if c.mlp_blocks else None
        if self.blocks is None:
            self.fc1 = nn.Linear(c.width, c.ffn)
            self.fc2 = nn.Linear(c.ffn, c.width)

    def mlp(self, x: Tensor) -> Tensor:
        """``x`` with the MLP's output added."""
        z = self.mlp_norm(x)
        if self.blocks is not None:
            mixed: Tensor = self.blocks(z)
            return x + mixed
        y: Tensor = self.fc2(F.gelu(self.fc1(z), approximate="tanh"))
        return x + y


class _Stack(nn.Module):
    """What the two forms share."""

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.max_tokens = config.max_tokens
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(_Block(config, self._filters()) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, config.eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)

    def _filters(self) -> nn.Module:
        """What a block holds to make its filters from."""
        raise NotImplementedError

    def _blocks(self) -> list[_Block]:
        return list(self.layers)  # type: ignore[arg-type]


class Hyena(_Stack):
    """The chunk form: ``forward(tokens [B,T] int64, *state) -> (logits [B,T,V], *new_state)``.

    ``position + T`` must not exceed ``max_tokens``; in PyTorch the convolution raises LimitError, in a
    graph the result is undefined, so a runtime checks it beforehand.
    """

    def _filters(self) -> nn.Module:
        c = self.config
        return nn.ParameterList(torch.zeros(c.width, c.max_tokens) for _ in range(c.order - 1))

    def state_spec(self) -> list[StateSpec]:
        """Per layer the short convolution's state and the caches, then the position."""
        c = self.config
        specs: list[StateSpec] = []
        for i in range(c.layers):
            specs.append(StateSpec(f"layers.{i}.short", ("B", 2, (c.order + 1) * c.width)))
            caches = [f"layers.{i}.cache.{j}" for j in range(c.order - 1)]
            specs += [StateSpec(name, ("B", c.width, c.max_tokens)) for name in caches]
        return [*specs, StateSpec("position", (1,), "int64")]

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        c = self.config
        position = state[-1]
        after: list[Tensor] = []
        x = self.embed(tokens)
        for i, layer in enumerate(self._blocks()):
            short, *caches = state[i * c.order : (i + 1) * c.order]
            packed, now = layer.hyena.projected(layer.hyena_norm(x), short)
            mixed, caches = self._mixed(layer, packed, caches, position)
            after += [now, *caches]
            x = layer.mlp(x + layer.hyena.out_proj(mixed))
        logits: Tensor = self.head(self.norm(x))
        return logits, *after, position + tokens.shape[1]

    def _mixed(
        self, layer: _Block, packed: Tensor, caches: Sequence[Tensor], position: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """The gates and long convolutions of ``packed [B,T,(N+1)d]``: ``[B,T,d]`` and the new caches."""
        n1, n2 = fft_sizes(self.config.max_tokens)
        skip = layer.hyena.filter_skip
        if self.config.order == 2:  # one operator
            mixed, cache = hyena_conv(packed, layer.filters[0], skip[0], caches[0], position, n1, n2)
            return mixed, [cache]
        out, *gates, v = torch.split(packed, self.config.width, -1)
        after = []
        for j, gate in enumerate(reversed(gates)):
            z = gate * v
            y, cache = fft_conv_cached(z.transpose(1, 2), layer.filters[j], caches[j], position, n1, n2)
            v = y.transpose(1, 2) + z * skip[j]
            after.append(cache)
        return out * v, after


class HyenaTrain(_Stack):
    """The training form: ``forward(tokens [B,T]) -> logits [B,T,V]`` for T <= max_tokens."""

    def _filters(self) -> nn.Module:
        return ImplicitFilter(self.config.filter_sizes)

    def forward(self, tokens: Tensor) -> Tensor:
        c = self.config
        if tokens.shape[1] > c.max_tokens:
            raise InputError(
                "a sequence is longer than the filters", got=tokens.shape[1], allowed=c.max_tokens
            )
        x = self.embed(tokens)
        empty = x.new_zeros(x.shape[0], 2, (c.order + 1) * c.width)
        for layer in self._blocks():
            packed, _ = layer.hyena.projected(layer.hyena_norm(x), empty)
            out, *gates, v = torch.split(packed, c.width, -1)
            filters = layer.filters(tokens.shape[1])
            for j, gate in enumerate(reversed(gates)):
                z = gate * v
                v = (
                    causal_conv(z.transpose(1, 2), filters[j]).transpose(1, 2)
                    + z * layer.hyena.filter_skip[j]
                )
            x = layer.mlp(x + layer.hyena.out_proj(out * v))
        logits: Tensor = self.head(self.norm(x))
        return logits


def _init(module: nn.Module, seed: int) -> None:
    """Fill a Hyena (either form) with weights to train from.

    The chunk form gets the filters that the training form would have. Projections that read the
    residual stream have the variance 1/fan_in, those that write to it are smaller by sqrt(2*layers);
    the short convolutions begin near the identity; the filters' FFN has safari's initialisation, but
    for a last layer scaled so that a filter's norm is about 1, not its points.
    """
    assert isinstance(module, _Stack)
    if isinstance(module, Hyena):
        train = HyenaTrain(module.config)
        _init(train, seed)
        module.load_state_dict(_from_training(module.config, train.state_dict()))
        return
    c = module.config
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(_first_value(c, name, p, rng))


def _first_value(c: HyenaConfig, name: str, p: Tensor, rng: torch.Generator) -> Tensor:
    """The initial value of one parameter of the training form."""
    noise = torch.randn(p.shape, generator=rng)
    if name.endswith("frequency"):
        return torch.full(p.shape, c.filter_frequency)
    if name.endswith("conv_weight"):
        return noise * 0.2 + torch.tensor([0.0, 0.0, 1.0])[:, None]
    if name.endswith("filter_skip"):
        return noise
    if ".filters." in name:
        fan_in = p.shape[-1] if p.ndim == 2 else c.filter_width
        bound: float = fan_in**-0.5 * (c.max_tokens**-0.5 * 8 if ".last." in name else 1.0)
        return (torch.rand(p.shape, generator=rng) * 2 - 1) * bound
    if p.ndim < 2:
        return torch.full(p.shape, 0.0 if name.endswith("bias") else 1.0)
    if name == "embed.weight":
        return noise * 0.5
    writes = name.endswith(("out_proj.weight", "fc2.weight")) or ".wo." in name
    depth = (2 * c.layers) ** -0.5 if writes else 1.0
    std: float = p.shape[1] ** -0.5 * (0.25 if name == "head.weight" else depth)
    return noise * std


def _from_training(config: HyenaConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, with every filter FFN replaced by the filters it makes (in float64)."""
    result = {k: v.detach() for k, v in tensors.items() if ".filters." not in k}
    with torch.device("cpu"):
        ffn = ImplicitFilter(config.filter_sizes).double()
    for i in range(config.layers):
        prefix = f"layers.{i}.filters."
        ffn.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        with torch.no_grad():
            for j, h in enumerate(ffn(config.max_tokens)):
                result[f"{prefix}{j}"] = h.float().contiguous()
    return result


_DNA = "hyena.backbone."


def _layout(raw: RawCheckpoint) -> str | None:
    if raw.config.get("model_type") == "hyenadna" or f"{_DNA}ln_f.weight" in raw.tensors:
        return "it has the layout of HyenaDNA"
    return None


def load_own(raw: RawCheckpoint, family: str, kind: type[HyenaConfig]) -> LoadedModel | None:
    """The model in a file of our own training of ``family``, with the filters that it makes, or None."""
    config = own_config(raw, family, kind)
    if config is None:
        return None
    with torch.device("meta"):
        wanted = HyenaTrain(config).state_dict()
    require_keys(raw, tuple(wanted), family)
    _check_shapes(raw.tensors, wanted)
    tensors = _from_training(config, {k: raw.tensors[k] for k in wanted})
    return LoadedModel(family, config, tensors, source=str(raw.path))


def _load(raw: RawCheckpoint) -> LoadedModel:
    own = load_own(raw, "hyena", HyenaConfig)
    if own is not None:
        return own
    if f"{_DNA}ln_f.weight" not in raw.tensors:
        raise CheckpointError(
            "this is not a Hyena checkpoint that can be read",
            got=f"{raw.path.name}: tensors such as {', '.join(list(raw.tensors)[:4])}",
            allowed="a Hugging Face folder of HyenaDNA, or a safetensors file from xexport's own training",
        )
    config, tensors = _read_dna(raw)
    return LoadedModel("hyena", config, tensors, source=str(raw.path))


def _check_shapes(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for key, tensor in wanted.items():
        if found[key].shape != tensor.shape:
            raise CheckpointError(
                f"tensor {key!r} has a wrong shape", got=tuple(found[key].shape), allowed=tuple(tensor.shape)
            )


#: HyenaDNA's block -> here
_DNA_BLOCK = {
    "norm1": "hyena_norm",
    "norm2": "mlp_norm",
    "mixer.in_proj": "hyena.in_proj",
    "mixer.out_proj": "hyena.out_proj",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
}


def _read_dna(raw: RawCheckpoint) -> tuple[HyenaConfig, dict[str, Tensor]]:
    """A HyenaDNA language model: sizes from the shapes, filters from the stored features and window."""
    t, first = raw.tensors, f"{_DNA}layers.0."
    names = ("mixer.filter_fn.pos_emb.z", "mixer.filter_fn.modulation.deltas", "mixer.in_proj.weight")
    needed = tuple(first + n for n in (*names, "mlp.fc1.weight", "mixer.filter_fn.implicit_filter.0.weight"))
    require_keys(raw, (f"{_DNA}embeddings.word_embeddings.weight", *needed), "hyena (HyenaDNA)")
    embed = t[f"{_DNA}embeddings.word_embeddings.weight"]
    linear = [
        k for k in t if k.startswith(f"{first}mixer.filter_fn.implicit_filter.") and k.endswith("weight")
    ]
    config = HyenaConfig(
        vocab_size=embed.shape[0],
        width=embed.shape[1],
        layers=1 + max(int(k.split(".")[3]) for k in t if k.startswith(f"{_DNA}layers.")),
        ffn=t[f"{first}mlp.fc1.weight"].shape[0],
        max_tokens=t[f"{first}mixer.filter_fn.pos_emb.z"].shape[1],
        order=t[f"{first}mixer.in_proj.weight"].shape[0] // embed.shape[1] - 1,
        filter_width=t[f"{first}mixer.filter_fn.implicit_filter.0.weight"].shape[0],
        filter_inner=len(linear) - 2,
        filter_features=t[f"{first}mixer.filter_fn.implicit_filter.0.weight"].shape[1],
        filter_shift=0.05,
    )
    if config.order != 2:
        raise CheckpointError("HyenaDNA exists with order 2 only", got=config.order)
    result = {"embed.weight": embed, "head.weight": t.get("lm_head.weight", embed)}
    for kind in ("weight", "bias"):
        result[f"norm.{kind}"] = t[f"{_DNA}ln_f.{kind}"]
    for i in range(config.layers):
        block = {
            k.removeprefix(f"{_DNA}layers.{i}."): v
            for k, v in t.items()
            if k.startswith(f"{_DNA}layers.{i}.")
        }
        result |= {f"layers.{i}.{k}": v for k, v in _dna_block(config, block).items()}
    with torch.device("meta"):
        wanted = Hyena(config).state_dict()
    _check_shapes(result, wanted)
    return config, result


def _dna_block(config: HyenaConfig, t: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One block in this file's names, the filters made in float64."""
    try:
        result = {
            f"{ours}.{k}": t[f"{its}.{k}"] for its, ours in _DNA_BLOCK.items() for k in ("weight", "bias")
        }
        result["hyena.conv_weight"] = t["mixer.short_filter.weight"][:, 0].T
        result["hyena.conv_bias"] = t["mixer.short_filter.bias"]
        result["hyena.filter_skip"] = t["mixer.filter_fn.bias"].view(config.order - 1, config.width)
    except KeyError as error:
        raise CheckpointError("a HyenaDNA block lacks a tensor", got=error, fix="is it truncated?") from error
    filters = published_filters(t, config.filter_sizes, "mixer.filter_fn.")
    return result | {f"filters.{j}": h.float().contiguous() for j, h in enumerate(filters)}


def _sized(layers: int, width: int, ffn: int) -> HyenaConfig:
    """A size of the paper's appendix A; GPT-2's vocabulary."""
    return HyenaConfig(vocab_size=50257, width=width, layers=layers, ffn=ffn)


FAMILY = Family(
    name="hyena",
    title="Hyena: gated implicit long convolutions (arXiv 2302.10866)",
    sources=(
        "https://arxiv.org/abs/2302.10866",
        "https://github.com/HazyResearch/safari",
        "https://arxiv.org/abs/2306.15794",
    ),
    config=HyenaConfig,
    presets={
        "tiny": HyenaConfig(
            vocab_size=29,
            width=24,
            layers=2,
            ffn=40,
            max_tokens=50,
            order=3,
            filter_width=8,
            filter_features=5,
        ),
        "zoo": HyenaConfig(filter_frequency=5.0),  # 0.05 nats better than 14 after 120 steps
        "125m": _sized(18, 768, 1536),
        "153m": _sized(18, 864, 1728),
        "355m": _sized(36, 1024, 2048),
    },
    build=Hyena,
    load=_load,
    layout=_layout,
    reads="keys of HyenaDNA (hyena.backbone.*), or model_type hyenadna in config.json",
    train_form=HyenaTrain,
    from_training=_from_training,
    init=_init,
    roles=(
        ("embed.*", "embedding"),
        ("head.*", "head"),
        ("*norm.*", "norm"),
        ("*.filters.*", "filter"),
        ("*.conv_*", "conv"),
        ("*.filter_skip", "filter"),
        ("*_proj.weight", "projection"),
        ("*.fc?.weight", "projection"),
    ),
    state_note="the inputs of every long convolution, up to max_tokens, and two short-convolution rows",
)
