"""Finding the library of native kernels that replaces the function bodies of ``xexport`` operators.

A graph runs without it: every operator carries its own body in standard ops. With it, ONNX Runtime
prefers the kernels, and the file stays the same.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

__all__ = ["NativeKernels", "find_native", "library_name"]

_SUFFIXES = {"darwin": ".dylib", "win32": ".dll"}


@dataclass(frozen=True)
class NativeKernels:
    """Where the kernels are, or why there are none.

    Attributes:
        path: the shared library, or None.
        reason: one sentence for ``xexport doctor`` and the report.
    """

    path: Path | None
    reason: str

    @property
    def available(self) -> bool:
        """Whether a library was found."""
        return self.path is not None


def library_name() -> str:
    """The file name of the kernel library on this platform."""
    return "libxexport_ops" + _SUFFIXES.get(sys.platform, ".so")


def find_native() -> NativeKernels:
    """Look for the library beside the operators (in an editable install as well as in a wheel).

    The variable ``XEXPORT_NATIVE=0`` turns it off.
    """
    if os.environ.get("XEXPORT_NATIVE") == "0":
        return NativeKernels(None, "no native kernels: turned off by XEXPORT_NATIVE=0")
    library = files("xexport.ops") / library_name()
    if isinstance(library, Path) and library.is_file():
        return NativeKernels(library.resolve(), f"native kernels from {library.name}")
    if not _has_sources():
        return NativeKernels(
            None, "no native kernels: this version ships none yet; operators run as standard ONNX ops"
        )
    return NativeKernels(
        None, f"no native kernels: {library_name()} was not built (no C++ compiler at install time?)"
    )


def _has_sources() -> bool:
    """Whether this installation carries kernel sources, so that a build could have been expected."""
    folders = (p for p in files("xexport.ops").iterdir() if p.is_dir())
    return any((folder / "kernel.cc").is_file() for folder in folders)
