"""State that stays on a device: what one run puts out there is what the next one takes in.

The persistent bindings of the CPU provider (onnxruntime.py) do not serve another one: ONNX Runtime copies a
bound input to the device when it is bound, so what is written into the buffer later is not seen (with the
WebGPU provider of 1.27 the state stood still). Here inputs are bound anew at every call, as OrtValues
that already lie on the device: a step copies its tokens there and its logits back, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from xexport.core.errors import RuntimeFailure, first_line
from xexport.core.manifest import KEEP_INPUT, Manifest
from xexport.core.state import StateSpec, state_shape
from xexport.runtimes.inputs import Inputs

__all__ = ["DEVICES", "DeviceCell", "host_value"]

Array = npt.NDArray[Any]
#: provider -> where ONNX Runtime keeps its tensors; those of the others are handed over in host memory
DEVICES = {"CUDAExecutionProvider": "cuda", "WebGpuExecutionProvider": "webgpu"}


class DeviceCell:
    """One stream on a provider that is not the CPU's; see :class:`xexport.runtimes.engine.Cell`.

    Args:
        session: an opened session.
        manifest: names, shapes and dtypes of the state.
        batch: B, fixed for the life of the cell.

    Attributes:
        keeps: whether the graph can leave out the logits of earlier positions.
    """

    def __init__(self, session: Any, manifest: Manifest, batch: int) -> None:
        self.keeps = any(t.name == KEEP_INPUT for t in manifest.inputs)
        self._session, self._batch = session, batch
        self._input = manifest.model.input.name
        self._outputs = {s.name: s.output for s in manifest.state}
        self._specs = [StateSpec(s.name, s.shape, s.dtype, s.init) for s in manifest.state]
        self._device = DEVICES.get(manifest.provider, "cpu")
        self._state: dict[str, Any] = {}  # name -> OrtValue, on the device after the first run
        self.reset()

    def run(self, inputs: Inputs, keep: int = 0) -> npt.NDArray[np.float32]:
        """Run ids ``[B,T]`` or features ``[B,T,F]``; the state moves on only if ONNX Runtime succeeds."""
        binding = self._session.io_binding()
        fed = {self._input: host_value(inputs)}
        if self.keeps:
            fed[KEEP_INPUT] = host_value(np.array([keep], np.int64))
        for name, value in (fed | self._state).items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits", "cpu")
        for output in self._outputs.values():
            binding.bind_output(output, self._device)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # ORT's exception classes share no public base
            raise RuntimeFailure(
                "ONNX Runtime failed to run the graph on the device",
                got=first_line(error),
                fix="feed shorter chunks if its memory ran out; --runtime cpu runs the bundle without it",
            ) from error
        logits, *state = binding.get_outputs()
        self._state = dict(zip(self._outputs, state, strict=True))
        found: npt.NDArray[np.float32] = logits.numpy()
        return found if self.keeps or not keep else found[:, -keep:].copy()

    def read(self) -> dict[str, Array]:
        """A copy of the present state."""
        return {name: np.array(value.numpy()) for name, value in self._state.items()}

    def reset(self) -> None:
        """Back to the state before the first token."""
        self.write({s.name: np.full(state_shape(s, self._batch), s.init, s.dtype) for s in self._specs})

    def write(self, tensors: Mapping[str, Array]) -> None:
        """Overwrite the present state; the next run takes it to the device."""
        self._state = {s.name: host_value(np.array(tensors[s.name])) for s in self._specs}


def host_value(array: Array) -> Any:
    """An OrtValue over the array's own memory (it holds a reference; nothing is copied)."""
    import onnxruntime as ort

    return ort.OrtValue.ortvalue_from_numpy(array)
