"""State along the stream: which bytes are there from the first token, and which come with every token."""

from __future__ import annotations

import math
from typing import NamedTuple

from xexport.core.manifest import Manifest, StateTensor

__all__ = ["StateGrowth", "overtakes", "state_growth"]

_ITEM_BYTES = {"float16": 2, "float32": 4, "int64": 8, "int32": 4, "int8": 1, "bool": 1}


class StateGrowth(NamedTuple):
    """Bytes of one stream's state as a function of its length.

    Attributes:
        fixed: bytes in use before the first token.
        per_token: bytes that every token adds, until ``bound`` tokens.
        bound: the longest stream, or None.
        allocated: bytes set aside from the beginning (a graph's caches have their full size at once).
    """

    fixed: int
    per_token: float
    bound: int | None
    allocated: int

    def at(self, position: int) -> float:
        """Bytes in use after ``position`` tokens."""
        return self.fixed + self.per_token * min(position, self.bound or position)

    @property
    def grows(self) -> bool:
        return self.per_token > 0


def state_growth(manifest: Manifest) -> StateGrowth:
    """What the manifest says of the state: a tensor that is only appended to fills up with the stream."""
    fixed, per_token, allocated = 0, 0.0, 0
    bound = manifest.model.max_tokens
    for tensor in manifest.state:
        size = _bytes(tensor)
        axis = _stream_axis(tensor, bound)
        allocated += size
        if axis is None:
            fixed += size
        else:
            length = tensor.shape[axis]
            per_token += size / int(length) if isinstance(length, int) else 0.0
    return StateGrowth(fixed, per_token, bound, allocated)


def overtakes(growing: StateGrowth, flat: StateGrowth) -> int | None:
    """The first position at which the growing state is the larger one; None if its bound comes first."""
    if not growing.grows:
        return None
    place = max(0, math.floor((flat.allocated - growing.fixed) / growing.per_token) + 1)
    return place if growing.bound is None or place <= growing.bound else None


def _bytes(tensor: StateTensor) -> int:
    count = _ITEM_BYTES.get(tensor.dtype, 4)
    for dim in tensor.shape:
        count *= dim if isinstance(dim, int) else 1
    return count


def _stream_axis(tensor: StateTensor, bound: int | None) -> int | None:
    """The axis along which the stream lies, None for a tensor that is rewritten at every token."""
    if tensor.appended is not None and not tensor.appended.rings:
        return tensor.appended.axis
    return next((i for i, dim in enumerate(tensor.shape) if bound is not None and dim == bound), None)
