"""TokenFormer: every projection is attention over learned parameter tokens (Pattention, arXiv 2410.23168).

Sources:
    1. Wang et al., TokenFormer, arXiv 2410.23168: equations 4-6 (Pattention), 7-11 (the block).
    2. Haiyang-W/TokenFormer, ``megatron/model/tokenformer.py`` and ``configs/tokenformer``: the sizes, and
       the layout of the published checkpoints.
    3. Su et al., RoFormer, arXiv 2104.09864: the rotation, here of the first quarter of a head as [2] has it.

Glossary:
    B batch, T tokens, d width, H heads, L = max_tokens; n parameter tokens of a layer, K_P and V_P [n,d].

Pattention takes the place of a linear layer:
    P(x) = theta(x K_P^T) V_P
    theta(a) = gelu(a sqrt(n) / |a|_2)                 ``l2_norm_gelu``: [1], equation 6, the published models
             = gelu(a) sqrt(n) / |gelu(a)|_2           ``gelu_l2_norm``
             = n softmax(a)                            ``softmax``
The block, X the residual stream, norms without weights:
    Y = X + P_o(attention(P_q(LN X), P_k(LN X), P_v(LN X))),   X' = Y + P_f(LN Y)
A zero vector a, which [2] turns into NaN, stays zero here.

Growing a model ([1], section 3.3) appends rows to K_P and V_P: an option of training, the form is the same.

State: ``layers.<i>.keys``, ``.values`` [B,H,L,d/H] float32 of the tokens so far, and there is no token L+1
(LimitError); ``position`` [1] int64, shared by the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xexport.core.checkpoint import RawCheckpoint, match_tensors, own_config, unreadable
from xexport.core.errors import CheckpointError, InputError
from xexport.core.family import Family, LoadedModel
from xexport.core.state import StateSpec
from xexport.models._chunk import layer_states
from xexport.models._rotary import rope_angles, rotate, turns_of
from xexport.models.transformer import fused_attention
from xexport.ops.cached_attention.reference import cached_attention

__all__ = ["FAMILY", "TokenFormer", "TokenFormerConfig", "TokenFormerTrain"]

_TINY = 1e-30


def _unit(x: Tensor) -> Tensor:
    """x sqrt(n) / |x|_2 over the last axis; zero stays zero."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _TINY)


_THETA: dict[str, Callable[[Tensor], Tensor]] = {
    "l2_norm_gelu": lambda a: F.gelu(_unit(a)),
    "gelu_l2_norm": lambda a: _unit(F.gelu(a)),
    "softmax": lambda a: a.softmax(-1) * a.shape[-1],
}


@dataclass(frozen=True)
class TokenFormerConfig:
    """Sizes of a TokenFormer.

    Attributes:
        vocab_size, width, layers, heads: V, d, number of blocks, H.
        qkv_slots, proj_slots, ffn_slots: n of the queries, keys and values, of the output, of the last layer.
        max_tokens: L, the longest stream.
        activation: theta, a key of the docstring's table.
        rope_share, rope_base: the share of a head that is rotated, and its frequencies base^(-2i/R).
        tied: the head is the embedding.
        eps: epsilon of the layer norms.
    """

    vocab_size: int = 256
    width: int = 160
    layers: int = 5
    heads: int = 5
    qkv_slots: int = 160
    proj_slots: int = 160
    ffn_slots: int = 640
    max_tokens: int = 2048
    activation: str = "l2_norm_gelu"
    rope_share: float = 0.25
    rope_base: float = 10000.0
    tied: bool = True
    eps: float = 1e-5

    def __post_init__(self) -> None:
        slots = (self.qkv_slots, self.proj_slots, self.ffn_slots)
        if min(self.vocab_size, self.width, self.layers, self.heads, self.max_tokens, *slots) < 1:
            raise InputError("a TokenFormer size is too small", got=self)
        if self.width % self.heads:
            raise InputError("the width is no multiple of the heads", got=(self.width, self.heads))
        if not 0 < self.rope_share <= 1 or self.rotated < 2 or self.rotated % 2:
            raise InputError(
                "a head can't be rotated in pairs",
                got=(self.size, self.rope_share),
                allowed="2, 4 ... channels",
            )
        if self.activation not in _THETA:
            raise InputError("unknown activation", got=self.activation, allowed=", ".join(_THETA))

    @property
    def size(self) -> int:
        """Channels of a head."""
        return self.width // self.heads

    @property
    def rotated(self) -> int:
        """R, the channels of a head that are rotated."""
        return int(self.size * self.rope_share)


class Pattention(nn.Module):
    """Attention of the input over ``slots`` parameter tokens."""

    def __init__(self, width: int, slots: int, activation: str) -> None:
        super().__init__()
        self.theta = _THETA[activation]
        self.key_param_tokens = nn.Parameter(torch.zeros(slots, width))
        self.value_param_tokens = nn.Parameter(torch.zeros(slots, width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same shape."""
        return self.theta(F.linear(x, self.key_param_tokens)) @ self.value_param_tokens


class _Attention(nn.Module):
    def __init__(self, c: TokenFormerConfig) -> None:
        super().__init__()
        self.c = c
        self.query, self.key, self.value = (Pattention(c.width, c.qkv_slots, c.activation) for _ in range(3))
        self.proj = Pattention(c.width, c.proj_slots, c.activation)

    def projected(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """q, k rotated, and v, each ``[B,T,H,K]``, of ``x [B,T,d]``."""
        q, k, v = (torch.unflatten(p(x), -1, (self.c.heads, -1)) for p in (self.query, self.key, self.value))
        return self._turned(q, rope), self._turned(k, rope), v

    def _turned(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        r = self.c.rotated
        if r == self.c.size:
            return rotate(x, rope)
        return torch.cat((rotate(x[..., :r], rope), x[..., r:]), -1)


class _Block(nn.Module):
    def __init__(self, c: TokenFormerConfig) -> None:
        super().__init__()
        self.attention = _Attention(c)
        self.mlp = Pattention(c.width, c.ffn_slots, c.activation)


class TokenFormer(nn.Module):
    """The chunk form: ``forward(tokens [B,T] int64, *state) -> (logits [B,T,V], *new_state)``.

    ``position + T`` must not exceed ``max_tokens``: LimitError in PyTorch and from a runtime.
    """

    turns: Tensor

    def __init__(self, config: TokenFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.max_tokens = config.max_tokens
        self.word_embeddings = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, config.eps)
        self.output = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)
        self.register_buffer("turns", torch.tensor(_turns(config), dtype=torch.int64))

    def state_spec(self) -> list[StateSpec]:
        """Keys and values of every layer, then the position."""
        c = self.config
        shape = ("B", c.heads, c.max_tokens, c.size)
        specs = layer_states(c.layers, {"keys": shape, "values": shape})
        return [*specs, StateSpec("position", (1,), "int64")]

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        c = self.config
        *caches, position = state
        rope = self.angles(position + torch.arange(tokens.shape[1], device=tokens.device))
        x = self.word_embeddings(tokens)
        after: list[Tensor] = []
        for i, block in enumerate(self.blocks()):
            q, k, v = (y.flatten(-2) for y in block.attention.projected(self.normed(x), rope))
            keys, values = caches[2 * i : 2 * i + 2]
            o, *now = cached_attention(q, k, v, keys, values, position, c.heads, c.heads, c.size**-0.5)
            after += now
            x = self.finish(block, x, o)
        return self.logits(x), *after, position + tokens.shape[1]

    def blocks(self) -> list[_Block]:
        """The blocks in their order."""
        return list(self.layers)  # type: ignore[arg-type]

    def normed(self, x: Tensor) -> Tensor:
        """The layer norm without weights."""
        return F.layer_norm(x, (self.config.width,), eps=self.config.eps)

    def finish(self, block: _Block, x: Tensor, attended: Tensor) -> Tensor:
        """The block's output from its input and the heads' outputs ``[B,T,d]``."""
        x = x + block.attention.proj(attended)
        y: Tensor = x + block.mlp(self.normed(x))
        return y

    def logits(self, x: Tensor) -> Tensor:
        """``[B,T,V]`` of the last block's output."""
        weight = self.word_embeddings.weight if self.output is None else self.output.weight
        return F.linear(self.norm(x), weight)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin ``[T,1,R/2]`` at int64 positions ``[T]``."""
        return rope_angles(self.turns, positions, self.norm.weight.dtype)


class TokenFormerTrain(TokenFormer):
    """The training form: ``forward(tokens [B,T]) -> logits [B,T,V]``, differentiable, all tokens at once."""

    def forward(self, tokens: Tensor, *state: Tensor) -> Tensor:  # type: ignore[override]
        rope = self.angles(torch.arange(tokens.shape[1], device=tokens.device))
        x = self.word_embeddings(tokens)
        for block in self.blocks():
            q, k, v = block.attention.projected(self.normed(x), rope)
            x = self.finish(block, x, fused_attention(q, k, v, 0))
        return self.logits(x)


def _turns(c: TokenFormerConfig) -> list[int]:
    return turns_of([c.rope_base ** (-2 * i / c.rotated) for i in range(c.rotated // 2)])


def _init(module: nn.Module, seed: int) -> None:
    """Fill a TokenFormer (either form) with weights to train from.

    theta's output has a variance near 1 a slot whatever the keys' scale, so the values' variance is 1/n;
    those that write to the residual stream are smaller by sqrt(2 * layers).
    """
    assert isinstance(module, TokenFormer)
    c, rng = module.config, torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim < 2:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            std = p.shape[1] ** -0.5
            if name.endswith("value_param_tokens"):
                std = p.shape[0] ** -0.5
                if ".proj." in name or ".mlp." in name:
                    std *= (2 * c.layers) ** -0.5
            elif "param_tokens" not in name:
                std *= 0.25  # embedding and head: small logits at the start
            p.copy_(torch.randn(p.shape, generator=rng) * std)
        module.turns.copy_(torch.tensor(_turns(c), dtype=torch.int64, device="cpu"))


def _from_training(config: TokenFormerConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The two forms have the same parameters; the constant table is made anew."""
    table = torch.tensor(_turns(config), dtype=torch.int64, device="cpu")
    return {**{k: v.detach() for k, v in tensors.items()}, "turns": table}


_FIRST = "sequential.2.attention.query.key_param_tokens"


def _layout(raw: RawCheckpoint) -> str | None:
    return f"it has a tensor {_FIRST}" if _FIRST in raw.tensors else None


def _published(raw: RawCheckpoint) -> tuple[TokenFormerConfig, dict[str, Tensor]]:
    """Sizes from shapes; heads and the rotated share, nowhere in the file, are those of [2]'s models."""
    t = raw.tensors
    embed = t.get("sequential.0.word_embeddings.weight")
    numbers = sorted({int(k.split(".")[1]) for k in t if k.endswith(".attention.query.key_param_tokens")})
    if embed is None or numbers != list(range(2, 2 + len(numbers))):
        raise CheckpointError("this TokenFormer lacks its embedding, or a layer", got=raw.path.name)
    names = {
        "sequential.0.word_embeddings.weight": "word_embeddings.weight",
        "output.weight": "output.weight",
    }
    names |= {f"sequential.{len(numbers) + 3}.norm.{k}": f"norm.{k}" for k in ("weight", "bias")}
    for k in t:
        room, number, *rest = k.split(".")
        if room == "sequential" and int(number) in numbers:
            names[k] = ".".join(("layers", str(int(number) - 2), *rest))
    tensors = {names[k]: v for k, v in t.items() if k in names}
    slots = (tensors.get(f"layers.0.{part}.key_param_tokens") for part in ("attention.proj", "mlp"))
    proj, ffn = (0 if s is None else len(s) for s in slots)
    width = embed.shape[1]
    config = TokenFormerConfig(
        vocab_size=embed.shape[0],
        width=width,
        layers=len(numbers),
        heads=12 if width == 768 else 16,
        qkv_slots=len(t[_FIRST]),
        proj_slots=proj,
        ffn_slots=ffn,
        tied="output.weight" not in t,
    )
    return config, tensors


def _load(raw: RawCheckpoint) -> LoadedModel:
    config = own_config(raw, "tokenformer", TokenFormerConfig)
    tensors, notes = dict(raw.tensors), list[str]()
    if config is None:
        if _layout(raw) is None:
            raise unreadable(
                raw,
                "a TokenFormer",
                "the published layout (sequential.2.attention ...), or xexport's own training",
            )
        config, tensors = _published(raw)
        notes.append(
            f"{config.heads} heads, a quarter of each rotated: the file does not say, its width does"
        )
    with torch.device("meta"):
        wanted = TokenFormer(config)
    found = match_tensors(_from_training(config, tensors), wanted, raw.path.name)
    return LoadedModel("tokenformer", config, found, source=str(raw.path), notes=tuple(notes))


def _sized(layers: int, width: int, heads: int) -> TokenFormerConfig:
    """A size of [2]; GPT-NeoX's vocabulary."""
    return TokenFormerConfig(50304, width, layers, heads, width, width, 4 * width)


def _tiny(**changes: object) -> TokenFormerConfig:
    """A size for tests; slots of different numbers, so that none can take another's place."""
    sizes: dict[str, object] = {"vocab_size": 29, "width": 32, "layers": 2, "heads": 2, "max_tokens": 96}
    slots = {"qkv_slots": 24, "proj_slots": 40, "ffn_slots": 56}
    return TokenFormerConfig(**(sizes | slots | changes))  # type: ignore[arg-type]


FAMILY = Family(
    name="tokenformer",
    title="TokenFormer: attention over parameter tokens (arXiv 2410.23168)",
    sources=("https://arxiv.org/abs/2410.23168", "https://github.com/Haiyang-W/TokenFormer"),
    config=TokenFormerConfig,
    presets={
        "tiny": _tiny(),
        "tiny-softmax": _tiny(activation="softmax", tied=False, rope_share=1.0),
        "tiny-gelu-first": _tiny(activation="gelu_l2_norm"),
        "zoo": TokenFormerConfig(),
        "150m": _sized(12, 768, 12),
        "450m": _sized(24, 1024, 16),
        "900m": _sized(32, 1280, 16),
        "1.5b": _sized(40, 1536, 16),
    },
    build=TokenFormer,
    load=_load,
    layout=_layout,
    reads="keys of the published TokenFormer (sequential.2.attention.query.key_param_tokens)",
    train_form=TokenFormerTrain,
    from_training=_from_training,
    init=_init,
    roles=(
        ("word_embeddings.*", "embedding"),
        ("output.*", "head"),
        ("norm.*", "norm"),
        ("*_param_tokens", "projection"),
        ("turns", "other"),
    ),
    state_note="keys and values of every token up to max_tokens",
)
