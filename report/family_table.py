"""The table of models as Markdown, from what benchmarks/models_table.py collected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        _by_runtime(row.get("targets") or ()) or fmt.MISSING,
        ", ".join(f"{who} {fmt.figure(error, 2)}" for who, error in (row.get("oracles") or {}).items())
        or fmt.MISSING,
        f"{bits:.3f}" if bits is not None else fmt.MISSING,
    )


def _by_runtime(targets: Sequence[str]) -> str:
    """``cpu-fp32, cpu-int8, openvino-fp32`` -> ``cpu: fp32, int8; openvino: fp32``."""
    found: dict[str, list[str]] = {}
    for target in targets:
        place, _, precision = target.rpartition("-")
        found.setdefault(place or target, []).append(precision if place else "")
    return "; ".join(f"{place}: {', '.join(names)}" for place, names in found.items())
