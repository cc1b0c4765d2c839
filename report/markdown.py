"""The report as Markdown: the same words and tables, no charts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from xexport.core.errors import InputError
from xexport.core.manifest import Manifest
from xexport.core.records import Record
from xexport.report.rivals import rivals_of
from xexport.report.tables import Table
from xexport.report.versus import versus
from xexport.report.view import Section, bundle_view, compared, compared_tables, title_of
from xexport.report.words import Sentence

__all__ = ["render_markdown"]

_SECTIONS = (
    ("Accuracy", "fidelity", "fidelity_note"),
    ("Speed", "latency", "latency_note"),
    ("Step time along the stream", "position_times", ""),
    ("Size and memory", "resources", ""),
    ("Placement", "placement", ""),
    ("Fallen back to another provider", "fallbacks", ""),
    ("Chunk law", "law", "law_note"),
    ("Operators", "lowerings", ""),
    ("Left as they were", "refusals", ""),
    ("Quantization, tensor by tensor", "decisions", ""),
    ("Checks at export", "checks", ""),
    ("Inputs, outputs, state", "signature", ""),
    ("Files", "files", ""),
    ("Model", "model", ""),
    ("Environment", "environment", ""),
)


def render_markdown(
    entries: Sequence[tuple[Manifest, Sequence[Record]]],
    *,
    sections: Sequence[Section] = (),
    details: bool = True,
) -> str:
    """The report on one or several bundles; names from manifests are escaped.

    ``sections`` come before all others; without ``details`` each bundle's own part is left out.

    Raises:
        InputError: no bundle was given.
    """
    if not entries:
        raise InputError("a report needs at least one bundle")
    parts = [f"# {_escape(title_of([m for m, _ in entries]))}"]
    for section in sections:
        parts += [f"## {section.heading}", _escape(section.note), _table(section.table)]
    if len(entries) > 1:
        rivals = rivals_of(entries)
        parts.append(_sentences(versus(rivals)))
        for section in compared_tables(rivals):
            parts += [f"## {section.heading}", _escape(section.note), _table(section.table)]
        parts += ["## Compared", _table(compared(entries))]
    for manifest, records in entries if details else ():
        parts += _bundle(manifest, records, "##" if len(entries) == 1 else "###")
    return "\n\n".join(parts) + "\n"


def _bundle(manifest: Manifest, records: Sequence[Record], level: str) -> list[str]:
    view = bundle_view(manifest, records)
    parts = [] if level == "##" else [f"## {_escape(view['name'])}"]
    parts.append(_escape(view["subtitle"]))
    parts += [f"> **Warning:** {_escape(w)}" for w in view["warnings"]]
    parts.append(_sentences(view["verdict"]))
    for heading, key, note in _SECTIONS:
        if view[key]:
            parts.append(f"{level} {heading}")
            if note and view[note]:
                parts.append(_escape(view[note]))
            parts.append(_table(view[key]))
    parts += [f"{level} Reproduce", _code(view["reproduce"])]
    if view["reproduce_note"]:
        parts.append(_escape(view["reproduce_note"]))
    return parts


def _sentences(found: Sequence[Sentence]) -> str:
    marks = {"good": "", "plain": "", "bad": "**Note:** "}
    return "\n".join(f"- {marks[s.tone]}{_escape(s.text)}" for s in found)


def _table(table: Table) -> str:
    rule = ["---:" if i in table.numeric else "---" for i in range(len(table.columns))]
    lines = [table.columns, rule, *table.rows]
    return "\n".join("| " + " | ".join(c if row is rule else _escape(c) for c in row) + " |" for row in lines)


def _code(text: str) -> str:
    """A fenced block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}sh\n{text}\n{fence}"


def _escape(text: str) -> str:
    """One line in which nothing is markup: neither Markdown's nor HTML's."""
    flat = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", flat)
