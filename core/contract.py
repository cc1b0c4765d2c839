"""What a model takes and how it may be called: the one place that knows about forms and kinds of input.

Two forms. ``chunk``: causal, any cut of a sequence gives the same result, a state is carried from call to
call. ``whole``: not causal; one call is one whole sequence and nothing is carried. Two kinds of input:
token ids [B,T] int64, or features [B,T,F] float32 (frames of audio, for example).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from xexport.core.errors import FormError, InputError

__all__ = ["CHUNKS_OF_TOKENS", "FORMS", "TOKENS", "Contract", "InputSpec", "contract_of"]

FORMS = ("chunk", "whole")


class _Kind(NamedTuple):
    """What sets one kind of input apart.

    ``window`` is how much of a text or recording one whole sequence of an evaluation is;
    ``random(rng, shape, vocab)`` makes an input for a check.
    """

    dtype: str
    unit: str
    window: int
    random: Callable[[Any, tuple[int, ...], int], Any]


def _ids(rng: Any, shape: tuple[int, ...], vocab: int) -> Any:
    return rng.integers(0, vocab, shape, dtype="int64")


def _frames(rng: Any, shape: tuple[int, ...], vocab: int) -> Any:
    return rng.standard_normal(shape, "float32")


_KINDS = {"tokens": _Kind("int64", "token", 256, _ids), "features": _Kind("float32", "frame", 1024, _frames)}


@dataclass(frozen=True)
class InputSpec:
    """The model's one input besides its state.

    Attributes:
        kind: ``tokens`` (ids, [B,T] int64) or ``features`` ([B,T,F] float32).
        name: the graph's input.
        width: F; 0 for tokens.
        multiple: T must be a multiple of it. A model that takes 4 frames to a position of its output
            has 4; in the chunk form its logits have T/4 positions.
        stride: if a call must be longer than what makes one position (it takes chunks of several):
            frames to a position; 0 is ``multiple``.
        least: the smallest T of the whole form; in the chunk form that is ``multiple``.
        typical: mean and deviation of features, for checks on random ones.
    """

    kind: str = "tokens"
    name: str = "tokens"
    width: int = 0
    multiple: int = 1
    least: int = 1
    stride: int = 0
    typical: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise InputError("unknown kind of input", got=self.kind, allowed=", ".join(_KINDS))
        if (self.width > 0) != (self.kind == "features"):
            raise InputError(
                f"an input of {self.kind} with a bad width",
                got=self.width,
                allowed="1 or more for features, 0 for tokens",
            )
        if self.stride and self.multiple % self.stride:
            raise InputError(
                "a call is not whole positions", got=self, allowed="multiple a multiple of stride"
            )
        if self.multiple < 1 or self.least < 1 or self.stride < 0 or not self.name:
            raise InputError(
                "an impossible input", got=self, allowed="multiple and least of 1 or more, a name"
            )

    @property
    def dtype(self) -> str:
        """numpy's name of the element type."""
        return _KINDS[self.kind].dtype

    @property
    def unit(self) -> str:
        """What one of the T is called: token or frame."""
        return _KINDS[self.kind].unit

    @property
    def window(self) -> int:
        """How much of a text or recording one whole sequence of an evaluation is."""
        return _KINDS[self.kind].window

    def shape(self, batch: int, length: int) -> tuple[int, ...]:
        """[B,T], or [B,T,F]."""
        return (batch, length, self.width) if self.width else (batch, length)

    def random(self, rng: Any, batch: int, length: int, vocab: int) -> Any:
        """Ids below ``vocab``, or normal features as large as :attr:`typical`, from a numpy generator."""
        drawn = _KINDS[self.kind].random(rng, self.shape(batch, length), vocab)
        return drawn if self.kind == "tokens" else self.scaled(drawn)

    def scaled(self, noise: Any) -> Any:
        """Features of mean 0 and variance 1 made as large as :attr:`typical`, float32."""
        mean, deviation = self.typical
        return (noise * deviation + mean).astype(self.dtype)


TOKENS = InputSpec()


@dataclass(frozen=True)
class Contract:
    """How a model may be called.

    Attributes:
        form: ``chunk`` or ``whole``.
        inputs: what it reads.
        fixed_length: T is exactly this (whole form only), or None.
        max_tokens: the longest stream (chunk form) or sequence (whole form), or None.
        predicts_next: it was made to predict the next token: bits per byte are meaningful.
    """

    form: str = "chunk"
    inputs: InputSpec = TOKENS
    fixed_length: int | None = None
    max_tokens: int | None = None
    predicts_next: bool = True

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise InputError("unknown form", got=self.form, allowed=", ".join(FORMS))
        if self.streams and self.inputs.least > self.inputs.multiple:
            raise InputError(
                "the chunk form takes every multiple of its unit",
                got=f"at least {self.inputs.least}",
                allowed=f"at least {self.inputs.multiple}",
                fix="carry what it needs of earlier input in the state",
            )
        if self.fixed_length is not None and (self.form != "whole" or not self.allows(self.fixed_length)):
            raise InputError(
                "a bad fixed length",
                got=f"{self.fixed_length} in the {self.form} form",
                allowed="in the whole form, a length that the input may have",
            )

    @property
    def streams(self) -> bool:
        """Whether a state is carried from call to call."""
        return self.form == "chunk"

    @property
    def generates(self) -> bool:
        """Whether what it predicts can be fed back to it."""
        return self.streams and self.inputs.kind == "tokens"

    def allows(self, length: int) -> bool:
        """Whether one call may have this T."""
        spec = self.inputs
        if self.fixed_length is not None and length != self.fixed_length:
            return False
        within = self.max_tokens is None or length <= self.max_tokens
        return within and length >= spec.least and length % spec.multiple == 0

    def nearest(self, length: int) -> int:
        """The shortest allowed T of at least ``length``; the longest there is if that is too long."""
        if self.fixed_length is not None:
            return self.fixed_length
        unit = self.inputs.multiple
        found = math.ceil(max(length, self.inputs.least) / unit) * unit
        return found if self.max_tokens is None else min(found, self.max_tokens // unit * unit)

    def lengths(self, wanted: Iterable[int]) -> tuple[int, ...]:
        """The nearest allowed lengths, each once, in their order."""
        return tuple(dict.fromkeys(self.nearest(n) for n in wanted))

    def prepared(self, wanted: Iterable[int]) -> tuple[int, ...]:
        """The lengths of single calls that a runtime of fixed shapes prepares, largest first.

        The smallest call there is is always among them, so any input can be fed in such pieces.
        """
        if self.fixed_length is not None:
            return (self.fixed_length,)
        unit = self.inputs.multiple
        fitting = (
            n - n % unit for n in wanted if n >= unit and (self.max_tokens is None or n <= self.max_tokens)
        )
        return tuple(sorted({unit, *fitting}, reverse=True))

    def positions(self, length: int) -> int:
        """Of how many positions the logits of ``length`` inputs are (chunk form)."""
        return length // (self.inputs.stride or self.inputs.multiple)

    def batched(self, values: Any, batch: int) -> Any:
        """``[n]`` ids or ``[n,F]`` features, or those with a batch axis already, for ``batch`` sequences."""
        import numpy as np

        array = np.asarray(values, dtype=self.inputs.dtype)
        if array.ndim < len(self.inputs.shape(1, 1)):
            array = array[None]
        return np.broadcast_to(array, (batch, *array.shape[1:]))

    def require_state(self, what: str) -> None:
        """Refuse something that needs a state to be carried.

        Args:
            what: "save its state", for example.

        Raises:
            FormError: the model has the whole-sequence form only.
        """
        if not self.streams:
            raise FormError(
                f"this model can't {what}",
                got="the whole-sequence form only: every output depends on the whole input, and nothing is "
                "carried from call to call",
                fix="feed whole sequences: every stream.feed(...) is one, and returns all its logits",
            )

    def require_generation(self) -> None:
        """Refuse generation to a model that can't go on from its own output.

        Raises:
            FormError: it has the whole-sequence form only, or doesn't read tokens.
        """
        self.require_state("generate")
        if not self.generates:
            raise FormError(
                "this model can't generate",
                got=f"it reads {self.inputs.kind}, not tokens: what it predicts can't be fed back",
                fix=f"feed it [B,T,{self.inputs.width}] float32: stream.feed(...) returns the logits",
            )


CHUNKS_OF_TOKENS = Contract()


def contract_of(module: Any, form: str = "chunk") -> Contract:
    """What an nn.Module says of itself: ``form``, ``input_spec``, ``fixed_length``, ``max_tokens``,
    ``predicts_next``, all optional.

    Args:
        form: for a module that doesn't say.

    Raises:
        InputError: an attribute that can't be right.
    """
    spec = getattr(module, "input_spec", None) or TOKENS
    if not isinstance(spec, InputSpec):
        raise InputError("input_spec must be an xexport.InputSpec", got=type(spec).__name__)
    form = getattr(module, "form", form)
    found = Contract(
        form,
        spec,
        getattr(module, "fixed_length", None),
        getattr(module, "max_tokens", None),
        bool(getattr(module, "predicts_next", form == "chunk" and spec.kind == "tokens")),
    )
    states = getattr(module, "state_spec", None)
    if not found.streams and callable(states) and states():
        raise InputError(
            "a module in the whole form has a state",
            got=f"{len(states())} state tensors",
            fix='return no state, or give it form = "chunk"',
        )
    return found
