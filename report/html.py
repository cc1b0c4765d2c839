"""One self-contained HTML file: no external request, light and dark, every figure from records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from xexport.core.manifest import Manifest
from xexport.core.records import Record

__all__ = ["render_html", "write_html"]


def render_html(entries: Sequence[tuple[Manifest, Sequence[Record]]]) -> str:
    """The report on one or several bundles.

    Raises:
        MissingDependencyError: plotly is not installed (the extra ``report``).
        InputError: no bundle was given.
    """
    raise NotImplementedError


def write_html(path: Path, entries: Sequence[tuple[Manifest, Sequence[Record]]]) -> None:
    """Render and write, through a temporary file in the same folder.

    Raises:
        OutputError: the file can't be written.
    """
    raise NotImplementedError
