"""Checking tokens and features before they reach a graph, where a bad id would be undefined behaviour."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from xexport.core.contract import Contract, InputSpec
from xexport.core.errors import InputError, LimitError

__all__ = ["Ids", "Inputs", "check_features", "check_limit", "check_tokens", "checker", "pieces"]

Ids = npt.NDArray[np.int64]
#: ids [B,T] int64, or features [B,T,F] float32
Inputs = npt.NDArray[Any]


def pieces(inputs: Inputs, lengths: Sequence[int]) -> list[Inputs]:
    """Consecutive parts of ``[B,T,...]``, each of one of ``lengths``, which are largest first.

    Raises:
        InputError: the shortest length leaves a rest.
    """
    parts, at = [], 0
    for length in lengths:
        while at + length <= inputs.shape[1]:
            parts.append(inputs[:, at : at + length])
            at += length
    if at < inputs.shape[1]:
        raise InputError("no prepared length fits", got=inputs.shape[1], allowed=", ".join(map(str, lengths)))
    return parts


def checker(contract: Contract, batch: int, vocab_size: int) -> Callable[[Any], Inputs]:
    """The check of everything that is fed to one stream; it returns the array that the graph gets.

    The returned function raises InputError (shape, type, values) and LimitError (too long).
    """
    spec = contract.inputs
    check: Callable[[Any], Inputs]
    if spec.kind == "tokens":
        check = partial(check_tokens, batch=batch, vocab_size=vocab_size)
    else:
        check = partial(check_features, batch=batch, spec=spec)
    if contract.streams and spec.multiple == spec.least == 1:
        return check  # the common case of streaming pays for no further call

    def checked(values: Any) -> Inputs:
        array = check(values)
        _check_length(array.shape[1], contract)
        return array

    return checked


def check_features(values: Any, batch: int, spec: InputSpec) -> npt.NDArray[np.float32]:
    """Features as a C-contiguous float32 array ``[B,T,F]``.

    Accepts ``[T,F]`` when the batch is 1, else ``[B,T,F]``; lists or arrays of numbers, all finite,
    with T >= 1.

    Raises:
        InputError: saying what was got and what is allowed.
    """
    allowed = f"[{batch}, T, {spec.width}]" + (f" or [T, {spec.width}]" if batch == 1 else "")
    try:
        array = np.asarray(values)
    except (ValueError, TypeError) as error:
        raise InputError("features are not a rectangular array of numbers", got=error) from error
    if array.dtype.kind not in "fiu":
        raise InputError("features are not numbers", got=f"dtype {array.dtype}", allowed="float32")
    if array.ndim == 2 and batch == 1:
        array = array[None]
    if array.ndim != 3 or array.shape[0] != batch or array.shape[2] != spec.width:
        raise InputError(
            "features have a wrong shape",
            got=f"shape {list(array.shape)}",
            allowed=allowed,
            fix=None if array.ndim != 3 else "the last axis holds the features of one frame",
        )
    if array.size == 0:
        raise InputError(
            "no features to feed", got=f"shape {list(array.shape)}", allowed="at least one frame"
        )
    with np.errstate(over="ignore"):  # what float32 can't hold is found below
        checked = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(checked).all():
        at = [int(i) for i in np.argwhere(~np.isfinite(checked))[0]]
        raise InputError(
            "a feature is not finite", got=f"{array[tuple(at)]} at {at}", allowed="finite float32 numbers"
        )
    return checked


def _check_length(length: int, contract: Contract) -> None:
    """Refuse a T that one call can't have; how much a stream can hold in all is not checked here."""
    spec = contract.inputs
    units = f"{spec.unit}s"
    if contract.fixed_length is not None and length != contract.fixed_length:
        raise InputError(
            f"this model takes sequences of one length: {contract.fixed_length} {units}",
            got=length,
            allowed=contract.fixed_length,
            fix="cut or pad the sequence as the model was trained",
        )
    if length < spec.least or length % spec.multiple:
        wanted = f"a multiple of {spec.multiple}" if spec.multiple > 1 else ""
        least = f"at least {spec.least}" if spec.least > spec.multiple else ""
        raise InputError(
            f"a bad number of {units}",
            got=length,
            allowed=" and ".join(w for w in (wanted, least) if w),
            fix="keep the rest for the next call, or pad the end" if contract.streams else "pad the end",
        )
    if not contract.streams and contract.max_tokens is not None and length > contract.max_tokens:
        raise LimitError(
            f"the model can take {contract.max_tokens} {units} at once",
            got=length,
            allowed=f"at most {contract.max_tokens}",
            fix="cut the sequence, or export with a larger maximum",
        )


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


def check_limit(position: int, count: int, max_tokens: int | None, unit: str = "token") -> None:
    """Refuse to go beyond what the state can hold.

    Raises:
        LimitError: naming the maximum, the position and how many tokens were to be fed.
    """
    if max_tokens is not None and position + count > max_tokens:
        raise LimitError(
            f"the stream can hold {max_tokens} {unit}s",
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
