"""Conformer: convolution and relative attention on log-mel frames of speech, CTC head (arXiv 2005.08100)

Sources:
    [1] A. Gulati et al., "Conformer: Convolution-augmented Transformer for Speech Recognition",
        arXiv 2005.08100: section 2 (the block), table 1 (sizes).
    [2] Z. Dai et al., "Transformer-XL", arXiv 1901.02860, section 3.3: attention with relative positions.
    [3] A. Graves et al., "Connectionist Temporal Classification", 2006: what the logits are for.
    [4] Hugging Face transformers, models/wav2vec2_conformer: what its blocks compute (compared in tests).

Symbols (B batch, T frames of 10 ms, n = T/4 positions of 40 ms, d width, H heads, K = d/H, F mel bins,
C channels of the subsampling, L frames of left context, V vocabulary):
    R          sinusoids of a distance, W_r projects them      [D,d]
    u, v       the two biases of the queries                   [H,1,K]

Two forms of the same weights. Whole: every frame attends to all, the depthwise convolutions are centred; as
[1]. Streaming (``streaming=True``): time is cut into chunks of ``chunk`` positions; a position attends to
its own chunk and the ``left`` positions before it, and the convolutions look back only. T is a multiple of
4 ``chunk``, so every call begins with a chunk, and any such cut gives the same logits: at chunk 1 every
multiple of 4 frames may be a call.

State of the streaming form, of constant size: ``subsample.1`` [B,1,1,F] and ``subsample.2`` [B,C,1,F/2], the
last rows before each of its convolutions; per layer ``k`` and ``v`` [B,L,d] and ``conv`` [B,kernel-1,d];
``position`` [1] int64, positions so far (which rows of k and v are in use).

What is constant is folded: batch norms into their convolutions and, in the streaming form, W_r R of the
distances that occur into one table a layer.

Departures from [1]: the head is CTC over the encoder (there a transducer's decoder of one LSTM), there is no
dropout, and an even kernel is centred with the extra tap on the left. The mean and deviation of every mel bin
belong to the model (``mean``, ``deviation``), so it reads features as runtimes/logmel.py makes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from xexport.core.checkpoint import RawCheckpoint
from xexport.core.contract import InputSpec
from xexport.core.errors import InputError
from xexport.core.family import Family, LoadedModel
from xexport.core.state import StateSpec
from xexport.models._chunk import layer_states
from xexport.models._conformer import Block, Places, Subsampling, position_table, projected_table
from xexport.models._fill import fill_by_training
from xexport.models._own import load_own

__all__ = ["FAMILY", "Conformer", "ConformerConfig", "ConformerTraining", "StreamingConformer"]


#: of five clips of LibriVox speech by runtimes/logmel.py: the mean and deviation of all their bins
_MEAN, _DEVIATION = 14.6, 3.6


@dataclass(frozen=True)
class ConformerConfig:
    """Sizes of one Conformer.

    Attributes:
        layers, width, heads: of the encoder; width is an even multiple of heads.
        vocab_size, blank: V, and the id that stands for "no new letter".
        ffn_width: inner width of the feed-forward networks, 4 d unless given.
        kernel: taps of the depthwise convolutions.
        bins: F.
        sub_channels: C, d unless given.
        eps: of every norm.
        streaming: the form; the whole form does not use the next two.
        left: L.
        chunk: positions that see one another.
    """

    layers: int
    width: int
    heads: int = 4
    vocab_size: int = 29
    blank: int = 0
    ffn_width: int = 0
    kernel: int = 31
    bins: int = 80
    sub_channels: int = 0
    eps: float = 1e-5
    streaming: bool = False
    left: int = 64
    chunk: int = 1

    def __post_init__(self) -> None:
        small = min(self.layers, self.width, self.heads, self.bins, self.chunk, self.left)
        if small < 1 or min(self.vocab_size, self.kernel) < 2:
            raise InputError(
                "a size of the Conformer is too small",
                got=self,
                allowed="1 or more; for vocab_size and kernel 2 or more",
            )
        if self.width % (2 * self.heads):
            raise InputError(
                "the width is not an even multiple of the heads",
                got=f"width {self.width}, {self.heads} heads",
                allowed=f"a multiple of {2 * self.heads}",
            )
        if not 0 <= self.blank < self.vocab_size:
            raise InputError(
                "the blank is not in the vocabulary", got=self.blank, allowed=f"0..{self.vocab_size - 1}"
            )

    @property
    def ffn(self) -> int:
        """Inner width of the feed-forward networks."""
        return self.ffn_width or 4 * self.width

    @property
    def channels(self) -> int:
        """C."""
        return self.sub_channels or self.width

    @property
    def distances(self) -> int:
        """D of the streaming form: from left + chunk - 1 down to 1 - chunk."""
        return self.left + 2 * self.chunk - 1


class _Encoder(nn.Module):
    """The parameters of either form; ``trained`` as in :class:`Block`."""

    def __init__(self, config: ConformerConfig, trained: bool = False) -> None:
        super().__init__()
        c = self.config = config
        self.vocab_size = c.vocab_size
        multiple = 4 * (c.chunk if c.streaming else 1)
        self.input_spec = InputSpec(
            "features", "log_mel", c.bins, multiple, stride=4, typical=(_MEAN, _DEVIATION)
        )
        self.max_tokens: int | None = None
        self.predicts_next = False
        self.register_buffer("mean", torch.zeros(c.bins))
        self.register_buffer("deviation", torch.ones(c.bins))
        self.subsample = Subsampling(c.bins, c.channels, c.width)
        self.blocks = nn.ModuleList(Block(c, trained) for _ in range(c.layers))
        self.head = nn.Linear(c.width, c.vocab_size)

    def first(self, batch: int) -> list[Tensor]:
        """Zeros before the first frame: rows of the subsampling's convolutions, and a depthwise one's."""
        c, like = self.config, self.head.weight
        before = ((1, 1, c.bins), (c.channels, 1, (c.bins + 1) // 2), (c.kernel - 1, c.width))
        return [like.new_zeros(batch, *shape) for shape in before]

    def normalised(self, features: Tensor) -> Tensor:
        """Log-mel frames with mean 0 and deviation 1 in every bin."""
        mean, deviation = self.get_buffer("mean"), self.get_buffer("deviation")
        return (features - mean) / deviation

    def layers(self) -> list[Block]:
        """The blocks, typed."""
        return [b for b in self.blocks if isinstance(b, Block)]


class Conformer(_Encoder):
    """The whole form: ``forward(features [B,T,F]) -> (logits [B,T/4,V],)``, T a multiple of 4."""

    form = "whole"

    def forward(self, features: Tensor) -> tuple[Tensor]:
        """Log-mel frames float32 -> CTC logits, all from all."""
        row1, row2, last = self.first(features.shape[0])
        x, _, _ = self.subsample(self.normalised(features), row1, row2)
        ahead = x.shape[1] - 1
        places = Places(position_table(ahead, -ahead, self.config.width, x), ahead)
        for block in self.layers():
            x, _ = block(x, places, None, last)
        return (self.head(x),)


class StreamingConformer(_Encoder):
    """The streaming form, in the chunk form: T a multiple of 4 ``chunk``, logits [B,T/4,V]."""

    form = "chunk"

    def state_spec(self) -> list[StateSpec]:
        """Rows of the subsampling, three tensors a layer, the position; all zero before the first frame."""
        c = self.config
        before: tuple[int | str, ...] = ("B", c.left, c.width)
        layer = {"k": before, "v": before, "conv": ("B", c.kernel - 1, c.width)}
        return [
            StateSpec("subsample.1", ("B", 1, 1, c.bins)),
            StateSpec("subsample.2", ("B", c.channels, 1, (c.bins + 1) // 2)),
            *layer_states(c.layers, layer),
            StateSpec("position", (1,), "int64"),
        ]

    def forward(self, features: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """(log-mel frames [B,T,F] float32, state as :meth:`state_spec`) -> (logits [B,T/4,V], new state)."""
        row1, row2, *layers, position = state
        x, row1, row2 = self.subsample(self.normalised(features), row1, row2)
        places = self.places(x, position)
        after: list[Tensor] = []
        for i, block in enumerate(self.layers()):
            k, v, last = layers[3 * i : 3 * i + 3]
            x, new = block(x, places, (k, v), last)
            after += new
        return self.head(x), row1, row2, *after, position + x.shape[1]

    def places(self, x: Tensor, position: Tensor) -> Places:
        """The chunks of ``x [B,n,d]`` and who sees whom, after ``position`` [1] positions."""
        c = self.config
        here = torch.arange(x.shape[1], device=x.device)
        begin = (
            here // c.chunk * c.chunk
        )  # of the query's chunk; its left context begins in this row of the keys
        key = torch.arange(c.left + x.shape[1], device=x.device)
        far = torch.logical_or(key < begin[:, None], key >= begin[:, None] + (c.left + c.chunk))
        return Places(None, c.chunk - 1, torch.logical_or(far, key + position < c.left))


class ConformerTraining(_Encoder):
    """The training form of either: ``forward(features [B,T,F]) -> logits [B,T/4,V]``, differentiable.

    It has the batch norms and W_r; parameters do not depend on the form.
    """

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__(config, trained=True)

    def forward(self, features: Tensor) -> Tensor:
        """All frames at once, from the first state."""
        row1, row2, last = self.first(features.shape[0])
        x, _, _ = self.subsample(self.normalised(features), row1, row2)
        places = self._places(x)
        for block in self.layers():
            x, _ = block(x, places, None, last)
        logits: Tensor = self.head(x)
        return logits

    def _places(self, x: Tensor) -> Places:
        """As the form has them, all distances and no cache."""
        c, n = self.config, x.shape[1]
        table = position_table(n - 1, 1 - n, c.width, x)
        if not c.streaming:
            return Places(table, n - 1)
        here = torch.arange(n, device=x.device)
        begin = (here // c.chunk * c.chunk)[:, None]
        return Places(table, n - 1, (here < begin - c.left) | (here >= begin + c.chunk))


def _build(config: ConformerConfig) -> nn.Module:
    return StreamingConformer(config) if config.streaming else Conformer(config)


def _from_training(config: ConformerConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Batch norms folded into their convolutions and, to stream, W_r R into a table."""
    out = {k: v.detach() for k, v in tensors.items() if ".depthwise." not in k}
    for i in range(config.layers):
        conv, attention = f"blocks.{i}.conv.depthwise", f"blocks.{i}.attention"
        own = {k.removeprefix(f"{conv}."): v for k, v in tensors.items() if k.startswith(f"{conv}.")}
        weight, bias = _folded(own, config.eps)
        out |= {f"{conv}.weight": weight, f"{conv}.bias": bias}
        if config.streaming:
            W_r = out.pop(f"{attention}.pos_proj.weight")
            most = config.left + config.chunk - 1
            # in double precision: the error of float32's sines of large angles stays out of the table
            R = position_table(most, 1 - config.chunk, config.width, W_r.new_empty(0, dtype=torch.float64))
            table = projected_table(W_r.double(), R, config.heads)
            out[f"{attention}.positions"] = table.to(W_r.dtype).contiguous()
    return out


def _folded(own: Mapping[str, Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """Weight ``[kernel,d]`` and bias ``[d]`` of a depthwise convolution followed by its batch norm."""
    gain = own["norm.weight"] * torch.rsqrt(own["norm.running_var"] + eps)
    weight = (own["conv.weight"][:, 0] * gain[:, None]).t().contiguous()
    return weight.detach(), (own["norm.bias"] + (own["conv.bias"] - own["norm.running_mean"]) * gain).detach()


def _load(raw: RawCheckpoint) -> LoadedModel:
    """A file of xexport's own training."""
    return load_own(FAMILY, raw, title="a Conformer")


@torch.no_grad()
def _init(module: nn.Module, seed: int) -> None:
    """Fill either form, or the training form: PyTorch's default bounds, branches smaller by the depth."""
    assert isinstance(module, _Encoder)
    if not isinstance(module, ConformerTraining):
        return fill_by_training(FAMILY, module, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        value = torch.empty(p.shape)
        if p.dim() == 1 or name.endswith((".u", ".v")):
            value.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        else:
            bound = (3 / p[0].numel()) ** 0.5 * (
                0.5 if name.endswith(("down.weight", "o_proj.weight")) else 1.0
            )
            value.uniform_(-bound, bound, generator=generator)
        p.copy_(value)
    module.get_buffer("mean").fill_(_MEAN)
    module.get_buffer("deviation").fill_(_DEVIATION)


def _streaming(config: ConformerConfig, left: int = 64, chunk: int = 4) -> ConformerConfig:
    return replace(config, streaming=True, left=left, chunk=chunk)


_TINY = ConformerConfig(2, 32, heads=2, ffn_width=64, kernel=7, sub_channels=4)
_ZOO = ConformerConfig(5, 128, sub_channels=32)
# [1], table 1
_S, _M, _L = (ConformerConfig(n, d, h, kernel=32) for n, d, h in ((16, 144, 4), (16, 256, 4), (17, 512, 8)))

PRESETS = {
    "tiny": _TINY,
    "tiny-streaming": _streaming(_TINY, left=5, chunk=1),
    "tiny-chunked": _streaming(replace(_TINY, kernel=6), left=4, chunk=3),
    "zoo": _ZOO,
    "zoo-streaming": _streaming(_ZOO, chunk=1),
    "s": _S,
    "s-streaming": _streaming(_S),
    "m": _M,
    "m-streaming": _streaming(_M),
    "l": _L,
    "l-streaming": _streaming(_L),
}

FAMILY = Family(
    name="conformer",
    title="Conformer: convolution and relative attention on speech, CTC head (arXiv 2005.08100)",
    sources=("https://arxiv.org/abs/2005.08100", "https://arxiv.org/abs/1901.02860"),
    config=ConformerConfig,
    presets=PRESETS,
    build=_build,
    load=_load,
    train_form=ConformerTraining,
    from_training=_from_training,
    init=_init,
    roles=(
        ("subsample.conv*", "conv"),
        ("*.depthwise.*", "conv"),
        ("head.*", "head"),
        ("*norm.*", "norm"),
        ("mean", "norm"),
        ("deviation", "norm"),
        ("*_proj.weight", "projection"),
        ("*.up.weight", "projection"),
        ("*.down.weight", "projection"),
        ("subsample.out.weight", "projection"),
        ("*", "other"),
    ),
    state_note="streaming presets: keys and values of a bounded left context, last rows of the convolutions",
)
