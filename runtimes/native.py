"""Finding the library of native kernels that replaces the function bodies of ``xexport`` operators.

A graph runs without it: every operator carries its own body in standard ops. With it, ONNX Runtime
prefers the kernels, and the file stays the same. The library is compiled when xexport is installed (in a
checkout also by ``make native``), and picks its instruction set when a session is made; ``XEXPORT_ISA``
asks for another one (``sse2``, ``avx2``, ``avx512``, ``neon``; ``baseline`` is the first or the last).
Where Linux lets it and memory is plenty, the library copies a layer's weights into pages of 2 MB, which are
read faster; ``XEXPORT_LARGE_PAGES=0`` leaves them in the file's pages, which processes share.
"""

from __future__ import annotations

import ctypes
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
        isa: the instruction set that sessions get; empty without a library, or if ``XEXPORT_ISA`` asks
            for one that this machine lacks (a session then fails and says so).
        in_place: operators whose kernel may write its new state over the old one.
    """

    path: Path | None
    reason: str
    isa: str = ""
    in_place: frozenset[str] = frozenset()

    @property
    def available(self) -> bool:
        """Whether a library was found."""
        return self.path is not None


def library_name() -> str:
    """The file name of the kernel library on this platform."""
    return "libxexport_ops" + _SUFFIXES.get(sys.platform, ".so")


def find_native() -> NativeKernels:
    """Look for the library beside the operators (in an editable install as well as in a wheel).

    The variable ``XEXPORT_NATIVE=0`` turns it off; the path of a library takes that one (of another
    processor, where this one is emulated).
    """
    chosen = os.environ.get("XEXPORT_NATIVE", "")
    if chosen == "0":
        return NativeKernels(None, "no native kernels: turned off by XEXPORT_NATIVE=0")
    if os.sep in chosen:
        return _described(Path(chosen))
    library = files("xexport.ops").joinpath(library_name())
    if not (isinstance(library, Path) and library.is_file()):
        return NativeKernels(
            None, f"no native kernels: {library_name()} was not built (no C++ compiler at install time?)"
        )
    return _described(library.resolve())


def _described(path: Path) -> NativeKernels:
    """Ask the library about itself; one that can't be loaded is as good as none."""
    try:
        library = ctypes.CDLL(str(path))
        library.xexport_native_isa.restype = ctypes.c_char_p
        isa = (library.xexport_native_isa() or b"").decode()
        oldest = int(library.xexport_native_oldest_minor())
        pages = "2 MB" if library.xexport_native_large_pages() else "the file's"
        library.xexport_native_in_place.restype = ctypes.c_char_p
        in_place = frozenset((library.xexport_native_in_place() or b"").decode().split(",")) - {""}
    except (OSError, AttributeError) as error:
        return NativeKernels(None, f"no native kernels: {path.name} can't be loaded: {error}")
    asked = os.environ.get("XEXPORT_ISA")
    kind = isa or f"XEXPORT_ISA={asked}, which this machine lacks"
    reason = (
        f"native kernels from {path.name}: {kind}; onnxruntime 1.{oldest} or newer; weights in {pages} pages"
    )
    return NativeKernels(path, reason, isa, in_place)
