"""Quantized tensors wait on the disk, not in memory, until the bundle is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from xexport.exporter.writer import disk_error

__all__ = ["Spool"]


class Spool:
    """An append-only scratch file; ``put`` returns a tensor that reads from it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "spool.bin"
        self._end = 0
        self._path.write_bytes(b"")

    def put(self, name: str, array: np.ndarray[Any, Any]) -> ir.ExternalTensor:
        """Store an array.

        Raises:
            OutputError: the disk is full.
        """
        array = np.ascontiguousarray(array)
        start = self._end
        try:
            with self._path.open("ab") as out:
                out.write(array.reshape(-1).view(np.uint8).data)
        except OSError as error:
            raise disk_error(error, self._folder) from error
        self._end += array.nbytes
        return ir.ExternalTensor(
            self._path.name,
            start,
            array.nbytes,
            ir.DataType.from_numpy(array.dtype),
            shape=ir.Shape(array.shape),
            name=name,
            base_dir=self._folder,
        )

    def close(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)
