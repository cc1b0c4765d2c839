"""Time per operator and placement per execution provider, from an ONNX Runtime profile."""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xexport.core.errors import RuntimeFailure
from xexport.core.records import Fallback, OpTime, OpTimes, Setup
from xexport.runtimes.engine import Cell
from xexport.runtimes.placement import Assigned, why_on_cpu

__all__ = ["parse_profile", "profile_ops"]

_CONTROL_FLOW = ("If", "Loop", "Scan", "SequenceMap")


def parse_profile(
    path: Path,
    *,
    setup: Setup,
    form: str = "step",
    tokens_per_call: int = 1,
    skip: int = 0,
    wanted: str = "",
    assigned: Sequence[Assigned] = (),
) -> OpTimes:
    """Read the JSON that a session with ``enable_profiling`` wrote.

    Every node event lies inside one ``model_run`` event. A control-flow node (Scan, Loop, If) gets
    what is left after the nodes of its body, which are counted on their own: no time counts twice.

    ORT writes whole microseconds, rounded down: very small nodes are counted too low, and what is
    missing shows as time outside the operators.

    Args:
        form, tokens_per_call: what was fed, for the row.
        skip: calls at the beginning that are left out (warm-up).
        wanted: the target's execution provider; what another one ran is a fallback.
        assigned: which provider was given which node, if that is known.

    Raises:
        RuntimeFailure: the file is no profile, or holds no more than ``skip`` calls.
    """
    events = _events(path)
    runs = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") == "model_run")[skip:]
    if not runs:
        raise RuntimeFailure("the profile holds too few calls", got=path.name, allowed=f"more than {skip}")
    first = runs[0][0]
    kernels = [e for e in events if _is_kernel(e) and e["ts"] >= first]
    rows: dict[tuple[str, str], list[tuple[str, int]]] = defaultdict(list)
    timed = _own_times(kernels)
    for event, identity, own in timed:
        args = event["args"]
        rows[args["op_name"], args.get("provider", "unknown")].append((identity, own))
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
        wanted=wanted,
        assigned=dict(Counter(node.provider for node in assigned)),
        fallbacks=_fallbacks(map(_ran, timed), wanted, assigned) if wanted else (),
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
    runtime: str | None = None,
) -> OpTimes:
    """Profile an ONNX Runtime bundle: ``steps`` calls of ``tokens_per_call`` tokens at batch 1.

    Single steps are fed with the state carried, longer calls from the initial state each. In the whole form
    every call is one sequence of the nearest length that the model takes.

    Raises:
        BundleError, RuntimeFailure: the bundle can't be opened, run or profiled.
    """
    from xexport.core.manifest import read_manifest
    from xexport.runtimes.opening import CPU, open_engine

    manifest = read_manifest(bundle)
    contract = manifest.model.contract
    spec = contract.inputs
    source = np.asarray(tokens, dtype=spec.dtype)
    per_call = contract.nearest(tokens_per_call)
    carried = contract.streams and per_call == spec.multiple
    if carried and contract.max_tokens is not None:
        steps = min(steps, max(contract.max_tokens // per_call - warmup, 1))
    form = "step" if carried else "prefill" if contract.streams else "whole"

    def calls(cell: Cell) -> Iterator[int]:
        """Nanoseconds of each call after the warm-up."""
        for index in range(warmup + steps):
            if index == 0 or not carried:
                cell.reset()
            at = index * per_call
            values = np.take(source, range(at, at + per_call), axis=0, mode="wrap")
            began = time.perf_counter_ns()
            cell.run(np.ascontiguousarray(values[None]), 1 if contract.streams else 0)
            if index >= warmup:
                yield time.perf_counter_ns() - began

    engine: Any
    if (runtime or manifest.runtime) not in ("onnxruntime", "onnxruntime-web", CPU):
        engine = open_engine(bundle, manifest, runtime=runtime, threads=threads, profile=True)
        return _node_times(engine.cell(1), calls, manifest.provider, setup, form, per_call)
    with tempfile.TemporaryDirectory(prefix="xexport-profile-") as folder:
        prefix = Path(folder) / "profile"
        engine = open_engine(bundle, manifest, runtime=runtime, threads=threads, profile_prefix=prefix)
        for _ in calls(engine.cell(1)):
            pass
        assigned = engine.assigned()
        return parse_profile(
            engine.end_profiling(),
            setup=setup,
            form=form,
            tokens_per_call=per_call,
            skip=warmup,
            wanted=engine.provider,
            assigned=assigned,
        )


def _node_times(
    cell: Any,
    calls: Callable[[Cell], Iterator[int]],
    provider: str,
    setup: Setup,
    form: str,
    per_call: int,
) -> OpTimes:
    """By operator, of a cell that tells the time of every node after each call.

    Its ``node_times()`` gives (name, type, nanoseconds), or (name, type, provider, nanoseconds).
    """
    nodes: dict[tuple[str, str], set[str]] = defaultdict(set)
    times: Counter[tuple[str, str]] = Counter()
    runs, ran = [], []
    for run in calls(cell):
        runs.append(run)
        for name, kind, *where, ns in cell.node_times():
            if ns:
                ran.append(_Ran(name, kind, where[0] if where else provider, ns))
                nodes[kind, ran[-1].provider].add(name)
                times[kind, ran[-1].provider] += ns
    ops = tuple(
        OpTime(op, on, len(nodes[op, on]), len(nodes[op, on]) * len(runs), ns)
        for (op, on), ns in times.most_common()
    )
    fallbacks = _fallbacks(ran, provider)
    return OpTimes(setup, form, len(runs), per_call, ops, tuple(runs), wanted=provider, fallbacks=fallbacks)


class _Ran(NamedTuple):
    """One node in one call: its name, operator, provider, nanoseconds of its own, types of its inputs."""

    name: str
    op: str
    provider: str
    ns: int
    types: Sequence[str] = ()


def _fallbacks(ran: Iterable[_Ran], wanted: str, assigned: Sequence[Assigned] = ()) -> tuple[Fallback, ...]:
    """What ran on another provider than ``wanted``, by operator and reason, the dearest first."""
    domains = {node.name: node.domain for node in assigned}
    taken = Counter(node.op for node in assigned if node.provider == wanted)
    times: Counter[tuple[str, str, str]] = Counter()
    nodes: dict[tuple[str, str, str], dict[str, None]] = defaultdict(dict)
    for node in ran:
        if node.provider == wanted:
            continue
        why = why_on_cpu(node.op, domains.get(node.name, ""), wanted, taken[node.op], node.types)
        key = node.op, node.provider, why
        times[key] += node.ns
        nodes[key][node.name] = None
    return tuple(
        Fallback(op, provider, tuple(nodes[op, provider, why]), ns, why)
        for (op, provider, why), ns in times.most_common()
    )


def _ran(timed: tuple[dict[str, Any], str, int]) -> _Ran:
    """A node's event with what tells it from others and the microseconds of its own."""
    event, identity, own = timed
    args = event["args"]
    name = str(event["name"]).removesuffix("_kernel_time")
    provider = args.get("provider", "unknown")
    return _Ran(name or identity, args["op_name"], provider, own * 1000, _types(args))


def _types(args: Mapping[str, Any]) -> list[str]:
    """Element types of a node's inputs, each once."""
    rows = args.get("input_type_shape") or []
    return list(dict.fromkeys(str(kind) for row in rows if isinstance(row, dict) for kind in row))


def _events(path: Path) -> list[dict[str, Any]]:
    try:
        events = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RuntimeFailure("the profile can't be read", got=f"{path}: {error}") from error
    return [e for e in events if isinstance(e, dict) and "ts" in e and "dur" in e]


def _is_kernel(event: dict[str, Any]) -> bool:
    return str(event.get("name", "")).endswith("_kernel_time") and "op_name" in event.get("args", {})


def _own_times(events: list[dict[str, Any]]) -> list[tuple[dict[str, Any], str, int]]:
    """(event, what tells its node from others, microseconds without the events inside it).

    A node is known by its name, its index, and the nodes it lies in: bodies number theirs anew.
    """
    found: list[tuple[dict[str, Any], str, int]] = []
    open_: dict[Any, list[int]] = defaultdict(list)  # thread -> places in found, outer first
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        stack = open_[event.get("tid")]
        while stack and not _inside(event, found[stack[-1]][0]):
            stack.pop()
        identity = f"{event['name']}:{event['args'].get('node_index', '')}"
        if stack:
            outer, outer_identity, outer_own = found[stack[-1]]
            identity = f"{outer_identity}/{identity}"
            found[stack[-1]] = (outer, outer_identity, max(outer_own - event["dur"], 0))
        stack.append(len(found))
        found.append((event, identity, event["dur"]))
    return found


def _inside(event: dict[str, Any], outer: dict[str, Any]) -> bool:
    """Only control flow holds other nodes; an equal stamp alone is rounding to microseconds."""
    if outer["args"]["op_name"] not in _CONTROL_FLOW:
        return False
    begin, end = outer["ts"], outer["ts"] + outer["dur"]
    return bool(begin <= event["ts"] and event["ts"] + event["dur"] <= end)
