"""Hybrid of Mamba-2 and attention (Bamba, Granite 4): most layers keep a state, a few a bounded cache.

Sources:
    [1] Hugging Face transformers, models/bamba: a Mamba-2 mixer or attention, then SwiGLU, each after an RMS
        norm; half of every attention head is rotated. Its parameter names are used here.
    [2] Hugging Face transformers, models/granitemoehybrid: the same with other names, factors on the
        embedding, residual branches, scores and logits, rotation or none, and experts beside the feed-forward
        network.
    [3] T. Dao and A. Gu, arXiv 2405.21060, section 9.2.3 (a few attention layers among SSD layers), and
        models/_ssd.py.
    [4] A. Vaswani et al., arXiv 1706.03762, and models/transformer.py (rotation, exact positions, the cache).

Symbols (B batch, T tokens, d width, H heads, G heads of keys and values, K head size, L = max_tokens):
    the mixer's are in models/_ssd.py, those of the experts in models/_experts.py.

State per Mamba-2 layer: ``conv`` [B,K-1,D+2GN] and ``ssm`` [B,H,N,P]; per attention layer ``keys`` and
``values`` [B,G,L,K]; ``position`` [1] int64 if there is an attention layer. Then there is no token L+1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xexport.core.checkpoint import RawCheckpoint, match_tensors, own_config
from xexport.core.errors import CheckpointError, InputError
from xexport.core.family import Family, LoadedModel
from xexport.core.state import StateSpec
from xexport.models._chunk import RMSNorm
from xexport.models._experts import EXPERT_ROLES, Experts, experts_from_granite
from xexport.models._rotary import rope_angles, rotate, turns_of
from xexport.models._ssd import SSD_ROLES, SsdMixer, SsdSizes, parse_limit, split_in_proj, ssd_init
from xexport.models.transformer import fused_attention
from xexport.ops.cached_attention.reference import cached_attention

__all__ = ["FAMILY", "Hybrid", "HybridConfig", "HybridTraining"]

_Rope = tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class HybridConfig:
    """Sizes and options of a hybrid.

    Attributes:
        layers, width, vocab_size: number of blocks, d, V.
        attention: indices of the layers with attention; the others have a Mamba-2 mixer.
        heads, kv_heads: H and G of attention; the head size is d / H.
        ffn: inner width of the feed-forward networks.
        experts, experts_used, expert_ffn: how many experts there are beside each of them, how many a token
            has, their inner width; 0 experts is none.
        mamba_heads, mamba_head_size, state_size, groups, conv_kernel: of the mixers.
        max_tokens: L, the longest stream if any layer has attention.
        rotary: how many channels of a head are rotated, 0 for none; rope_base: of the frequencies.
        eps: of every norm.
        conv_bias, mamba_bias, attention_bias, ffn_bias: which biases there are.
        dt_min, dt_max: limits of the mixers' step size; a maximum of 0 is none.
        embedding_factor, residual_factor: on the embedding, and on what a block adds.
        score_factor: on attention scores; 0 is the usual K^-1/2.
        logits_divisor: of the logits.
    """

    layers: int
    width: int
    vocab_size: int
    attention: tuple[int, ...]
    heads: int
    kv_heads: int
    ffn: int
    mamba_heads: int
    mamba_head_size: int
    state_size: int
    groups: int = 1
    conv_kernel: int = 4
    max_tokens: int = 4096
    rotary: int = 0
    rope_base: float = 10000.0
    eps: float = 1e-5
    conv_bias: bool = True
    mamba_bias: bool = False
    attention_bias: bool = False
    ffn_bias: bool = False
    dt_min: float = 0.0
    dt_max: float = 0.0
    embedding_factor: float = 1.0
    residual_factor: float = 1.0
    score_factor: float = 0.0
    logits_divisor: float = 1.0
    experts: int = 0
    experts_used: int = 0
    expert_ffn: int = 0

    def __post_init__(self) -> None:
        if self.experts and not (0 < self.experts_used <= self.experts and self.expert_ffn > 0):
            raise InputError(
                "impossible experts",
                got=f"{self.experts_used} of {self.experts} are used, of inner width {self.expert_ffn}",
                allowed="at least one of them, and a width of 1 or more",
            )
        if self.width % self.heads or self.heads % self.kv_heads:
            raise InputError(
                "the width is no multiple of the heads, or the heads none of kv_heads",
                got=(self.width, self.heads, self.kv_heads),
            )
        if self.rotary % 2 or self.rotary > self.head_size:
            raise InputError(
                "the rotated channels of a head must be even and at most all",
                got=(self.rotary, self.head_size),
            )
        if any(not 0 <= i < self.layers for i in self.attention):
            raise InputError(
                "an attention layer is none of the layers",
                got=self.attention,
                allowed=f"0 to {self.layers - 1}",
            )

    @property
    def head_size(self) -> int:
        """K."""
        return self.width // self.heads

    @property
    def mixer(self) -> SsdSizes:
        """The sizes of a Mamba-2 mixer."""
        return SsdSizes(
            self.width,
            self.mamba_heads,
            self.mamba_head_size,
            self.state_size,
            groups=self.groups,
            conv_kernel=self.conv_kernel,
            norm_groups=self.groups,
            norm_eps=self.eps,
            conv_bias=self.conv_bias,
            projection_bias=self.mamba_bias,
            dt_min=self.dt_min,
            dt_max=self.dt_max,
        )


PRESETS = {
    "tiny": HybridConfig(3, 24, 61, (1,), 2, 1, 40, 4, 12, 8, groups=2, max_tokens=4096, rotary=6),
    "tiny-experts": HybridConfig(
        *(3, 24, 61, (1,), 2, 1, 40, 4, 12, 8),
        groups=2,
        max_tokens=64,
        experts=5,
        experts_used=2,
        expert_ffn=16,
    ),
    "zoo": HybridConfig(5, 160, 256, (2,), 5, 5, 320, 10, 32, 32, max_tokens=2048, rotary=16),
    "bamba-9b": HybridConfig(32, 4096, 128256, (9, 18, 27), 32, 8, 14336, 128, 64, 128, rotary=64),
}


class _Attention(nn.Module):
    def __init__(self, c: HybridConfig) -> None:
        super().__init__()
        self.c, self.scale = c, c.score_factor or c.head_size**-0.5
        self.q_proj = nn.Linear(c.width, c.width, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.width, c.kv_heads * c.head_size, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.width, c.kv_heads * c.head_size, bias=c.attention_bias)
        self.o_proj = nn.Linear(c.width, c.width, bias=c.attention_bias)

    def _rotated(self, x: Tensor, heads: int, rope: _Rope) -> Tensor:
        """[B,T,heads K] -> [B,T,heads,K], its first channels rotated."""
        x, r = torch.unflatten(x, -1, (heads, -1)), self.c.rotary
        if rope is None:
            return x
        return (
            torch.cat((rotate(x[..., :r], rope), x[..., r:]), -1) if r < self.c.head_size else rotate(x, rope)
        )

    def forward(
        self, x: Tensor, rope: _Rope, position: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B,T,d] after ``position`` tokens -> (y, new keys, new values)."""
        c = self.c
        q, k = self._rotated(self.q_proj(x), c.heads, rope), self._rotated(self.k_proj(x), c.kv_heads, rope)
        q, k, v = q.flatten(-2), k.flatten(-2), self.v_proj(x)
        y, keys, values = cached_attention(q, k, v, keys, values, position, c.heads, c.kv_heads, self.scale)
        return self.o_proj(y), keys, values

    def whole(self, x: Tensor, rope: _Rope) -> Tensor:
        """The same without earlier tokens, differentiable."""
        c = self.c
        q, k = self._rotated(self.q_proj(x), c.heads, rope), self._rotated(self.k_proj(x), c.kv_heads, rope)
        v = torch.unflatten(self.v_proj(x), -1, (c.kv_heads, -1))
        y: Tensor = self.o_proj(fused_attention(q * (self.scale * c.head_size**0.5), k, v, 0))
        return y


class _FeedForward(nn.Module):
    def __init__(self, c: HybridConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.width, c.ffn, bias=c.ffn_bias)
        self.up_proj = nn.Linear(c.width, c.ffn, bias=c.ffn_bias)
        self.down_proj = nn.Linear(c.ffn, c.width, bias=c.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class _Layer(nn.Module):
    def __init__(self, c: HybridConfig, index: int) -> None:
        super().__init__()
        attends = index in c.attention
        self.factor = c.residual_factor
        self.input_layernorm = RMSNorm(c.width, c.eps)
        self.self_attn = _Attention(c) if attends else None
        self.mamba = None if attends else SsdMixer(c.mixer)
        self.pre_ff_layernorm = RMSNorm(c.width, c.eps)
        self.feed_forward = _FeedForward(c)
        self.experts = Experts(c.width, c.experts, c.experts_used, c.expert_ffn) if c.experts else None

    def _added(self, x: Tensor, y: Tensor) -> Tensor:
        return x + (y if self.factor == 1.0 else y * self.factor)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The block's output from its input and what its mixer or attention gave."""
        x = self._added(x, mixed)
        z = self.pre_ff_layernorm(x)
        y = self.feed_forward(z)
        return self._added(x, y if self.experts is None else y + self.experts(z))


class _Decoder(nn.Module):
    """Embedding, blocks, last norm, and the rotation's frequencies (if any) in units of 2^-32 turns."""

    turns: Tensor

    def __init__(self, c: HybridConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.width)
        self.layers = nn.ModuleList(_Layer(c, i) for i in range(c.layers))
        self.final_layernorm = RMSNorm(c.width, c.eps)
        if c.rotary:
            self.register_buffer("turns", torch.tensor(_turns(c), dtype=torch.int64))


class Hybrid(nn.Module):
    """The chunk form; parameter names are those of [1] but for the mixers' ``dt_proj``."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.max_tokens: int | None = config.max_tokens if config.attention else None
        self.model = _Decoder(config)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)

    def _embedded(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.model.embed_tokens(tokens)
        return x if self.config.embedding_factor == 1.0 else x * self.config.embedding_factor

    def _logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.model.final_layernorm(x))
        return logits if self.config.logits_divisor == 1.0 else logits / self.config.logits_divisor

    def _rope(self, start: Tensor | int, tokens: Tensor) -> _Rope:
        if not self.config.rotary:
            return None
        here = start + torch.arange(tokens.shape[1], device=tokens.device)
        return rope_angles(self.model.turns, here, self.lm_head.weight.dtype)

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """(tokens [B,T] int64, state as :meth:`state_spec`) -> (logits [B,T,V], new state)."""
        attends = bool(self.config.attention)
        position = state[-1]
        rope = self._rope(position, tokens) if attends else None
        x, new = self._embedded(tokens), []
        for index, layer in enumerate(self.model.layers):
            assert isinstance(layer, _Layer)
            one, other = state[2 * index : 2 * index + 2]
            z = layer.input_layernorm(x)
            if layer.mamba is not None:
                y, one, other = layer.mamba(z, one, other)
            else:
                assert layer.self_attn is not None
                y, one, other = layer.self_attn(z, rope, position, one, other)
            x = layer.finish(x, y)
            new += [one, other]
        after = [position + tokens.shape[1]] if attends else []
        return (self._logits(x), *new, *after)

    def state_spec(self) -> Sequence[StateSpec]:
        """Two tensors a layer, float32 and zero before the first token; then the position."""
        c = self.config
        cache: tuple[int | str, ...] = ("B", c.kv_heads, c.max_tokens, c.head_size)
        specs = []
        for i in range(c.layers):
            shapes = {"keys": cache, "values": cache} if i in c.attention else c.mixer.states
            specs += [StateSpec(f"layers.{i}.{name}", shape) for name, shape in shapes.items()]
        return [*specs, StateSpec("position", (1,), "int64")] if c.attention else specs


class HybridTraining(Hybrid):
    """The same parameters, whole sequences from the first token: ``forward(tokens [B,T]) -> logits``."""

    def forward(self, tokens: Tensor, *state: Tensor) -> Tensor:  # type: ignore[override]
        """tokens [B,T] int64 -> logits [B,T,V]."""
        rope, x = self._rope(0, tokens), self._embedded(tokens)
        zeros = [
            x.new_zeros([tokens.shape[0], *map(int, shape[1:])])
            for shape in self.config.mixer.states.values()
        ]
        for layer in self.model.layers:
            assert isinstance(layer, _Layer)
            z = layer.input_layernorm(x)
            if layer.mamba is not None:
                y = layer.mamba(z, *zeros)[0]
            else:
                assert layer.self_attn is not None
                y = layer.self_attn.whole(z, rope)
            x = layer.finish(x, y)
        return self._logits(x)


def _turns(c: HybridConfig) -> list[int]:
    """The rotation's frequencies, base^(-2i/R) radians a token for R rotated channels."""
    return turns_of([c.rope_base ** (-2 * i / c.rotary) for i in range(c.rotary // 2)])


_MODEL_TYPES = ("bamba", "granitemoehybrid")
#: rows of a cache that a checkpoint gets unless its own maximum is shorter
_DEFAULT_BOUND = 4096


def _layout(raw: RawCheckpoint) -> str | None:
    kind = raw.config.get("model_type")
    return f"its config.json says {kind}" if kind in _MODEL_TYPES else None


def _refuse(row: Mapping[str, Any], key: str, allowed: tuple[object, ...]) -> None:
    """Raise unless config.json lacks ``key`` or has an allowed value."""
    if key in row and row[key] not in allowed:
        raise CheckpointError(
            f"config.json has a {key} that this family does not compute",
            got=row[key],
            allowed=", ".join(map(str, allowed)),
        )


def _rope_of(row: Mapping[str, Any], granite: bool, size: int) -> dict[str, Any]:
    """The rotated channels of a head, and the base of the frequencies."""
    if granite and row.get("position_embedding_type") != "rope":
        return {"rotary": 0}
    rope = row.get("rope_parameters") or row.get("rope_scaling") or {}
    _refuse({"rope_type": rope.get("rope_type", rope.get("type", "default"))}, "rope_type", ("default",))
    share = 1.0 if granite else float(rope.get("partial_rotary_factor", 0.5))
    return {
        "rotary": int(size * share),
        "rope_base": float(rope.get("rope_theta", row.get("rope_theta", 10000.0))),
    }


def _attention_layers(row: Mapping[str, Any]) -> tuple[int, ...]:
    """Their indices, which the two layouts name in different ways."""
    if row["model_type"] == "bamba":
        return tuple(int(i) for i in row.get("attn_layer_indices") or ())
    kinds = row.get("layer_types") or row.get("layers_block_type") or []
    return tuple(i for i, kind in enumerate(kinds) if "attention" in kind and "linear" not in kind)


def _config_from_hugging_face(raw: RawCheckpoint) -> HybridConfig:
    """config.json has the sizes; keys it may leave out have the defaults of [1] and [2]."""
    row = raw.config
    if row.get("model_type") not in _MODEL_TYPES:
        raise CheckpointError(
            "this checkpoint is not a Hugging Face folder of a Mamba-2 hybrid",
            got=f"{raw.path.name}: model_type {row.get('model_type')!r}",
            allowed=f"a folder whose config.json says {' or '.join(_MODEL_TYPES)}, or a file of our own "
            "training",
        )
    granite = row["model_type"] == "granitemoehybrid"
    _refuse(row, "hidden_act", ("silu",))
    low, high = parse_limit(raw)
    try:
        width, heads = int(row["hidden_size"]), int(row["num_attention_heads"])
        mamba_heads, size = int(row["mamba_n_heads"]), row.get("mamba_d_head", "auto")
        inner = int(row.get("mamba_expand", 2)) * width
        factors: dict[str, Any] = {
            "embedding_factor": float(row.get("embedding_multiplier", 1.0)),
            "residual_factor": float(row.get("residual_multiplier", 1.0)),
            "score_factor": float(row.get("attention_multiplier", 1.0)),
            "logits_divisor": float(row.get("logits_scaling", 1.0)),
            "experts": int(row.get("num_local_experts", 8)),
            "experts_used": int(row.get("num_experts_per_tok", 2)),
            "expert_ffn": int(row.get("intermediate_size", 32)),
        }
        return HybridConfig(
            layers=int(row["num_hidden_layers"]),
            width=width,
            vocab_size=int(row["vocab_size"]),
            attention=_attention_layers(row),
            heads=heads,
            kv_heads=int(row.get("num_key_value_heads") or heads),
            ffn=int(row["shared_intermediate_size" if granite else "intermediate_size"]),
            mamba_heads=mamba_heads,
            mamba_head_size=inner // mamba_heads if size == "auto" else int(size),
            state_size=int(row["mamba_d_state"]),
            groups=int(row.get("mamba_n_groups", 1)),
            conv_kernel=int(row.get("mamba_d_conv", 4)),
            max_tokens=min(int(row.get("max_position_embeddings", _DEFAULT_BOUND)), _DEFAULT_BOUND),
            eps=float(row.get("rms_norm_eps", 1e-6 if granite else 1e-5)),
            conv_bias=bool(row.get("mamba_conv_bias", True)),
            mamba_bias=bool(row.get("mamba_proj_bias", False)),
            attention_bias=bool(row.get("attention_bias", False)),
            ffn_bias=bool(row.get("mlp_bias", False)),
            dt_min=low,
            dt_max=high,
            **_rope_of(row, granite, width // heads),
            **(factors if granite else {}),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError("config.json lacks a size, or has a malformed one", got=error) from error


_GRANITE = (
    (".post_attention_layernorm.", ".pre_ff_layernorm."),
    (".shared_mlp.output_linear.", ".feed_forward.down_proj."),
    ("model.norm.", "model.final_layernorm."),
)


def _from_granite(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of [2] under the names of [1]; its one input matrix is gate and up, as views."""
    out: dict[str, Tensor] = {}
    for name, value in tensors.items():
        for theirs, ours in _GRANITE:
            name = name.replace(theirs, ours)
        place, found, leaf = name.partition(".shared_mlp.input_linear.")
        if not found:
            out[name] = value
            continue
        half = value.shape[0] // 2
        out[f"{place}.feed_forward.gate_proj.{leaf}"] = value[:half]
        out[f"{place}.feed_forward.up_proj.{leaf}"] = value[half:]
    return experts_from_granite(out)


def _load(raw: RawCheckpoint) -> LoadedModel:
    """Read a Hugging Face folder or a file of our own training; a tied head is the embedding."""
    config, notes = own_config(raw, "hybrid", HybridConfig), []
    tensors = dict(raw.tensors)
    if config is None:
        config = _config_from_hugging_face(raw)
        if raw.config["model_type"] == "granitemoehybrid":
            tensors = _from_granite(tensors)
        tensors = split_in_proj(tensors)
        if "lm_head.weight" not in tensors and "model.embed_tokens.weight" in tensors:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
            notes.append("the head is tied to the embedding: both are written")
        if config.experts:
            notes.append(
                f"all {config.experts} experts of a layer are computed for every token: "
                f"{config.experts_used} of them count"
            )
        longest = int(raw.config.get("max_position_embeddings", 0))
        if config.attention and longest > config.max_tokens:
            notes.append(
                f"the cache holds {config.max_tokens} of the {longest} tokens that the model was made for"
            )
    with torch.device("meta"):
        wanted = Hybrid(config)
    return LoadedModel(
        family="hybrid",
        config=config,
        tensors=match_tensors(_from_training(config, tensors), wanted, raw.path.name),
        tokenizer="bytes" if config.vocab_size == 256 else None,
        source=str(raw.path),
        notes=tuple(notes),
    )


@torch.no_grad()
def _init(module: Hybrid, seed: int) -> None:
    """Mixers as models/_ssd.py has it, other matrices normal with the variance 1 / fan-in, deterministic."""
    generator = torch.Generator().manual_seed(seed)
    c = module.config
    for name, p in module.named_parameters():
        if ".mamba." in name or p.dim() == 1:
            p.copy_(ssd_init(name, p.shape, c.layers, generator))
            continue
        std = 0.02 if "embed_tokens" in name else p.shape[1] ** -0.5
        std *= (2 * c.layers) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        p.copy_(torch.empty(p.shape).normal_(0, std, generator=generator))
    if c.rotary:
        module.model.turns.copy_(torch.tensor(_turns(c), dtype=torch.int64, device="cpu"))


def _from_training(config: HybridConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Training and chunk form share their parameters; the constant table is made anew."""
    if not config.rotary:
        return dict(tensors)
    return {**tensors, "model.turns": torch.tensor(_turns(config), dtype=torch.int64, device="cpu")}


FAMILY = Family(
    name="hybrid",
    title="Hybrid of Mamba-2 and attention (Bamba, Granite 4)",
    sources=("arXiv 2405.21060", "transformers models/bamba", "transformers models/granitemoehybrid"),
    config=HybridConfig,
    presets=PRESETS,
    build=Hybrid,
    load=_load,
    layout=_layout,
    reads="a Hugging Face folder with model_type bamba or granitemoehybrid",
    train_form=HybridTraining,
    from_training=_from_training,
    init=_init,
    roles=(
        ("model.embed_tokens.*", "embedding"),
        ("lm_head.*", "head"),
        ("*norm*", "norm"),
        *SSD_ROLES,
        *EXPERT_ROLES,
        ("*.self_attn.*.weight", "projection"),
        ("*.feed_forward.*.weight", "projection"),
        ("*", "other"),
    ),
    state_note="bounded: the cache of the attention layers; constant: H matrices N x P a Mamba-2 layer",
)
