"""OpenVINO: a bundle's inlined graph as models of fixed shape, with the state in OpenVINO variables.

Source: OpenVINO 2026 documentation, "Stateful models and State API" and "Changing Input Shapes".

The file stays the one dynamic graph. Opened as it is, OpenVINO 2026.4's CPU plugin gives wrong numbers for
several models as soon as T changes between calls (measured: RetNet, RWKV-4, Mamba with a branch on T), so
every length that is asked for is a model of its own: the graph is read once a length, reshaped to [B,T],
its float state becomes variables (MakeStateful), and it is compiled when it is first needed. A longer
input is fed in the lengths of the target's ``lengths``, largest first. Integer state (positions) stays an
input and an output, since a variable of the CPU plugin can't be int64. A model in the whole form is compiled
for every length that comes; the last few are kept.

OpenVINO's CPU plugin computes int64 as int32. A graph that relies on more is refused at the export, which
compares every bundle with ONNX Runtime's results.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xexport.core.errors import RuntimeFailure
from xexport.core.manifest import Manifest, safe_path
from xexport.core.state import StateSpec, state_shape
from xexport.runtimes.inputs import Inputs, pieces

__all__ = ["OpenVinoCell", "OpenVinoEngine", "open_engine", "unavailable"]

Array = npt.NDArray[Any]
_KEPT = 4  # lengths of a whole-form model


def unavailable(provider: str) -> str | None:
    """Why this machine can't run an OpenVINO device, or None if it can."""
    import openvino

    devices = openvino.Core().available_devices
    return None if provider in devices else f"OpenVINO has no device {provider}; it has {', '.join(devices)}"


def open_engine(
    folder: Path, manifest: Manifest, *, threads: int = 0, profile: bool = False
) -> OpenVinoEngine:
    """Open the graph of a bundle; lengths are compiled when they are first run.

    Args:
        folder: the bundle.
        manifest: its manifest.
        threads: 0 takes every physical core.
        profile: keep the time of every node (:meth:`OpenVinoCell.node_times`).

    Raises:
        RuntimeFailure: OpenVINO is not installed, lacks the device, or refuses the graph.
    """
    try:
        import openvino
    except ImportError as error:
        raise RuntimeFailure(
            "the bundle is for OpenVINO, which is not installed",
            got=error,
            fix="pip install 'xexport[openvino]', or run it with --runtime onnxruntime",
        ) from error
    why = unavailable(manifest.provider)
    if why is not None:
        raise RuntimeFailure(f"the bundle is for OpenVINO's {manifest.provider}, which isn't here", got=why)
    config: dict[str, Any] = {**_options(manifest), "INFERENCE_NUM_THREADS": threads}
    if profile:
        config["PERF_COUNT"] = "YES"
    began = time.perf_counter()
    core = openvino.Core()
    path = safe_path(folder, manifest.graph)
    try:
        core.read_model(path)
    except RuntimeError as error:
        raise _refused(error, "read") from error
    return OpenVinoEngine(core, path, manifest, threads, config, time.perf_counter() - began)


@dataclass(frozen=True)
class OpenVinoEngine:
    """An opened graph; cells of one batch size share the compiled models.

    Attributes:
        core: ``openvino.Core``.
        path: the graph.
        manifest: what was opened.
        threads: as asked; 0 is OpenVINO's default.
        config: properties every model is compiled with.
        load_seconds: how long reading the graph took; compiling comes on top, at the first run.
    """

    core: Any
    path: Path
    manifest: Manifest
    threads: int
    config: Mapping[str, Any]
    load_seconds: float
    _compiled: dict[tuple[int, int], Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def cell(self, batch: int) -> OpenVinoCell:
        """The state of ``batch`` parallel sequences."""
        return OpenVinoCell(self, batch)

    def lengths(self) -> tuple[int, ...]:
        """Steps of one call, largest first; the last is the smallest call there is."""
        return self.manifest.model.contract.prepared(self.manifest.target_row.get("lengths") or [])

    def compiled(self, batch: int, length: int) -> Any:
        """The model of one shape.

        Raises:
            RuntimeFailure: OpenVINO can't compile the graph.
        """
        key = batch, length
        if key not in self._compiled:
            if not self.manifest.model.contract.streams:
                _forget(self._compiled)
            try:
                model = self.core.read_model(self.path)
                model.reshape(_shapes(model, self.manifest, batch, length))
                _make_stateful(model, self.manifest)
                self._compiled[key] = self.core.compile_model(
                    model, self.manifest.provider, dict(self.config)
                )
            except RuntimeError as error:
                raise _refused(error, f"compile [B={batch}, T={length}] of") from error
        return self._compiled[key]


class OpenVinoCell:
    """One stream: a request a length, of which one holds the present state.

    Attributes:
        keeps: False; the logits of every position are computed.
    """

    keeps = False

    def __init__(self, engine: OpenVinoEngine, batch: int) -> None:
        manifest = engine.manifest
        self._engine, self._batch, self._contract = engine, batch, manifest.model.contract
        self._specs = [StateSpec(s.name, s.shape, s.dtype, s.init) for s in manifest.state]
        self._whole = {s.name: s.output for s in manifest.state if s.dtype == "int64"}
        self._integers: dict[str, Array] = {}
        self._requests: dict[int, Any] = {}
        self._variables: dict[int, dict[str, Any]] = {}
        self._active = 0  # the length whose request holds the float state; 0 before the first run
        self._first: dict[str, Array] = {}
        self.reset()

    def run(self, inputs: Inputs, keep: int = 0) -> npt.NDArray[np.float32]:
        """Run ids ``[B,T]`` or features ``[B,T,F]``; after a failure the state is as before."""
        longer = self._contract.streams and inputs.shape[1] > self._contract.inputs.multiple
        before = self.read() if longer else None
        try:
            cut = pieces(inputs, self._engine.lengths()) if self._contract.streams else [inputs]
            parts = [self._call(part) for part in cut]
        except RuntimeError as error:
            if before is not None:
                self.write(before)
            raise RuntimeFailure("OpenVINO failed to run the graph", got=_brief(error)) from error
        logits = parts[0] if len(parts) == 1 else np.concatenate(parts, 1)
        return logits[:, -keep:].copy() if keep else logits

    def read(self) -> dict[str, Array]:
        """A copy of the present state."""
        if not self._active:
            return {s.name: self._first[s.name].copy() for s in self._specs}
        variables = self._variables[self._active]
        return {
            s.name: (self._integers[s.name] if s.name in self._whole else variables[s.name].state.data).copy()
            for s in self._specs
        }

    def reset(self) -> None:
        """Back to the state before the first token."""
        self.write({s.name: np.full(state_shape(s, self._batch), s.init, s.dtype) for s in self._specs})

    def write(self, tensors: Mapping[str, Array]) -> None:
        """Overwrite the present state; it goes into a request at the next run."""
        self._first = {s.name: tensors[s.name].copy() for s in self._specs}
        self._integers = {name: self._first[name] for name in self._whole}
        self._active = 0

    def node_times(self) -> list[tuple[str, str, int]]:
        """(name, type, nanoseconds) of every node in the last call; needs ``open_engine(profile=True)``."""
        rows = self._requests[self._active].profiling_info
        return [(r.node_name, r.node_type, round(r.real_time.total_seconds() * 1e9)) for r in rows]

    def _call(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        request = self._request(inputs.shape[1])
        feeds: dict[str, Any] = {self._contract.inputs.name: np.ascontiguousarray(inputs), **self._integers}
        found = request.infer(feeds, share_inputs=False)
        self._integers = {name: found[output].copy() for name, output in self._whole.items()}
        logits: npt.NDArray[np.float32] = found["logits"].copy()
        return logits

    def _request(self, length: int) -> Any:
        """The request of a length, with the present float state in its variables."""
        if length not in self._requests:
            if not self._contract.streams:
                _forget(self._requests)
            request = self._engine.compiled(self._batch, length).create_infer_request()
            self._requests[length] = request
            self._variables[length] = _variables(request, self._specs)
        if self._active != length:
            self._fill(self._variables[length])
            self._active = length
        return self._requests[length]

    def _fill(self, target: Mapping[str, Any]) -> None:
        import openvino

        source = self._variables.get(self._active)
        for name, variable in target.items():
            value = self._first[name] if source is None else source[name].state.data
            variable.state = openvino.Tensor(np.array(value))


def _forget(kept: dict[Any, Any]) -> None:
    """Drop the oldest, so that there is room for one more."""
    while len(kept) >= _KEPT:
        del kept[next(iter(kept))]


def _shapes(model: Any, manifest: Manifest, batch: int, length: int) -> dict[str, list[int]]:
    """Every input's shape once B and T are known."""
    spec = manifest.model.contract.inputs
    found: dict[str, list[int]] = {spec.name: list(spec.shape(batch, length))}
    for state in manifest.state:
        found[state.name] = [batch if d == "B" else int(d) for d in state.shape]
    given = {name for port in model.inputs for name in port.names}
    return {name: shape for name, shape in found.items() if name in given}


def _make_stateful(model: Any, manifest: Manifest) -> None:
    """Float state tensors become variables, which stay in the plugin's own memory and layout."""
    from openvino.passes import MakeStateful, Manager

    manager = Manager()
    manager.register_pass(MakeStateful({s.name: s.output for s in manifest.state if s.dtype != "int64"}))
    manager.run_passes(model)
    model.validate_nodes_and_infer_types()


def _variables(request: Any, specs: Sequence[StateSpec]) -> dict[str, Any]:
    """State name -> variable; OpenVINO names one after the input and the output it was made of."""
    found = {v.name: v for v in request.query_state()}
    named = {}
    for spec in specs:
        match = [v for name, v in found.items() if name.startswith(f"{spec.name}{spec.name}")]
        if spec.dtype != "int64":
            (named[spec.name],) = match
    return named


def _options(manifest: Manifest) -> dict[str, str]:
    row = manifest.target_row.get("provider_options") or {}
    return {str(k): str(v) for k, v in row.items()}


def _refused(error: Exception, verb: str) -> RuntimeFailure:
    return RuntimeFailure(
        f"OpenVINO can't {verb} the graph",
        got=_brief(error),
        fix="run the bundle with --runtime onnxruntime, or export for a cpu-* target",
    )


def _brief(error: Exception) -> str:
    """The sentence of OpenVINO's message, without its source files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith(("Exception from", "Check "))]
    return (said or lines or ["no message"])[0][:300]
