"""Graphs of fixed shape in ONNX Runtime: one session a length, one state between them.

A longer input is fed in pieces, largest length first. All sessions read and write the same buffers, so the
state needs no copying when the length changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from xexport.core.errors import InputError
from xexport.core.manifest import Manifest
from xexport.runtimes.inputs import Inputs, pieces
from xexport.runtimes.placement import Assigned, assignment
from xexport.runtimes.state_buffers import Array, StateBuffers, aligned

if TYPE_CHECKING:
    from xexport.runtimes.onnxruntime import WholeCell

__all__ = ["StaticCell", "StaticEngine"]


@dataclass(frozen=True)
class StaticEngine:
    """Opened graphs of fixed shape; cells share their weights.

    Attributes:
        sessions: T -> ``onnxruntime.InferenceSession``, largest T first.
        manifest: what was opened.
        threads: as asked; 0 is ORT's default.
        provider: the execution provider that was asked for.
        load_seconds: how long ORT took to open all graphs.
    """

    sessions: Mapping[int, Any]
    manifest: Manifest
    threads: int
    provider: str
    load_seconds: float
    _used: list[int] = field(default_factory=list, init=False, repr=False, compare=False)

    def cell(self, batch: int) -> StaticCell | WholeCell:
        """The state of one sequence; of a model in the whole form, what runs its one length.

        Raises:
            InputError: ``batch`` is not 1, the one that the graphs are made for.
        """
        if batch != 1:
            raise InputError(
                "this bundle's graphs have a fixed batch size",
                got=batch,
                allowed=1,
                fix="open one stream a sequence: they share the weights",
            )
        if not self.manifest.model.contract.streams:
            from xexport.runtimes.onnxruntime import WholeCell

            (session,) = self.sessions.values()
            return WholeCell(session, self.manifest)
        return StaticCell(self)

    def end_profiling(self) -> Path:
        """The profile of the graph that ran last, complete; only of an engine with a ``profile_prefix``."""
        paths = {length: Path(session.end_profiling()) for length, session in self.sessions.items()}
        return paths[self._used[-1] if self._used else min(paths)]

    def assigned(self) -> list[Assigned]:
        """Which provider took which node of which graph; only of an engine with a ``profile_prefix``."""
        return [node for session in self.sessions.values() for node in assignment(session)]

    def ran(self, length: int) -> None:
        """Note which graph ran last."""
        self._used[:] = [length]


class StaticCell:
    """One stream's state and, for every length, the bindings between its two sets of buffers.

    Attributes:
        buffers: the state.
        keeps: False; the logits of every position are computed.
    """

    keeps = False

    def __init__(self, engine: StaticEngine) -> None:
        manifest = engine.manifest
        self._engine = engine
        self._manifest = manifest
        self.buffers = StateBuffers(manifest.state, 1)
        self._lengths = tuple(engine.sessions)
        self._bound: dict[int, _Bound] = {}

    def run(self, inputs: Inputs, keep: int = 0) -> npt.NDArray[np.float32]:
        """Run ids ``[1,T]`` or features ``[1,T,F]``; after a failure the state is as before."""
        parts = pieces(inputs, self._lengths)
        before = self.buffers.read() if len(parts) > 1 else None
        logits = []
        try:
            for part in parts:
                logits.append(self._call(part))
        except Exception:
            if before is not None:
                self.buffers.write(before)
            raise
        joined = logits[0] if len(logits) == 1 else np.concatenate(logits, 1)
        return joined[:, -keep:].copy() if keep else joined

    def read(self) -> dict[str, Array]:
        """A copy of the present state."""
        return self.buffers.read()

    def reset(self) -> None:
        """Back to the state before the first token."""
        self.buffers.reset()

    def write(self, tensors: Mapping[str, Array]) -> None:
        """Overwrite the present state."""
        self.buffers.write(tensors)

    def _call(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        from xexport.runtimes.onnxruntime import failed

        length = inputs.shape[1]
        if length not in self._bound:
            self._bound[length] = _Bound(self._engine.sessions[length], self._manifest, self.buffers, length)
        bound = self._bound[length]
        bound.inputs[...] = inputs
        try:
            bound.session.run_with_iobinding(bound.pair[self.buffers.side])
        except Exception as error:  # ORT's exception classes share no public base
            self.buffers.undo()
            raise failed(error) from error
        self.buffers.commit()
        self._engine.ran(length)
        return bound.logits.copy()


class _Bound:
    """A session of one length with its own input and logits, bound to the state both ways."""

    def __init__(self, session: Any, manifest: Manifest, buffers: StateBuffers, length: int) -> None:
        import onnxruntime as ort

        share = ort.OrtValue.ortvalue_from_numpy
        contract = manifest.model.contract
        spec = contract.inputs
        self.session = session
        self.inputs = aligned(spec.shape(1, length), spec.dtype)
        shape = next(o.shape for o in session.get_outputs() if o.name == "logits")
        self.logits = aligned(tuple(shape), "float32")
        self.pair = []
        for side in (0, 1):
            binding = session.io_binding()
            binding.bind_ortvalue_input(spec.name, share(self.inputs))
            binding.bind_ortvalue_output("logits", share(self.logits))
            for state in manifest.state:
                binding.bind_ortvalue_input(state.name, share(buffers.sets[side][state.name]))
                binding.bind_ortvalue_output(state.output, share(buffers.sets[side ^ 1][state.name]))
            self.pair.append(binding)
