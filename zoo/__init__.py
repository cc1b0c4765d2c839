"""Small trained checkpoints, and the recipe that made them."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

__all__ = ["checkpoint_path", "shipped"]

_SUFFIX = ".safetensors"


def checkpoint_path(family: str) -> Path | None:
    """The shipped checkpoint of a family, or None if there is none."""
    path = Path(str(files("xexport.zoo"))) / "checkpoints" / f"{family}{_SUFFIX}"
    return path if path.is_file() else None


def shipped() -> tuple[str, ...]:
    """The families that have a shipped checkpoint."""
    folder = Path(str(files("xexport.zoo"))) / "checkpoints"
    return tuple(sorted(p.name.removesuffix(_SUFFIX) for p in folder.glob(f"*{_SUFFIX}")))
