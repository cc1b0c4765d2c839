"""The figures of one profiling run as one plain object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xexport.core.manifest import Manifest
from xexport.core.records import Bandwidth, Fallback, Memory, OpTimes, Placed, Record
from xexport.core.stats import finite_or_none as number
from xexport.report.entries import last_of
from xexport.report.jsonout import summary

__all__ = ["profile_summary"]


_KEPT = ("model", "target", "bundle", "bytes", "latency", "form", "fixed_length", "passes")


def profile_summary(manifest: Manifest, records: Sequence[Record], bundle: str) -> dict[str, Any]:
    """What ``xexport profile --json`` prints.

    Keys: model, target, bundle, bytes, latency, peak_rss, operators[{op, us_per_step, nodes}],
    placement[{provider, nodes, us_per_step, share}], fallbacks[{op, nodes[], provider, us_per_step, why}],
    warnings[] (every fallback as a sentence), bandwidth{bytes_per_s, fraction_of_floor}, environment. In the
    whole-sequence form passes, and no bandwidth; us_per_step is of a whole pass.
    """
    whole = summary(manifest, records, bundle)
    ops = next((r for r in records if isinstance(r, OpTimes) and r.form in ("step", "whole")), None)
    memory = last_of(records, Memory)
    step = whole["latency"]["step_ms"]["p50"]
    return {
        **{key: whole[key] for key in _KEPT if key in whole},
        "peak_rss": memory.peak_rss if memory else None,
        "operators": [{"op": op, "us_per_step": number(us), "nodes": nodes} for op, us, nodes in ops.by_op]
        if ops
        else [],
        "placement": [_placed(row) for row in ops.placed] if ops else [],
        "fallbacks": [_fallback(row, ops.calls) for row in ops.fallbacks] if ops else [],
        "warnings": list(dict.fromkeys(w for r in records for w in getattr(r, "warnings", ()))),
        "bandwidth": _bandwidth(last_of(records, Bandwidth), step),
        "environment": records[-1].setup.environment if records else None,
    }


def _placed(row: Placed) -> dict[str, Any]:
    """One provider's row."""
    return {
        "provider": row.provider,
        "nodes": row.nodes,
        "us_per_step": number(row.us_per_call),
        "share": number(row.share),
    }


def _fallback(row: Fallback, calls: int) -> dict[str, Any]:
    """Nodes of one operator that fell back for one reason."""
    return {
        "op": row.op,
        "nodes": list(row.nodes),
        "provider": row.provider,
        "us_per_step": number(row.ns / 1e3 / max(calls, 1)),
        "why": row.why,
    }


def _bandwidth(row: Bandwidth | None, step_ms: float | None) -> dict[str, Any] | None:
    """How near the step is to the time it takes just to read the weights."""
    if row is None:
        return None
    floor_ms = row.bytes_per_token / row.bytes_per_s * 1e3
    return {
        "bytes_per_s": number(row.bytes_per_s),
        "bytes_per_token": row.bytes_per_token,
        "floor_ms": number(floor_ms),
        "fraction_of_floor": number(floor_ms / step_ms) if step_ms else None,
    }
