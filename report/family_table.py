"""The table of models as Markdown, from what benchmarks/models_table.py collected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xexport.report import format as fmt

__all__ = ["MARKS", "render"]

#: what the README's table stands between
MARKS = ("<!-- made by benchmarks/models_table.py -->", "<!-- end -->")
_HEAD = (
    "family", "form", "state of its zoo preset", "state in bytes", "operators", "targets",
    "largest error against", "zoo bits per byte",
)  # fmt: skip


def render(table: Mapping[str, Any]) -> str:
    """The rows in the order of their names; a dash where nothing was measured."""
    lines = [_HEAD, ["---"] * len(_HEAD)]
    lines += [_row(name, row) for name, row in sorted(table["families"].items())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _row(name: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    state = row["state"]
    bits = row.get("zoo_bits_per_byte")
    return (
        f"`{name}`",
        row["form"],
        fmt.bytes_text(state["bytes"]),
        state["formula"] or fmt.MISSING,
        ", ".join(f"`{op}`" for op in row.get("operators") or ()) or fmt.MISSING,
        ", ".join(row.get("targets") or ()) or fmt.MISSING,
        ", ".join(f"{who} {fmt.figure(error, 2)}" for who, error in (row.get("oracles") or {}).items())
        or fmt.MISSING,
        f"{bits:.3f}" if bits is not None else fmt.MISSING,
    )
