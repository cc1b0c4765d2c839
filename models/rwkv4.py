"""RWKV-4 "Dove": an average of past values with a learned decay per channel, in constant state.

Sources:
    [1] B. Peng et al., "RWKV: Reinventing RNNs for the Transformer Era", arXiv 2305.13048: section 3 (the
        block), equations 11 to 19, appendix on the recurrent form; table 2 and appendix (presets).
    [2] github BlinkDL/RWKV-LM, RWKV-v4neo/src/model.py: key layout, initial values.
    [3] PyPI rwkv 0.8.32, version 4: the inference rule; its first pp is -1e30.
    [4] Hugging Face transformers, models/rwkv: a second layout, with other names for the same tensors.

Symbols (B batch, T tokens, C width, A width of time mixing, V vocabulary):
    time_mix_*   how much of this token against the one before, [1,1,C]
    r, k, v      receptance, key, value                          [B,T,A]
    w            -exp(time_decay), the logarithm of the decay    [A]
    u            time_first, the bonus of the current token      [A]

State per layer: ``att_shift`` [B,C] and ``ffn_shift`` [B,C] (the last normed input of each half), and the
running average (ops/wkv4): ``aa`` and ``bb`` [B,A], numerator and denominator over e^pp, and ``pp`` [B,A],
the largest exponent so far, which starts at -1e30.

Departure: [4] halves the residual stream every 6 layers for fp16; in fp32 that changes nothing but the last
digits of the layer norms, so it is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xexport.core.checkpoint import RawCheckpoint, own_config, require_keys
from xexport.core.errors import CheckpointError
from xexport.core.family import Family, LoadedModel
from xexport.core.state import StateSpec
from xexport.models._chunk import FromFirstState
from xexport.models._rwkv import (
    ChannelMix,
    count_layers,
    matrix_init,
    parameter,
    published_tensors,
    ramp,
    shifted,
    tokens_of,
)
from xexport.ops.wkv4.reference import wkv4

__all__ = ["FAMILY", "Rwkv4", "Rwkv4Config", "Rwkv4Training"]

_STATES = ("att_shift", "aa", "bb", "pp", "ffn_shift")


@dataclass(frozen=True)
class Rwkv4Config:
    """Sizes of one RWKV-4 model.

    Attributes:
        layers, width, vocab_size: L, C, V.
        att_width: A, the width unless given.
        ffn_width: hidden width of channel mixing, 4 C unless given.
        norm_eps: of every layer norm.
    """

    layers: int
    width: int
    vocab_size: int = 50277
    att_width: int = 0
    ffn_width: int = 0
    norm_eps: float = 1e-5

    @property
    def attention(self) -> int:
        """A."""
        return self.att_width or self.width

    @property
    def hidden(self) -> int:
        """Hidden width of channel mixing."""
        return self.ffn_width or 4 * self.width


PRESETS = {
    "tiny": Rwkv4Config(2, 32, 61, 24, 72),
    "zoo": Rwkv4Config(6, 160, 256),
    "169m": Rwkv4Config(12, 768),
    "430m": Rwkv4Config(24, 1024),
    "1.5b": Rwkv4Config(24, 2048),
    "3b": Rwkv4Config(32, 2560),
    "7b": Rwkv4Config(32, 4096),
}


class _TimeMix(nn.Module):
    def __init__(self, config: Rwkv4Config) -> None:
        super().__init__()
        C, A = config.width, config.attention
        self.time_decay, self.time_first = parameter(A), parameter(A)
        self.time_mix_k, self.time_mix_v, self.time_mix_r = (parameter(1, 1, C) for _ in range(3))
        self.key = nn.Linear(C, A, bias=False)
        self.value = nn.Linear(C, A, bias=False)
        self.receptance = nn.Linear(C, A, bias=False)
        self.output = nn.Linear(A, C, bias=False)

    def forward(self, x: Tensor, last: Tensor, *average: Tensor) -> tuple[Tensor, ...]:
        """(x [B,T,C], last [B,C], aa, bb, pp [B,A]) -> (y, new last, new aa, bb, pp)."""
        before = shifted(x, last)
        step = x - before
        k = self.key(before + step * self.time_mix_k)
        v = self.value(before + step * self.time_mix_v)
        r = torch.sigmoid(self.receptance(before + step * self.time_mix_r))
        y, *new = wkv4(-torch.exp(self.time_decay), self.time_first, k, v, *average)
        return (self.output(r * y), x[:, -1], *new)


class _Block(nn.Module):
    def __init__(self, config: Rwkv4Config, layer: int) -> None:
        super().__init__()
        C, eps = config.width, config.norm_eps
        self.ln0 = nn.LayerNorm(C, eps) if layer == 0 else None
        self.ln1 = nn.LayerNorm(C, eps)
        self.ln2 = nn.LayerNorm(C, eps)
        self.att = _TimeMix(config)
        self.ffn = ChannelMix(C, config.hidden)


class Rwkv4(nn.Module):
    """RWKV-4 in the chunk form; parameter names are those of [2]."""

    max_tokens: int | None = None

    def __init__(self, config: Rwkv4Config) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.emb = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(_Block(config, i) for i in range(config.layers))
        self.ln_out = nn.LayerNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """(tokens [B,T] int64, state as :meth:`state_spec`) -> (logits [B,T,V], new state)."""
        x = self.emb(tokens)
        new: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            assert isinstance(block, _Block)
            *att, last = state[5 * index : 5 * index + 5]
            if block.ln0 is not None:
                x = block.ln0(x)
            y, *att = block.att(block.ln1(x), *att)
            x = x + y
            y, last = block.ffn(block.ln2(x), last)
            x = x + y
            new += [*att, last]
        return (self.head(self.ln_out(x)), *new)

    def state_spec(self) -> Sequence[StateSpec]:
        """Five tensors a layer, all float32; zero before the first token but for pp, which is -1e30."""
        C, A = self.config.width, self.config.attention
        return [
            StateSpec(
                f"layers.{i}.{name}", ("B", C if "shift" in name else A), init=-1e30 if name == "pp" else 0.0
            )
            for i in range(self.config.layers)
            for name in _STATES
        ]


class Rwkv4Training(FromFirstState, Rwkv4):
    """The same parameters, whole sequences from the first state."""


def _layout(raw: RawCheckpoint) -> str | None:
    if raw.config.get("model_type") == "rwkv":
        return "its config.json says rwkv, which is RWKV-4"
    t = raw.tensors
    if "blocks.0.att.time_mix_k" in t and "blocks.0.att.ln_x.weight" not in t:
        return "it has blocks.0.att.time_mix_k and no .ln_x, the RWKV-4 layout"
    return None


_HUGGING_FACE = (
    ("rwkv.embeddings.", "emb."),
    ("rwkv.", ""),
    (".pre_ln.", ".ln0."),
    (".attention.", ".att."),
    (".feed_forward.", ".ffn."),
    ("time_mix_key", "time_mix_k"),
    ("time_mix_value", "time_mix_v"),
    ("time_mix_receptance", "time_mix_r"),
)


def _published_name(name: str) -> str:
    """A name of [4] as [2] has it."""
    for theirs, published in _HUGGING_FACE:
        name = name.replace(theirs, published)
    return name


def _config_from_shapes(raw: RawCheckpoint, t: Mapping[str, Tensor]) -> Rwkv4Config:
    """All sizes of a checkpoint are in its shapes; only [4] says an eps."""
    if "blocks.0.att.ln_x.weight" in t:
        raise CheckpointError(
            "this is a later RWKV than version 4: it has a norm of the heads",
            got=f"{raw.path.name}, with blocks.0.att.ln_x.weight",
            fix="name rwkv5, rwkv6 or rwkv (version 7) as the model",
        )
    renamed = RawCheckpoint(raw.path, t, raw.metadata, raw.config)
    att = "blocks.0.att."
    require_keys(
        renamed, ("emb.weight", "head.weight", att + "key.weight", "blocks.0.ffn.key.weight"), "rwkv4"
    )
    vocab, width = t["emb.weight"].shape
    return Rwkv4Config(
        layers=count_layers(t),
        width=width,
        vocab_size=vocab,
        att_width=t[att + "key.weight"].shape[0],
        ffn_width=t["blocks.0.ffn.key.weight"].shape[0],
        norm_eps=float(raw.config.get("layer_norm_epsilon", 1e-5)),
    )


def _load(raw: RawCheckpoint) -> LoadedModel:
    """Read the layout of [2] (.pth or .safetensors), a folder of [4], or a file of our own training."""
    tensors, notes = dict(raw.tensors), []
    if raw.config.get("model_type") == "rwkv":
        tensors = {_published_name(name): value for name, value in tensors.items()}
        if "head.weight" not in tensors and "emb.weight" in tensors:
            tensors["head.weight"] = tensors["emb.weight"]
            notes.append("the head is tied to the embedding: both are written")
    config = own_config(raw, "rwkv4", Rwkv4Config) or _config_from_shapes(raw, tensors)
    with torch.device("meta"):
        wanted = Rwkv4(config)
    return LoadedModel(
        family="rwkv4",
        config=config,
        tensors=published_tensors(raw, tensors, wanted),
        tokenizer=tokens_of(config.vocab_size),
        source=str(raw.path),
        notes=tuple(notes),
    )


@torch.no_grad()
def _init(module: Rwkv4, seed: int) -> None:
    """The initial values of [2], deterministic in ``seed`` (matrices: models/_rwkv.py)."""
    generator = torch.Generator().manual_seed(seed)
    c = module.config
    channel = torch.arange(c.width) / c.width
    for name, p in module.named_parameters():
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else 0
        depth, height = layer / max(c.layers - 1, 1), 1 - layer / c.layers
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "time_decay":
            value = -5 + 8 * ramp(c.attention) ** (0.7 + 1.3 * depth)
        elif leaf == "time_first":
            value = torch.log(torch.tensor(0.3)) + 0.5 * ((torch.arange(c.attention) + 1) % 3 - 1)
        elif leaf == "time_mix_v":
            value = channel**height + 0.3 * depth
        elif leaf.startswith("time_mix"):
            value = channel ** (0.5 * height if leaf == "time_mix_r" and ".att." in name else height)
        elif p.dim() == 1:
            value = torch.full(p.shape, 0.0 if leaf == "bias" else 1.0)
        else:
            value = matrix_init(name, p.shape, generator)
        p.copy_(value.reshape(p.shape))


FAMILY = Family(
    name="rwkv4",
    title="RWKV-4 (Dove): decaying average per channel",
    sources=("arXiv 2305.13048", "github BlinkDL/RWKV-LM", "PyPI rwkv 0.8.32", "transformers models/rwkv"),
    config=Rwkv4Config,
    presets=PRESETS,
    build=Rwkv4,
    load=_load,
    layout=_layout,
    reads="BlinkDL's RWKV-4 keys blocks.0.att.time_mix_k without .ln_x, or model_type rwkv in config.json",
    train_form=Rwkv4Training,
    init=_init,
    roles=(
        ("emb.*", "embedding"),
        ("head.*", "head"),
        ("*.ln[0-2].*", "norm"),
        ("ln_out.*", "norm"),
        ("*.time_decay", "decay"),
        ("*.time_first", "gate"),
        ("*.time_mix_?", "gate"),
        ("*.att.*.weight", "projection"),
        ("*.ffn.*.weight", "projection"),
        ("*", "other"),
    ),
    state_note="constant: 5 vectors of width C a layer",
)
