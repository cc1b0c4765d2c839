"""ONNX Runtime: opening a bundle's graph, and state that lives in ping-pong IO bindings.

A stream keeps two sets of state buffers (state_buffers.py). One binding reads set 0 and writes set 1, the
other the reverse; both are made once, so a token costs no Python work per state tensor. A cache that a native
kernel appends to is bound to input and output at once. Measured with onnxruntime 1.31 on one Zen 3 core:
``Stream.feed`` of one token costs 8 us + 0.3 us a state tensor (checks and the caller's copy of the logits
included), ``session.run`` with numpy 10 us + 2.7 us.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xexport.core.errors import BundleError, RuntimeFailure, first_line
from xexport.core.manifest import KEEP_INPUT, Manifest, safe_path
from xexport.runtimes import placement, qnn
from xexport.runtimes.device_cell import DeviceCell, host_value
from xexport.runtimes.inputs import Inputs
from xexport.runtimes.native import NativeKernels, find_native
from xexport.runtimes.state_buffers import StateBuffers, aligned, check_appended
from xexport.runtimes.static import StaticEngine

__all__ = ["OrtCell", "OrtEngine", "WholeCell", "compile_contexts", "failed", "open_engine", "unavailable"]

Array = npt.NDArray[Any]
_CPU = "CPUExecutionProvider"
#: on another provider our kernels would only pull their nodes, and the state with them, back to the CPU
_NO_NATIVE = NativeKernels(None, "the kernels are for the CPU provider")
_OLDEST = (1, 23)  # the first with every operator of opset 23; 1.22.1 refuses the graph


def unavailable(provider: str) -> str | None:
    """Why this machine can't run an execution provider, or None if it can."""
    import onnxruntime as ort

    version = tuple(int(p) for p in ort.__version__.split(".")[:2])
    if version < _OLDEST:
        return f"onnxruntime {ort.__version__} is older than {_OLDEST[0]}.{_OLDEST[1]} (opset 23)"
    if provider == qnn.PROVIDER:
        return qnn.unavailable()
    if provider not in ort.get_available_providers():
        return f"this onnxruntime has no {provider}; it has {', '.join(ort.get_available_providers())}"
    return None


def open_engine(
    folder: Path,
    manifest: Manifest,
    *,
    threads: int = 0,
    profile_prefix: Path | str | None = None,
) -> OrtEngine | StaticEngine:
    """Open the graph of a bundle, or its graphs of fixed shape.

    Args:
        folder: the bundle.
        manifest: its manifest.
        threads: intra-op threads; 0 takes every physical core.
        profile_prefix: write ORT's per-operator profile to files of this prefix (read it after
            ``engine.end_profiling()``), and keep which provider took which node (``engine.assigned()``).

    Raises:
        RuntimeFailure: the provider isn't available, ORT refused the graph, or the target promises full
            placement and nodes would fall back to the CPU (they are named).
        BundleError: the graph's inputs and outputs aren't those of the manifest, or an option of
            the manifest names a path.
    """
    # a bundle of another runtime names that one's devices: it runs here on the CPU
    own = manifest.runtime == "onnxruntime"
    provider = manifest.provider if own else _CPU
    why = unavailable(provider)
    if why is not None:
        raise RuntimeFailure(
            f"the bundle is for {provider}, which can't run here",
            got=why,
            fix="run it where that provider is installed, or export for a target `xexport doctor` can run",
        )
    check_appended(manifest.state)
    native = find_native() if provider == _CPU else _NO_NATIVE
    settings = _options_of(manifest, "provider_options") if own else {}

    def opened(name: str, *, promised: bool = True) -> Any:
        """The session of one graph, by the provider that was asked for."""
        path = safe_path(folder, name)
        options = _session_options(manifest, threads, native, apart=profile_prefix is not None)
        if promised and provider != _CPU and manifest.target_row.get("full_placement"):
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        if profile_prefix is not None:
            options.enable_profiling = True
            options.profile_file_prefix = f"{profile_prefix}-{path.stem}"
        if profile_prefix is not None or not promised:
            placement.record(options)
        try:
            session = _session(path, options, provider, settings)
        except Exception as error:  # ORT's exception classes share no public base
            if placement.is_broken_promise(error):
                raise placement.broken_promise(opened(name, promised=False), provider) from error
            raise _refused(error, path) from error
        _check_signature(session, manifest)
        return session

    def opened_context(length: int) -> Any:
        """The session of a compiled graph, or None where it was compiled for another device."""
        if provider == _CPU or length not in manifest.contexts:
            return None
        try:
            return opened(manifest.contexts[length])
        except RuntimeFailure:
            return None

    began = time.perf_counter()
    if manifest.graphs:
        sessions = {
            length: opened_context(length) or opened(name)
            for length, name in sorted(manifest.graphs.items(), reverse=True)
        }
        return StaticEngine(sessions, manifest, threads, provider, time.perf_counter() - began)
    session = opened(manifest.graph)
    return OrtEngine(session, manifest, threads, native, time.perf_counter() - began)


def compile_contexts(folder: Path, manifest: Manifest) -> dict[int, str]:
    """Compile a bundle's graphs of fixed shape for its provider and write the results beside them.

    Returns:
        T -> file name, for :attr:`Manifest.contexts`.

    Raises:
        RuntimeFailure: the provider refused a graph, or would leave nodes of it to the CPU (they are named).
    """
    settings = _options_of(manifest, "provider_options")
    made = {}
    for length, name in manifest.graphs.items():
        graph, made[length] = safe_path(folder, name), f"{Path(name).stem}.context.onnx"
        options = _session_options(manifest, 0, _NO_NATIVE)
        if manifest.target_row.get("full_placement"):
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        qnn.add_provider(options, settings)
        try:
            qnn.write_context(graph, options, safe_path(folder, made[length]))
        except Exception as error:  # ORT's exception classes share no public base
            open_engine(folder, manifest)  # says which nodes
            raise _refused(error, graph) from error
    return made


def _session(path: Path, options: Any, provider: str, settings: Mapping[str, str]) -> Any:
    """An ``onnxruntime.InferenceSession``; a plugin's provider comes with the options."""
    import onnxruntime as ort

    if provider == qnn.PROVIDER:
        qnn.add_provider(options, settings)
        with qnn.quiet_stdout():
            return ort.InferenceSession(str(path), options)
    return ort.InferenceSession(str(path), options, providers=[(provider, settings)], enable_fallback=0)


@dataclass(frozen=True)
class OrtEngine:
    """An opened graph; cells share its weights.

    Attributes:
        session: the ``onnxruntime.InferenceSession``.
        manifest: what was opened.
        threads: as asked; 0 is ORT's default.
        native: the kernel library registered with the session, or why none.
        load_seconds: how long ORT took to open the graph.
    """

    session: Any
    manifest: Manifest
    threads: int
    native: NativeKernels
    load_seconds: float

    def cell(self, batch: int) -> OrtCell | WholeCell | DeviceCell:
        """State buffers and bindings for ``batch`` parallel sequences."""
        if not self.manifest.model.contract.streams:
            return WholeCell(self.session, self.manifest)
        if self.provider != _CPU:
            return DeviceCell(self.session, self.manifest, batch)
        return OrtCell(self.session, self.manifest, batch, self.in_place())

    def end_profiling(self) -> Path:
        """The file of the profile, complete; only of an engine with a ``profile_prefix``."""
        return Path(self.session.end_profiling())

    @property
    def provider(self) -> str:
        """The execution provider that was asked for: a bundle of another runtime runs on the CPU."""
        return self.manifest.provider if self.manifest.runtime == "onnxruntime" else _CPU

    def assigned(self) -> list[placement.Assigned]:
        """Which provider took which node; only of an engine with a ``profile_prefix``."""
        return placement.assignment(self.session)

    def in_place(self) -> frozenset[str]:
        """State tensors with one buffer: appended to by a kernel that is there and writes in place.

        A function body is no such thing: it may read the old value after it has written the new one.
        """
        if self.native.path is None or self.provider != _CPU:
            return frozenset()
        able = self.native.in_place
        return frozenset(s.name for s in self.manifest.state if s.appended and s.appended.op in able)


class OrtCell:
    """One stream's state: two sets of buffers and the bindings between them.

    Args:
        session: an opened session; any number of cells may use it, from any thread.
        manifest: names, shapes and dtypes of the state.
        batch: B, fixed for the life of the cell.
        in_place: state tensors that the graph's kernels update in place.

    Attributes:
        buffers: the state.
        keeps: whether the graph can leave out the logits of earlier positions.
    """

    def __init__(self, session: Any, manifest: Manifest, batch: int, in_place: Collection[str] = ()) -> None:
        self.keeps = any(t.name == KEEP_INPUT for t in manifest.inputs)
        self._session = session
        self._state = manifest.state
        self._vocab = manifest.model.vocab_size
        self._contract = manifest.model.contract
        spec = self._contract.inputs
        self._input, self._unit = spec.name, spec.multiple
        self.buffers = StateBuffers(manifest.state, batch, in_place)
        self._values = tuple({n: host_value(a) for n, a in each.items()} for each in self.buffers.sets)
        self._inputs = aligned(spec.shape(batch, self._unit), spec.dtype)
        per_step = self._contract.positions(self._unit)
        self._logits = aligned((batch, per_step, self._vocab), "float32")
        self._step = self._binding_pair()
        for binding in self._step:
            self._bind(binding, self._inputs, self._logits, per_step)
        self._chunk: tuple[Any, Any] | None = None

    def run(self, inputs: Inputs, keep: int = 0) -> npt.NDArray[np.float32]:
        """Run ids ``[B,T]`` or features ``[B,T,F]``; the state moves on only if ORT succeeds."""
        batch, length = inputs.shape[:2]
        self.buffers.protect(length)
        if length == self._unit:
            self._inputs[...] = inputs
            self._execute(self._step)
            return self._logits[:, -keep:].copy()
        if self._chunk is None:
            self._chunk = self._binding_pair()
        positions = self._contract.positions(length)
        wanted = min(keep or positions, positions)
        computed = wanted if self.keeps else positions
        logits = np.empty((batch, computed, self._vocab), np.float32)
        self._bind(self._chunk[self.buffers.side], inputs, logits, computed)
        self._execute(self._chunk)
        return logits if computed == wanted else logits[:, -wanted:].copy()

    def read(self) -> dict[str, Array]:
        """A copy of the present state."""
        return self.buffers.read()

    def reset(self) -> None:
        """Back to the state before the first token."""
        self.buffers.reset()

    def write(self, tensors: Mapping[str, Array]) -> None:
        """Overwrite the present state."""
        self.buffers.write(tensors)

    def _execute(self, pair: tuple[Any, Any]) -> None:
        try:
            self._session.run_with_iobinding(pair[self.buffers.side])
        except Exception as error:  # ORT's exception classes share no public base
            self.buffers.undo()
            raise failed(error) from error
        self.buffers.commit()

    def _binding_pair(self) -> tuple[Any, Any]:
        """Bindings of the state alone: 0 -> 1 and 1 -> 0."""
        return (self._bind_state(0), self._bind_state(1))

    def _bind_state(self, side: int) -> Any:
        binding = self._session.io_binding()
        for s in self._state:
            binding.bind_ortvalue_input(s.name, self._values[side][s.name])
            binding.bind_ortvalue_output(s.output, self._values[side ^ 1][s.name])
        return binding

    def _bind(self, binding: Any, inputs: Inputs, logits: npt.NDArray[np.float32], keep: int) -> None:
        binding.bind_ortvalue_input(self._input, host_value(inputs))
        binding.bind_ortvalue_output("logits", host_value(logits))
        if self.keeps:
            binding.bind_ortvalue_input(KEEP_INPUT, host_value(np.array([keep], np.int64)))


class WholeCell:
    """Whole sequences through a graph without a state; the same interface as :class:`OrtCell`."""

    keeps = False

    def __init__(self, session: Any, manifest: Manifest) -> None:
        self._session = session
        self._input = manifest.model.input.name

    def run(self, inputs: Inputs, keep: int = 0) -> npt.NDArray[np.float32]:
        """Run ids ``[B,T]`` or features ``[B,T,F]``; of how many positions the logits are, the graph says."""
        try:
            (logits,) = self._session.run(None, {self._input: inputs})
        except Exception as error:  # ORT's exception classes share no public base
            raise failed(error) from error
        found: npt.NDArray[np.float32] = logits
        return found[:, -keep:].copy() if keep else found

    def read(self) -> dict[str, Array]:
        """No state."""
        return {}

    def reset(self) -> None:
        """Nothing to forget."""

    def write(self, tensors: Mapping[str, Array]) -> None:
        """Nothing to overwrite."""


def failed(error: Exception) -> RuntimeFailure:
    """A failed run as an error of this project."""
    return RuntimeFailure(
        "ONNX Runtime failed to run the graph",
        got=first_line(error),
        fix="feed shorter chunks if memory ran out; else run `xexport validate` on the bundle",
    )


def _session_options(manifest: Manifest, threads: int, native: NativeKernels, apart: bool = False) -> Any:
    """``apart``: operators that one node runs in a row are nodes of their own, for a profile to show them."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors; ORT's warnings are about its own rewrites
    options.intra_op_num_threads = threads
    for key, value in _options_of(manifest, "session_options").items():
        options.add_session_config_entry(key, value)
    if native.path is not None:
        if apart:
            options.add_session_config_entry("xexport.sequences", "0")
        try:
            options.register_custom_ops_library(str(native.path))
        except Exception as error:  # ORT's exception classes share no public base
            raise RuntimeFailure(
                "the library of native kernels can't be loaded",
                got=f"{native.path}: {first_line(error)}",
                fix="reinstall xexport, or set XEXPORT_NATIVE=0 to run without it",
            ) from error
    return options


def _options_of(manifest: Manifest, key: str) -> dict[str, str]:
    """Options a manifest passes to the runtime; some of ORT's load libraries, so none may be a path."""
    row = manifest.target_row.get(key) or {}
    options = {str(k): str(v) for k, v in row.items()} if isinstance(row, dict) else {}
    for name, value in options.items():
        if any(mark in value for mark in ("/", "\\", "..")) or value.endswith((".so", ".dll", ".dylib")):
            raise BundleError(f"the manifest's {key} name a path", got=f"{name} = {value}")
    return options


def _check_signature(session: Any, manifest: Manifest) -> None:
    """Refuse a graph whose inputs and outputs aren't what the manifest says."""
    wanted_in = {t.name: t.dtype for t in manifest.inputs} | {s.name: s.dtype for s in manifest.state}
    wanted_out = {t.name: t.dtype for t in manifest.outputs} | {s.output: s.dtype for s in manifest.state}
    given = [*session.get_inputs(), *session.get_overridable_initializers()]  # the latter have a default
    _compare("input", given, wanted_in)
    _compare("output", session.get_outputs(), wanted_out)


def _compare(kind: str, nodes: Sequence[Any], wanted: Mapping[str, str]) -> None:
    names = {"float": "float32", "double": "float64"}
    found = {}
    for node in nodes:
        element = node.type.removeprefix("tensor(").removesuffix(")")
        found[node.name] = names.get(element, element)
    if found != wanted:
        odd = sorted(found.items() ^ wanted.items())
        raise BundleError(
            f"the graph's {kind}s are not those of the manifest",
            got=", ".join(f"{n} ({d})" for n, d in odd[:6]),
            fix="export the model again",
        )


def _refused(error: Exception, graph: Path) -> RuntimeFailure:
    """ORT's refusal of a graph, with what can be done about the common causes."""
    text = str(error)
    fix = "export the model again with this version of xexport"
    if "bad_alloc" in text or "Failed to allocate" in text:
        fix = "close other programs, or export for a target with smaller weights (cpu-int8, cpu-int4)"
    elif "NOT_IMPLEMENTED" in text or "No Op registered" in text or "opset" in text.lower():
        fix = "upgrade onnxruntime, or export for another target"
    elif "Protobuf parsing failed" in text or "external data" in text.lower():
        fix = "a file of the bundle is missing or damaged: copy the whole folder again"
    return RuntimeFailure("ONNX Runtime refused the graph", got=f"{graph}: {first_line(error)}", fix=fix)
