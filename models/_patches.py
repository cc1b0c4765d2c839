"""Sequences in patches: which rows of a coarse model a chunk makes, and attention inside of a patch.

Models with a coarse and a fine level (MegaByte, Block Transformer, Hourglass) meet chunks that begin and end
in the middle of patches. Everything here is arithmetic on the position, which is data: the same graph serves
every alignment. How many rows a chunk adds to the coarse level is data too, and often 0: tensors of the
coarse level then have no rows, and cost nothing.

Glossary:
    B batch, T tokens of the chunk, P patch size, N rows that a chunk adds to the coarse or the local model,
    H heads, K head size.

A *row* is an element of the coarse sequence. A local model reads a patch as *slots*: ``lead`` slots that come
from the coarse model or begin the patch, then its tokens. ``ahead`` says whether the logits after a patch's
last token are those of the next patch's lead (which then needs the next row), or of a slot of that token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from xexport.models._rotary import rope_angles, rotate
from xexport.models.transformer import fused_attention
from xexport.ops.cached_attention.reference import cached_attention

__all__ = ["Everything", "InPatch", "Place", "Slots", "Span", "count_of", "recent"]


def count_of(count: Tensor) -> int:
    """A number that is data (int64 ``[1]``, 0 or more) as the size of an axis, also while exporting."""
    number = count.item()
    torch._check(number >= 0)  # type: ignore[no-untyped-call]
    return number  # type: ignore[return-value]


def recent(before: Tensor, new: Tensor, index: Tensor) -> Tensor:
    """Elements of axis 1 of ``concat(before, new)``."""
    return torch.index_select(torch.cat((before, new), 1), 1, index)


@dataclass(frozen=True)
class Span:
    """Elements begin .. end-1 of a sequence, maybe none.

    Attributes:
        begin, end: int64 ``[1]``.
        index: int64 ``[N]``, begin .. end-1.
    """

    begin: Tensor
    end: Tensor
    index: Tensor

    @classmethod
    def between(cls, begin: Tensor, end: Tensor) -> Span:
        """The elements that a chunk adds."""
        return cls(begin, end, begin + torch.arange(count_of(end - begin), device=begin.device))

    @property
    def count(self) -> int:
        """N."""
        return self.index.shape[0]


@dataclass(frozen=True)
class Slots:
    """How the local model reads a patch.

    Attributes:
        patch: P; lead, ahead: see above.
    """

    patch: int
    lead: int
    ahead: bool

    @property
    def size(self) -> int:
        """Slots of a patch. The last token has none if its logits are found ahead."""
        return self.lead + self.patch - self.ahead

    def after(self, position: Tensor) -> Tensor:
        """How many slots ``position`` tokens fill; none before the first token."""
        if self.ahead:
            whole = position // self.patch * (self.size - self.patch) + position + self.lead
            return whole * (position > 0)
        return position + self.begun(position) * self.lead

    def begun(self, position: Tensor) -> Tensor:
        """How many patches the first ``position`` tokens have begun: ceil(position / P)."""
        return (position + (self.patch - 1)) // self.patch

    def rows(self, slots: Tensor) -> Tensor:
        """How many rows of the coarse model the first ``slots`` slots need."""
        return (slots + (self.size - 1)) // self.size


class Place(Protocol):
    """Where the rows of a chunk are, for the attention of all layers of one model."""

    def turned(self, x: Tensor) -> Tensor:
        """Queries or keys ``[B,N,H,K]`` rotated by their position, if the model rotates."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Softmax attention of ``[B,N,H,K]`` each, over these rows and those in the state: ``[B,N,H*K]``."""
        ...


class _Turning:
    """Rotates pairs (i, i+R/2) of the first R = 2 * len(turns) channels; without ``turns`` nothing."""

    def __init__(self, positions: Tensor, turns: Tensor | None, dtype: torch.dtype) -> None:
        self._width = 0 if turns is None else 2 * turns.shape[0]
        self._rope = None if turns is None else rope_angles(turns, positions, dtype)

    def turned(self, x: Tensor) -> Tensor:
        """See :class:`Place`."""
        if self._rope is None:
            return x
        if self._width == x.shape[-1]:
            return rotate(x, self._rope)
        return torch.cat((rotate(x[..., : self._width], self._rope), x[..., self._width :]), -1)


class Everything(_Turning):
    """A row sees itself and all rows before it.

    State: keys and values ``[B,H,L,K]``; row L+1 is a LimitError.

    Args:
        turns: frequencies of the rotation in units of 2^-32 turns a row, or None.
        whole: the chunk is all there is: PyTorch's own attention, which has a gradient; no state.
    """

    def __init__(self, span: Span, turns: Tensor | None, dtype: torch.dtype, whole: bool = False) -> None:
        super().__init__(span.index, turns, dtype)
        self._span, self._whole = span, whole

    def attend(self, q: Tensor, k: Tensor, v: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """See :class:`Place`."""
        if self._whole:
            return fused_attention(q, k, v, 0), list(state)
        heads, size = q.shape[-2:]
        q, k, v = (y.flatten(-2) for y in (q, k, v))
        o, *new = cached_attention(q, k, v, *state, self._span.begin, heads, heads, size**-0.5)
        return o, new


class InPatch(_Turning):
    """A row sees itself and the rows before it in its patch of ``size`` rows.

    State: keys and values ``[B,size,H*K]`` of the patch that the last row is in; the rows after it repeat it.

    The chunk is laid on the grid of its patches, whose first may begin in the state: small products, one a
    patch, whatever the chunk's length.
    """

    def __init__(self, span: Span, size: int, turns: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(span.index % size, turns, dtype)
        begin, last = span.begin, span.end - 1
        first = begin // size * size
        self._patches = count_of(last // size - begin // size + 1)
        grid = torch.arange(self._patches, device=begin.device)[:, None] * size
        place = (grid + torch.arange(size, device=begin.device)).flatten() + first
        row = torch.minimum(place, last) - begin
        self._size = size
        self._rows = row.clamp(min=0)
        self._filled = torch.where(place < begin, place - first, row + size)
        self._own = span.index - first
        self._last = torch.arange(size, device=begin.device) + (last // size * size - first)
        ones = torch.ones(size, size, dtype=torch.bool, device=begin.device)
        self._hidden = ones.triu(1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """See :class:`Place`."""
        heads, size = q.shape[-2:]
        rows = [recent(old, y.flatten(2), self._filled) for old, y in zip(state, (k, v), strict=True)]
        asked = torch.index_select(q.flatten(2), 1, self._rows) * size**-0.5
        gq, gk, gv = (self._grid(y, heads) for y in (asked, *rows))
        scores = (gq @ gk.transpose(-1, -2)).masked_fill(self._hidden, float("-inf"))
        o = (scores.softmax(-1) @ gv).transpose(2, 3).flatten(3).flatten(1, 2)
        return torch.index_select(o, 1, self._own), [torch.index_select(y, 1, self._last) for y in rows]

    def _grid(self, x: Tensor, heads: int) -> Tensor:
        """``[B,patches*size,H*K]`` -> ``[B,patches,H,size,K]``."""
        return x.view(x.shape[0], self._patches, self._size, heads, -1).transpose(2, 3)
