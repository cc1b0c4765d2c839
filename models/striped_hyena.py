"""StripedHyena: gated convolutions in modal form, a state for ever, striped with attention (Evo).

Sources:
    [1] togethercomputer/stripedhyena 0.2.2 (Apache-2.0), ``model.py``, ``engine.py``, ``layers.py``, and its
        configs/7b-sh-32k-v1.yml. Its parameter names are used here but for those of ``filter``.
    [2] Massaroli et al., Laughing Hyena Distillery, arXiv 2310.18780: the modal form and its recurrence.
    [3] Poli et al., Hyena, arXiv 2302.10866, of order 2: what is in modal form.
    [4] Nguyen et al., Sequence modeling and design from molecular to genome scale with Evo, Science 386
        (2024): the same architecture over bytes of DNA.

Symbols (B batch, T tokens, d width, S modes a channel, K short filter, H heads, G heads of keys and values):

A block of either kind (rms norms):  u = x + mix(norm(x))    x' = u + l3(act(l1 norm(u)) * l2 norm(u))
The mixer of a Hyena block:
    x2, x1, v = shortconv(projections(.))             causal, depthwise, K taps
    y = x2 (h * (x1 v) + D x1 v) W_out                h_t = Re sum_n R_n lambda_n^t: ops/modal_conv
[1] lays x2, x1 and v out a head at a time (``column_split_hyena``); the rows of ``projections`` and the
short filter are sorted when they are read, so that here each is one piece. Attention is that of [1], from
flash-attention: all channels of a head are rotated by halves, G <= H.

Norm: x / sqrt(mean(x^2) + eps) with ``use_flash_rmsnorm`` (as published models do), else x / (rms + eps).

State per Hyena block ``fir`` [B,K-1,3d] and ``modes`` [B,S,2,d]; per attention block ``keys`` and ``values``
[B,G,L,d/H]; ``position`` [1] int64 if there is an attention block. Then L = max_tokens is the last token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xexport.core.errors import InputError
from xexport.core.family import Family
from xexport.core.state import StateSpec
from xexport.models._rotary import rope_angles, rotate, turns_of
from xexport.models._striped_load import load_with, striped_layout
from xexport.models.transformer import fused_attention
from xexport.ops.cached_attention.reference import cached_attention
from xexport.ops.causal_conv1d.reference import causal_conv1d
from xexport.ops.modal_conv.reference import modal_conv, modal_conv_whole

__all__ = ["FAMILY", "StripedHyena", "StripedHyenaConfig", "StripedHyenaTraining"]

_Rope = tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class StripedHyenaConfig:
    """Sizes and options of a StripedHyena.

    Attributes:
        layers, width, vocab_size: number of blocks, d, V.
        attention: indices of the blocks with attention; the others are Hyena blocks.
        heads, kv_heads: H and G.
        ffn: inner width of the feed-forward networks.
        state_size: S. short_filter: K.
        max_tokens: the longest stream if any block has attention.
        rope_base: of the rotation's frequencies; rope_scale: what positions are divided by.
        eps: of every norm; eps_inside: whether it is under the root.
        activation: ``silu`` or ``gelu``.
        qkv_bias, out_bias: of the attention's projections.
    """

    layers: int
    width: int
    vocab_size: int
    attention: tuple[int, ...]
    heads: int
    kv_heads: int
    ffn: int
    state_size: int = 2
    short_filter: int = 3
    max_tokens: int = 4096
    rope_base: float = 10000.0
    rope_scale: float = 1.0
    eps: float = 1e-5
    eps_inside: bool = True
    activation: str = "silu"
    qkv_bias: bool = False
    out_bias: bool = False

    def __post_init__(self) -> None:
        sizes = (
            self.layers,
            self.width,
            self.vocab_size,
            self.heads,
            self.kv_heads,
            self.ffn,
            self.state_size,
        )
        if min(sizes) < 1 or self.short_filter < 2 or self.max_tokens < 1:
            raise InputError("a StripedHyena size is too small", got=self)
        if self.width % (2 * self.heads) or self.heads % self.kv_heads:
            raise InputError(
                "the width is no multiple of twice the heads, or the heads none of kv_heads",
                got=(self.width, self.heads, self.kv_heads),
            )
        if any(not 0 <= i < self.layers for i in self.attention):
            raise InputError(
                "an attention block is none of the blocks",
                got=self.attention,
                allowed=f"0 to {self.layers - 1}",
            )
        if self.activation not in ("silu", "gelu"):
            raise InputError("unknown activation", got=self.activation, allowed="silu, gelu")

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self.width // self.heads


class _Norm(nn.Module):
    """The root-mean-square norm of [1], in both of its versions."""

    def __init__(self, c: StripedHyenaConfig) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(c.width))
        self.eps, self.inside = c.eps, c.eps_inside

    def forward(self, x: Tensor) -> Tensor:
        if self.inside:
            return F.rms_norm(x, (x.shape[-1],), self.scale, self.eps)
        y: Tensor = x / ((x * x).mean(-1, keepdim=True).sqrt() + self.eps) * self.scale
        return y


class _FeedForward(nn.Module):
    def __init__(self, c: StripedHyenaConfig) -> None:
        super().__init__()
        self.act = F.silu if c.activation == "silu" else F.gelu
        self.l1 = nn.Linear(c.width, c.ffn, bias=False)
        self.l2 = nn.Linear(c.width, c.ffn, bias=False)
        self.l3 = nn.Linear(c.ffn, c.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.l3(self.act(self.l1(x)) * self.l2(x))
        return y


class _Attention(nn.Module):
    def __init__(self, c: StripedHyenaConfig) -> None:
        super().__init__()
        self.c = c
        shared = c.kv_heads * c.head_size
        self.widths = [c.width, shared, shared]
        self.Wqkv = nn.Linear(c.width, sum(self.widths), bias=c.qkv_bias)
        self.out_proj = nn.Linear(c.width, c.width, bias=c.out_bias)

    def _split(self, x: Tensor, rope: _Rope) -> tuple[Tensor, Tensor, Tensor]:
        """q, k [B,T,heads,K], rotated, and v [B,T,G*K]."""
        assert rope is not None
        q, k, v = torch.split(self.Wqkv(x), self.widths, -1)
        q, k = (torch.unflatten(y, -1, (-1, self.c.head_size)) for y in (q, k))
        return rotate(q, rope), rotate(k, rope), v

    def streamed(
        self, x: Tensor, rope: _Rope, position: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B,T,d] after ``position`` tokens -> (y, new keys, new values)."""
        c = self.c
        q, k, v = self._split(x, rope)
        y, keys, values = cached_attention(
            q.flatten(-2), k.flatten(-2), v, keys, values, position, c.heads, c.kv_heads, c.head_size**-0.5
        )
        return self.out_proj(y), keys, values

    def whole(self, x: Tensor, rope: _Rope) -> Tensor:
        """The same without earlier tokens, differentiable."""
        q, k, v = self._split(x, rope)
        v = torch.unflatten(v, -1, (-1, self.c.head_size))
        y: Tensor = self.out_proj(fused_attention(q, k, v, 0))
        return y


class _Filter(nn.Module):
    """Short filter and modes of a Hyena block."""

    def __init__(self, c: StripedHyenaConfig) -> None:
        super().__init__()
        self.conv_weight = nn.Parameter(torch.zeros(c.short_filter, 3 * c.width))
        self.conv_bias = nn.Parameter(torch.zeros(3 * c.width))
        self.poles = nn.Parameter(torch.zeros(c.state_size, 2, c.width))
        self.residues = nn.Parameter(torch.zeros(c.state_size, 2, c.width))
        self.D = nn.Parameter(torch.zeros(c.width))

    def streamed(self, x: Tensor, fir: Tensor, modes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projections [B,T,3d] -> (y [B,T,d], new states)."""
        packed, fir = causal_conv1d(x, self.conv_weight, self.conv_bias, fir)
        y, modes = modal_conv(packed, self.poles, self.residues, self.D, modes)
        return y, fir, modes

    def whole(self, x: Tensor) -> Tensor:
        """The same without earlier tokens, differentiable."""
        before = x.new_zeros(x.shape[0], self.conv_weight.shape[0] - 1, x.shape[2])
        packed, _ = causal_conv1d(x, self.conv_weight, self.conv_bias, before)
        return modal_conv_whole(packed, self.poles, self.residues, self.D)


class _Block(nn.Module):
    def __init__(self, c: StripedHyenaConfig, index: int) -> None:
        super().__init__()
        self.pre_norm, self.post_norm = _Norm(c), _Norm(c)
        self.inner_mha_cls = _Attention(c) if index in c.attention else None
        if self.inner_mha_cls is None:
            self.filter = _Filter(c)
            self.projections = nn.Linear(c.width, 3 * c.width)
            self.out_filter_dense = nn.Linear(c.width, c.width)
        self.mlp = _FeedForward(c)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The block's output from its input and what its mixer gave."""
        u = x + mixed
        y: Tensor = self.mlp(self.post_norm(u))
        return u + y


class StripedHyena(nn.Module):
    """The chunk form: ``forward(tokens [B,T] int64, *state) -> (logits [B,T,V], *new_state)``."""

    turns: Tensor

    def __init__(self, config: StripedHyenaConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.max_tokens: int | None = config.max_tokens if config.attention else None
        self.embedding_layer = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(_Block(config, i) for i in range(config.layers))
        self.norm = _Norm(config)
        self.unembed = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.attention:
            self.register_buffer("turns", _turns(config).to(self.unembed.weight.device))

    def _rope(self, start: Tensor | int, tokens: Tensor) -> _Rope:
        if not self.config.attention:
            return None
        here = start + torch.arange(tokens.shape[1], device=tokens.device)
        return rope_angles(self.turns, here, self.unembed.weight.dtype)

    def state_spec(self) -> list[StateSpec]:
        """Two tensors a block, float32 and zero before the first token; then the position."""
        c = self.config
        cache: tuple[int | str, ...] = ("B", c.kv_heads, c.max_tokens, c.head_size)
        attends = {"keys": cache, "values": cache}
        convolves: dict[str, tuple[int | str, ...]] = {
            "fir": ("B", c.short_filter - 1, 3 * c.width),
            "modes": ("B", c.state_size, 2, c.width),
        }
        specs = []
        for i in range(c.layers):
            rows = attends if i in c.attention else convolves
            specs += [StateSpec(f"blocks.{i}.{name}", shape) for name, shape in rows.items()]
        return [*specs, StateSpec("position", (1,), "int64")] if c.attention else specs

    def forward(self, tokens: Tensor, *state: Tensor) -> Any:
        """(tokens [B,T] int64, state as :meth:`state_spec`) -> (logits [B,T,V], *new state)."""
        position = state[-1]
        rope = self._rope(position, tokens)
        x, new = self.embedding_layer(tokens), []
        for i, block in enumerate(self.blocks):
            assert isinstance(block, _Block)
            one, other = state[2 * i : 2 * i + 2]
            z = block.pre_norm(x)
            if block.inner_mha_cls is not None:
                y, one, other = block.inner_mha_cls.streamed(z, rope, position, one, other)
            else:
                y, one, other = block.filter.streamed(block.projections(z), one, other)
                y = block.out_filter_dense(y)
            x = block.finish(x, y)
            new += [one, other]
        after = [position + tokens.shape[1]] if self.config.attention else []
        return self.unembed(self.norm(x)), *new, *after


class StripedHyenaTraining(StripedHyena):
    """The same parameters, whole sequences from the first token: ``forward(tokens [B,T]) -> logits``."""

    def forward(self, tokens: Tensor, *state: Tensor) -> Any:
        """tokens [B,T] int64 -> logits [B,T,V]; takes no state."""
        assert not state
        rope, x = self._rope(0, tokens), self.embedding_layer(tokens)
        for block in self.blocks:
            assert isinstance(block, _Block)
            z = block.pre_norm(x)
            if block.inner_mha_cls is not None:
                y = block.inner_mha_cls.whole(z, rope)
            else:
                y = block.out_filter_dense(block.filter.whole(block.projections(z)))
            x = block.finish(x, y)
        return self.unembed(self.norm(x))


def _turns(c: StripedHyenaConfig) -> Tensor:
    """The rotation's frequencies, in units of 2^-32 turns a token."""
    size = c.head_size
    rates = [c.rope_base ** (-2 * i / size) / c.rope_scale for i in range(size // 2)]
    return torch.tensor(turns_of(rates), dtype=torch.int64, device="cpu")


@torch.no_grad()
def _init(module: StripedHyena, seed: int) -> None:
    """Matrices normal with the variance 1/fan-in, those that write to the residual stream smaller by
    sqrt(2 layers); poles from slow to fast with filters of norm about 1; short filters near the identity.
    """
    c, rng = module.config, torch.Generator().manual_seed(seed)
    depth = (2 * c.layers) ** -0.5
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=rng)
        if name.endswith("scale"):
            p.fill_(1.0)
        elif name.endswith("poles"):
            rate, angle = torch.exp(1.5 * noise[:, 0] - 3), 0.5 * noise[:, 1]
            p.copy_(torch.stack((angle.cos(), angle.sin()), 1) * torch.exp(-rate)[:, None])
        elif name.endswith("residues"):
            p.copy_(noise * 0.3 * c.state_size**-0.5)
        elif name.endswith("conv_weight"):
            p.copy_(noise * 0.2)
            p[-1] += 1
        elif name.endswith("filter.D"):
            p.copy_(noise)
        elif p.dim() == 1:
            p.zero_()
        else:
            writes = name.endswith(("out_proj.weight", "out_filter_dense.weight", "l3.weight"))
            std = 0.5 if "embedding" in name else p.shape[1] ** -0.5 * (depth if writes else 1.0)
            p.copy_(noise * std)
    if c.attention:
        module.turns.copy_(_turns(c))


def _from_training(config: StripedHyenaConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Training and chunk form share their parameters; the constant table is made anew."""
    return {**tensors, "turns": _turns(config)} if config.attention else dict(tensors)


PRESETS = {
    "tiny": StripedHyenaConfig(3, 24, 61, (1,), 4, 2, 40, state_size=3, max_tokens=4096),
    "zoo": StripedHyenaConfig(5, 160, 256, (2,), 5, 5, 448, state_size=8, max_tokens=2048),
    # configs/7b-sh-32k-v1.yml of [1]; the cache bounded to 4096
    "7b": StripedHyenaConfig(
        32, 4096, 32000, tuple(range(1, 32, 2)), 32, 8, 14336, state_size=2, rope_base=500000.0
    ),
}

FAMILY = Family(
    name="striped_hyena",
    title="StripedHyena: Hyena blocks in modal form with a few of attention (Evo)",
    sources=("https://github.com/togethercomputer/stripedhyena", "https://arxiv.org/abs/2310.18780"),
    config=StripedHyenaConfig,
    presets=PRESETS,
    build=StripedHyena,
    load=load_with(StripedHyenaConfig, StripedHyena, _from_training),
    layout=striped_layout,
    reads="a Hugging Face folder with model_type stripedhyena",
    train_form=StripedHyenaTraining,
    from_training=_from_training,
    init=_init,
    roles=(
        ("embedding_layer.*", "embedding"),
        ("unembed.*", "head"),
        ("*norm.scale", "norm"),
        ("*.poles", "decay"),
        ("*.conv_*", "conv"),
        ("*_proj.weight", "projection"),
        ("*.Wqkv.weight", "projection"),
        ("*.projections.weight", "projection"),
        ("*.out_filter_dense.weight", "projection"),
        ("*.mlp.*.weight", "projection"),
        ("*", "other"),
    ),
    state_note="constant: S complex numbers a channel of a Hyena block; bounded: the cache of attention",
)
