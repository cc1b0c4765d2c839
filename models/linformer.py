"""Linformer: attention over keys and values projected to a fixed number of rows, whole sequences only.

Sources:
    1. Wang et al., Linformer: Self-Attention with Linear Complexity, arXiv 2006.04768: equation 7 (the head),
       section 4 (sharing of the projections, a nonuniform k, the masked-language-model experiments).
    2. lucidrains/linformer (MIT), version 0.2.3: the layout of the layer around it (pre-norm, learned
       positions, k x n projections as free matrices, initial values).

Glossary:
    B batch, n sequence length (fixed), d width, H heads, K = d/H head size, k rows after the projection,
    E_i, F_i [k,n] the projections of keys and values of head i.

One block (pre-norm): Y = X + A(LN(X)),  X' = Y + gelu(LN(Y) W_1) W_2. Head i of the attention (equation 7):
    head_i = softmax(Q_i (E_i K_i)^T / sqrt K) (F_i V_i),   Q_i, K_i, V_i = X W_i^Q, X W_i^K, X W_i^V
The cost is n k instead of n^2. Sharing of the projections (section 4), the option ``sharing``:
    none        E_i and F_i of every head and layer
    headwise    E and F of every layer, for all heads
    kv          one E = F of every layer, for all heads
    layerwise   one E = F for all heads and layers

E and F mix the positions of the whole sequence, later ones too: the model is not causal and has no stream.
They have one column a position, so n is fixed: ``fixed_length``. Shorter texts are padded as in training.

Departure: [2] has no norm before the logits, and with ``share_kv`` it shares W^K and W^V too, which [1] does
not. The norm is the option ``final_norm`` (True: as pre-norm encoders have it).

State: none, the whole-sequence form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xexport.core.checkpoint import RawCheckpoint
from xexport.core.errors import InputError
from xexport.core.family import Family, LoadedModel
from xexport.core.state import StateSpec
from xexport.models._fill import fill
from xexport.models._own import load_own

__all__ = ["FAMILY", "Linformer", "LinformerConfig", "LinformerTrain"]

_SHARING = ("none", "headwise", "kv", "layerwise")


@dataclass(frozen=True)
class LinformerConfig:
    """Sizes of a Linformer with a head that predicts tokens.

    Attributes:
        vocab_size, width, layers, heads: V, d, number of blocks, H.
        length: n, the one length of its sequences.
        rows: k.
        ffn: inner width of the feed-forward network.
        sharing: of the projections: ``none``, ``headwise``, ``kv`` or ``layerwise``.
        final_norm: a layer norm before the logits.
        eps: epsilon of the layer norms.
    """

    vocab_size: int = 256
    width: int = 192
    layers: int = 4
    heads: int = 6
    length: int = 512
    rows: int = 64
    ffn: int = 768
    sharing: str = "layerwise"
    final_norm: bool = True
    eps: float = 1e-5

    def __post_init__(self) -> None:
        sizes = (self.vocab_size, self.width, self.layers, self.heads, self.length, self.rows, self.ffn)
        if min(sizes) < 1:
            raise InputError("a Linformer size is too small", got=self)
        if self.width % self.heads:
            raise InputError(
                "the width of a Linformer must be a multiple of its heads", got=(self.width, self.heads)
            )
        if self.rows > self.length:
            raise InputError(
                "a Linformer projects its positions to fewer rows", got=self.rows, allowed=f"1..{self.length}"
            )
        if self.sharing not in _SHARING:
            raise InputError("unknown sharing", got=self.sharing, allowed=", ".join(_SHARING))


def _projection(c: LinformerConfig) -> nn.Parameter:
    """[k,n], or [H,k,n] where every head has its own."""
    heads = (c.heads,) if c.sharing == "none" else ()
    return nn.Parameter(torch.zeros(*heads, c.rows, c.length))


class _Attention(nn.Module):
    """Equation 7; the projections may come from outside."""

    def __init__(self, c: LinformerConfig) -> None:
        super().__init__()
        self.heads = c.heads
        self.q_proj = nn.Linear(c.width, c.width, bias=False)
        self.k_proj = nn.Linear(c.width, c.width, bias=False)
        self.v_proj = nn.Linear(c.width, c.width, bias=False)
        self.o_proj = nn.Linear(c.width, c.width)
        self.rows_of_keys = _projection(c) if c.sharing != "layerwise" else None
        self.rows_of_values = _projection(c) if c.sharing in ("none", "headwise") else None

    def forward(self, x: Tensor, shared: Tensor | None) -> Tensor:
        """``x [B,n,d]`` -> the same shape; ``shared`` [k,n] is the projection of every layer, if one is."""
        e = shared if self.rows_of_keys is None else self.rows_of_keys
        f = e if self.rows_of_values is None else self.rows_of_values
        assert e is not None
        assert f is not None
        q = torch.unflatten(self.q_proj(x), -1, (self.heads, -1)).transpose(1, 2)  # [B,H,n,K]
        keys, values = self._rows(e, self.k_proj(x)), self._rows(f, self.v_proj(x))  # [B,H,k,K]
        o = F.scaled_dot_product_attention(q, keys, values)
        y: Tensor = self.o_proj(o.transpose(1, 2).flatten(-2))
        return y

    def _rows(self, projection: Tensor, x: Tensor) -> Tensor:
        """E X of every head: ``x [B,n,d]`` -> [B,H,k,K]."""
        if projection.ndim == 2:  # shared by the heads: one product for all of them
            return torch.unflatten(projection @ x, -1, (self.heads, -1)).transpose(1, 2)
        return projection @ torch.unflatten(x, -1, (self.heads, -1)).transpose(1, 2)


class _Block(nn.Module):
    def __init__(self, c: LinformerConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(c.width, c.eps)
        self.attention = _Attention(c)
        self.ffn_norm = nn.LayerNorm(c.width, c.eps)
        self.fc1 = nn.Linear(c.width, c.ffn)
        self.fc2 = nn.Linear(c.ffn, c.width)

    def forward(self, x: Tensor, shared: Tensor | None) -> Tensor:
        """``x [B,n,d]`` -> the same shape."""
        x = x + self.attention(self.attention_norm(x), shared)
        y: Tensor = self.fc2(F.gelu(self.fc1(self.ffn_norm(x))))
        return x + y


class Linformer(nn.Module):
    """The whole form: ``forward(tokens [B,n] int64) -> (logits [B,n,V],)`` for n = ``config.length``."""

    form = "whole"

    def __init__(self, config: LinformerConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.fixed_length = config.length
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Parameter(torch.zeros(config.length, config.width))
        self.rows = _projection(config) if config.sharing == "layerwise" else None
        self.layers = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, config.eps) if config.final_norm else nn.Identity()
        self.head = nn.Linear(config.width, config.vocab_size)

    def state_spec(self) -> list[StateSpec]:
        """Empty: nothing is carried."""
        return []

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return (self.logits(tokens),)

    def logits(self, tokens: Tensor) -> Tensor:
        """tokens ``[B,n]`` -> logits ``[B,n,V]``."""
        x = self.embed(tokens) + self.positions
        for block in self.layers:
            x = block(x, self.rows)
        found: Tensor = self.head(self.norm(x))
        return found


class LinformerTrain(Linformer):
    """The training form: ``forward(tokens [B,n]) -> logits [B,n,V]``; the same parameters."""

    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        return self.logits(tokens)


def _init(module: nn.Module, seed: int) -> None:
    """Fill a Linformer (either form) with weights to train from.

    Products keep the variance of what they read: 1/fan_in, that of E and F 1/n over the positions. What
    writes to the residual stream is smaller by sqrt(2 * layers); the head starts small.
    """
    assert isinstance(module, Linformer)
    writes = dict.fromkeys(("*o_proj.weight", "*fc2.weight"), module.config.layers)
    fill(module, seed, writes=writes, fixed={"embed.weight": 0.5, "positions": 0.1})


def _load(raw: RawCheckpoint) -> LoadedModel:
    return load_own(FAMILY, raw, title="a Linformer")


_TINY = LinformerConfig(vocab_size=29, width=32, layers=2, heads=2, length=24, rows=8, ffn=48)

FAMILY = Family(
    name="linformer",
    title="Linformer: attention of linear cost, whole sequences of one length (arXiv 2006.04768)",
    sources=("https://arxiv.org/abs/2006.04768", "https://github.com/lucidrains/linformer"),
    config=LinformerConfig,
    presets={
        "tiny": _TINY,
        "zoo": LinformerConfig(),
        # RoBERTa-base with k = 128 and one projection: section 5.1 and table 2 of [1]
        "base": LinformerConfig(
            vocab_size=50265, width=768, layers=12, heads=12, length=512, rows=128, ffn=3072
        ),
        "base-1024": LinformerConfig(
            vocab_size=50265, width=768, layers=12, heads=12, length=1024, rows=256, ffn=3072
        ),
    },
    build=Linformer,
    load=_load,
    train_form=LinformerTrain,
    init=_init,
    roles=(
        ("embed.*", "embedding"),
        ("positions", "other"),
        ("head.*", "head"),
        ("*norm.*", "norm"),
        ("*rows*", "other"),
        ("*_proj.weight", "projection"),
        ("*.fc?.weight", "projection"),
        ("*.bias", "norm"),
    ),
    state_note="none: whole sequences only",
    form="whole",
)
