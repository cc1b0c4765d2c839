"""What every benchmark shares: options, the configuration it ran in, interleaved timing, a table, JSON.

Two things timed one after the other differ by whatever else the machine did meanwhile. So all
candidates of a comparison take turns, round by round, and a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from xexport.evaluate.environment import environment

__all__ = ["header", "interleaved", "median_ratio", "microseconds", "options", "save", "table"]

_CONSOLE = Console(width=160, highlight=False)


def options(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have; the first line of ``doc`` describes it."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: a smoke test")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: processor time of this thread, for one thread on a busy machine",
    )
    parser.add_argument("--json", type=Path, metavar="F", help="write configuration and rows to this file")
    return parser


def header(title: str, **config: Any) -> dict[str, Any]:
    """Print the title, the machine and the configuration; returns them as a dict."""
    machine = asdict_of(environment())
    _CONSOLE.print(f"[bold]{title}[/bold]")
    _CONSOLE.print(
        f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_average']}; onnxruntime "
        f"{machine['onnxruntime']}, torch {machine['torch']}, python {machine['python']}"
    )
    if config:
        _CONSOLE.print(", ".join(f"{k} {v}" for k, v in config.items()))
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"benchmark": title, "date": date, "machine": machine, "config": config}


def asdict_of(record: Any) -> dict[str, Any]:
    """A dataclass or msgspec struct as a plain dict."""
    import msgspec

    if isinstance(record, msgspec.Struct):
        plain: dict[str, Any] = msgspec.to_builtins(record)
        return plain
    return asdict(record)


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    repeat: int = 1,
    warmup: int = 1,
    clock: str = "wall",
) -> dict[str, list[float]]:
    """Seconds a call of every candidate, one sample a round; the order turns from round to round.

    Args:
        calls: candidate name -> what is timed.
        repeat: calls a sample (their mean is kept), for calls too short to time alone.
        warmup: calls thrown away first.
        clock: ``"wall"``, or ``"cpu"`` for the time that this thread had the processor.
    """
    now = time.perf_counter if clock == "wall" else time.thread_time
    names = list(calls)
    for name in names:
        for _ in range(warmup):
            calls[name]()
    samples: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                call = calls[name]
                began = now()
                for _ in range(repeat):
                    call()
                samples[name].append((now() - began) / repeat)
    finally:
        gc.enable()
    return samples


def median_ratio(samples: Sequence[float], base: Sequence[float]) -> float:
    """How many times as fast as ``base``: the median over rounds of base / sample."""
    return statistics.median(b / s for s, b in zip(samples, base, strict=True))


def microseconds(samples: Sequence[float]) -> float:
    """The median in microseconds."""
    return statistics.median(samples) * 1e6


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows; the first column is left-aligned, numbers to the right."""
    grid = Table(title=title, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        grid.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        grid.add_row(*(_text(cell) for cell in row))
    _CONSOLE.print(grid)


def _text(cell: Any) -> str:
    if isinstance(cell, float):
        if cell != 0 and abs(cell) < 0.01:
            return f"{cell:.1e}"
        return f"{cell:.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
    return str(cell)


def save(path: Path | None, about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the configuration and every row, raw samples included, if a file was asked for."""
    if path is not None:
        path.write_text(json.dumps({**about, "rows": list(rows)}, indent=1) + "\n", encoding="utf-8")
