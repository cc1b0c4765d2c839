"""What RWKV-4, 5 and 6 share: the token shift, initial values, and reading the published key layout.

Source: github BlinkDL/RWKV-LM, RWKV-v4neo/src/model.py and RWKV-v5/src/model.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from xexport.core.checkpoint import RawCheckpoint, match_tensors
from xexport.core.errors import CheckpointError

__all__ = [
    "ChannelMix",
    "count_layers",
    "matrix_init",
    "new_state",
    "parameter",
    "published_tensors",
    "ramp",
    "shifted",
]


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


def new_state(module: Any, batch: int) -> list[Tensor]:
    """The state before the first token as tensors beside the module's own weights."""
    weight: Tensor = module.emb.weight
    return [
        weight.new_full([batch if d == "B" else int(d) for d in s.shape], s.init) for s in module.state_spec()
    ]


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
