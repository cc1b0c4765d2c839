"""Linear attention: plain, gated (GLA), with the delta rule (DeltaNet), and both (Gated DeltaNet).

Sources:
    1. Katharopoulos et al., Transformers are RNNs, arXiv 2006.16236: equations 9, 18 to 20; phi = elu + 1.
    2. Yang et al., Gated Linear Attention Transformers, arXiv 2312.06635: equation 3, section 4.4.
    3. Yang et al., Parallelizing Linear Transformers with the Delta Rule, arXiv 2406.06484: equation 2.
    4. Yang et al., Gated Delta Networks, arXiv 2412.06464: equation 10, section 3.4.
    5. fla-org/flash-linear-attention, layers/gla.py, delta_net.py, gated_deltanet.py, and models/: what the
       papers leave open, and the checkpoint layouts.

Glossary:
    B batch, T tokens, d width, H heads, K key size, V value size, S state [K,V] of a head.

``rule``, for one head (o is the head's output, s = K^-1/2):
    linear       S_t = S_{t-1} + k v^T,  z_t = z_{t-1} + k,  o = S^T q / (z.q + 1e-6),  q, k through elu + 1
    gla          S_t = diag(exp g) S_{t-1} + k v^T,          o = s S^T q,   g = logsigmoid(low rank of x) / 16
    delta        S_t = S_{t-1} + beta k (v - S_{t-1}^T k)^T, o = s S^T q,   beta = sigmoid(x W_b)
    gated_delta  the same after S_{t-1} was multiplied by exp(g),  g = -exp(A) softplus(x W_a + dt)
Where there is a convolution (``conv_size``), q, k and v go through a causal depthwise one of that many taps
and SiLU; of the delta rules q and k then get unit length. The head's output is normed and, but for ``linear``
and where ``gate`` is false, multiplied by SiLU(x W_g); ``linear`` does neither, as its paper.

The block around it is that of [5] for all four: x + mixer(norm(x)), then x + SwiGLU(norm(x)); [1] has the
block of Vaswani et al. and trained positions instead.

The normaliser z is the state's last column: v gets a column of ones.

State: ``layers.<i>.state`` [B,H,K,V], for ``linear`` [B,H,K,V+1]; ``layers.<i>.conv``
[B,conv_size-1,H(2K+V)], the last inputs of the convolutions of q, k and v. Constant in the stream's length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xexport.core.checkpoint import RawCheckpoint, match_tensors, own_config, require_keys
from xexport.core.errors import CheckpointError, InputError
from xexport.core.family import Family, LoadedModel
from xexport.core.state import StateSpec
from xexport.models._chunk import RMSNorm
from xexport.ops.causal_conv1d.reference import causal_conv1d
from xexport.ops.delta_rule.parallel import delta_rule_parallel
from xexport.ops.delta_rule.reference import delta_rule
from xexport.ops.linear_attention.by_key import gated_by_key_parallel
from xexport.ops.linear_attention.parallel import gated_parallel
from xexport.ops.linear_attention.reference import linear_attention

__all__ = ["FAMILY", "LinearAttention", "LinearAttentionConfig", "LinearAttentionTrain"]

_RULES = ("linear", "gla", "delta", "gated_delta")


@dataclass(frozen=True)
class LinearAttentionConfig:
    """Sizes of a linear attention model.

    Attributes:
        vocab_size, width, layers, heads: V, d, number of blocks, H.
        key_size, value_size: K and V of a head; 0 is d/H.
        ffn: inner width of the feed-forward network.
        rule: ``linear``, ``gla``, ``delta`` or ``gated_delta``; see the module's docstring.
        conv_size: taps of the short convolutions; 0 for none, of a delta rule SiLU alone.
        gate: gate the output, where the rule has a norm.
        gate_rank, gate_divisor: of GLA's decay.
        beta_max: what a delta rule's sigmoid is multiplied by (2 allows negative eigenvalues).
        eps: epsilon of the RMS norms.
    """

    vocab_size: int = 256
    width: int = 160
    layers: int = 4
    heads: int = 5
    key_size: int = 0
    value_size: int = 0
    ffn: int = 432
    rule: str = "gla"
    conv_size: int = 0
    gate: bool = True
    gate_rank: int = 16
    gate_divisor: float = 16.0
    beta_max: float = 1.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.rule not in _RULES:
            raise InputError("unknown rule of linear attention", got=self.rule, allowed=", ".join(_RULES))
        sizes = (self.vocab_size, self.width, self.layers, self.heads, self.ffn, self.gate_rank)
        if min(sizes) < 1 or min(self.key_size, self.value_size, self.conv_size) < 0 or self.conv_size == 1:
            raise InputError("a size of linear attention is too small", got=self)
        if not (self.key_size and self.value_size) and self.width % self.heads:
            raise InputError("the width is not a multiple of the heads", got=(self.width, self.heads))

    @property
    def key(self) -> int:
        """K."""
        return self.key_size or self.width // self.heads

    @property
    def value(self) -> int:
        """V of a head."""
        return self.value_size or self.width // self.heads

    @property
    def channels(self) -> int:
        """Of q, k and v together."""
        return self.heads * (2 * self.key + self.value)

    @property
    def erases(self) -> bool:
        """Whether the rule is a delta rule."""
        return self.rule in ("delta", "gated_delta")


class _FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, c: LinearAttentionConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.width, c.ffn, bias=False)
        self.up_proj = nn.Linear(c.width, c.ffn, bias=False)
        self.down_proj = nn.Linear(c.ffn, c.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


@dataclass(frozen=True)
class _Terms:
    """What the recurrence of a chunk is made of: q, k ``[B,T,H*K]``, v ``[B,T,H*V]``, the decay's logarithm
    ``[B,T,H]`` or ``[B,T,H*K]``, and a delta rule's beta ``[B,T,H]``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    beta: Tensor | None


class _Mixer(nn.Module):
    """Projections, convolution, gates and norm around the recurrence, which the caller runs."""

    def __init__(self, c: LinearAttentionConfig) -> None:
        super().__init__()
        self.c = c
        keys, values = c.heads * c.key, c.heads * c.value
        self.q_proj = nn.Linear(c.width, keys, bias=False)
        self.k_proj = nn.Linear(c.width, keys, bias=False)
        self.v_proj = nn.Linear(c.width, values, bias=False)
        self.o_proj = nn.Linear(values, c.width, bias=False)
        normed = c.rule != "linear"
        self.g_proj = nn.Linear(c.width, values, bias=False) if normed and c.gate else None
        self.o_norm = RMSNorm(c.value, c.eps) if normed else None
        if c.conv_size:
            self.conv_weight = nn.Parameter(torch.zeros(c.conv_size, c.channels))
        if c.rule == "gla":
            parts = nn.Linear(c.width, c.gate_rank, bias=False), nn.Linear(c.gate_rank, keys)
            self.gk_proj = nn.Sequential(*parts)
        if c.erases:
            self.b_proj = nn.Linear(c.width, c.heads, bias=False)
        if c.rule == "gated_delta":
            self.a_proj = nn.Linear(c.width, c.heads, bias=False)
            self.A_log = nn.Parameter(torch.zeros(c.heads))
            self.dt_bias = nn.Parameter(torch.zeros(c.heads))

    def terms(self, x: Tensor, last: Tensor | None) -> tuple[_Terms, Tensor | None]:
        """The terms for ``x [B,T,d]`` after the convolution's ``last`` inputs, and its new last ones."""
        c, heads = self.c, self.c.heads
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if last is not None:
            bias = x.new_zeros(c.channels)
            z, last = causal_conv1d(torch.cat((q, k, v), -1), self.conv_weight, bias, last, silu=True)
            q, k, v = torch.split(z, [heads * c.key, heads * c.key, heads * c.value], -1)
        elif c.erases:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        decay = beta = None
        if c.rule == "linear":
            q, k = F.elu(q) + 1, F.elu(k) + 1
            v = torch.unflatten(v, -1, (heads, -1))
            v = torch.cat((v, torch.ones_like(v[..., :1])), -1).flatten(-2)
        elif c.rule == "gla":
            decay = F.logsigmoid(self.gk_proj(x)) * (1 / c.gate_divisor)
        else:
            q, k = _unit(q, heads), _unit(k, heads)
            beta = self.b_proj(x).sigmoid() * c.beta_max
        if c.rule == "gated_delta":
            decay = -self.A_log.exp() * F.softplus(self.a_proj(x) + self.dt_bias)
        return _Terms(q, k, v, decay, beta), last

    @property
    def scale(self) -> float:
        """The factor on the recurrence's output."""
        return 1.0 if self.c.rule == "linear" else float(self.c.key**-0.5)

    def finish(self, x: Tensor, o: Tensor) -> Tensor:
        """The layer's output from its input and the recurrence's output ``o [B,T,H,V or V+1]``."""
        if self.c.rule == "linear":
            o = o[..., :-1] / (o[..., -1:] + 1e-6)
        if self.o_norm is not None:
            o = self.o_norm(o)
        o = o.flatten(-2)
        y: Tensor = self.o_proj(o if self.g_proj is None else o * F.silu(self.g_proj(x)))
        return y


class _Block(nn.Module):
    def __init__(self, c: LinearAttentionConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(c.width, c.eps)
        self.attn = _Mixer(c)
        self.mlp_norm = RMSNorm(c.width, c.eps)
        self.mlp = _FeedForward(c)


class _Decoder(nn.Module):
    def __init__(self, c: LinearAttentionConfig) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(c.vocab_size, c.width)
        self.layers = nn.ModuleList(_Block(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.width, c.eps)


class LinearAttention(nn.Module):
    """The chunk form: ``forward(tokens [B,T] int64, *state) -> (logits [B,T,V], *new_state)``."""

    max_tokens: int | None = None

    def __init__(self, config: LinearAttentionConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.model = _Decoder(config)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)

    def state_spec(self) -> list[StateSpec]:
        """Per layer the matrix, and the convolution's inputs if there is one."""
        c, specs = self.config, []
        for i in range(c.layers):
            columns = c.value + (c.rule == "linear")
            specs.append(StateSpec(f"layers.{i}.state", ("B", c.heads, c.key, columns)))
            if c.conv_size:
                specs.append(StateSpec(f"layers.{i}.conv", ("B", c.conv_size - 1, c.channels)))
        return specs

    def blocks(self) -> list[_Block]:
        """The blocks in their order."""
        return list(self.model.layers)  # type: ignore[arg-type]

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        c = self.config
        x = self.model.embeddings(tokens)
        rest, after = list(state), []
        for block in self.blocks():
            matrix, last = rest.pop(0), rest.pop(0) if c.conv_size else None
            h = block.attn_norm(x)
            terms, last = block.attn.terms(h, last)
            o, matrix = _recur(c, terms, matrix, block.attn.scale)
            after += [matrix] if last is None else [matrix, last]
            x = x + block.attn.finish(h, torch.unflatten(o, -1, (c.heads, -1)))
            x = x + block.mlp(block.mlp_norm(x))
        return self.lm_head(self.model.norm(x)), *after


def _recur(c: LinearAttentionConfig, t: _Terms, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The recurrence over a chunk, by the operator of its rule."""
    decay = t.q.new_zeros(t.q.shape[0], t.q.shape[1], c.heads) if t.decay is None else t.decay
    if t.beta is None:
        o, new = linear_attention(t.q, t.k, t.v, state, decay, c.heads, c.heads, scale, "gated")
    else:
        o, new = delta_rule(t.q, t.k, t.v, state, decay, t.beta, c.heads, c.heads, scale, "gated_delta")
    return o, new


class LinearAttentionTrain(LinearAttention):
    """The training form: ``forward(tokens [B,T]) -> logits [B,T,V]``, differentiable, in chunks of products.

    Same parameters as the chunk form.
    """

    def forward(self, tokens: Tensor, *state: Tensor) -> Tensor:  # type: ignore[override]
        c = self.config
        x = self.model.embeddings(tokens)
        for block in self.blocks():
            h = block.attn_norm(x)
            empty = x.new_zeros(x.shape[0], c.conv_size - 1, c.channels) if c.conv_size else None
            t, _ = block.attn.terms(h, empty)
            x = x + block.attn.finish(h, _parallel(c, t, block.attn.scale))
            x = x + block.mlp(block.mlp_norm(x))
        logits: Tensor = self.lm_head(self.model.norm(x))
        return logits


def _parallel(c: LinearAttentionConfig, t: _Terms, scale: float) -> Tensor:
    """The recurrence from an empty state in chunks of products, ``[B,T,H,V]``."""
    q, k, v = (torch.unflatten(y, -1, (c.heads, -1)) for y in (t.q, t.k, t.v))
    state = q.new_zeros(q.shape[0], c.heads, q.shape[3], v.shape[3])
    decay = q.new_zeros(q.shape[:3]) if t.decay is None else t.decay
    if t.beta is not None:
        o, _ = delta_rule_parallel(q, k, v, state, decay, t.beta, scale)
    elif c.rule == "gla":
        decay = torch.unflatten(decay, -1, (c.heads, -1))
        o, _ = gated_by_key_parallel(q, k, v, state, decay, scale)
    else:
        o, _ = gated_parallel(q, k, v, state, decay, scale)
    return o


def _unit(x: Tensor, heads: int) -> Tensor:
    """Every head's vector in ``x [B,T,H*K]`` at unit length."""
    y = torch.unflatten(x, -1, (heads, -1))
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6)).flatten(-2)


def _init(module: nn.Module, seed: int) -> None:
    """Fill a module (either form) with weights to train from.

    Projections that read the residual stream have the variance 1/fan_in, those that write to it are smaller
    by sqrt(2 * layers); the head starts small; convolutions begin near the identity. Decays as in [5].
    """
    assert isinstance(module, LinearAttention)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(_first_value(module.config, name, p, rng))


def _first_value(c: LinearAttentionConfig, name: str, p: Tensor, rng: torch.Generator) -> Tensor:
    """The initial value of one parameter."""
    noise = torch.randn(p.shape, generator=rng)
    if name.endswith("A_log"):
        return torch.rand(p.shape, generator=rng).mul(15).add(1).log()
    if name.endswith("dt_bias"):
        dt = torch.exp(torch.rand(p.shape, generator=rng) * math.log(100) + math.log(1e-3))
        return dt + torch.log(-torch.expm1(-dt))  # softplus maps it back to dt
    if name.endswith("conv_weight"):
        last = torch.zeros(p.shape)
        last[-1] = 1
        return last + noise * 0.1
    if noise.ndim < 2:
        return torch.full(p.shape, 0.0 if name.endswith("bias") else 1.0)
    std: float = noise.shape[1] ** -0.5
    if name.endswith("embeddings.weight"):
        std = 0.5
    elif name.endswith("lm_head.weight"):
        std *= 0.25
    elif name.endswith(("o_proj.weight", "down_proj.weight")):
        std *= (2 * c.layers) ** -0.5
    return noise * std


def _from_training(config: LinearAttentionConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Training and chunk form share their parameters."""
    return {k: v.detach() for k, v in tensors.items()}


#: model_type of flash-linear-attention -> rule
_PUBLISHED = {"gla": "gla", "delta_net": "delta", "gated_deltanet": "gated_delta"}
#: keys of their config.json that change the function, and the values computed here
_FIXED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("swish", "silu"),
    "attn": (None,),
    "feature_map": (None,),
    "clamp_min": (None,),
    "qk_norm": ("l2",),
    "qk_activation": ("silu",),
    "use_beta": (True,),
    "elementwise_affine": (True,),
    "use_output_norm": (True,),
    "output_gate_activation": ("swish", "silu"),
    "attnres_block_size": (None,),
    "tie_word_embeddings": (False,),
}


def _layout(raw: RawCheckpoint) -> str | None:
    kind = raw.config.get("model_type")
    return f"its config.json says model_type {kind}" if kind in _PUBLISHED else None


def _load(raw: RawCheckpoint) -> LoadedModel:
    """A Hugging Face folder of flash-linear-attention, or a file of xexport's own training."""
    config, tensors = own_config(raw, "linear_attention", LinearAttentionConfig), dict(raw.tensors)
    if config is None:
        config = _published_config(raw)
        tensors = _published_tensors(config, raw)
    with torch.device("meta"):
        wanted = LinearAttention(config)
    return LoadedModel(
        family="linear_attention",
        config=config,
        tensors=match_tensors(tensors, wanted, raw.path.name),
        tokenizer="bytes" if config.vocab_size == 256 else None,
        source=str(raw.path),
    )


def _published_config(raw: RawCheckpoint) -> LinearAttentionConfig:
    """Sizes from config.json; a value that would change the function is refused."""
    c, kind = raw.config, raw.config.get("model_type")
    if kind not in _PUBLISHED:
        raise CheckpointError(
            "this is not a linear attention checkpoint that can be read",
            got=f"{raw.path.name}: model_type {kind!r}, tensors such as {', '.join(list(raw.tensors)[:4])}",
            allowed=f"a Hugging Face folder of {', '.join(_PUBLISHED)}, or a safetensors file from xexport's "
            "own training",
        )
    for key, allowed in _FIXED.items():
        if key in c and c[key] not in allowed:
            raise CheckpointError(
                f"config.json has a {key} that is not computed here", got=c[key], allowed=allowed
            )
    require_keys(raw, ("model.embeddings.weight", "model.layers.0.attn.q_proj.weight"), "linear_attention")
    try:
        rule, heads, width = _PUBLISHED[kind], int(c["num_heads"]), int(c["hidden_size"])
        for key in ("num_kv_heads", "num_v_heads"):
            if c.get(key) not in (None, heads):
                raise CheckpointError(
                    f"config.json has other {key} than num_heads", got=c[key], allowed=heads
                )
        if rule == "gated_delta":
            key_size = int(c.get("head_dim", 256))
            value_size = round(key_size * float(c.get("expand_v", 2.0)))
        else:
            key_size = round(width * float(c.get("expand_k", 0.5 if rule == "gla" else 1.0))) // heads
            value_size = round(width * float(c.get("expand_v", 1.0))) // heads
        convolves = bool(c.get("use_short_conv", rule != "gla"))
        return LinearAttentionConfig(
            vocab_size=int(c["vocab_size"]),
            width=width,
            layers=int(c["num_hidden_layers"]),
            heads=heads,
            key_size=key_size,
            value_size=value_size,
            ffn=raw.tensors["model.layers.0.mlp.up_proj.weight"].shape[0],
            rule=rule,
            conv_size=int(c.get("conv_size", 4)) if convolves else 0,
            gate=bool(
                c.get("use_output_gate", True) if rule == "gla" else c.get("use_gate", rule != "delta")
            ),
            gate_rank=raw.tensors["model.layers.0.attn.gk_proj.0.weight"].shape[0] if rule == "gla" else 16,
            beta_max=2.0 if c.get("allow_neg_eigval") else 1.0,
            eps=float(c.get("norm_eps", 1e-6)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError("config.json lacks a size, or has a malformed one", got=error) from error


def _published_tensors(config: LinearAttentionConfig, raw: RawCheckpoint) -> dict[str, Tensor]:
    """Their tensors in this file's names: one convolution for q, k and v, one name for the norm."""
    tensors = {}
    for key, tensor in raw.tensors.items():
        for theirs in ("g_norm_swish_gate", "g_norm"):
            key = key.replace(f"attn.{theirs}.", "attn.o_norm.")
        if "_conv1d." not in key:
            tensors[key] = tensor
        elif key.endswith("bias"):
            raise CheckpointError("convolutions with a bias are not computed here", got=key)
    for i in range(config.layers if config.conv_size else 0):
        names = tuple(f"model.layers.{i}.attn.{n}_conv1d.weight" for n in "qkv")
        require_keys(raw, names, "linear_attention")
        weight = torch.cat([raw.tensors[n][:, 0] for n in names])
        tensors[f"model.layers.{i}.attn.conv_weight"] = weight.t().contiguous()
    return tensors


def _tiny(rule: str, **changes: object) -> LinearAttentionConfig:
    """A size for tests."""
    sizes: dict[str, object] = {"vocab_size": 29, "width": 32, "layers": 2, "heads": 2, "ffn": 80}
    sizes |= {"key_size": 8, "value_size": 12, "rule": rule, "gate_rank": 4}
    return LinearAttentionConfig(**(sizes | changes))  # type: ignore[arg-type]


PRESETS = {
    "tiny": _tiny("gla"),
    "tiny-linear": _tiny("linear"),
    "tiny-delta": _tiny("delta", conv_size=4, gate=False),
    "tiny-gated-delta": _tiny("gated_delta", conv_size=4),
    "zoo": LinearAttentionConfig(rule="gated_delta", conv_size=4),
    # the 1.3B models of [2], [3] and [4]
    "gla-1.3b": LinearAttentionConfig(32000, 2048, 24, 4, 256, 512, 5632),
    "deltanet-1.3b": LinearAttentionConfig(32000, 2048, 24, 16, 128, 128, 5632, "delta", 4, False),
    "gated-deltanet-1.3b": LinearAttentionConfig(32000, 2048, 21, 6, 256, 512, 5632, "gated_delta", 4),
}

FAMILY = Family(
    name="linear_attention",
    title="Linear attention: plain, GLA, DeltaNet, Gated DeltaNet (arXiv 2006.16236, 2312.06635, 2412.06464)",
    sources=(
        "https://arxiv.org/abs/2006.16236",
        "https://arxiv.org/abs/2312.06635",
        "https://arxiv.org/abs/2406.06484",
        "https://arxiv.org/abs/2412.06464",
        "https://github.com/fla-org/flash-linear-attention",
    ),
    config=LinearAttentionConfig,
    presets=PRESETS,
    build=LinearAttention,
    load=_load,
    layout=_layout,
    train_form=LinearAttentionTrain,
    from_training=_from_training,
    init=_init,
    roles=(
        ("*embeddings.weight", "embedding"),
        ("lm_head.*", "head"),
        ("*norm.weight", "norm"),
        ("*.gk_proj.*", "decay"),
        ("*.a_proj.*", "decay"),
        ("*.A_log", "decay"),
        ("*.dt_bias", "decay"),
        ("*.b_proj.*", "gate"),
        ("*.conv_weight", "conv"),
        ("*_proj.weight", "projection"),
        ("*", "other"),
    ),
    state_note="one matrix a head and layer, and a few rows of the short convolution: constant",
)
