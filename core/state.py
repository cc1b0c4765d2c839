"""The recurrent state of a model in the chunk form: named, shaped, typed, with its first value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from xexport.core.errors import InputError

__all__ = ["StateSpec", "check_state_specs", "state_shape", "zero_state"]

_DTYPES = ("float32", "float16", "int64")


@dataclass(frozen=True)
class StateSpec:
    """One state tensor.

    Attributes:
        name: unique, dotted, stable across exports, for example ``layers.3.wkv``.
        shape: dimensions; the string ``"B"`` stands for the batch size, every other entry is fixed.
        dtype: ``float32``, ``float16`` or ``int64``.
        init: the value every element has before the first token.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"
    init: float = 0.0

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise InputError(f"state {self.name!r} has an unknown dtype", got=self.dtype, allowed=_DTYPES)
        for dim in self.shape:
            if dim != "B" and not (isinstance(dim, int) and dim > 0):
                raise InputError(
                    f"state {self.name!r} has a bad dimension",
                    got=dim,
                    allowed='a positive integer, or "B" for the batch',
                )


def state_shape(spec: StateSpec, batch: int) -> tuple[int, ...]:
    """The concrete shape of one state tensor at a batch size."""
    return tuple(batch if d == "B" else int(d) for d in spec.shape)


def zero_state(specs: Iterable[StateSpec], batch: int) -> list[Any]:
    """The state before the first token, as numpy arrays in the order of ``specs``."""
    import numpy as np

    return [np.full(state_shape(s, batch), s.init, dtype=s.dtype) for s in specs]


def check_state_specs(specs: Sequence[StateSpec], reserved: str = "tokens") -> None:
    """Refuse duplicate names, and names the graph itself needs: ``reserved`` (its input) and ``logits``.

    Raises:
        InputError: naming the offending state.
    """
    seen: set[str] = set()
    for spec in specs:
        if spec.name in seen or spec.name in (reserved, "logits"):
            raise InputError(f"state name {spec.name!r} is taken", fix="give every state tensor its own name")
        seen.add(spec.name)
