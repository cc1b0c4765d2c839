"""Giving back the pages of a memory-mapped checkpoint that a process has read."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

__all__ = ["release_pages"]

_DONT_NEED = 4  # MADV_DONTNEED on Linux
_RANGE = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+ +(/.*)$")


def release_pages(path: Path) -> int:
    """Unmap the resident pages of the files at or below ``path``; they are read again when touched.

    The heap's free pages are given back too.

    Resident pages of a mapped file count as this process's memory although the system may take them
    back. A mapping that was written to is left alone, as its changes exist nowhere else. Does nothing
    on systems other than Linux.

    Returns:
        The number of mappings that were released.
    """
    if not sys.platform.startswith("linux"):
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    root = path.resolve()
    count = 0
    for start, end, file in _clean_mappings():
        if file == root or root in file.parents:
            failed = libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONT_NEED)
            count += not failed
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)
    return count


def _clean_mappings() -> list[tuple[int, int, Path]]:
    """Start, end and file of every mapping of a file that this process has not written to."""
    found: list[tuple[int, int, Path]] = []
    present: tuple[int, int, Path] | None = None
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        match = _RANGE.match(line)
        if match:
            present = int(match[1], 16), int(match[2], 16), Path(match[3])
        elif line.startswith("Anonymous:"):  # pages that were written to are copies, no longer the file
            if present is not None and line.split()[1] == "0":
                found.append(present)
            present = None
    return found
