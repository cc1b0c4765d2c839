"""Plotly figures as plain JSON; colours of text and grid are set by the page, which knows its theme."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from xexport.core.extras import require
from xexport.core.manifest import Manifest
from xexport.core.records import Drift, OpTimes, Record
from xexport.report import format as fmt
from xexport.report.entries import compared_latency, last_of
from xexport.report.tables import sizes_by_role

__all__ = [
    "COLOURS",
    "drift_kl",
    "drift_state",
    "figure_json",
    "latency_ecdf",
    "log_axis",
    "op_times",
    "plotly_js",
    "position_times",
    "safe_label",
    "sizes",
    "trace",
]

#: Readable on light and dark, told apart by the colour blind (after Okabe and Ito).
COLOURS = ("#0a84c6", "#d9822b", "#1f9e77", "#c2569b", "#7a6ff0", "#b8a100", "#8a8f98")
RUNNERS = {
    "torch": ("PyTorch", "#8a8f98"),
    "onnx": ("ONNX fp32", "#d9822b"),
    "bundle": ("this bundle", "#0a84c6"),
}
_OPS_SHOWN = 14
_TICKS = ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,))


def plotly_js() -> str:
    """The plotting library itself, to be inlined once.

    Raises:
        MissingDependencyError: plotly is not installed.
    """
    require("plotly", extra="report", why="to draw the report's charts")
    from plotly.offline import get_plotlyjs

    text: str = get_plotlyjs()
    return text


def drift_kl(records: Sequence[Record], unit: str = "token") -> str | None:
    """Mean KL divergence of each window against the index of the token or frame."""
    return _drift(records, unit, lambda w: w.kl_mean, "mean KL divergence (nats)")


def drift_state(records: Sequence[Record], unit: str = "token") -> str | None:
    """Relative error of the worst state tensor where each window ends."""
    return _drift(records, unit, lambda w: w.worst_state[1], "error of the worst state tensor")


def _drift(records: Sequence[Record], unit: str, value: Any, title: str) -> str | None:
    traces = []
    for runner in ("onnx", "bundle"):
        row = last_of(records, Drift, runner)
        if row is None:
            continue
        name, colour = RUNNERS[runner]
        values = [value(w) for w in row.windows]
        shown = [v if math.isfinite(v) and v > 0 else None for v in values]
        if not any(v is not None for v in shown):
            continue
        labels = [
            f"{unit}s {w.start:,} to {w.stop:,}<br>worst state {safe_label(w.worst_state[0])}"
            for w in row.windows
        ]
        traces.append(
            trace("scatter", x=[w.stop for w in row.windows], y=shown, mode="lines+markers", name=name,
                   line={"color": colour, "width": 2}, text=labels, connectgaps=False,
                   hovertemplate="%{text}<br>%{y:.3g}<extra>%{fullData.name}</extra>")
        )  # fmt: skip
    if not traces:
        return None
    values = [v for t in traces for v in t.y if v is not None]
    stops = [v for t in traces for v in t.x]
    return figure_json(
        traces, {"xaxis": log_axis(f"{unit} index", stops), "yaxis": log_axis(title, values, least=10.0)}
    )


def latency_ecdf(records: Sequence[Record]) -> str | None:
    """Share of steps that took at most so long, from the raw samples, with p50, p90 and p99."""
    traces = []
    for runner, (name, colour) in RUNNERS.items():
        row = compared_latency(records).get(runner)
        if row is None:
            continue
        samples = sorted(ns / 1e6 for ns in row.step_ns)
        shares = [(i + 1) / len(samples) for i in range(len(samples))]
        line = {"color": colour, "width": 2, "shape": "hv"}
        hover = "%{y:.1%} of steps within %{x:.4g} ms<extra>%{fullData.name}</extra>"
        traces.append(
            trace("scatter", x=samples, y=shares, mode="lines", name=name, line=line, hovertemplate=hover)
        )
        marks = [(q, row.step_ms(q)) for q in (50, 90, 99)]
        traces.append(
            trace("scatter", x=[v for _, v in marks], y=[q / 100 for q, _ in marks], mode="markers",
                   marker={"color": colour, "size": 8}, showlegend=False, text=[f"p{q}" for q, _ in marks],
                   hovertemplate="%{text}: %{x:.4g} ms<extra></extra>")
        )  # fmt: skip
    if not traces:
        return None
    layout = {
        "xaxis": log_axis("step time (ms)", [v for t in traces for v in t.x]),
        "yaxis": {"title": {"text": "share of steps"}, "tickformat": ".0%", "range": [0, 1.02]},
    }
    return figure_json(traces, layout)


def position_times(records: Sequence[Record], unit: str = "token") -> str | None:
    """Median step time along the stream: flat for a state of fixed size, rising for a cache."""
    traces = []
    for runner, (name, colour) in RUNNERS.items():
        row = compared_latency(records).get(runner)
        if row is None or len(row.positions) < 2:
            continue
        traces.append(
            trace("scatter", x=[p.position for p in row.positions], y=[p.median_ms for p in row.positions],
                   mode="lines+markers", name=name, line={"color": colour, "width": 2},
                   hovertemplate=f"{unit} " + "%{x}: %{y:.4g} ms<extra>%{fullData.name}</extra>")
        )  # fmt: skip
    if not traces:
        return None
    return figure_json(
        traces,
        {
            "xaxis": {"title": {"text": f"{unit} index"}},
            "yaxis": {"title": {"text": "step time, median (ms)"}, "rangemode": "tozero"},
        },
    )


def op_times(row: OpTimes | None) -> str | None:
    """Time a call by operator, the dearest first, and what passes outside the operators."""
    if row is None or not row.ops:
        return None
    ranked = row.by_op
    bars = [(f"{safe_label(op)} ({nodes})", us) for op, us, nodes in ranked[:_OPS_SHOWN]]
    rest = sum(us for _, us, _ in ranked[_OPS_SHOWN:])
    if rest:
        bars.append((f"{len(ranked) - _OPS_SHOWN} other operators", rest))
    whole = sum(row.run_ns) / 1e3 / max(row.calls, 1)
    outside = whole - sum(us for _, us, _ in ranked)
    if outside > 0:
        bars.append(("between operators", outside))
    bars.reverse()
    colours = [
        "#8a8f98" if n in ("between operators",) or n.endswith("other operators") else COLOURS[0]
        for n, _ in bars
    ]
    bar = trace(
        "bar", x=[us for _, us in bars], y=[n for n, _ in bars], orientation="h", marker={"color": colours},
        text=[f"{fmt.figure(us)} µs · {us / whole:.0%}" if whole else "" for _, us in bars],
        textposition="outside", cliponaxis=False, hovertemplate="%{y}: %{x:.4g} µs a call<extra></extra>",
    )  # fmt: skip
    layout = {
        "xaxis": {"title": {"text": "µs a call, under profiling"}, "rangemode": "tozero"},
        "yaxis": {"automargin": True},
        "margin": {"l": 20, "r": 100, "t": 10, "b": 50},
        "height": 70 + 25 * len(bars),
        "showlegend": False,
    }
    return figure_json([bar], layout)


def sizes(manifest: Manifest) -> str | None:
    """Bytes of weights by what they do, coloured by how they are stored."""
    table = sizes_by_role(manifest)
    if not table:
        return None
    totals: dict[str, int] = {}
    for (role, _), size in table.items():
        totals[role] = totals.get(role, 0) + size
    roles = sorted(totals, key=lambda r: totals[r])
    formats = sorted({f for _, f in table}, key=lambda f: -sum(b for (_, g), b in table.items() if g == f))
    names = [f"{safe_label(r).replace('_', ' ')} · {fmt.bytes_text(totals[r])}" for r in roles]
    traces = [
        trace("bar", y=names, x=[table.get((r, f), 0) / 1e6 for r in roles], orientation="h",
               name=safe_label(f), marker={"color": COLOURS[i % len(COLOURS)]},
               hovertemplate="%{y}: %{x:.4g} MB<extra>%{fullData.name}</extra>")
        for i, f in enumerate(formats)
    ]  # fmt: skip
    layout = {
        "barmode": "stack",
        "xaxis": {"title": {"text": "MB of weights"}},
        "yaxis": {"automargin": True},
        "height": 110 + 34 * len(roles),
        "showlegend": True,
    }
    return figure_json(traces, layout)


def log_axis(title: str, values: Sequence[float], *, room: float = 1.0, least: float = 1.0) -> dict[str, Any]:
    """A logarithmic axis whose ticks are plain numbers, closer together where the span is short.

    ``least``: the ratio that the axis spans at least, so that noise does not look like a trend.
    """
    span = max(max(values) / min(values), 1.1)
    margin = room * max(span**0.06, (least / span) ** 0.5)
    low, high = min(values) / margin, max(values) * margin
    span = math.log10(high / low)
    steps = _TICKS[0 if span < 0.6 else 1 if span < 1.3 else 2 if span < 3 else 3]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, math.ceil(len(decades) / 7))
    ticks = [m * 10.0**d for d in decades if d % every == 0 for m in steps]
    ticks = [t for t in ticks if low <= t <= high]
    return {
        "title": {"text": title},
        "type": "log",
        "range": [math.log10(low), math.log10(high)],
        "tickvals": ticks,
        "ticktext": [_tick(t) for t in ticks],
    }


def _tick(value: float) -> str:
    if 1e-3 <= value < 1e5:
        return f"{value:,.10g}"
    digits, exponent = f"{value:.1e}".split("e")
    power = f"10<sup>{int(exponent)}</sup>"
    return power if digits == "1.0" else f"{digits.removesuffix('.0')}·{power}"


def trace(kind: str, **fields: Any) -> Any:
    """A trace, checked by plotly: a misspelt property raises here and not in the reader's browser."""
    require("plotly", extra="report", why="to draw the report's charts")
    from plotly import graph_objects

    return {"scatter": graph_objects.Scatter, "bar": graph_objects.Bar}[kind](**fields)


def figure_json(traces: list[Any], layout: dict[str, Any]) -> str:
    """A figure as JSON that is safe inside a script element, with the page's common layout."""
    from plotly import graph_objects

    base: dict[str, Any] = {
        "height": 330,
        "margin": {"l": 60, "r": 20, "t": 36, "b": 50},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "hovermode": "closest",
        "template": None,
    }
    figure = graph_objects.Figure(data=traces, layout=base | layout)
    # Untrusted names are in here: no "<" may reach the page, where it could end the script element.
    text: str = json.dumps(json.loads(figure.to_json()), separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def safe_label(text: str) -> str:
    """A name for a label: plotly reads some HTML in labels."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
