"""MegaByte: a global model over patches of bytes and a local one inside of each, streamed byte by byte.

Sources:
    1. Yu et al., MEGABYTE: Predicting Million-byte Sequences with Multiscale Transformers,
       arXiv 2305.07185, sections 2.1 to 2.3: patch embedder, global and local model.
    2. lucidrains/MEGABYTE-pytorch 0.3.6 (MIT), two stages: ``style="lucidrains"``; its checkpoints are read.

Glossary:
    B batch, T bytes, P patch size, k patch, p place in it, D_G and D_L widths of the global and local model,
    e = D_G/P width of a byte in a patch, H heads, K head size, G patches of the longest stream.

``style="paper"``, the equations of [1]:
    global input   g_0 = E_pad,  g_k = concat_p(E_x[x_{(k-1)P+p}] + E_pos[(k-1)P+p])
    local input    l_{k,0} = w h_{k,0} + E_lpad,  l_{k,p} = w h_{k,p} + E_l[x_{kP+p-1}]
    logits         of byte kP+p: E_l local(l)_{k,p}
where h_k = global(g)_k in P pieces of e. A byte's place in its patch is in h. The logits after byte t are
those of byte t+1: at the end of a patch they need the global model's next row.
``style="lucidrains"``, [2]:
    g_0 = s_G,  g_k = LN(W LN(concat_p(E_x[x_{(k-1)P+p}])) + b)
    l_{k,0} = s_L,  l_{k,1+p} = E_l[x_{kP+p}] + (W' h_k + b')_p
    logits         of byte kP+p+1: W_o local(l)_{k,1+p} + b_o
so row k of the global model, which knows the patches before k, is needed from the first byte of patch k on.

The paper leaves the Transformer's block open. Both styles have that of [2]: RMS norm before each part, no
bias in attention, GELU; with ``shift`` (always, in [2]) half of each part's input comes from the row before.
``rotary`` rotates keys and queries by their row (global) and their place in the patch (local).

One step computes one local row, and a global row in one step of P: in the other steps the global model's
tensors have no rows (models/_patches.py).

State: ``recent`` [B,P] int64, the last P bytes; ``context`` [B,P,D_L], what the local model reads of the
current row; ``global.<i>.keys``, ``.values`` [B,H,G,K] (paper: G+1); of the current patch
``local.<i>.keys``, ``.values`` [B,S,H*K], S = P (paper) or P+1; with ``shift`` also ``*.shift`` [B,2,D/2];
``position`` [1] int64. The first G*P bytes are the longest stream (LimitError).
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
from xexport.models._chunk import FromFirstState, RMSNorm
from xexport.models._fill import fill
from xexport.models._patches import Everything, InPatch, Place, Slots, Span, recent
from xexport.models._rotary import turns_of

__all__ = ["FAMILY", "MegaByte", "MegaByteConfig", "MegaByteTrain"]

_STYLES = ("paper", "lucidrains")


@dataclass(frozen=True)
class MegaByteConfig:
    """Sizes and options of a MegaByte.

    Attributes:
        vocab_size: 256 bytes.
        patch, patches: P, G.
        width, layers, heads: the global model's D_G, blocks, H.
        local_width, local_layers, local_heads: the local model's.
        head_size: K of both; 0 is width over heads of each.
        ffn_factor: inner width of the feed-forward networks over the model's width.
        style: ``paper`` or ``lucidrains``.
        shift: half of a block's input comes from the row before.
        rotary: rotate queries and keys.
        eps: epsilon of the RMS norms.
    """

    vocab_size: int = 256
    patch: int = 4
    patches: int = 512
    width: int = 192
    layers: int = 3
    heads: int = 6
    local_width: int = 128
    local_layers: int = 2
    local_heads: int = 4
    head_size: int = 0
    ffn_factor: int = 4
    style: str = "paper"
    shift: bool = False
    rotary: bool = True
    eps: float = 1e-5

    def __post_init__(self) -> None:
        sizes = (self.vocab_size, self.patch, self.patches, self.width, self.layers, self.heads)
        if min(*sizes, self.local_width, self.local_layers, self.local_heads, self.ffn_factor) < 1:
            raise InputError("a MegaByte size is below 1", got=self)
        if self.style not in _STYLES:
            raise InputError("unknown style of MegaByte", got=self.style, allowed=", ".join(_STYLES))
        if self.style == "paper" and self.width % self.patch:
            raise InputError("a patch's bytes must share the width", got=(self.width, self.patch))
        for width, heads in ((self.width, self.heads), (self.local_width, self.local_heads)):
            size = self.head_size or width // heads
            if (not self.head_size and width % heads) or size % 2:
                raise InputError("the head size must be whole and even", got=(width, heads, self.head_size))
            if self.shift and width % 2:
                raise InputError("a shift needs an even width", got=width)

    @property
    def slots(self) -> Slots:
        """How the local model reads a patch."""
        return Slots(self.patch, 1, ahead=self.style == "paper")

    @property
    def rows(self) -> int:
        """Rows of the global model's cache."""
        return self.patches + (self.style == "paper")


class _Block(nn.Module):
    """Attention and feed-forward network of either model."""

    def __init__(self, c: MegaByteConfig, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.shift = heads, c.shift
        self.size = c.head_size or width // heads
        inner = heads * self.size
        self.attention_norm = RMSNorm(width, c.eps)
        self.qkv_proj = nn.Linear(width, 3 * inner, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)
        self.ffn_norm = RMSNorm(width, c.eps)
        self.fc1 = nn.Linear(width, c.ffn_factor * width)
        self.fc2 = nn.Linear(c.ffn_factor * width, width)

    def forward(
        self, x: Tensor, place: Place, inside: Tensor | None, state: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """``x [B,N,d]`` -> the same shape and the new state; ``inside [N,1]`` is 0 where no row is before."""
        before = state[2].unbind(1) if self.shift else (None, None)
        z, first = _shifted(x, before[0], inside)
        q, k, v = torch.unflatten(
            self.qkv_proj(self.attention_norm(z)), -1, (3, self.heads, self.size)
        ).unbind(2)
        o, new = place.attend(place.turned(q), place.turned(k), v, state[:2])
        x = x + self.o_proj(o)
        z, second = _shifted(x, before[1], inside)
        x = x + self.fc2(F.gelu(self.fc1(self.ffn_norm(z))))
        if first is not None and second is not None:
            new.append(torch.stack((first, second), 1))
        return x, new


def _shifted(x: Tensor, before: Tensor | None, inside: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``x [B,N,d]`` with its second half from the row before, and that half of the last row ``[B,d/2]``."""
    if before is None:
        return x, None
    kept, half = x.chunk(2, -1)
    both = torch.cat((before[:, None], half), 1)
    moved = both[:, :-1] if inside is None else both[:, :-1] * inside
    return torch.cat((kept, moved), -1), both[:, -1]


class _Model(nn.Module):
    """The blocks of the global or the local model, and its last norm."""

    def __init__(self, c: MegaByteConfig, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(c, width, heads) for _ in range(layers))
        self.norm = RMSNorm(width, c.eps)
        self.tensors = 3 if c.shift else 2

    def forward(
        self, x: Tensor, place: Place, inside: Tensor | None, state: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """``x [B,N,d]`` -> the same shape and the new state; the last norm is left to the caller."""
        new: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            x, now = block(x, place, inside, state[i * self.tensors : (i + 1) * self.tensors])
            new += now
        return x, new


class MegaByte(nn.Module):
    """The chunk form: ``forward(tokens [B,T] int64, *state) -> (logits [B,T,V], *new_state)``.

    ``position + T`` must not exceed G*P: LimitError from a runtime, and in PyTorch as soon as a row is needed
    that the global model's cache has no place for.
    """

    whole = False
    turns: Tensor
    local_turns: Tensor

    def __init__(self, config: MegaByteConfig) -> None:
        super().__init__()
        c = self.config = config
        self.vocab_size, self.max_tokens = c.vocab_size, c.patch * c.patches
        paper = c.style == "paper"
        byte = c.width // c.patch if paper else c.local_width
        self.patch_embed = nn.Embedding(c.vocab_size, byte)
        self.patch_start = nn.Parameter(torch.zeros(c.width))
        if paper:
            self.patch_places = nn.Embedding(self.max_tokens, byte)
        else:
            self.bytes_norm = nn.LayerNorm(c.patch * byte)
            self.patch_proj = nn.Linear(c.patch * byte, c.width)
            self.patch_norm = nn.LayerNorm(c.width)
        self.coarse = _Model(c, c.width, c.layers, c.heads)
        context = (byte, c.local_width) if paper else (c.width, c.patch * c.local_width)
        self.context_proj = nn.Linear(*context, bias=not paper)
        self.embed = nn.Embedding(c.vocab_size, c.local_width)
        self.start = nn.Parameter(torch.zeros(c.local_width))
        self.local = _Model(c, c.local_width, c.local_layers, c.local_heads)
        self.head = None if paper else nn.Linear(c.local_width, c.vocab_size)
        for name, table in _tables(c).items():
            self.register_buffer(name, table.to(self.start.device))

    def state_spec(self) -> list[StateSpec]:
        """The last bytes, the current row's output, both caches, the position."""
        c = self.config
        size, local = (c.head_size or d // h for d, h in ((c.width, c.heads), (c.local_width, c.local_heads)))
        specs = [
            StateSpec("recent", ("B", c.patch), "int64"),
            StateSpec("context", ("B", c.patch, c.local_width)),
        ]
        shapes: list[tuple[str, int, tuple[int | str, ...], int]] = [
            ("global", c.layers, ("B", c.heads, c.rows, size), c.width),
            ("local", c.local_layers, ("B", c.slots.size, c.local_heads * local), c.local_width),
        ]
        for model, layers, shape, width in shapes:
            for i in range(layers):
                specs += [StateSpec(f"{model}.{i}.{name}", shape) for name in ("keys", "values")]
                if c.shift:
                    specs.append(StateSpec(f"{model}.{i}.shift", ("B", 2, width // 2)))
        return [*specs, StateSpec("position", (1,), "int64")]

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        c, slots = self.config, self.config.slots
        before, context, *rest, position = state
        split = c.layers * self.coarse.tensors
        end = position + tokens.shape[1]
        new = Span.between(slots.after(position), slots.after(end))
        rows = Span.between(slots.rows(new.begin), slots.rows(new.end))
        coarse = self._coarse(before, tokens, rows, position, rest[:split])
        context = torch.cat((context[:, None], coarse[0]), 1)
        x, local = self._local(tokens, context, new, rows, position, rest[split:])
        here = slots.after(position + torch.arange(1, tokens.shape[1] + 1, device=end.device))
        x = torch.index_select(x, 1, here - 1 - new.begin)
        logits = self._logits(x)
        last = torch.cat((before, tokens), 1)[:, -c.patch :]
        return logits, last, context[:, -1], *coarse[1], *local, end

    def _coarse(
        self, before: Tensor, tokens: Tensor, rows: Span, position: Tensor, state: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """What the local model reads of the new rows ``[B,N,P,D_L]``, and the global model's new state."""
        c, count = self.config, rows.count
        byte = torch.arange(c.patch, device=position.device)
        first = rows.index * c.patch
        # of concat(the P bytes before the chunk, chunk): row k reads the patch before patch k
        x = self.patch_embed(recent(before, tokens, ((first - position)[:, None] + byte).flatten()))
        width = x.shape[-1]
        x = x.view(x.shape[0], count, c.patch, width)
        if c.style == "paper":
            x = (
                x + self.patch_places((first[:, None] + (byte - c.patch)).clamp(0, self.max_tokens - 1))
            ).flatten(2)
        else:
            x = self.patch_norm(self.patch_proj(self.bytes_norm(x.flatten(2))))
        x = torch.where((rows.index == 0)[:, None], self.patch_start, x)
        place = Everything(rows, self.turns if c.rotary else None, x.dtype, self.whole)
        x, new = self.coarse(x, place, None, state)
        x = self.coarse.norm(x)
        if c.style == "paper":
            x = x.view(x.shape[0], count, c.patch, width)
        return self.context_proj(x).view(x.shape[0], count, c.patch, c.local_width), new

    def _local(
        self,
        tokens: Tensor,
        context: Tensor,
        new: Span,
        rows: Span,
        position: Tensor,
        state: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """The local model's output ``[B,N,D_L]`` of the new slots; ``context [B,1+rows,P,D_L]``."""
        c, size = self.config, self.config.slots.size
        patch = new.index // size
        slot = new.index % size
        inside = (slot > 0)[:, None]
        # slot p of patch k reads byte kP+p-1, and what the row has for it
        byte = (patch * c.patch + slot - 1 - position).clamp(min=0)
        x = torch.where(
            inside, F.embedding(torch.index_select(tokens, 1, byte), self.embed.weight), self.start
        )
        piece = slot if c.style == "paper" else (slot - 1).clamp(min=0)
        read = torch.index_select(context.flatten(1, 2), 1, (patch - rows.begin + 1) * c.patch + piece)
        x = x + (read if c.style == "paper" else read * inside)
        place = InPatch(new, size, self.local_turns if c.rotary else None, x.dtype)
        y: tuple[Tensor, list[Tensor]] = self.local(x, place, inside, state)
        return y

    def _logits(self, x: Tensor) -> Tensor:
        """``[B,T,V]`` of the local model's output."""
        x = self.local.norm(x)
        return F.linear(x, self.embed.weight) if self.head is None else self.head(x)


class MegaByteTrain(FromFirstState, MegaByte):
    """The training form: ``forward(tokens [B,T]) -> logits [B,T,V]``, differentiable; the same parameters."""

    whole = True


def _tables(c: MegaByteConfig) -> dict[str, Tensor]:
    """The rotations' frequencies 10000^(-2i/K), always on the CPU."""
    tables = {}
    for name, width, heads in (
        ("turns", c.width, c.heads),
        ("local_turns", c.local_width, c.local_heads),
    ):
        size = c.head_size or width // heads
        turns = turns_of([10000.0 ** (-2 * i / size) for i in range(size // 2)])
        tables[name] = torch.tensor(turns, dtype=torch.int64, device="cpu")
    return tables


def _init(module: nn.Module, seed: int) -> None:
    """Fill a MegaByte (either form) with weights to train from.

    Projections that read a residual stream have the variance 1/fan_in, those that write to it are smaller by
    sqrt(2 * layers); the head starts small, and where it is the local embedding both do.
    """
    assert isinstance(module, MegaByte)
    c, ends = module.config, ("*o_proj.weight", "*fc2.weight")
    writes = dict.fromkeys((f"local{end}" for end in ends), c.local_layers) | dict.fromkeys(ends, c.layers)
    small = ["head.weight", *(["embed.weight"] if module.head is None else [])]
    fill(
        module, seed, writes=writes, small=small, fixed=dict.fromkeys(("*embed*", "*start*", "*places*"), 0.5)
    )
    for name, table in _tables(c).items():
        module.get_buffer(name).copy_(table)


def _from_training(config: MegaByteConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The two forms have the same parameters; the constant tables are made anew."""
    return {**{k: v.detach() for k, v in tensors.items()}, **_tables(config)}


_KNOWN = "to_next_transformer_projections.0.1.weight"
_HEAD_SIZE = 64
_DEFAULT_PATCHES = 1024
#: [2] -> here; {m} is ``coarse`` or ``local``
_OUTSIDE = {
    "token_embs.0.weight": "embed.weight",
    "token_embs.1.0.weight": "patch_embed.weight",
    "token_embs.1.2.": "bytes_norm.",
    "token_embs.1.3.": "patch_proj.",
    "token_embs.1.4.": "patch_norm.",
    "start_tokens.0": "patch_start",
    "start_tokens.1": "start",
    "to_next_transformer_projections.0.1.": "context_proj.",
    "to_logits.": "head.",
    "transformers.0.norm.g": "coarse.norm.weight",
    "transformers.1.norm.g": "local.norm.weight",
}
_INSIDE = {
    "0.norm.g": "attention_norm.weight",
    "0.to_out.weight": "o_proj.weight",
    "1.0.g": "ffn_norm.weight",
    "1.1.": "fc1.",
    "1.4.": "fc2.",
}


def _layout(raw: RawCheckpoint) -> str | None:
    return f"it has MEGABYTE-pytorch's {_KNOWN}" if _KNOWN in raw.tensors else None


def _load(raw: RawCheckpoint) -> LoadedModel:
    """A state_dict of a two-stage MEGABYTE-pytorch, or a file of xexport's own training."""
    config = own_config(raw, "megabyte", MegaByteConfig)
    notes: tuple[str, ...] = ()
    tensors = dict(raw.tensors)
    if config is None:
        if _KNOWN not in raw.tensors:
            raise unreadable(
                raw,
                "a MegaByte",
                "a state_dict of MEGABYTE-pytorch, or a safetensors file from xexport's own training",
            )
        config, notes = _config_of(raw)
        tensors = _renamed(tensors, config)
    with torch.device("meta"):
        wanted = MegaByte(config)
    found = match_tensors(_from_training(config, tensors), wanted, raw.path.name)
    tokenizer = "bytes" if config.vocab_size == 256 else None
    return LoadedModel("megabyte", config, found, tokenizer, source=str(raw.path), notes=notes)


def _config_of(raw: RawCheckpoint) -> tuple[MegaByteConfig, tuple[str, ...]]:
    """Sizes from the shapes of a state_dict of [2], and what they do not tell."""
    first = "transformers.{}.layers.0.0.to_q.weight"
    needed = ("token_embs.0.weight", "token_embs.1.3.weight", first.format(0), first.format(1))
    require_keys(raw, needed, "megabyte (MEGABYTE-pytorch)")
    if any(k.startswith(("transformers.2.", "pos_embs.")) for k in raw.tensors):
        raise CheckpointError(
            "this MEGABYTE-pytorch has options that are not computed here",
            got=", ".join(sorted({k.split(".")[0] for k in raw.tensors})),
            allowed="two stages, without pos_emb",
        )
    vocab, local_width = raw.tensors["token_embs.0.weight"].shape
    width, taken = raw.tensors["token_embs.1.3.weight"].shape
    inner = raw.tensors[first.format(0)].shape[0]
    layers = [
        1 + max(int(k.split(".")[3]) for k in raw.tensors if k.startswith(f"transformers.{i}.layers."))
        for i in (0, 1)
    ]
    rotary = "transformers.0.rotary_emb.inv_freq" in raw.tensors
    if inner % _HEAD_SIZE or taken % local_width:
        raise CheckpointError("the sizes of this MEGABYTE-pytorch don't fit", got=(inner, taken, local_width))
    config = MegaByteConfig(
        vocab_size=vocab,
        patch=taken // local_width,
        patches=_DEFAULT_PATCHES,
        width=width,
        layers=layers[0],
        heads=inner // _HEAD_SIZE,
        local_width=local_width,
        local_layers=layers[1],
        local_heads=inner // _HEAD_SIZE,
        head_size=_HEAD_SIZE,
        ffn_factor=raw.tensors["transformers.0.layers.0.1.1.weight"].shape[0] // width,
        style="lucidrains",
        shift=True,
        rotary=rotary,
        # [2] divides by max(RMS, 1e-8)
        eps=1e-16,
    )
    return config, (
        f"the file does not tell the head size, taken as {_HEAD_SIZE}, MEGABYTE-pytorch's default",
        f"the file does not tell the longest stream, taken as {_DEFAULT_PATCHES} patches",
    )


def _renamed(tensors: Mapping[str, Tensor], config: MegaByteConfig) -> dict[str, Tensor]:
    """Tensors of [2] under their names here, q, k and v as one."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        for theirs, ours in _OUTSIDE.items():
            if key.startswith(theirs):
                found[ours + key.removeprefix(theirs)] = tensor
    for model, (stage, layers) in {"coarse": (0, config.layers), "local": (1, config.local_layers)}.items():
        for i in range(layers):
            lead, name = f"transformers.{stage}.layers.{i}.", f"{model}.blocks.{i}."
            for key, tensor in tensors.items():
                for theirs, ours in _INSIDE.items():
                    if key.startswith(lead + theirs):
                        found[name + ours + key.removeprefix(lead + theirs)] = tensor
            parts = [tensors[f"{lead}0.{part}.weight"] for part in ("to_q", "to_kv")]
            found[name + "qkv_proj.weight"] = torch.cat(parts)
    return found


def _tiny(**changes: object) -> MegaByteConfig:
    """A size for tests: an odd patch, two layers of each."""
    sizes: dict[str, object] = {
        "vocab_size": 29,
        "patch": 3,
        "patches": 32,
        "width": 24,
        "layers": 2,
        "heads": 2,
        "local_width": 16,
        "local_layers": 2,
        "local_heads": 2,
        "ffn_factor": 2,
    }
    return MegaByteConfig(**(sizes | changes))  # type: ignore[arg-type]


FAMILY = Family(
    name="megabyte",
    title="MegaByte: a global model over patches, a local one inside (arXiv 2305.07185)",
    sources=("https://arxiv.org/abs/2305.07185", "https://github.com/lucidrains/MEGABYTE-pytorch"),
    config=MegaByteConfig,
    presets={
        "tiny": _tiny(),
        "tiny-lucidrains": _tiny(style="lucidrains", shift=True, rotary=False, patch=4),
        "tiny-one": _tiny(patch=1, patches=96, shift=True),
        "zoo": MegaByteConfig(),
        # the example of [2]
        "lucidrains": MegaByteConfig(
            16000, 4, 1024, 512, 6, 8, 256, 4, 8, 64, style="lucidrains", shift=True, rotary=False, eps=1e-16
        ),
        # about the sizes of [1]'s larger language models (P = 8, 8192 bytes, 0.76 + 0.26 billion); the layers
        # are chosen to reach them
        "1b": MegaByteConfig(256, 8, 1024, 2048, 15, 16, 1024, 21, 16),
    },
    build=MegaByte,
    load=_load,
    layout=_layout,
    reads=f"MEGABYTE-pytorch's key {_KNOWN}",
    train_form=MegaByteTrain,
    from_training=_from_training,
    init=_init,
    roles=(
        ("*embed.weight", "embedding"),
        ("patch_places.weight", "embedding"),
        ("head.*", "head"),
        ("*norm.*", "norm"),
        ("*bias", "norm"),
        ("*_proj.weight", "projection"),
        ("*.fc?.weight", "projection"),
        ("*", "other"),
    ),
    state_note="keys and values of every patch up to the bound, and of one patch's bytes",
)
