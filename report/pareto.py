"""Accuracy against speed: one point a runner of each bundle, and which of them are not beaten."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from typing import NamedTuple

from xexport.core.manifest import Manifest
from xexport.core.records import Record
from xexport.report import format as fmt
from xexport.report.entries import compared_latency, fidelity_of

__all__ = ["Point", "front", "points"]


class Point(NamedTuple):
    """A runner's median step and bits per byte.

    ``error`` is the standard error of what it lost against the reference (paired by token), since
    the error of the figure itself is mostly the text's and common to all points.
    """

    model: str
    label: str
    runner: str
    ms: float
    bits: float
    error: float
    detail: str


def points(entries: Sequence[tuple[Manifest, Sequence[Record]]]) -> list[Point]:
    """Every runner whose speed and accuracy were both measured.

    Several bundles of one model repeat its PyTorch and fp32 figures: the first is taken.
    """
    found: list[Point] = []
    seen: set[tuple[str, str]] = set()
    for manifest, records in entries:
        model = html.escape(manifest.model.family)
        key = json.dumps([manifest.model.family, manifest.model.config, manifest.model.source], default=str)
        for runner in ("torch", "onnx", "bundle"):
            if runner != "bundle" and (key, runner) in seen:
                continue
            point = _point(model, manifest, records, runner)
            if point is not None:
                found.append(point)
                seen.add((key, runner))
    return found


def front(found: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both speed and accuracy, the fastest first.

    A slower point has to be better by more than twice the standard error: fp32 in another runtime
    differs in the seventh digit, which is no reason to wait for it.
    """
    best: list[Point] = []
    for point in sorted(found, key=lambda p: (p.ms, p.bits)):
        if not best or best[-1].bits - point.bits > 2 * math.hypot(point.error, best[-1].error):
            best.append(point)
    return best


def _point(model: str, manifest: Manifest, records: Sequence[Record], runner: str) -> Point | None:
    latency = compared_latency(records).get(runner)
    measured = fidelity_of(records, runner)
    if runner == "torch":
        measured = fidelity_of(records, "bundle") or fidelity_of(records, "onnx")
    if latency is None or measured is None:
        return None
    bits = measured.bits_per_byte("reference" if runner == "torch" else "candidate")[0]
    if not math.isfinite(bits):
        return None
    error = 0.0 if runner == "torch" else measured.bits_lost[1]
    label = {"torch": "PyTorch", "onnx": "ONNX fp32", "bundle": html.escape(manifest.target)}[runner]
    detail = f"p99 {fmt.ms(latency.step_ms(99))}, {fmt.count(latency.decode_tokens_per_s)} tokens/s"
    return Point(
        model, label, runner, latency.step_ms(50), bits, error if math.isfinite(error) else 0.0, detail
    )
