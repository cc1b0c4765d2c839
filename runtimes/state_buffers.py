"""The memory that holds a stream's state: two buffers a tensor, or one where it is only appended to.

A run reads a tensor's present buffer and writes the other one; when it has succeeded they change places, so a
run that fails leaves the state as it was. A cache of the stream's past (``core.manifest.Appended``) whose
operator has a kernel that writes in place gets along with one buffer: the run writes behind the stream's
position only, and what a failed one left there is cleared. Where it overwrites older tokens, in a ring, the
rows in question (one or few for a token) are copied beforehand, and put back. That saves half its memory, and
a copy of it at every step.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from xexport.core.errors import BundleError
from xexport.core.manifest import Appended, StateTensor

__all__ = ["StateBuffers", "aligned", "check_appended"]

Array = npt.NDArray[Any]
_ALIGNMENT = 64


class StateBuffers:
    """All state tensors of one stream.

    Args:
        state: their names, shapes, dtypes and first values.
        batch: B.
        in_place: names of the tensors with one buffer; each must have ``appended``.

    Attributes:
        sets: name -> buffer, twice; a tensor updated in place has the same one in both.
        side: the set that holds the present state.
    """

    def __init__(self, state: Sequence[StateTensor], batch: int, in_place: Collection[str] = ()) -> None:
        self._state = tuple(state)
        self._in_place = frozenset(in_place)
        self._kept: list[tuple[Array, Array]] = []
        first = {s.name: aligned(_concrete(s.shape, batch), s.dtype) for s in self._state}
        second = {
            s.name: first[s.name] if s.name in self._in_place else aligned(_concrete(s.shape, batch), s.dtype)
            for s in self._state
        }
        self.sets = (first, second)
        #: how rows are overwritten (the same in many layers) -> the buffers, that axis first
        self._rings: dict[Appended, list[Array]] = {}
        for s in self._state:
            if s.name in self._in_place and s.appended is not None and s.appended.rings:
                rows = np.moveaxis(first[s.name], s.appended.axis, 0)
                self._rings.setdefault(s.appended, []).append(rows)
        self.side = 0
        self._written = not all(s.init == 0 for s in self._state)  # not by runs alone: all of it counts
        self.reset()

    @property
    def present(self) -> dict[str, Array]:
        """The buffers of the present state."""
        return self.sets[self.side]

    def protect(self, count: int) -> None:
        """A run of ``count`` tokens begins: keep what it overwrites in place."""
        self._kept.clear()
        for how, buffers in self._rings.items():
            end = int(self.present[how.position][0])
            rows = [row for ring in how.rings for row in ring.written(end, count)]
            for part in (buffer[row] for buffer in buffers for row in rows):
                self._kept.append((part, part.copy()))

    def commit(self) -> None:
        """A run succeeded: what it wrote is the present state."""
        self.side ^= 1

    def undo(self) -> None:
        """A run failed: what it may have written into the present state goes."""
        for part, old in self._kept:
            part[...] = old
        for s in self._state:
            if s.name in self._in_place and not (s.appended and s.appended.rings):
                self._part(s, slice(self._end(s), None))[...] = s.init

    def read(self) -> dict[str, Array]:
        """A copy of the present state."""
        return {name: buffer.copy() for name, buffer in self.present.items()}

    def write(self, tensors: Mapping[str, Array]) -> None:
        """Overwrite the present state."""
        for name, buffer in self.present.items():
            np.copyto(buffer, tensors[name], casting="no")
        self._written = True

    def reset(self) -> None:
        """First values. Of an appended tensor only what the stream has filled is touched."""
        ends = {
            s.name: self._end(s)
            for s in self._state
            if s.appended is not None and not s.appended.rings and not self._written
        }
        for s in self._state:
            self._part(s, slice(0, ends.get(s.name)))[...] = s.init
        self._written = False

    def _end(self, s: StateTensor) -> int:
        """The stream's position, behind which an appended tensor has its first values."""
        assert s.appended is not None
        return int(self.present[s.appended.position][0])

    def _part(self, s: StateTensor, part: slice) -> Array:
        """A part of the stream in an appended tensor; of any other tensor everything."""
        if s.appended is None:
            return self.present[s.name]
        view: Array = self.present[s.name][(slice(None),) * s.appended.axis + (part,)]
        return view


def check_appended(state: Sequence[StateTensor]) -> None:
    """Refuse a manifest whose appended tensors can't be cut at their position.

    Raises:
        BundleError: naming the tensor.
    """
    positions = {s.name for s in state if (s.dtype, s.shape) == ("int64", (1,))}
    for s in state:
        if s.appended is None:
            continue
        axis, position = s.appended.axis, s.appended.position
        if not 0 <= axis < len(s.shape) or s.shape[axis] == "B" or position not in positions:
            raise BundleError(
                f"the manifest's state {s.name!r} can't be appended to",
                got=f"axis {axis} of {list(s.shape)}, position {position!r}",
                fix="export the model again",
            )
        for ring in s.appended.rings:
            least = min(ring.first, ring.start, ring.until, ring.span - 1, ring.rate - 1)
            if least < 0 or ring.first + (ring.span - 1) // ring.rate >= int(s.shape[axis]):
                raise BundleError(
                    f"the manifest's state {s.name!r} has a ring that is not in it",
                    got=f"{ring} of {list(s.shape)}",
                    fix="export the model again",
                )


def aligned(shape: tuple[int, ...], dtype: str) -> Array:
    """Zeros whose memory begins at a cache line, as ONNX Runtime's own buffers do; not touched yet."""
    kind = np.dtype(dtype)
    count = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    raw = np.zeros(count + _ALIGNMENT, np.uint8)
    skip = -raw.ctypes.data % _ALIGNMENT
    return raw[skip : skip + count].view(kind).reshape(shape)


def _concrete(shape: Sequence[int | str], batch: int) -> tuple[int, ...]:
    return tuple(batch if d == "B" else int(d) for d in shape)
