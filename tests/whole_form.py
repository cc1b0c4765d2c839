"""Small modules of both forms and kinds of input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xexport.core.contract import InputSpec
from xexport.core.state import StateSpec

__all__ = ["ChunksOfFrames", "Encoder", "WholeFrames", "sizes"]

VOCAB, WIDTH, FRAME = 29, 24, 20


class Encoder(nn.Module):
    """One layer of attention in both directions; with a length, a mixing matrix of that size before it."""

    form = "whole"
    vocab_size = VOCAB

    def __init__(self, length: int | None = None, vocab: int = VOCAB) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fixed_length, self.vocab_size = length, vocab
        self.mix = nn.Parameter(torch.randn(length, length) * length**-0.5) if length else None
        self.embed = nn.Embedding(vocab, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocab)

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        x = self.embed(tokens)
        if self.mix is not None:
            x = x + self.mix @ self.norm(x)
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = torch.softmax(q @ k.transpose(1, 2) * WIDTH**-0.5, -1)
        return (self.head(self.norm(x + weights @ v)),)


class WholeFrames(nn.Module):
    """Two strided convolutions over features and the mean over time: fewer positions than frames."""

    form = "whole"
    vocab_size = 11
    input_spec = InputSpec("features", "features", FRAME, least=7)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv1d(FRAME, WIDTH, 3, 2)
        self.second = nn.Conv1d(WIDTH, WIDTH, 3, 2)
        self.head = nn.Linear(WIDTH, 11)

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        x = F.relu(self.second(F.relu(self.first(features.transpose(1, 2))))).transpose(1, 2)
        return (self.head(x + x.mean(1, keepdim=True)),)


class ChunksOfFrames(nn.Module):
    """Four frames make a position; a causal convolution over positions, its past in the state."""

    vocab_size = 11
    input_spec = InputSpec("features", "features", FRAME, multiple=4)

    def __init__(self, most: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.max_tokens = most
        self.join = nn.Linear(4 * FRAME, WIDTH)
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3)
        self.head = nn.Linear(WIDTH, 11)

    def state_spec(self) -> Sequence[StateSpec]:
        return [StateSpec("last", ("B", 2, WIDTH))]

    def forward(self, features: Tensor, last: Tensor) -> tuple[Tensor, ...]:
        x = torch.cat((last, self.join(torch.unflatten(features, 1, (-1, 4)).flatten(2))), 1)
        return self.head(F.silu(self.mix(x.transpose(1, 2)).transpose(1, 2))), x[:, -2:]


def sizes(timed: bool = False) -> Any:
    """Measurements that take a second."""
    from xexport.evaluate.suite import Sizes

    return Sizes(256, 256, chunk_tokens=24, steps=10, prefill=(16,), positions=(), timed=timed)
