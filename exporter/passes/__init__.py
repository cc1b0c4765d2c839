"""Graph passes: one file each, ``run(model) -> int`` says how many places it changed."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["optimize"]


def optimize(model: ir.Model) -> dict[str, int]:
    """All passes in their order; returns how many places each changed."""
    from xexport.exporter.passes import cse, fold, names, noop, shapes, transposes

    counts: dict[str, int] = {}
    for title, step in (
        ("fold", fold.run),
        ("transposes", transposes.run),
        ("shapes", shapes.run),
        ("noop", noop.run),
        ("fold again", fold.run),
        ("cse", cse.run),
        ("names", names.run),
    ):
        counts[title] = step(model)
    return counts
