"""The Python side of a worker process: a bundle in another interpreter, asked through frames (wire.py).

It needs numpy, msgspec and the runtime's own package, neither torch nor onnx. One request, one answer:

| op | asks | answers |
|---|---|---|
| ``open`` | bundle, threads, options | runtime, version, load_seconds, rss (before), perhaps provider |
| ``cell`` | batch | cell (a number) |
| ``run`` | cell, keep, tensor ``inputs`` | ns (inside the worker), tensor ``logits`` |
| ``read``, ``write``, ``reset`` | cell (and the state's tensors) | the state's tensors, or nothing |
| ``node_times`` | cell | nodes: name, type (and provider), nanoseconds of the last call |
| ``assigned`` | | nodes: name, operator, domain, provider (ONNX Runtime, opened with a ``profile_prefix``) |
| ``end_profiling`` | | path of the profile (ONNX Runtime, opened with a ``profile_prefix``) |
| ``memory`` | | rss, peak_bytes of this process |

A failed request is answered by ``ok: false`` with the four parts of an error, and the worker lives on. It
ends when its input ends.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from xexport.core.errors import RuntimeFailure, XexportError
from xexport.core.manifest import read_manifest
from xexport.runtimes.wire import Tensors, read_frame, write_frame

__all__ = ["Worker", "main", "memory_facts"]

#: of ``open``: what open_engine of some runtime takes besides the threads
_OPTIONS = ("profile", "profile_prefix")
_Answer = tuple[dict[str, Any], Mapping[str, Any]]


class Worker:
    """What the requests work on: one engine, and the cells that were made of it."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._cells: list[Any] = []
        self._operations: dict[str, Callable[[dict[str, Any], Tensors], _Answer]] = {
            "open": self._open,
            "cell": self._cell,
            "run": self._run,
            "read": lambda row, _: ({}, self._of(row).read()),
            "write": self._write,
            "reset": self._reset,
            "node_times": lambda row, _: ({"nodes": [list(n) for n in self._of(row).node_times()]}, {}),
            "assigned": lambda _row, _: ({"nodes": [list(n) for n in self._engine.assigned()]}, {}),
            "end_profiling": lambda _row, _: ({"path": str(self._engine.end_profiling())}, {}),
            "memory": lambda _row, _: (memory_facts(), {}),
        }

    def answer(self, row: dict[str, Any], tensors: Tensors) -> _Answer:
        """Do one request; every failure is an answer too."""
        try:
            operation = self._operations.get(str(row.get("op")))
            if operation is None:
                raise RuntimeFailure(
                    "unknown request", got=row.get("op"), allowed=", ".join(self._operations)
                )
            header, out = operation(row, tensors)
            return {"ok": True, **header}, out
        except XexportError as error:
            parts = {key: getattr(error, key) for key in ("got", "allowed", "fix")}
            told = {key: None if value is None else str(value) for key, value in parts.items()}
            return {"ok": False, "error": error.what, **told}, {}
        except Exception as error:  # the worker outlives whatever its runtime raises
            return {"ok": False, "error": "the worker failed", "got": f"{type(error).__name__}: {error}"}, {}

    def _open(self, row: dict[str, Any], _: Tensors) -> _Answer:
        before = memory_facts()
        folder = Path(row["bundle"])
        manifest = read_manifest(folder)
        options = {key: row["options"][key] for key in _OPTIONS if key in row.get("options", {})}
        runtime = import_module(f"xexport.runtimes.{manifest.runtime}")
        self._engine = runtime.open_engine(folder, manifest, threads=int(row.get("threads", 0)), **options)
        package = import_module(manifest.runtime)
        return {
            "runtime": manifest.runtime,
            "version": str(getattr(package, "__version__", "")),
            "load_seconds": self._engine.load_seconds,
            **before,
        }, {}

    def _cell(self, row: dict[str, Any], _: Tensors) -> _Answer:
        if self._engine is None:
            raise RuntimeFailure("no bundle is open in this worker")
        cell = self._engine.cell(int(row["batch"]))
        self._cells.append(cell)
        return {"cell": len(self._cells) - 1, "keeps": bool(cell.keeps)}, {}

    def _run(self, row: dict[str, Any], tensors: Tensors) -> _Answer:
        began = time.perf_counter_ns()
        logits = self._of(row).run(tensors["inputs"], int(row.get("keep", 0)))
        return {"ns": time.perf_counter_ns() - began}, {"logits": logits}

    def _write(self, row: dict[str, Any], tensors: Tensors) -> _Answer:
        self._of(row).write(tensors)
        return {}, {}

    def _reset(self, row: dict[str, Any], _: Tensors) -> _Answer:
        self._of(row).reset()
        return {}, {}

    def _of(self, row: dict[str, Any]) -> Any:
        return self._cells[int(row["cell"])]


def memory_facts() -> dict[str, int]:
    """Resident bytes of this process now and at most, where the system says."""
    found = {"rss": 0, "peak_bytes": 0}
    names = {"VmRSS:": "rss", "VmHWM:": "peak_bytes"}
    try:
        with Path("/proc/self/status").open(encoding="ascii", errors="replace") as status:
            for line in status:
                key, *rest = line.split()
                if key in names:
                    found[names[key]] = int(rest[0]) * 1024
    except OSError:
        pass
    return found


def main(source: BinaryIO | None = None, out: BinaryIO | None = None) -> None:
    """Answer until the input ends. Whatever else prints goes to stderr: stdout carries frames alone."""
    source = source or sys.stdin.buffer
    if out is None:
        out = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
    worker = Worker()
    while (frame := read_frame(source)) is not None:
        header, tensors = worker.answer(*frame)
        write_frame(out, header, tensors)


if __name__ == "__main__":
    main()
