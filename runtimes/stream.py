"""A stream: tokens or features in, logits out, the state stays inside.

The chunk law makes every way of feeding the same text equal: at once, in chunks, token by token. A model in
the whole-sequence form has no state: there every call is one whole sequence.
A stream is fed by one thread at a time; many streams may share the weights of one bundle.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from xexport.core.contract import Contract
from xexport.core.errors import InputError, RuntimeFailure
from xexport.core.state import StateSpec, state_shape
from xexport.runtimes.inputs import check_limit, checker
from xexport.runtimes.saved import SavedState

if TYPE_CHECKING:
    from xexport.runtimes.engine import Cell
    from xexport.runtimes.generate import Generation
    from xexport.runtimes.tokenizers import Tokenizer

__all__ = ["SavedState", "Stream"]


class Stream:
    """A model with its state, as the protocol ``core.runner.Runner`` asks.

    Made by :meth:`Bundle.stream`; the arguments are for runtimes.

    Args:
        cell: holds and moves the state.
        specs: the state tensors.
        vocab_size: V.
        batch: B parallel sequences, all of the same length.
        contract: its form and input, with the longest stream the state can hold.
        fingerprint: names the graph and weights; a state of another fingerprint is refused.
        tokenizer: for :meth:`generate`.

    Attributes:
        vocab_size, batch, contract: as above.
        max_tokens: the longest stream (or whole sequence), or None.
        position: tokens fed since the last reset; stays 0 in the whole form.
        keeps: whether ``feed(..., keep=n)`` saves work.
        tokenizer: as above.
    """

    def __init__(
        self,
        cell: Cell,
        specs: Sequence[StateSpec],
        *,
        vocab_size: int,
        batch: int,
        contract: Contract,
        fingerprint: str,
        tokenizer: Tokenizer,
    ) -> None:
        self.contract = contract
        self.vocab_size = vocab_size
        self.batch = batch
        self.max_tokens = contract.max_tokens
        self.position = 0
        self.keeps = cell.keeps
        self.tokenizer = tokenizer
        self._cell = cell
        self._specs = tuple(specs)
        self._fingerprint = fingerprint
        self._busy = threading.Lock()
        self._check = checker(contract, batch, vocab_size)
        self._carries = contract.streams
        self.reset()

    def feed(self, tokens: Sequence[int] | Any, keep: int = 0) -> npt.NDArray[np.float32]:
        """Feed tokens (or features) and return the logits after each of them, or after the last ones.

        In the whole form one call is one whole sequence, and the logits are of all its positions.

        Args:
            tokens: ids ``[B,T]``, or ``[T]`` when B is 1; lists or integer arrays. A model of features
                takes numbers ``[B,T,F]``, or ``[T,F]``.
            keep: return the logits of this many last positions; 0 returns all. After a prompt only
                the last (``keep=1``) is needed, and the others cost a large vocabulary's product each.

        Returns:
            float32 ``[B,T,V]``, or ``[B,min(keep,T),V]``; the caller's own. A model that takes n frames
            to a position returns T/n of them.

        Raises:
            InputError: no tokens, a wrong shape or type, an id out of range, a feature that is not
                finite, a length that the model can't take, a negative ``keep``.
            LimitError: beyond ``max_tokens``; the state is as before.
            RuntimeFailure: the runtime failed (the state is as before), or another thread is
                feeding this stream.
        """
        inputs = self._check(tokens)
        if keep < 0:
            raise InputError("bad number of positions to keep", got=keep, allowed="0 (all), or 1 or more")
        if not self._busy.acquire(blocking=False):
            raise RuntimeFailure("another thread is feeding this stream", fix="open one stream per thread")
        try:
            if not self._carries:
                whole: npt.NDArray[np.float32] = self._cell.run(inputs, keep)
                return whole
            count = inputs.shape[1]
            if self.max_tokens is not None:
                check_limit(self.position, count, self.max_tokens, self.contract.inputs.unit)
            logits: npt.NDArray[np.float32] = self._cell.run(inputs, keep)
            self.position += count
            return logits
        finally:
            self._busy.release()

    @property
    def inside_ns(self) -> int | None:
        """How long the last call took inside a worker process; None if the runtime is in this one."""
        return getattr(self._cell, "inside_ns", None)

    def reset(self) -> None:
        """Back to the state before the first token."""
        self._cell.reset()
        self.position = 0

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """A copy of every state tensor by name."""
        return self._cell.read()

    def save(self) -> SavedState:
        """A copy of the state and position; see :class:`SavedState` for keeping it in a file.

        Raises:
            FormError: the model has the whole-sequence form only: there is no state.
        """
        self.contract.require_state("save its state")
        return SavedState(self._fingerprint, self.batch, self.position, self._cell.read())

    def restore(self, saved: SavedState) -> None:
        """Continue from a saved state, as often as you like.

        Raises:
            InputError: it is of another model, batch size or layout; the stream is as before.
            FormError: the model has the whole-sequence form only: there is no state.
        """
        self.contract.require_state("restore a state")
        self._check_fits(saved)
        self._cell.write(saved.tensors)
        self.position = saved.position

    def generate(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 64,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        stop: str | int | Sequence[str | int] | None = None,
    ) -> Generation:
        """Feed a prompt, then sample: an iterator over pieces of text, each valid Unicode.

        The stream goes on from where it is (call :meth:`reset` for a fresh text), and afterwards
        holds the prompt and every generated token. A bundle without a tokenizer yields ids as text.

        Args:
            prompt: text, or ids.
            max_tokens: how many tokens to generate at most.
            temperature: 0 is greedy.
            top_p: nucleus sampling; 1 is off.
            top_k: 0 is off.
            seed: the same seed gives the same text.
            stop: end before any of these strings, or at any of these ids.

        Raises:
            FormError: the model has the whole-sequence form only, or reads features.
            InputError: batch is not 1, an empty prompt, an argument out of range.
            LimitError: while iterating, at ``max_tokens`` of the model.
        """
        self.contract.require_generation()
        from xexport.runtimes.generate import Generation
        from xexport.runtimes.sampling import Sampler

        return Generation(
            self,
            self.tokenizer,
            prompt,
            max_tokens=max_tokens,
            sampler=Sampler(temperature, top_p, top_k),
            seed=seed,
            stop=stop,
        )

    def _check_fits(self, saved: SavedState) -> None:
        if not isinstance(saved, SavedState):
            raise InputError("not a saved state", got=type(saved).__name__, allowed="what save() returned")
        if saved.fingerprint != self._fingerprint:
            raise InputError(
                "this state was saved from another model",
                got=saved.fingerprint[:16],
                allowed=self._fingerprint[:16],
                fix="restore it into a stream of the bundle it came from",
            )
        if saved.batch != self.batch:
            raise InputError("this state has another batch size", got=saved.batch, allowed=self.batch)
        top = self.max_tokens
        if saved.position < 0 or (top is not None and saved.position > top):
            raise InputError(
                "this state has an impossible position", got=saved.position, allowed=f"0 .. {top}"
            )
        for spec in self._specs:
            tensor = saved.tensors.get(spec.name)
            wanted = (state_shape(spec, self.batch), spec.dtype)
            found = None if tensor is None else (tensor.shape, tensor.dtype.name)
            if found != wanted:
                raise InputError(f"state {spec.name!r} doesn't fit", got=found, allowed=wanted)
