"""A bundle as bytes, for machines that do not share a disk."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from xexport.core.errors import BundleError
from xexport.core.manifest import safe_path
from xexport.runtimes.bundle import load

__all__ = ["LARGEST", "pack", "same_bundle", "unpack"]

#: bytes; a larger bundle stays where it was exported, unless --out is on a shared disk
LARGEST = 1 << 30


def pack(folder: str | Path) -> bytes | None:
    """The files of a bundle; None if they are more than :data:`LARGEST` bytes."""
    files = [p for p in sorted(Path(folder).iterdir()) if p.is_file()]
    if sum(p.stat().st_size for p in files) > LARGEST:
        return None
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for path in files:
            archive.write(path, path.name)
    return out.getvalue()


def unpack(data: bytes, folder: Path) -> Path:
    """Write a parcel's files into a folder, which is made, and check that they arrived whole.

    Raises:
        BundleError: a name that leaves the folder, or a file that is not what the manifest says.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            for name in names:
                safe_path(folder, name)
            folder.mkdir(parents=True, exist_ok=True)
            for name in names:
                (folder / name).write_bytes(archive.read(name))
    except zipfile.BadZipFile as error:
        raise BundleError("the bundle did not arrive whole", got=error) from error
    load(folder)
    return folder


def same_bundle(folder: Path, fingerprint: str) -> bool:
    """Whether a folder holds that very bundle."""
    if not (folder / "manifest.json").is_file():
        return False
    try:
        return load(folder, verify=False).fingerprint == fingerprint
    except BundleError:
        return False
