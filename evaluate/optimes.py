"""Time per operator and placement per execution provider, from an ONNX Runtime profile."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xexport.core.errors import RuntimeFailure
from xexport.core.manifest import StateTensor
from xexport.core.records import OpTime, OpTimes, Setup

__all__ = ["parse_profile", "profile_ops"]


def parse_profile(
    path: Path, *, setup: Setup, form: str = "step", tokens_per_call: int = 1, skip: int = 0
) -> OpTimes:
    """Read the JSON that a session with ``enable_profiling`` wrote.

    Every node event lies inside one ``model_run`` event; nodes inside a control-flow body (Scan,
    Loop, If) are counted through the outer node only, so that no time is counted twice.

    ORT writes whole microseconds, rounded down: very small nodes are counted too low, and what is
    missing shows as time outside the operators.

    Args:
        form, tokens_per_call: what was fed, for the row.
        skip: calls at the beginning that are left out (warm-up).

    Raises:
        RuntimeFailure: the file is no profile, or holds no more than ``skip`` calls.
    """
    events = _events(path)
    runs = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") == "model_run")[skip:]
    if not runs:
        raise RuntimeFailure("the profile holds too few calls", got=path.name, allowed=f"more than {skip}")
    first = runs[0][0]
    kernels = [e for e in events if _is_kernel(e) and e["ts"] >= first]
    rows: dict[tuple[str, str], list[tuple[tuple[str, str], int]]] = defaultdict(list)
    for event in _outermost(kernels):
        args = event["args"]
        rows[args["op_name"], args.get("provider", "unknown")].append((_node(event), event["dur"]))
    return OpTimes(
        setup=setup,
        form=form,
        calls=len(runs),
        tokens_per_call=tokens_per_call,
        ops=tuple(
            OpTime(op, provider, len({n for n, _ in seen}), len(seen), sum(d for _, d in seen) * 1000)
            for (op, provider), seen in sorted(rows.items())
        ),
        run_ns=tuple((end - begin) * 1000 for begin, end in runs),
    )


def profile_ops(
    bundle: Path,
    tokens: Sequence[int] | Any,
    *,
    setup: Setup,
    steps: int = 50,
    warmup: int = 5,
    tokens_per_call: int = 1,
    threads: int = 0,
) -> OpTimes:
    """Profile an ONNX Runtime bundle: ``steps`` calls of ``tokens_per_call`` tokens at batch 1.

    Single tokens are fed with the state carried, longer calls from the initial state each.

    Raises:
        BundleError, RuntimeFailure: the bundle can't be opened, run or profiled.
    """
    from xexport.core.manifest import read_manifest
    from xexport.runtimes.onnxruntime import open_engine

    manifest = read_manifest(bundle)
    source = np.asarray(tokens, dtype=np.int64).reshape(-1)
    limit = manifest.model.max_tokens
    if limit is not None:
        tokens_per_call = min(tokens_per_call, limit)
        if tokens_per_call == 1:
            steps = min(steps, max(limit - warmup, 1))
    with tempfile.TemporaryDirectory(prefix="xexport-profile-") as folder:
        engine = open_engine(bundle, manifest, threads=threads, profile_prefix=Path(folder) / "profile")
        cell = engine.cell(1)
        for index in range(warmup + steps):
            if index == 0 or tokens_per_call > 1:
                cell.write(_first_state(manifest.state))
            at = index * tokens_per_call
            ids = np.take(source, range(at, at + tokens_per_call), mode="wrap")
            cell.run(np.ascontiguousarray(ids[None, :]))
        written = Path(engine.session.end_profiling())
        return parse_profile(
            written,
            setup=setup,
            form="step" if tokens_per_call == 1 else "prefill",
            tokens_per_call=tokens_per_call,
            skip=warmup,
        )


def _first_state(state: Sequence[StateTensor]) -> dict[str, Any]:
    """State tensor -> its value before the first token, at batch 1."""
    return {s.name: np.full([1 if d == "B" else int(d) for d in s.shape], s.init, s.dtype) for s in state}


def _node(event: dict[str, Any]) -> tuple[str, str]:
    """What tells a node from another: its name, or its index where the exporter gave none."""
    return str(event["name"]), str(event["args"].get("node_index", ""))


def _events(path: Path) -> list[dict[str, Any]]:
    try:
        events = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RuntimeFailure("the profile can't be read", got=f"{path}: {error}") from error
    return [e for e in events if isinstance(e, dict) and "ts" in e and "dur" in e]


def _is_kernel(event: dict[str, Any]) -> bool:
    return str(event.get("name", "")).endswith("_kernel_time") and "op_name" in event.get("args", {})


def _outermost(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events that lie inside no other event of their own thread."""
    kept: list[dict[str, Any]] = []
    ends: dict[Any, int] = {}
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        thread = event.get("tid")
        stop = event["ts"] + event["dur"]
        if stop <= ends.get(thread, -1) and event["ts"] < ends[thread]:
            continue
        ends[thread] = max(stop, ends.get(thread, 0))
        kept.append(event)
    return kept
