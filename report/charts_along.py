"""Figures over several bundles: step time and state along one stream, one line a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xexport.report import format as fmt
from xexport.report.charts import COLOURS, figure_json, log_axis, safe_label, trace
from xexport.report.rivals import Rival, common_unit

__all__ = ["state_along", "steps_along"]

_POINTS = 80


def steps_along(rivals: Sequence[Rival]) -> str | None:
    """Median step time against the position in the stream; the band holds half of the steps."""
    traces = []
    top = 0.0  # the axis follows the medians: on a busy machine the bars would squash them
    for index, rival in enumerate(rivals):
        if rival.turns is None or len(rival.turns.steps) < 2:
            continue
        colour = COLOURS[index % len(COLOURS)]
        places = [t.at for t in rival.turns.steps]
        medians = [t.median_ms for t in rival.turns.steps]
        top = max(top, *medians)
        grows = rival.state.grows
        traces.append(
            trace("scatter", x=places, y=medians, mode="lines+markers", name=_name(rival),
                  line={"color": colour, "width": 3 if grows else 2},
                  marker={"symbol": "diamond" if grows else "circle", "size": 9 if grows else 7},
                  error_y=_spread(rival),
                  hovertemplate=f"{rival.unit} " + "%{x:,}: %{y:.4g} ms<extra>%{fullData.name}</extra>")
        )  # fmt: skip
    if len(traces) < 2:
        return None
    layout = {
        "xaxis": {"title": {"text": f"{common_unit(rivals)}s already in the stream"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": "step time, median (ms)"}, "range": [0, 1.4 * top]},
        "height": 430,
    }
    return figure_json(traces, layout)


def _spread(rival: Rival) -> dict[str, Any]:
    """From the first to the third quarter of the samples, about the median."""
    from xexport.core.stats import percentile

    up, down = [], []
    for turn in rival.turns.steps if rival.turns else ():
        samples = [ns / 1e6 for row in turn.ns for ns in row]
        up.append(percentile(samples, 75) - turn.median_ms)
        down.append(turn.median_ms - percentile(samples, 25))
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1, "width": 3}


def state_along(rivals: Sequence[Rival]) -> str | None:
    """Bytes of state in use against the position in the stream."""
    if len(rivals) < 2 or not any(r.state.allocated for r in rivals):
        return None
    bounds = [r.state.bound for r in rivals if r.state.bound]
    end = 1.25 * max(bounds, default=4000)
    traces, values = [], []
    for index, rival in enumerate(rivals):
        if not rival.state.allocated:
            continue
        last = min(end, rival.state.bound or end)
        places = [1, *(round(last * (i + 1) / _POINTS) for i in range(_POINTS))]
        used = [rival.state.at(p) for p in places]
        values += used
        colour = COLOURS[index % len(COLOURS)]
        traces.append(
            trace("scatter", x=places, y=used, mode="lines", name=_name(rival),
                  line={"color": colour, "width": 3 if rival.state.grows else 2},
                  text=[fmt.bytes_text(v) for v in used],
                  hovertemplate="after %{x:,} " + f"{rival.unit}s: " +
                  "%{text}<extra>%{fullData.name}</extra>")
        )  # fmt: skip
        if rival.state.bound:
            traces.append(_stop(rival, used[-1], colour))
    axis = log_axis("state in use", values, room=1.2)
    axis["ticktext"] = [fmt.bytes_text(v) for v in axis["tickvals"]]
    layout = {
        "xaxis": {"title": {"text": f"{common_unit(rivals)}s already in the stream"}, "range": [0, end]},
        "yaxis": axis,
        "height": 430,
        "margin": {"l": 72, "r": 20, "t": 36, "b": 50},
    }
    return figure_json(traces, layout)


def _stop(rival: Rival, used: float, colour: str) -> Any:
    """Where the stream of a bounded model ends."""
    return trace(
        "scatter", x=[rival.state.bound], y=[used], mode="markers+text", showlegend=False,
        marker={"color": colour, "symbol": "x", "size": 10}, text=["full"], textposition="middle right",
        hovertemplate=f"longest stream: {rival.state.bound:,} {rival.unit}s<extra></extra>",
    )  # fmt: skip


def _name(rival: Rival) -> str:
    return safe_label(rival.label)
