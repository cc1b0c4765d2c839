"""Graph passes: one file each, ``run(model) -> int`` says how many places it changed."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module

import onnx_ir as ir

from xexport.core.manifest import Refusal

__all__ = ["fuse", "optimize"]


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


def fuse(model: ir.Model, names: Iterable[str]) -> list[Refusal]:
    """The passes that a target asks for (``fuse`` in its TOML), in their order, after quantization.

    Each is a file here with ``rewrite(model) -> list[Refusal]``: nodes become operators of this project
    (or plainer standard ones), and a node that is left as it is has its reason.
    """
    refusals: list[Refusal] = []
    for name in names:
        refusals += import_module(f"xexport.exporter.passes.{name}").rewrite(model)
    return refusals
