"""Writing a graph and its weights: a few megabytes in memory at a time, hashed on the way to the disk."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir

from xexport.core.errors import OutputError
from xexport.core.manifest import FileEntry
from xexport.core.progress import Progress, Silent
from xexport.exporter.weights import CheckpointTensor

__all__ = ["DATA_NAME", "GRAPH_NAME", "file_entry", "write_graphs", "write_model"]

GRAPH_NAME = "model.onnx"
DATA_NAME = "model.onnx.data"
_TITLE = "write weights"
_ALIGN = 64  # bytes: one cache line, and what SIMD loads want
_INLINE = 1024  # bytes: smaller tensors stay in the .onnx, where they are easy to read
_BLOCK = 1 << 24


def write_model(
    model: ir.Model, folder: Path, progress: Progress | None = None, *, title: str = _TITLE
) -> list[FileEntry]:
    """Write ``model.onnx`` and ``model.onnx.data`` into an existing folder.

    Afterwards every large initializer of ``model`` is an external tensor that points at the
    written file, so the model holds no weights in memory. ``title`` is what the stage is called.

    Raises:
        OutputError: the disk is full or the folder can't be written.
    """
    return write_graphs(model, folder, lambda: [(GRAPH_NAME, model)], progress, title=title)


def write_graphs(
    model: ir.Model,
    folder: Path,
    graphs: Callable[[], Iterable[tuple[str, ir.Model]]],
    progress: Progress | None = None,
    *,
    title: str = _TITLE,
) -> list[FileEntry]:
    """Write the weights of ``model`` once, and graphs that read them.

    Args:
        graphs: called when the weights are written and ``model`` points at them: file name and graph, each
            with initializers of ``model`` and small ones of its own.

    Raises:
        OutputError: the disk is full or the folder can't be written.
    """
    progress = progress or Silent()
    values = [v for v in model.graph.initializers.values() if _is_large(v)]
    for value in model.graph.initializers.values():
        if not _is_large(value):
            _inline(value)
    progress.stage(title, total=len(values))
    entries = []
    try:
        data = [_write_data(values, folder, progress)] if values else []
        for name, graph in graphs():
            ir.save(graph, folder / name)
            entries.append(file_entry(folder / name))
    except OSError as error:
        raise disk_error(error, folder) from error
    return [*entries, *data]


def disk_error(error: OSError, where: Path) -> OutputError:
    """An OSError as a sentence."""
    if error.errno == errno.ENOSPC:
        return OutputError("the disk is full", got=where, fix="free some space, or name another --out")
    return OutputError(
        "can't write here", got=f"{where}: {error.strerror or error}", fix="name another --out"
    )


def file_entry(path: Path) -> FileEntry:
    """Name, size and sha256 of a written file."""
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return FileEntry(path=path.name, sha256=digest, bytes=path.stat().st_size)


def _is_large(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and tensor.nbytes >= _INLINE


def _inline(value: ir.Value) -> None:
    """A small tensor goes into the .onnx itself, wherever its bytes are now."""
    tensor = value.const_value
    if isinstance(tensor, ir.ExternalTensor | ir.LazyTensor):
        value.const_value = ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=tensor.name)


def _write_data(values: list[ir.Value], folder: Path, progress: Progress) -> FileEntry:
    digest = hashlib.sha256()
    path = folder / DATA_NAME
    offset = 0
    external: list[tuple[ir.Value, ir.ExternalTensor]] = []
    with path.open("wb") as out, ThreadPoolExecutor(1) as pool:
        for value in values:
            tensor = value.const_value
            assert tensor is not None
            offset += _put(out, digest, pool, b"\0" * (-offset % _ALIGN))
            start = offset
            for block in _blocks(tensor):
                offset += _put(out, digest, pool, block)
            external.append((value, _pointer(tensor, start, offset - start, folder)))
            progress.advance()
    # only now: a lazy tensor may read another initializer that is written later
    for value, pointer in external:
        value.const_value = pointer
    return FileEntry(path=DATA_NAME, sha256=digest.hexdigest(), bytes=offset)


def _blocks(tensor: ir.TensorProtocol) -> Iterator[memoryview]:
    if isinstance(tensor, CheckpointTensor):
        for part in tensor.blocks(_BLOCK):
            yield part.reshape(-1).view(np.uint8).data
        return
    array: np.ndarray[Any, Any] = np.ascontiguousarray(tensor.numpy())
    if tensor.dtype.bitwidth < 8:
        yield memoryview(tensor.tobytes())
        return
    flat = array.reshape(-1).view(np.uint8).data
    for start in range(0, len(flat), _BLOCK):
        yield flat[start : start + _BLOCK]


def _put(out: BinaryIO, digest: Any, pool: Executor, data: bytes | memoryview) -> int:
    """Write and hash at the same time: both let other threads run, and cost about the same."""
    hashed = pool.submit(digest.update, data)
    out.write(data)
    hashed.result()
    return len(data)


def _pointer(tensor: ir.TensorProtocol, offset: int, length: int, folder: Path) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        DATA_NAME,
        offset,
        length,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name or "",
        base_dir=folder,
    )
