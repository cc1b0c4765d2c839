"""Frames between a bundle's user and a worker process: a JSON header and the raw bytes of tensors.

A frame is the length of the header (unsigned, 32 bits, little-endian), the header (JSON, UTF-8), and the
bytes of the tensors that the header's ``tensors`` lists, little-endian and in C order, one after another.
The JavaScript side of the same protocol is runtimes/web/worker.mjs.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from xexport.core.errors import RuntimeFailure

__all__ = ["DTYPES", "Tensors", "read_frame", "write_frame"]

Tensors = dict[str, npt.NDArray[Any]]
#: what may be sent; a header with another dtype is refused
DTYPES = ("float32", "float16", "int64", "int32")
_LENGTH = struct.Struct("<I")
_LARGEST_HEADER = 1 << 24  # bytes: a header lists names and shapes, never values


def write_frame(out: BinaryIO, header: Mapping[str, Any], tensors: Mapping[str, npt.NDArray[Any]]) -> None:
    """Send one frame.

    Raises:
        RuntimeFailure: a tensor of another dtype than :data:`DTYPES`.
        OSError: the other side is gone.
    """
    listed = []
    for name, tensor in tensors.items():
        if tensor.dtype.name not in DTYPES:
            raise RuntimeFailure(
                f"tensor {name!r} can't be sent to a worker", got=tensor.dtype, allowed=", ".join(DTYPES)
            )
        listed.append({"name": name, "dtype": tensor.dtype.name, "shape": list(tensor.shape)})
    text = json.dumps({**header, "tensors": listed}, separators=(",", ":")).encode()
    # one write of the small part: the reader wakes once
    out.write(_LENGTH.pack(len(text)) + text)
    for tensor in tensors.values():
        out.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
    out.flush()


def read_frame(source: BinaryIO) -> tuple[dict[str, Any], Tensors] | None:
    """The next frame, or None where the stream ends between two frames.

    Raises:
        RuntimeFailure: the stream ends inside a frame, or what came is no frame.
    """
    head = source.read(_LENGTH.size)
    if not head:
        return None
    try:
        (length,) = _LENGTH.unpack(head)
        if length > _LARGEST_HEADER:
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(_exactly(source, length))
        tensors = {row["name"]: _tensor(source, row) for row in header.pop("tensors", [])}
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise RuntimeFailure("what came from the other process is no frame", got=error) from error
    return header, tensors


def _tensor(source: BinaryIO, row: Mapping[str, Any]) -> npt.NDArray[Any]:
    if row["dtype"] not in DTYPES:
        raise ValueError(f"dtype {row['dtype']!r}")
    shape = tuple(int(n) for n in row["shape"])
    if any(n < 0 for n in shape):
        raise ValueError(f"shape {shape}")
    tensor = np.empty(shape, row["dtype"])
    view = memoryview(tensor.reshape(-1).view(np.uint8).data)
    at = 0
    while at < len(view):
        count = source.readinto(view[at:])  # type: ignore[attr-defined]
        if not count:
            raise ValueError("the stream ended inside a tensor")
        at += count
    return tensor


def _exactly(source: BinaryIO, count: int) -> bytes:
    data = source.read(count)
    if len(data) != count:
        raise ValueError("the stream ended inside a header")
    return data
