"""Accuracy against speed as a figure: every runner of every bundle, with the Pareto front."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from xexport.core.manifest import Manifest
from xexport.core.records import Record
from xexport.report.charts import COLOURS, figure_json, log_axis, trace
from xexport.report.labels import Box, place
from xexport.report.pareto import Point, front, points

__all__ = ["scatter"]

#: the plot's area in a narrow window; a wider one has more room between the points, and labels stay apart
_PLOT = Box(0, 0, 860, 330)


def scatter(entries: Sequence[tuple[Manifest, Sequence[Record]]]) -> str | None:
    """Bits per byte against step time, every runner of every bundle, with the Pareto front."""
    found = points(entries)
    if not found:
        return None
    layout = {
        "xaxis": log_axis("step time, median (ms) – less is better", [p.ms for p in found], room=1.25),
        "yaxis": {"title": {"text": "bits per byte – less is better"}, "range": _span(found)},
        "height": 430,
    }
    traces = []
    labels = _labels(found, layout)
    for index, model in enumerate(dict.fromkeys(p.model for p in found)):
        group = [(p, label) for p, label in zip(found, labels, strict=True) if p.model == model]
        colour = COLOURS[index % len(COLOURS)]
        traces += [_point_trace(model, group, colour), *_led_away(model, group, colour)]
    best = front(found)
    if len(best) > 1:
        # hv: between two points of the front nothing better than the worse of them was measured
        line = {"color": "rgba(128,128,128,.8)", "dash": "dot", "width": 1.5, "shape": "hv"}
        traces.insert(
            0,
            trace("scatter", x=[p.ms for p in best], y=[p.bits for p in best], mode="lines", line=line,
                   name="Pareto front", hoverinfo="skip"),
        )  # fmt: skip
    return figure_json(traces, layout)


class _Label(NamedTuple):
    """Where a point's label goes: beside it, or at (ms, bits) at the end of a line."""

    side: str
    away: tuple[float, float] | None


def _labels(found: Sequence[Point], layout: Mapping[str, Any]) -> list[_Label]:
    """Labels that don't cover each other in a chart of about the page's width."""
    (left, right), (low, high) = layout["xaxis"]["range"], layout["yaxis"]["range"]
    across, down = _PLOT.right / (right - left), _PLOT.bottom / (high - low)
    pixels = [((math.log10(p.ms) - left) * across, (high - p.bits) * down) for p in found]
    first = ["bottom right" if p.runner == "bundle" else "top right" for p in found]
    made = []
    for at, spot in zip(
        pixels, place(pixels, [html.unescape(p.label) for p in found], _PLOT, first), strict=True
    ):
        moved = (spot.x, spot.y) != at
        away = (10 ** (left + spot.x / across), high - spot.y / down) if moved else None
        made.append(_Label(spot.side, away))
    return made


def _led_away(model: str, group: Sequence[tuple[Point, _Label]], colour: str) -> list[Any]:
    """Labels that found no room beside their points, with lines to them; they come and go with the model."""
    x: list[float | None] = []
    y: list[float | None] = []
    text, sides = [], []
    for point, label in group:
        if label.away is not None:
            x += [point.ms, label.away[0], None]
            y += [point.bits, label.away[1], None]
            text += ["", point.label, ""]
            sides += [label.side] * 3
    line = {"color": "rgba(128,128,128,.7)", "width": 1}
    led = trace(
        "scatter", x=x, y=y, text=text, textposition=sides, mode="lines+text", line=line, name=model,
        legendgroup=model, showlegend=False, hoverinfo="skip", textfont={"color": colour},
    )  # fmt: skip
    return [led] if x else []


def _span(found: Sequence[Point]) -> list[float]:
    """The range of bits per byte shown: at least half a per cent, so that equal looks equal."""
    low, high = min(p.bits - p.error for p in found), max(p.bits + p.error for p in found)
    extra = max(0.12 * (high - low), 0.0025 * high)
    return [low - extra, high + extra]


def _point_trace(model: str, labelled: Sequence[tuple[Point, _Label]], colour: str) -> Any:
    symbols = {"torch": "circle-open", "onnx": "diamond-open", "bundle": "circle"}
    group = [point for point, _ in labelled]
    return trace(
        "scatter",
        x=[p.ms for p in group],
        y=[p.bits for p in group],
        mode="markers+text",
        name=model,
        legendgroup=model,
        text=[p.label if label.away is None else "" for p, label in labelled],
        hovertext=[p.label for p in group],
        textposition=[label.side for _, label in labelled],
        textfont={"color": colour},
        marker={
            "color": colour,
            "size": 13,
            "symbol": [symbols[p.runner] for p in group],
            "line": {"width": 2},
        },
        error_y={"type": "data", "array": [p.error for p in group], "thickness": 1, "width": 3},
        customdata=[[p.detail] for p in group],
        hovertemplate="<b>%{hovertext}</b><br>%{x:.3g} ms, %{y:.4f} bits per byte<br>%{customdata[0]}"
        "<extra>%{fullData.name}</extra>",
    )
