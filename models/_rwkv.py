"""What RWKV-4, 5 and 6 share: the token shift, the frame of 5 and 6, initial values, the published layout.

Source: github BlinkDL/RWKV-LM, RWKV-v4neo/src/model.py and RWKV-v5/src/model.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xexport.core.checkpoint import RawCheckpoint, match_tensors
from xexport.core.errors import CheckpointError
from xexport.core.state import StateSpec
from xexport.models._chunk import layer_states

__all__ = [
    "ChannelMix",
    "HeadedRwkv",
    "HeadedTimeMix",
    "bonus_init",
    "count_layers",
    "decay_init",
    "matrix_init",
    "parameter",
    "published_tensors",
    "ramp",
    "shifted",
    "tokens_of",
]


def tokens_of(vocab_size: int) -> str | None:
    """What the ids of a published checkpoint stand for, as far as their number says: bytes, or RWKV World."""
    return {256: "bytes", 65536: "rwkv-world"}.get(vocab_size)


def parameter(*shape: int) -> nn.Parameter:
    """A parameter of zeros."""
    return nn.Parameter(torch.zeros(*shape))


def shifted(x: Tensor, last: Tensor) -> Tensor:
    """The input one token earlier: [B,T,C], with ``last`` [B,C] before the first."""
    # cut after joining: x[:, :-1] would make torch.export guard against T = 2
    return torch.cat((last.unsqueeze(1), x), 1)[:, :-1]


class ChannelMix(nn.Module):
    """The second half of a block of RWKV-4 and 5; ``time_mix_*`` 1 is the token itself, 0 the one before."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.time_mix_k, self.time_mix_r = parameter(1, 1, width), parameter(1, 1, width)
        self.key = nn.Linear(width, hidden, bias=False)
        self.receptance = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """(x [B,T,C], last [B,C]) -> (y, new last)."""
        before = shifted(x, last)
        step = x - before
        hidden = torch.relu(self.key(before + step * self.time_mix_k))
        r = torch.sigmoid(self.receptance(before + step * self.time_mix_r))
        return r * self.value(hidden * hidden), x[:, -1]


class HeadedTimeMix(nn.Module):
    """What the time mixing of RWKV-5 and 6 has alike: four projections, and a norm of every head.

    Group norm is a layer norm over the axis of N followed by the affine map of ``ln_x``, which is the same
    number and one kernel in ONNX Runtime.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        C, A = config.width, config.attention
        self.heads, self.head_size, self.eps = config.heads, config.head_size, config.group_norm_eps
        self.receptance = nn.Linear(C, A, bias=False)
        self.key = nn.Linear(C, A, bias=False)
        self.value = nn.Linear(C, A, bias=False)
        self.output = nn.Linear(A, C, bias=False)
        self.ln_x = nn.GroupNorm(config.heads, A, config.group_norm_eps)

    def split(self, x: Tensor) -> Tensor:
        """[B,T,A] -> [B,T,H,N]."""
        return torch.unflatten(x, -1, (self.heads, self.head_size))

    def joined(self, y: Tensor) -> Tensor:
        """The heads [B,T,H,N], each normed -> [B,T,A]."""
        y = F.layer_norm(y, (self.head_size,), eps=self.eps)
        return y.flatten(-2) * self.ln_x.weight + self.ln_x.bias


class _Block(nn.Module):
    def __init__(self, width: int, layer: int, att: nn.Module, ffn: nn.Module) -> None:
        super().__init__()
        self.ln0 = nn.LayerNorm(width) if layer == 0 else None
        self.ln1 = nn.LayerNorm(width)
        self.ln2 = nn.LayerNorm(width)
        self.att, self.ffn = att, ffn


class HeadedRwkv(nn.Module):
    """RWKV-5 or 6 in the chunk form; parameter names are the published ones.

    Args:
        config: layers, width, vocab_size, attention (A), heads, head_size, hidden.
        att, ffn: config -> the halves of a block: (x, shift, wkv) -> (y, shift, wkv) and
            (x, shift) -> (y, shift).
    """

    max_tokens: int | None = None

    def __init__(self, config: Any, att: Callable[[Any], nn.Module], ffn: Callable[[Any], nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.vocab_size: int = config.vocab_size
        self.emb = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(
            _Block(config.width, i, att(config), ffn(config)) for i in range(config.layers)
        )
        self.ln_out = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, *state: Tensor) -> Any:
        """(tokens [B,T] int64, state as :meth:`state_spec`) -> (logits [B,T,V], new state)."""
        x = self.emb(tokens)
        new: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            assert isinstance(block, _Block)
            att_shift, wkv, ffn_shift = state[3 * index : 3 * index + 3]
            if block.ln0 is not None:
                x = block.ln0(x)
            y, att_shift, wkv = block.att(block.ln1(x), att_shift, wkv)
            x = x + y
            y, ffn_shift = block.ffn(block.ln2(x), ffn_shift)
            x = x + y
            new += [att_shift, wkv, ffn_shift]
        return (self.head(self.ln_out(x)), *new)

    def state_spec(self) -> Sequence[StateSpec]:
        """Three tensors a layer, all float32, all zero before the first token; ``wkv`` is read S[k,v]."""
        C, H, N = self.config.width, self.config.heads, self.config.head_size
        shapes: dict[str, tuple[int | str, ...]] = {
            "att_shift": ("B", C),
            "wkv": ("B", H, N, N),
            "ffn_shift": ("B", C),
        }
        return layer_states(self.config.layers, shapes)


def count_layers(names: Iterable[str]) -> int:
    """One more than the largest ``blocks.<number>.`` among the names."""
    return 1 + max((int(m[1]) for name in names if (m := re.match(r"blocks\.(\d+)\.", name))), default=-1)


def published_tensors(raw: RawCheckpoint, tensors: dict[str, Tensor], wanted: nn.Module) -> dict[str, Tensor]:
    """The tensors of ``wanted``; one that it has no place for is an error.

    The published code has options (a small attention, positions, a copying head, tuned first states) that
    show only in further tensors: leaving them out would give another model without a word.

    Raises:
        CheckpointError: a tensor is missing, has a wrong shape, or has no place.
    """
    found = match_tensors(tensors, wanted, raw.path.name)
    unread = sorted(set(tensors) - set(found))
    if unread:
        raise CheckpointError(
            f"{len(unread)} tensors of the checkpoint have no place in this model",
            got=f"{raw.path.name}, with {', '.join(unread[:4])}",
            allowed="the published layout without optional parts",
            fix="if they are not needed, save the file without them",
        )
    return found


def ramp(size: int) -> Tensor:
    """0 to 1 over ``size`` channels, both ends included."""
    return torch.arange(size) / max(size - 1, 1)


def decay_init(size: int, depth: float) -> Tensor:
    """``time_decay`` of RWKV-5 and 6, for a layer at ``depth`` (0 the first, 1 the last)."""
    return -6 + 5 * ramp(size) ** (0.7 + 1.3 * depth)


def bonus_init(size: int, depth: float) -> Tensor:
    """``time_faaaa`` of RWKV-5 and 6."""
    return depth * (1 - ramp(size)) + 0.1 * ((torch.arange(size) + 1) % 3 - 1)


def matrix_init(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Orthogonal as in the sources, with their gains.

    Where they start at zero (key, receptance, output of time mixing, the way out of channel mixing) the
    gain is small instead, so that a random-weights export exercises every path. Large matrices are normal
    of the same row norm: a QR of a large head takes a minute.
    """
    value = torch.empty(shape)
    if name == "emb.weight":
        return value.uniform_(-1e-2, 1e-2, generator=generator)
    zero = (".att.key.", ".att.receptance.", ".att.output.", ".ffn.value.", ".ffn.receptance.")
    gain = 0.5 if name == "head.weight" else 0.2 if any(part in name for part in zero) else 1.0
    gain *= max(1.0, (shape[0] / shape[1]) ** 0.5)
    if value.numel() < 1 << 22:
        nn.init.orthogonal_(value, gain=gain, generator=generator)
        return value
    return value.normal_(0, gain / max(shape) ** 0.5, generator=generator)
