"""Writing a report: the suffix of the file picks the form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from xexport.core.errors import InputError, OutputError
from xexport.core.manifest import Manifest
from xexport.core.records import Record
from xexport.report.jsonout import report_json
from xexport.report.view import Section

__all__ = ["check_suffix", "write_report"]

_SUFFIXES = (".html", ".md", ".json")


def write_report(
    path: Path,
    entries: Sequence[tuple[Manifest, Sequence[Record]]],
    *,
    sections: Sequence[Section] = (),
    details: bool = True,
) -> Path:
    """Write the report on some bundles and return where it is.

    Args:
        path: its suffix picks the form.
        entries: the bundles.
        sections: tables that come before all others (not in JSON, which is of the bundles alone).
        details: False leaves out each bundle's own part.

    Raises:
        InputError: an unknown suffix, or no bundle.
        OutputError: the file can't be written.
    """
    check_suffix(path)
    if not entries:
        raise InputError("a report needs at least one bundle")
    if path.suffix == ".html":
        from xexport.report.html import write_html

        write_html(path, entries, sections=sections, details=details)
        return path
    if path.suffix == ".md":
        from xexport.report.markdown import render_markdown

        text = render_markdown(entries, sections=sections, details=details)
    else:
        text = json.dumps(report_json(entries), indent=2) + "\n"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError("the report can't be written", got=f"{path}: {error.strerror}") from error
    return path


def check_suffix(path: Path) -> None:
    """Refuse a file name that no report has, before anything is measured for it.

    Raises:
        InputError: an unknown suffix.
    """
    if path.suffix not in _SUFFIXES:
        raise InputError("unknown kind of report", got=path.name, allowed=", ".join(_SUFFIXES))
