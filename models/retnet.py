"""RetNet: retention, a linear recurrence with one fixed decay a head, in the chunk form.

Sources:
    1. Sun et al., Retentive Network: A Successor to Transformer for Large Language Models,
       arXiv 2307.08621: section 2.1 (retention), 2.2 (multi-scale, gated), table 2 (sizes).
    2. microsoft/torchscale, ``retnet.py`` and ``multiscale_retention.py`` (MIT): the rotation's
       frequencies, which the paper leaves open, the RMS-normed, GLU variant, and the options below.
    3. Wang et al., DeepNet: Scaling Transformers to 1,000 Layers, arXiv 2203.00555: deepnorm.

Glossary:
    B batch, T tokens, d width, H heads, K = d/H key size, V = value_factor*K value size,
    gamma_h = 1 - 2^(-5-h) decay of head h, theta_i rotation of key pair i, radians a token.

One block (pre-norm, X the residual stream):
    Y = MSR(LN(X)) + X        X' = FFN(LN(Y)) + Y        FFN(Z) = gelu(Z W1) W2
    MSR(X) = (swish(X W_G) * GroupNorm_H(retention(X W_Q, X W_K, X W_V))) W_O
    retention, head h:  S_t = gamma_h S_{t-1} + k_t v_t^T,   o_t = K^-1/2 q_t S_t
with q and k rotated by the angle ``position * theta`` (xPos without its scaling: gamma does that).

Options of [2]: norms behind each layer in place of before it, ``Y = LN(a X + MSR(X))``, and then none behind
the last; ``deepnorm``, with a = (2 layers)^(1/4) in place of 1 (either place of the norms: releases of [2]
differ); a norm behind the embedding; an embedding times sqrt(d); relu or swish for gelu. Its experts are
refused.

Normalisation: the paper also divides by sqrt(K), by the row sums of the decay mask and by the row's
absolute sum (section 2.2, "retention score normalization"). The last two divide a head's output at
one token by one positive number; the group norm that follows cancels any such factor, so the recurrence
keeps K^-1/2 alone and the model is the same function. (But for the norm's epsilon of 1e-6, which acts on
head outputs of 1e-3 and less, as weights that were never trained give.)

Precision: angles are exact at any distance (models/_rotary.py). Rounding theta to 2^-33 turns moves the angle
between tokens n and m by (n-m) * 7e-10 rad, and the decay ends at n-m of some thousands.

Forms: linear_recurrence is one node for every T. Its kernel goes token by token, and with 128 keys a head
or more (the paper's sizes) by equation 7, 32 tokens at a time: measured figures are in
ops/linear_recurrence/README.md. Equation 7 in PyTorch is the training form, RetNetTrain.

State: ``layers.<i>.retention`` [B,H,K,V] float32, ``position`` [1] int64 (shared by the batch).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xexport.core.checkpoint import RawCheckpoint, own_config
from xexport.core.errors import CheckpointError, InputError
from xexport.core.family import Family, LoadedModel
from xexport.core.state import StateSpec
from xexport.models._fill import fill
from xexport.models._retnet_load import HEADS_KEY, from_torchscale
from xexport.models._rotary import rope_angles, rotate_pairs, turns_of
from xexport.ops.linear_recurrence.reference import linear_recurrence

__all__ = ["FAMILY", "RetNet", "RetNetConfig", "RetNetTrain"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "swish": F.silu}


@dataclass(frozen=True)
class RetNetConfig:
    """Sizes of a RetNet.

    Attributes:
        vocab_size, width, layers, heads: V, d, number of blocks, H.
        ffn: inner width of the feed-forward network (the paper's is 2 d).
        value_factor: value size over key size (the paper's is 2); their product is whole.
        rms: RMS norms without mean and bias, as torchscale has them, in place of layer and group norms.
        glu: gate the feed-forward network by a third matrix, as torchscale does.
        eps: epsilon of every norm.
        norms_behind: the norms come after the residual sums, and there is none behind the last layer.
        deepnorm: the residual stream is weighted by (2 layers)^(1/4) in every sum.
        embedding_norm: a norm behind the embedding.
        scale_embedding: embeddings are multiplied by sqrt(width).
        activation: of the feed-forward network: gelu, relu or swish.
    """

    vocab_size: int = 256
    width: int = 160
    layers: int = 4
    heads: int = 5
    ffn: int = 320
    value_factor: float = 2
    rms: bool = False
    glu: bool = False
    eps: float = 1e-6
    norms_behind: bool = False
    deepnorm: bool = False
    embedding_norm: bool = False
    scale_embedding: bool = False
    activation: str = "gelu"

    def __post_init__(self) -> None:
        if min(self.vocab_size, self.width, self.layers, self.heads, self.ffn) < 1:
            raise InputError("a RetNet size is below 1", got=self)
        if self.width % (2 * self.heads):
            raise InputError(
                "the width of a RetNet must be an even multiple of its heads", got=(self.width, self.heads)
            )
        if self.value_size < 1 or self.value_size != self.key_size * self.value_factor:
            raise InputError("the value size is not whole", got=self.key_size * self.value_factor)
        if self.activation not in _ACTIVATIONS:
            raise InputError(
                "unknown activation of a RetNet", got=self.activation, allowed=", ".join(_ACTIVATIONS)
            )

    @property
    def key_size(self) -> int:
        """K."""
        return self.width // self.heads

    @property
    def value_size(self) -> int:
        """V."""
        return round(self.key_size * self.value_factor)

    @property
    def residual(self) -> float:
        """What the residual stream is multiplied by in every sum."""
        return (2.0 * self.layers) ** 0.25 if self.deepnorm else 1.0


class _Norm(nn.Module):
    """Layer norm over the last axis, or RMS norm."""

    def __init__(self, width: int, rms: bool, eps: float) -> None:
        super().__init__()
        self.rms, self.eps = rms, eps
        self.weight = nn.Parameter(torch.ones(width))
        if not rms:
            self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.rms:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


class _Retention(nn.Module):
    """The projections around the recurrence; the recurrence itself is handed in by the caller."""

    def __init__(self, c: RetNetConfig) -> None:
        super().__init__()
        self.c = c
        values = c.heads * c.value_size
        self.q_proj = nn.Linear(c.width, c.width, bias=False)
        self.k_proj = nn.Linear(c.width, c.width, bias=False)
        self.v_proj = nn.Linear(c.width, values, bias=False)
        self.g_proj = nn.Linear(c.width, values, bias=False)
        self.out_proj = nn.Linear(values, c.width, bias=False)

    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """q and k of ``x [B,T,d]``, each ``[B,T,H,K]`` and rotated; cos and sin are ``[T,1,K/2]``."""
        q, k = (torch.unflatten(p(x), -1, (self.c.heads, -1)) for p in (self.q_proj, self.k_proj))
        return rotate_pairs(q, cos, sin), rotate_pairs(k, cos, sin)

    def finish(self, x: Tensor, o: Tensor) -> Tensor:
        """Group norm, swish gate and output projection of the heads' outputs ``o [B,T,H,V]``."""
        if self.c.rms:
            o = F.rms_norm(o, o.shape[-1:], None, self.c.eps)
        else:
            o = F.layer_norm(o, o.shape[-1:], None, None, self.c.eps)
        y: Tensor = self.out_proj(F.silu(self.g_proj(x)) * o.flatten(-2))
        return y


class _FeedForward(nn.Module):
    """act(x W1) W2, or (act(x W1) * x Wg) W2."""

    def __init__(self, c: RetNetConfig) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[c.activation]
        self.fc1 = nn.Linear(c.width, c.ffn, bias=False)
        self.fc2 = nn.Linear(c.ffn, c.width, bias=False)
        self.gate = nn.Linear(c.width, c.ffn, bias=False) if c.glu else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.fc1(x))
        y: Tensor = self.fc2(h if self.gate is None else h * self.gate(x))
        return y


class _Block(nn.Module):
    def __init__(self, c: RetNetConfig) -> None:
        super().__init__()
        self.retention_norm = _Norm(c.width, c.rms, c.eps)
        self.retention = _Retention(c)
        self.ffn_norm = _Norm(c.width, c.rms, c.eps)
        self.ffn = _FeedForward(c)
        self.behind, self.residual = c.norms_behind, c.residual

    def before(self, norm: nn.Module, x: Tensor) -> Tensor:
        """What retention or the feed-forward network reads of the stream ``x``."""
        return x if self.behind else norm(x)

    def after(self, norm: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The stream ``x`` with the result ``y`` in it."""
        z = (x if self.residual == 1.0 else x * self.residual) + y
        return norm(z) if self.behind else z

    def feed(self, x: Tensor) -> Tensor:
        """The feed-forward half of the block."""
        return self.after(self.ffn_norm, x, self.ffn(self.before(self.ffn_norm, x)))


class RetNet(nn.Module):
    """The chunk form: ``forward(tokens [B,T] int64, *state) -> (logits [B,T,V], *new_state)``.

    The buffers ``decay`` (log gamma, float32 [H]) and ``turns`` (theta in 2^-32 turns, int64 [K/2])
    are constants of the configuration, kept with the weights so that a module on the meta device has
    them too.
    """

    max_tokens: int | None = None
    decay: Tensor
    turns: Tensor

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.embed = nn.Embedding(config.vocab_size, config.width)
        if config.embedding_norm:
            self.embed_norm = _Norm(config.width, config.rms, config.eps)
        self.layers = nn.ModuleList(_Block(config) for _ in range(config.layers))
        if not config.norms_behind:
            self.norm = _Norm(config.width, config.rms, config.eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        for name, table in _tables(config).items():
            self.register_buffer(name, torch.tensor(table.tolist(), dtype=table.dtype))

    def state_spec(self) -> list[StateSpec]:
        """Retention per layer, then the position."""
        c = self.config
        shape = ("B", c.heads, c.key_size, c.value_size)
        specs = [StateSpec(f"layers.{i}.retention", shape) for i in range(c.layers)]
        return [*specs, StateSpec("position", (1,), "int64")]

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        c = self.config
        *retention, position = state
        batch, length = tokens.shape
        cos, sin = self.angles(position + torch.arange(length, device=tokens.device))
        decay = self.decay.expand(batch, length, c.heads)
        x = self._embedded(tokens)
        after = []
        for layer, before in zip(self._blocks(), retention, strict=True):
            h = layer.before(layer.retention_norm, x)
            q, k = layer.retention.rotated(h, cos, sin)
            o, now = linear_recurrence(
                q.flatten(-2),
                k.flatten(-2),
                layer.retention.v_proj(h),
                before,
                decay,
                c.heads,
                c.key_size**-0.5,
            )
            after.append(now)
            y = layer.retention.finish(h, torch.unflatten(o, -1, (c.heads, -1)))
            x = layer.feed(layer.after(layer.retention_norm, x, y))
        return self._logits(x), *after, position + length

    def _embedded(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embed(tokens)
        if self.config.scale_embedding:
            x = x * self.config.width**0.5
        return self.embed_norm(x) if self.config.embedding_norm else x

    def _logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x if self.config.norms_behind else self.norm(x))
        return logits

    def _blocks(self) -> list[_Block]:
        return list(self.layers)  # type: ignore[arg-type]

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin ``[T,1,K/2]`` of ``position * theta`` for int64 positions ``[T]`` below 2^33."""
        return rope_angles(self.turns, positions, self.decay.dtype)


class RetNetTrain(RetNet):
    """The training form: ``forward(tokens [B,T]) -> logits [B,T,V]``, differentiable.

    Chunkwise retention (paper, equation 7): inside a chunk of C tokens the parallel form
    ``(Q K^T * D) V`` with ``D[n,m] = gamma^(n-m)`` for n >= m (equation 5), between chunks the
    recurrence, so the cost is linear in T. Same parameters as the chunk form.
    """

    chunk = 128

    def forward(self, tokens: Tensor, *state: Tensor) -> Tensor:  # type: ignore[override]
        c = self.config
        cos, sin = self.angles(torch.arange(tokens.shape[1], device=tokens.device))
        tables = self._decays(min(self.chunk, tokens.shape[1]))
        x = self._embedded(tokens)
        for layer in self._blocks():
            h = layer.before(layer.retention_norm, x)
            q, k = (y.transpose(1, 2) for y in layer.retention.rotated(h, cos, sin))
            v = torch.unflatten(layer.retention.v_proj(h), -1, (c.heads, -1)).transpose(1, 2)
            y = layer.retention.finish(h, self._retain(q, k, v, tables).transpose(1, 2))
            x = layer.feed(layer.after(layer.retention_norm, x, y))
        return self._logits(x)

    def _decays(self, size: int) -> tuple[Tensor, Tensor]:
        """The mask ``D * K^-1/2 [H,C,C]`` of a chunk, and ``gamma^n [H,C+1,1]``."""
        n = torch.arange(size + 1, dtype=self.decay.dtype, device=self.decay.device)
        log = self.decay[:, None, None]
        lag = (n[:size, None] - n[:size]).clamp(min=0)
        return (log * lag).exp().tril() * self.config.key_size**-0.5, (log * n[:, None]).exp()

    def _retain(self, q: Tensor, k: Tensor, v: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """Retention of ``q, k [B,H,T,K]`` and ``v [B,H,T,V]`` from an empty state."""
        mask, power = tables
        outs: list[Tensor] = []
        now: Tensor | None = None
        for qc, kc, vc in zip(*(torch.split(y, mask.shape[1], 2) for y in (q, k, v)), strict=True):
            size = qc.shape[2]
            out = ((qc @ kc.transpose(2, 3)) * mask[:, :size, :size]) @ vc
            faded = (kc * power[:, :size].flip(1)).transpose(2, 3) @ vc
            if now is not None:
                out = out + (qc * (power[:, 1 : size + 1] * self.config.key_size**-0.5)) @ now
                faded = faded + now * power[:, size, None]
            now = faded
            outs.append(out)
        return torch.cat(outs, 2)


def _tables(config: RetNetConfig) -> dict[str, Tensor]:
    """The constant buffers, always on the CPU: ``decay`` float32 [H], ``turns`` int64 [K/2].

    theta_i = 10000^(-i/(K/2-1)), torchscale's choice.
    """
    gamma = [math.log1p(-(2.0 ** (-5 - h))) for h in range(config.heads)]
    return {
        "decay": torch.tensor(gamma, dtype=torch.float32, device="cpu"),
        "turns": torch.tensor(turns_of(_theta(config)), dtype=torch.int64, device="cpu"),
    }


def _theta(config: RetNetConfig) -> list[float]:
    pairs = config.key_size // 2
    return [10000.0 ** -(i / max(pairs - 1, 1)) for i in range(pairs)]


def _published_tables(config: RetNetConfig) -> dict[str, Tensor]:
    """The same constants as torchscale stores them: theta twice a pair."""
    angle = torch.tensor(_theta(config)).repeat_interleave(2)
    return {HEADS_KEY: _tables(config)["decay"], HEADS_KEY.replace("decay", "angle"): angle}


def _init(module: nn.Module, seed: int) -> None:
    """Fill a RetNet (either form) with weights to train from.

    Projections that read the residual stream have the variance 1/fan_in; those that write to it are
    smaller by sqrt(2 * layers), so that the stream's variance does not grow with depth. The head
    starts small: the first logits are nearly flat.
    """
    assert isinstance(module, RetNet)
    fill(module, seed, writes=dict.fromkeys(("*out_proj.weight", "*fc2.weight"), module.config.layers))
    for name, table in _tables(module.config).items():
        module.get_buffer(name).copy_(table)


def _from_training(config: RetNetConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The two forms have the same parameters; the constant tables are made anew."""
    return {**{k: v.detach() for k, v in tensors.items()}, **_tables(config)}


def _layout(raw: RawCheckpoint) -> str | None:
    if any(key.endswith(HEADS_KEY) for key in raw.tensors):
        return f"it has torchscale's {HEADS_KEY}"
    return None


def _load(raw: RawCheckpoint) -> LoadedModel:
    config = own_config(raw, "retnet", RetNetConfig)
    if config is not None:
        return _checked(raw, config, dict(raw.tensors))
    if any(key.endswith(HEADS_KEY) for key in raw.tensors):
        return _load_torchscale(raw)
    raise CheckpointError(
        "this is not a RetNet checkpoint that can be read",
        got=f"{raw.path.name}: tensors such as {', '.join(list(raw.tensors)[:4])}",
        allowed="torchscale's RetNetDecoder, or a safetensors file from xexport's own training",
    )


def _load_torchscale(raw: RawCheckpoint) -> LoadedModel:
    """torchscale's decoder; what is neither used nor the constants that it stores is refused."""
    fields, found, notes = from_torchscale(raw)
    try:
        config = RetNetConfig(**fields)
    except InputError as error:
        raise CheckpointError("torchscale's options are not those of a RetNet", got=error) from error
    for name, ours in _published_tables(config).items():
        theirs = found.pop(name, ours)
        if theirs.shape != ours.shape or not torch.allclose(theirs.float(), ours, rtol=1e-2):
            raise CheckpointError(
                f"{name} is not what a RetNet of its size has", got=theirs.tolist(), allowed=ours.tolist()
            )
    return dataclasses.replace(_checked(raw, config, found), notes=notes)


def _checked(raw: RawCheckpoint, config: RetNetConfig, found: dict[str, Tensor]) -> LoadedModel:
    """The tensors of ``config`` out of ``found``, each of the right shape."""
    with torch.device("meta"):
        wanted = {k: v.shape for k, v in RetNet(config).state_dict().items()}
    tensors = _from_training(config, {k: v for k, v in found.items() if k in wanted})
    strange = [k for k in found if k not in wanted]
    if strange:
        raise CheckpointError(
            f"{len(strange)} tensors of this checkpoint belong to no RetNet that is known here",
            got=f"{raw.path.name}: among others {', '.join(strange[:4])}",
        )
    missing = [k for k in wanted if k not in tensors]
    if missing:
        raise CheckpointError(
            f"this checkpoint lacks {len(missing)} tensors of a RetNet",
            got=f"{raw.path.name}: {len(raw.tensors)} tensors",
            allowed=f"among others {', '.join(missing[:4])}",
            fix="is it truncated, or of another variant?",
        )
    for key, shape in wanted.items():
        if tensors[key].shape != shape:
            raise CheckpointError(
                f"tensor {key!r} has a wrong shape", got=tuple(tensors[key].shape), allowed=tuple(shape)
            )
    return LoadedModel("retnet", config, tensors, source=str(raw.path))


def _sized(layers: int, width: int, heads: int) -> RetNetConfig:
    """A row of the paper's table 2; vocabulary as in its experiments."""
    return RetNetConfig(vocab_size=100288, width=width, layers=layers, heads=heads, ffn=2 * width)


_TINY: dict[str, Any] = {"vocab_size": 29, "width": 32, "layers": 2, "heads": 2, "ffn": 48}

FAMILY = Family(
    name="retnet",
    title="RetNet: multi-scale retention (arXiv 2307.08621)",
    sources=("https://arxiv.org/abs/2307.08621", "https://github.com/microsoft/torchscale"),
    config=RetNetConfig,
    presets={
        "tiny": RetNetConfig(**_TINY),
        "tiny-deepnorm": RetNetConfig(
            **_TINY
            | {"rms": True, "glu": True, "norms_behind": True, "deepnorm": True, "embedding_norm": True}
            | {"scale_embedding": True, "activation": "swish"}
        ),
        "zoo": RetNetConfig(),
        "1.3b": _sized(24, 2048, 8),
        "2.7b": _sized(32, 2560, 10),
        "6.7b": _sized(32, 4096, 16),
    },
    build=RetNet,
    load=_load,
    layout=_layout,
    reads="torchscale's key retnet_rel_pos.decay",
    train_form=RetNetTrain,
    from_training=_from_training,
    init=_init,
    roles=(
        ("embed.*", "embedding"),
        ("head.*", "head"),
        ("decay", "decay"),
        ("turns", "other"),
        ("*norm.*", "norm"),
        ("*_proj.weight", "projection"),
        ("*.ffn.*", "projection"),
    ),
    state_note="one matrix a head and layer, and the position: constant in the length of the stream",
)
