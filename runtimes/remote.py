"""An engine in another process: the interpreter of an isolated environment runs the graph (worker.py)."""

from __future__ import annotations

import subprocess
import tempfile
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from xexport.core.errors import RuntimeFailure
from xexport.core.manifest import Manifest
from xexport.runtimes.environments import worker_command
from xexport.runtimes.inputs import Inputs
from xexport.runtimes.placement import Assigned
from xexport.runtimes.wire import Tensors, read_frame, write_frame

__all__ = ["RemoteCell", "RemoteEngine", "open_engine"]

_PATIENCE = 5.0  # seconds a worker has to end by itself once its input has ended


def open_engine(
    folder: Path, manifest: Manifest, environment: str, *, threads: int = 0, **options: Any
) -> RemoteEngine:
    """Open the graph of a bundle in a worker process of an environment.

    Args:
        folder: the bundle.
        manifest: its manifest.
        environment: a row of environments.toml.
        threads: 0 takes every physical core.
        options: what the runtime's own ``open_engine`` takes besides.

    Raises:
        RuntimeFailure: the environment is not installed, the worker ended, or the runtime refused the graph.
        UnknownNameError: there is no such environment.
    """
    link = _Link(environment)
    told = {key: str(value) if isinstance(value, Path) else value for key, value in options.items() if value}
    opened, _ = link.ask({"op": "open", "bundle": str(folder.resolve()), "threads": threads, "options": told})
    return RemoteEngine(link, manifest, environment, opened)


class RemoteEngine:
    """A graph that another process has opened; the process ends with this object.

    Attributes:
        manifest: what was opened.
        environment: where.
        version: of the runtime there.
        load_seconds: how long the runtime took to open the graph there.
        rss_before: resident bytes of the worker before it opened the graph.
    """

    def __init__(self, link: _Link, manifest: Manifest, environment: str, opened: Mapping[str, Any]) -> None:
        self.manifest, self.environment = manifest, environment
        self.version = str(opened.get("version", ""))
        self.load_seconds = float(opened.get("load_seconds", 0))
        self.rss_before = int(opened.get("rss", 0))
        self._provider = str(opened.get("provider") or manifest.provider)
        self._link = link

    def cell(self, batch: int) -> RemoteCell:
        """The state of ``batch`` parallel sequences, in the worker."""
        row, _ = self._link.ask({"op": "cell", "batch": batch})
        return RemoteCell(self._link, int(row["cell"]), keeps=bool(row.get("keeps")))

    def memory(self) -> dict[str, int]:
        """``rss`` and ``peak_bytes`` of the worker."""
        row, _ = self._link.ask({"op": "memory"})
        return {key: int(row.get(key, 0)) for key in ("rss", "peak_bytes")}

    @property
    def provider(self) -> str:
        """The execution provider, or device, that the bundle is for, as the profile there calls it."""
        return self._provider

    def assigned(self) -> list[Assigned]:
        """Which provider took which node, of an engine with a ``profile_prefix``."""
        return [Assigned(*map(str, node)) for node in self._link.ask({"op": "assigned"})[0]["nodes"]]

    def end_profiling(self) -> Path:
        """The profile that the worker's ONNX Runtime wrote."""
        row, _ = self._link.ask({"op": "end_profiling"})
        return Path(row["path"])


class RemoteCell:
    """One stream's state in a worker; see :class:`xexport.runtimes.engine.Cell`.

    Attributes:
        keeps: as the worker's cell.
        inside_ns: how long the last run took inside the worker, without the way there and back.
    """

    def __init__(self, link: _Link, number: int, *, keeps: bool) -> None:
        self.keeps = keeps
        self.inside_ns: int | None = None
        self._link, self._number = link, number

    def run(self, inputs: Inputs, keep: int = 0) -> npt.NDArray[np.float32]:
        """Run ids ``[B,T]`` or features ``[B,T,F]``; after a failure the state is as before."""
        row, tensors = self._ask("run", {"inputs": inputs}, keep=keep)
        self.inside_ns = int(row["ns"])
        return tensors["logits"]

    def read(self) -> Tensors:
        """A copy of the present state."""
        return self._ask("read")[1]

    def reset(self) -> None:
        """Back to the state before the first token."""
        self._ask("reset")

    def write(self, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
        """Overwrite the present state."""
        self._ask("write", tensors)

    def node_times(self) -> list[tuple[Any, ...]]:
        """(name, type, nanoseconds) of every node in the last call; the provider may come before the time."""
        rows = self._ask("node_times")[0]["nodes"]
        return [(*map(str, row[:-1]), int(row[-1])) for row in rows]

    def _ask(
        self, op: str, tensors: Mapping[str, npt.NDArray[Any]] | None = None, **parts: Any
    ) -> tuple[dict[str, Any], Tensors]:
        return self._link.ask({"op": op, "cell": self._number, **parts}, tensors)


class _Link:
    """A worker process and the pipes to it; one request at a time, from any thread."""

    def __init__(self, environment: str) -> None:
        command, variables = worker_command(environment)
        self._environment = environment
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, env=variables
            )
        except OSError as error:
            raise RuntimeFailure(f"the worker of {environment!r} can't be started", got=error) from error
        self._lock = threading.Lock()
        self._end = weakref.finalize(self, _stop, self._process, self._errors)

    def ask(
        self, header: Mapping[str, Any], tensors: Mapping[str, npt.NDArray[Any]] | None = None
    ) -> tuple[dict[str, Any], Tensors]:
        """Send a request and wait for its answer.

        Raises:
            RuntimeFailure: the worker ended, or says that it failed.
        """
        with self._lock:
            try:
                write_frame(cast("BinaryIO", self._process.stdin), header, tensors or {})
                answer = read_frame(cast("BinaryIO", self._process.stdout))
            except (OSError, RuntimeFailure) as error:
                raise self._ended(error) from error
        if answer is None:
            raise self._ended(None)
        row, found = answer
        if not row.get("ok"):
            raise RuntimeFailure(
                str(row.get("error") or "the worker failed"),
                got=row.get("got"),
                allowed=row.get("allowed"),
                fix=row.get("fix"),
            )
        return row, found

    def _ended(self, error: Exception | None) -> RuntimeFailure:
        self._process.kill()
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        said = "; ".join(lines[-2:]) or (str(error) if error else "it said nothing")
        how = f"exit code {code}" if code >= 0 else f"signal {-code}"
        return RuntimeFailure(
            f"the worker of the environment {self._environment!r} ended",
            got=f"{how}: {said}",
            fix=f"python -m xexport.runtimes.environments install {self._environment}",
        )


def _stop(process: subprocess.Popen[bytes], errors: Any) -> None:
    """End a worker: its input ends, and it is killed if that was not enough."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    errors.close()
