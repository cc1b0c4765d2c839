"""Block Transformer: a decoder over blocks of tokens, and one that decodes the next block from its output.

Sources:
    1. Ho et al., Block Transformer: Global-to-Local Language Modeling for Fast Inference, arXiv 2406.02657,
       section 2: embedder (lookup), block decoder, token decoder (prefix).
    2. itsnamgyu/block-transformer (Apache-2.0): the parts' names and sizes, and what is left open: both
       decoders are GPT-NeoX, the last token of a block is not read by the token decoder.
    3. GPT-NeoX of Hugging Face transformers, models/gpt_neox: the block.

Glossary:
    B batch, T tokens, P tokens a block (L_B in [1]), k block, j place in it, D and d widths of the block and
    the token decoder, H heads, K head size, R rotated channels of a head, n prefix length, G blocks of the
    longest stream.

    block input    g_k = concat_j E[x_{(k-1)P+j}]                      E [V,D/P]
    context        c_k = block_decoder(g)_k,   prefix (p_{k,0} .. p_{k,n-1}) = W c_k + b in n pieces
    token input    p_{k,0} .. p_{k,n-1}, E_t[x_{kP}] .. E_t[x_{kP+P-2}]
    logits         of token kP+j: W_o token_decoder(token input of k)_{n-1+j}
Both decoders, X the residual stream:  X' = X + attention(LN_1(X)) + W_2 gelu(W_1 LN_2(X)), rotary on the
first R channels of a head; the token decoder sees its own block alone and counts positions in it.

Departure: [2] never predicts the first block, and pads it on the left to any alignment. A stream has to
predict from its first token on, so block -1 is P times ``start_token`` (the end of text), as if another text
had just ended.

A step computes one row of the token decoder, n at the begin of a block, and one of the block decoder in one
step of P (models/_patches.py).

State: ``recent`` [B,P] int64, the last P tokens; ``prefix`` [B,n,d] of the current block;
``block.<i>.keys``, ``.values`` [B,H,G+1,K]; ``token.<i>.keys``, ``.values`` [B,S,H*K] of the current block,
S = n+P-1; ``position`` [1] int64. The first G*P tokens are the longest stream (LimitError).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from xexport.models._patches import Everything, InPatch, Place, Slots, Span, recent
from xexport.models._rotary import turns_of

__all__ = ["FAMILY", "BlockTransformer", "BlockTransformerConfig", "BlockTransformerTrain"]


@dataclass(frozen=True)
class BlockTransformerConfig:
    """Sizes of a Block Transformer.

    Attributes:
        vocab_size: V.
        block, blocks: P, G.
        prefix: n.
        width, layers, heads, ffn: the block decoder's D, blocks, H, inner width of the feed-forward network.
        token_width, token_layers, token_heads, token_ffn: the token decoder's.
        rotary: share of a head's channels that are rotated.
        start_token: what the block before the first one is made of.
        eps: epsilon of the layer norms.
    """

    vocab_size: int = 256
    block: int = 4
    blocks: int = 512
    prefix: int = 2
    width: int = 192
    layers: int = 2
    heads: int = 6
    ffn: int = 768
    token_width: int = 160
    token_layers: int = 2
    token_heads: int = 5
    token_ffn: int = 640
    rotary: float = 0.25
    start_token: int = 0
    eps: float = 1e-5

    def __post_init__(self) -> None:
        sizes = (self.vocab_size, self.block, self.blocks, self.prefix, self.width, self.layers, self.heads)
        if min(*sizes, self.ffn, self.token_width, self.token_layers, self.token_heads, self.token_ffn) < 1:
            raise InputError("a Block Transformer size is below 1", got=self)
        if self.width % self.block:
            raise InputError("a block's tokens must share the width", got=(self.width, self.block))
        for width, heads in ((self.width, self.heads), (self.token_width, self.token_heads)):
            if width % heads or not 0 <= self.rotary <= 1 or int(width // heads * self.rotary) % 2:
                raise InputError(
                    "heads must divide the width, and an even number of their channels be rotated",
                    got=(width, heads, self.rotary),
                )
        if not 0 <= self.start_token < self.vocab_size:
            raise InputError("the start token is not in the vocabulary", got=self.start_token)

    @property
    def slots(self) -> Slots:
        """How the token decoder reads a block."""
        return Slots(self.block, self.prefix, ahead=True)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)

    def forward(self, x: Tensor, place: Place, state: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """``x [B,N,d]``, normed -> the same shape, and the new state."""
        q, k, v = torch.unflatten(self.query_key_value(x), -1, (self.heads, 3, self.size)).unbind(3)
        o, new = place.attend(place.turned(q), place.turned(k), v, state)
        return self.dense(o), new


class _MLP(nn.Module):
    def __init__(self, width: int, ffn: int) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(width, ffn)
        self.dense_4h_to_h = nn.Linear(ffn, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x)))
        return y


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, ffn: int, eps: float) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(width, eps)
        self.post_attention_layernorm = nn.LayerNorm(width, eps)
        self.attention = _Attention(width, heads)
        self.mlp = _MLP(width, ffn)

    def forward(self, x: Tensor, place: Place, state: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        attended, new = self.attention(self.input_layernorm(x), place, state)
        return x + attended + self.mlp(self.post_attention_layernorm(x)), new


class _NeoX(nn.Module):
    """The layers of one decoder and its last norm, with the names of source [3]."""

    def __init__(self, width: int, layers: int, heads: int, ffn: int, eps: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(width, heads, ffn, eps) for _ in range(layers))
        self.final_layer_norm = nn.LayerNorm(width, eps)

    def forward(self, x: Tensor, place: Place, state: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """``x [B,N,d]`` -> the same shape, not yet normed, and the new state."""
        new: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            x, now = layer(x, place, state[2 * i : 2 * i + 2])
            new += now
        return x, new


class _Embedder(nn.Module):
    def __init__(self, c: BlockTransformerConfig) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(c.vocab_size, c.width // c.block)


class _BlockDecoder(nn.Module):
    def __init__(self, c: BlockTransformerConfig) -> None:
        super().__init__()
        self.gpt_neox = _NeoX(c.width, c.layers, c.heads, c.ffn, c.eps)


class _TokenDecoder(nn.Module):
    def __init__(self, c: BlockTransformerConfig) -> None:
        super().__init__()
        self.gpt_neox = _NeoX(c.token_width, c.token_layers, c.token_heads, c.token_ffn, c.eps)
        self.gpt_neox.embed_in = nn.Embedding(c.vocab_size, c.token_width)
        self.expansion_layer = nn.Linear(c.width, c.prefix * c.token_width)
        self.embed_out = nn.Linear(c.token_width, c.vocab_size, bias=False)


class BlockTransformer(nn.Module):
    """The chunk form: ``forward(tokens [B,T] int64, *state) -> (logits [B,T,V], *new_state)``.

    ``position + T`` must not exceed G*P: LimitError from a runtime, and in PyTorch as soon as a row is needed
    that the block decoder's cache has no place for.
    """

    whole = False
    turns: Tensor
    token_turns: Tensor

    def __init__(self, config: BlockTransformerConfig) -> None:
        super().__init__()
        c = self.config = config
        self.vocab_size, self.max_tokens = c.vocab_size, c.block * c.blocks
        self.embedder = _Embedder(c)
        self.block_decoder = _BlockDecoder(c)
        self.token_decoder = _TokenDecoder(c)
        for name, table in _tables(c).items():
            self.register_buffer(name, table.to(self.embedder.embeddings.weight.device))

    def state_spec(self) -> list[StateSpec]:
        """The last tokens, the current prefix, both caches, the position."""
        c = self.config
        specs = [
            StateSpec("recent", ("B", c.block), "int64", init=c.start_token),
            StateSpec("prefix", ("B", c.prefix, c.token_width)),
        ]
        shapes: list[tuple[str, int, tuple[int | str, ...]]] = [
            ("block", c.layers, ("B", c.heads, c.blocks + 1, c.width // c.heads)),
            ("token", c.token_layers, ("B", c.slots.size, c.token_width)),
        ]
        for decoder, layers, shape in shapes:
            for i in range(layers):
                specs += [StateSpec(f"{decoder}.{i}.{name}", shape) for name in ("keys", "values")]
        return [*specs, StateSpec("position", (1,), "int64")]

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        c, slots = self.config, self.config.slots
        before, prefix, *rest, position = state
        end = position + tokens.shape[1]
        new = Span.between(slots.after(position), slots.after(end))
        rows = Span.between(slots.rows(new.begin), slots.rows(new.end))
        made, blocks = self._prefixes(before, tokens, rows, position, rest[: 2 * c.layers])
        prefix = torch.cat((prefix[:, None], made), 1)
        x, cache = self._decoded(tokens, prefix, new, rows, position, rest[2 * c.layers :])
        here = slots.after(position + torch.arange(1, tokens.shape[1] + 1, device=end.device))
        x = torch.index_select(x, 1, here - 1 - new.begin)
        logits = self.token_decoder.embed_out(self.token_decoder.gpt_neox.final_layer_norm(x))
        last = torch.cat((before, tokens), 1)[:, -c.block :]
        return logits, last, prefix[:, -1], *blocks, *cache, end

    def _prefixes(
        self, before: Tensor, tokens: Tensor, rows: Span, position: Tensor, state: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Prefixes ``[B,N,n,d]`` from the new rows of the block decoder, and its new state."""
        c, decoder = self.config, self.block_decoder.gpt_neox
        index = (rows.index * c.block - position)[:, None] + torch.arange(c.block, device=position.device)
        # of concat(the P tokens before the chunk, chunk): row k reads block k-1
        x = self.embedder.embeddings(recent(before, tokens, index.flatten()))
        x = x.view(x.shape[0], rows.count, c.width)
        place = Everything(rows, self.turns if len(self.turns) else None, x.dtype, self.whole)
        x, new = decoder(x, place, state)
        x = self.token_decoder.expansion_layer(decoder.final_layer_norm(x))
        return x.view(x.shape[0], rows.count, c.prefix, c.token_width), new

    def _decoded(
        self,
        tokens: Tensor,
        prefix: Tensor,
        new: Span,
        rows: Span,
        position: Tensor,
        state: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """The token decoder's output ``[B,N,d]`` of the new slots; ``prefix [B,1+rows,n,d]``."""
        c, decoder, size = self.config, self.token_decoder.gpt_neox, self.config.slots.size
        block, slot = new.index // size, new.index % size
        token = (block * c.block + slot - c.prefix - position).clamp(min=0)
        read = F.embedding(torch.index_select(tokens, 1, token), self._embedding())
        piece = (block - rows.begin + 1) * c.prefix + slot.clamp(max=c.prefix - 1)
        given = torch.index_select(prefix.flatten(1, 2), 1, piece)
        x = torch.where((slot < c.prefix)[:, None], given, read)
        place = InPatch(new, size, self.token_turns if len(self.token_turns) else None, x.dtype)
        y: tuple[Tensor, list[Tensor]] = decoder(x, place, state)
        return y

    def _embedding(self) -> Tensor:
        embed = self.token_decoder.gpt_neox.embed_in
        assert isinstance(embed, nn.Embedding)
        return embed.weight


class BlockTransformerTrain(FromFirstState, BlockTransformer):
    """The training form: ``forward(tokens [B,T]) -> logits [B,T,V]``, differentiable; the same parameters."""

    whole = True


def _tables(c: BlockTransformerConfig) -> dict[str, Tensor]:
    """The rotations' frequencies 10000^(-2i/R), always on the CPU."""
    tables = {}
    for name, size in (("turns", c.width // c.heads), ("token_turns", c.token_width // c.token_heads)):
        rotated = int(size * c.rotary)
        turns = turns_of([10000.0 ** (-2 * i / rotated) for i in range(rotated // 2)])
        tables[name] = torch.tensor(turns, dtype=torch.int64, device="cpu")
    return tables


def _init(module: nn.Module, seed: int) -> None:
    """Fill a Block Transformer (either form) with weights to train from.

    Projections that read a residual stream have the variance 1/fan_in, those that write to it are smaller by
    sqrt(2 * layers); the head starts small.
    """
    assert isinstance(module, BlockTransformer)
    c = module.config
    layers = {"block": c.layers, "token": c.token_layers}
    writes = {f"{m}*{end}": n for m, n in layers.items() for end in (".dense.weight", "4h_to_h.weight")}
    fill(module, seed, writes=writes, small=["*embed_out*"], fixed={"*embed*": 0.5})
    for name, table in _tables(c).items():
        module.get_buffer(name).copy_(table)


def _from_training(config: BlockTransformerConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The two forms have the same parameters; the constant tables are made anew."""
    return {**{k: v.detach() for k, v in tensors.items()}, **_tables(config)}


_KNOWN = "token_decoder.expansion_layer.weight"
_LAYER = "{}_decoder.gpt_neox.layers."
_HEADS = 16
_BLOCKS = 512


def _layout(raw: RawCheckpoint) -> str | None:
    known = _KNOWN in raw.tensors and "embedder.embeddings.weight" in raw.tensors
    return f"it has block-transformer's {_KNOWN}" if known else None


def _load(raw: RawCheckpoint) -> LoadedModel:
    """A state_dict of block-transformer's main models, or a file of xexport's own training."""
    config = own_config(raw, "block_transformer", BlockTransformerConfig)
    notes: tuple[str, ...] = ()
    if config is None:
        if _layout(raw) is None:
            raise unreadable(
                raw,
                "a Block Transformer",
                "a state_dict of block-transformer, or a safetensors file of xexport's own training",
            )
        config = _config_of(raw)
        notes = (
            f"the file does not tell the number of heads, taken as {_HEADS}, Pythia-410m's",
            f"the longest stream is taken as {_BLOCKS} blocks, the start token as 0, Pythia's end of text",
        )
    with torch.device("meta"):
        wanted = BlockTransformer(config)
    tensors = dict(raw.tensors)
    if _KNOWN in tensors and tensors[_KNOWN].ndim == 3:  # a convolution over single rows
        tensors[_KNOWN] = tensors[_KNOWN].squeeze(-1)
    found = match_tensors(_from_training(config, tensors), wanted, raw.path.name)
    return LoadedModel("block_transformer", config, found, source=str(raw.path), notes=notes)


def _config_of(raw: RawCheckpoint) -> BlockTransformerConfig:
    """Sizes from the shapes of a state_dict of [2]: lookup embedder, GPT-NeoX decoders, prefix decoding."""
    first = "0.mlp.dense_h_to_4h.weight"
    needed = [_LAYER.format(d) + first for d in ("block", "token")]
    require_keys(raw, (*needed, "token_decoder.embed_out.weight"), "block_transformer")
    ffn, width = raw.tensors[needed[0]].shape
    token_ffn, token_width = raw.tensors[needed[1]].shape
    vocab, piece = raw.tensors["embedder.embeddings.weight"].shape
    expanded = raw.tensors[_KNOWN].shape[0]
    if width % piece or expanded % token_width:
        raise CheckpointError(
            "the sizes of this Block Transformer don't fit", got=(width, piece, expanded, token_width)
        )
    layers = [
        1 + max(int(k.split(".")[3]) for k in raw.tensors if k.startswith(_LAYER.format(d)))
        for d in ("block", "token")
    ]
    return BlockTransformerConfig(
        vocab_size=vocab,
        block=width // piece,
        blocks=_BLOCKS,
        prefix=expanded // token_width,
        width=width,
        layers=layers[0],
        heads=_HEADS,
        ffn=ffn,
        token_width=token_width,
        token_layers=layers[1],
        token_heads=_HEADS,
        token_ffn=token_ffn,
    )


def _sized(layers: int, width: int) -> BlockTransformerConfig:
    """A ``block_main_b4_*`` of source [2]: both decoders alike, Pythia's vocabulary and heads."""
    ffn = 4 * width
    return BlockTransformerConfig(50304, 4, 512, 2, width, layers, 16, ffn, width, layers, 16, ffn)


FAMILY = Family(
    name="block_transformer",
    title="Block Transformer: a decoder over blocks, one inside of each (arXiv 2406.02657)",
    sources=("https://arxiv.org/abs/2406.02657", "https://github.com/itsnamgyu/block-transformer"),
    config=BlockTransformerConfig,
    presets={
        "tiny": BlockTransformerConfig(29, 3, 32, 2, 24, 2, 3, 40, 16, 1, 2, 32, rotary=0.5),
        "tiny-long-prefix": BlockTransformerConfig(29, 2, 48, 5, 16, 1, 2, 32, 24, 2, 3, 40, 0.5, 7),
        "zoo": BlockTransformerConfig(),
        "85m": _sized(6, 768),
        "1.2b": _sized(12, 2048),
    },
    build=BlockTransformer,
    load=_load,
    layout=_layout,
    reads=f"block-transformer's key {_KNOWN}",
    train_form=BlockTransformerTrain,
    from_training=_from_training,
    init=_init,
    roles=(
        ("*embeddings.weight", "embedding"),
        ("*embed_in.weight", "embedding"),
        ("*embed_out.weight", "head"),
        ("*norm.*", "norm"),
        ("*bias", "norm"),
        ("*.weight", "projection"),
        ("*", "other"),
    ),
    state_note="keys and values of every block up to the bound, and of one block's tokens",
)
