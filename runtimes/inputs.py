"""Checking token ids before they reach a graph, where a bad one would be undefined behaviour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from xexport.core.errors import InputError, LimitError

__all__ = ["Ids", "check_limit", "check_tokens"]

Ids = npt.NDArray[np.int64]


def check_tokens(tokens: Sequence[int] | Any, batch: int, vocab_size: int) -> Ids:
    """Token ids as a C-contiguous int64 array ``[B,T]``.

    Accepts ``[T]`` when the batch is 1, else ``[B,T]``; lists or integer arrays, every id in
    ``0 .. vocab_size-1`` and T >= 1.

    Raises:
        InputError: saying what was got and what is allowed.
    """
    if batch == 1 and type(tokens) is list and len(tokens) == 1 and type(tokens[0]) is int:
        return _one_token(tokens[0], vocab_size)
    ids = _as_integers(tokens)
    if ids.size == 0:
        raise InputError("no tokens to feed", got=f"shape {list(ids.shape)}", allowed="at least one token")
    if ids.ndim == 1 and batch == 1:
        ids = ids[None, :]
    if ids.ndim != 2 or ids.shape[0] != batch:
        raise InputError(
            "tokens have a wrong shape",
            got=f"shape {list(ids.shape)}",
            allowed=f"[{batch}, T]" + (" or [T]" if batch == 1 else ""),
            fix=None if ids.ndim != 2 else "open the stream with the batch size you feed",
        )
    if ids.size == 1:
        return _one_token(int(ids.item()), vocab_size)
    checked = np.ascontiguousarray(ids, dtype=np.int64)
    # negative ids are huge when read as unsigned, so one reduction finds both ends of the range
    if int(checked.view(np.uint64).max()) >= vocab_size:
        low, high = int(ids.min()), int(ids.max())
        raise _out_of_range(low if low < 0 else high, vocab_size)
    return checked


def check_limit(position: int, count: int, max_tokens: int | None) -> None:
    """Refuse to go beyond what the state can hold.

    Raises:
        LimitError: naming the maximum, the position and how many tokens were to be fed.
    """
    if max_tokens is not None and position + count > max_tokens:
        raise LimitError(
            f"the stream can hold {max_tokens} tokens",
            got=f"{count} more at position {position}",
            allowed=f"at most {max_tokens - position} more",
            fix="call reset() (or restore() an earlier state), or export with a larger maximum",
        )


def _one_token(token: int, vocab_size: int) -> Ids:
    """The common case of streaming, without numpy's reductions (5 us each)."""
    if 0 <= token < vocab_size:
        return np.array([[token]], dtype=np.int64)
    raise _out_of_range(token, vocab_size)


def _as_integers(tokens: Any) -> npt.NDArray[np.integer[Any]]:
    if isinstance(tokens, str | bytes):
        raise InputError(
            "tokens are ids, not text",
            got=type(tokens).__name__,
            allowed="a list of ints, or an integer array",
            fix="encode the text first: bundle.tokenizer().encode(text)",
        )
    try:
        ids = np.asarray(tokens)
    except (ValueError, OverflowError, TypeError) as error:
        raise InputError("tokens are not a rectangular array of ids", got=error) from error
    if ids.size == 0 and ids.dtype == np.float64:
        return np.empty(ids.shape, np.int64)  # what numpy makes of []
    if ids.dtype.kind not in "iu":
        raise InputError("tokens are not integers", got=f"dtype {ids.dtype}", allowed="int64 (or any int)")
    return ids


def _out_of_range(token: int, vocab_size: int) -> InputError:
    return InputError("a token id is out of range", got=token, allowed=f"0 .. {vocab_size - 1}")
