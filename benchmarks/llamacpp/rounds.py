"""Alternating runs: llama-bench in a process of its own, then our stream, then the other way round.

What slows the machine for a moment slows both, so a ratio is the median of the rounds' ratios. The
memory's read bandwidth is measured in every round too: on shared machines it changes by the second.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llamacpp.build import BenchmarkError, Log, Tools, run
from llamacpp.ours import last_logits_only, time_decode, time_prefill

__all__ = ["alternate", "bandwidth", "llama_bench", "llama_cpu", "pooled", "quartiles"]

Row = dict[str, Any]
_KEY = ("shape", "format", "threads", "work", "clock")
_SERIES = ("llama_tokens_per_s", "ours_tokens_per_s", "read_bytes_per_s")


def llama_bench(path: Path, tools: Tools, threads: int, prompt: int, steps: int) -> dict[str, float]:
    """Tokens/s by work (``"decode"``, ``"prefill"``) of one llama-bench process, after its own warm-up.

    Raises:
        BenchmarkError: it failed, or its output isn't what it was asked for.
    """
    command = [tools.program("llama-bench"), "-m", str(path), "-t", str(threads), "-r", "1", "-o", "json"]
    said = run([*command, "-p", str(prompt), "-n", str(steps)], "llama-bench", timeout=1800)
    found = {}
    for row in json.loads(said):
        work, count = ("prefill", row["n_prompt"]) if row["n_prompt"] else ("decode", row["n_gen"])
        (nanoseconds,) = row["samples_ns"]
        found[work] = count * 1e9 / nanoseconds
    if set(found) != {"decode", "prefill"}:
        raise BenchmarkError(f"llama-bench printed {sorted(found)}, not one decode and one prefill row")
    return found


def llama_cpu(path: Path, tools: Tools, prompt: int, steps: int) -> dict[str, float]:
    """Tokens by work per second of processor time, one thread.

    llama-bench tells wall time only, which on a busy machine says who else was there. So each work
    runs once and three times, and the difference of what the two processes used is two works: loading
    and warming up cancel.
    """
    found = {}
    for work, count in (("prefill", prompt), ("decode", steps)):
        asked = ["-p", str(prompt), "-n", "0"] if work == "prefill" else ["-p", "0", "-n", str(steps)]
        command = [tools.program("llama-bench"), "-m", str(path), "-t", "1", "-o", "json", *asked]
        used = []
        for repeats in (1, 3):
            before = _children_seconds()
            run([*command, "-r", str(repeats)], "llama-bench", timeout=1800)
            used.append(_children_seconds() - before)
        found[work] = 2 * count / (used[1] - used[0])
    return found


def _children_seconds() -> float:
    import resource  # not on Windows, where the rest runs

    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def bandwidth(threads: int) -> float:
    """Bytes/s that this many threads read from memory now: the fastest of several passes."""
    from xexport.evaluate.bandwidth import measure_bandwidth
    from xexport.evaluate.environment import make_setup

    setup = make_setup(model="", target="", bundle="", threads=threads)
    return float(measure_bandwidth(0, setup=setup).bytes_per_s)


def alternate(
    path: Path,
    stream: Any,
    tools: Tools,
    *,
    threads: int,
    prompt: int,
    steps: int,
    rounds: int,
    clock: str,
    log: Log,
) -> dict[str, Row]:
    """Work -> raw tokens/s of both sides, one sample a round; who goes first alternates.

    Args:
        path: the GGUF file.
        stream: the bundle's, opened with as many threads.
        prompt, steps: tokens of a prefill, and single steps of a decode.
        clock: ``"wall"``, or ``"cpu"`` for processor time (one thread, on a busy machine).
    """
    now = time.perf_counter if clock == "wall" else time.thread_time
    tokens = np.random.default_rng(0).integers(0, stream.vocab_size, (1, max(prompt, steps)), dtype=np.int64)
    last = last_logits_only(stream)

    def ours() -> dict[str, float]:
        prefill = prompt / time_prefill(stream, tokens[:, :prompt], now, last=last)
        return {"prefill": prefill, "decode": steps / time_decode(stream, tokens, steps, now)}

    def llama() -> dict[str, float]:
        if clock == "cpu":
            return llama_cpu(path, tools, prompt, steps)
        return llama_bench(path, tools, threads, prompt, steps)

    ours()
    sides: dict[str, Callable[[], dict[str, float]]] = {"llama": llama, "ours": ours}
    rows: dict[str, Row] = {
        work: {name: [] for name in _SERIES} | {"last_logits_only": last, "clock": clock}
        for work in ("decode", "prefill")
    }
    for number in range(rounds):
        order = ("llama", "ours") if number % 2 == 0 else ("ours", "llama")
        found = {side: sides[side]() for side in order}
        read = bandwidth(threads)
        for work, row in rows.items():
            row["llama_tokens_per_s"].append(found["llama"][work])
            row["ours_tokens_per_s"].append(found["ours"][work])
            row["read_bytes_per_s"].append(read)
        log(
            f"  {threads} thread(s), round {number + 1}/{rounds}: "
            + ", ".join(f"{w} {found['llama'][w]:.0f} : {found['ours'][w]:.0f}" for w in rows)
        )
    return rows


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """25%, median, 75% of at least one value."""
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def pooled(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows of several runs as one: samples of the same shape, format, threads, work and clock are joined.

    Derived figures are computed anew; everything else is taken from the last row of a kind.
    """
    merged: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = tuple(row[k] for k in _KEY)
        before = merged.get(key)
        joined = {s: [*(before[s] if before else ()), *row[s]] for s in _SERIES}
        merged[key] = {**row, **joined}
    return [{**row, **_figures(row)} for row in merged.values()]


def _figures(row: Mapping[str, Any]) -> Row:
    """Medians, the rounds' ratios, and for decode the share of the memory's bandwidth."""
    llama, ours, read = (row[s] for s in _SERIES)
    ratios = [mine / theirs for mine, theirs in zip(ours, llama, strict=True)]
    figures: Row = {
        "rounds": len(ratios),
        "llama": statistics.median(llama),
        "ours": statistics.median(ours),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": quartiles(ratios),
        "read_gb_per_s": statistics.median(read) / 1e9,
        "read_gb_per_s_best": max(read) / 1e9,
    }
    if row["work"] == "decode" and row["clock"] == "wall":
        for side, speeds in (("llama", llama), ("ours", ours)):
            weight = row[f"{side}_bytes_per_token"]
            shares = [weight * s / r for s, r in zip(speeds, read, strict=True)]
            figures[f"{side}_of_bandwidth"] = statistics.median(shares)
            figures[f"{side}_of_best_bandwidth"] = weight * statistics.median(speeds) / max(read)
    return figures
