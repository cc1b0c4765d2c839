"""A module and its graph as functions of numpy arrays, and how far their results are apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xexport.core.manifest import KEEP_INPUT
from xexport.core.state import StateSpec
from xexport.exporter.writer import DATA_NAME

__all__ = ["Array", "Forward", "OnnxForward", "largest_error", "torch_forward", "weight_bytes"]

_MAP_ABOVE = 1 << 26  # bytes of weights that ONNX Runtime may copy

Array = np.ndarray[Any, Any]
#: (inputs, state) -> (logits, new state)
Forward = Callable[[Array, Sequence[Array]], tuple[Array, list[Array]]]


def torch_forward(module: torch.nn.Module) -> Forward:
    """The module as a function of numpy arrays."""

    def forward(inputs: Array, state: Sequence[Array]) -> tuple[Array, list[Array]]:
        with torch.inference_mode():
            logits, *new = module(torch.from_numpy(inputs), *map(torch.from_numpy, state))
        return logits.float().numpy(), [s.numpy() for s in new]

    return forward


class OnnxForward:
    """The graph in ONNX Runtime as a function of numpy arrays.

    Weights stay memory-mapped (no prepacking), so a large model is checked without a copy of it.

    Attributes:
        keeps: the graph can be asked for the logits of the last positions only.
    """

    def __init__(self, graph: Path) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        kept: list[str] = []
        if weight_bytes(graph) > _MAP_ABOVE:
            options.add_session_config_entry("session.disable_prepacking", "1")
            kept.append("ConstantFolding")  # it would transpose every weight that has one row an output
        self._session = ort.InferenceSession(
            str(graph), options, providers=["CPUExecutionProvider"], disabled_optimizers=kept
        )
        given = [i.name for i in self._session.get_inputs()]
        self._names = [name for name in given if name != KEEP_INPUT]
        # an input with a default is not among them; some targets take the default away (passes/required)
        self._asked = KEEP_INPUT in given
        self.keeps = self._asked or any(
            i.name == KEEP_INPUT for i in self._session.get_overridable_initializers()
        )

    def __call__(self, inputs: Array, state: Sequence[Array], keep: int = 0) -> tuple[Array, list[Array]]:
        """Logits ``[B,T,V]``, or with ``keep`` ``[B,min(keep,T),V]``, and the new state."""
        feeds = dict(zip(self._names, [inputs, *state], strict=True))
        if keep or self._asked:
            feeds[KEEP_INPUT] = np.array([keep], np.int64)
        logits, *new = self._session.run(None, feeds)
        return np.asarray(logits, np.float32), list(new)


def weight_bytes(graph: Path) -> int:
    """Size of the external data of a graph."""
    data = graph.with_name(DATA_NAME)  # a model of small tensors alone has none
    return data.stat().st_size if data.is_file() else 0


def _rms(values: Array) -> float:
    """RMS of the elements that are not zero: a cache that is still mostly empty must not count as small."""
    filled = np.count_nonzero(values)
    return float(np.sqrt(np.square(values, dtype=np.float64).sum() / filled)) if filled else 0.0


def largest_error(
    specs: Sequence[StateSpec], want: Array, want_state: list[Array], got: Array, got_state: list[Array]
) -> tuple[float, str]:
    """The largest error of logits or a state tensor, relative to its RMS; NaN counts as infinite."""
    pairs = [("logits", want, got)]
    pairs += [(f"state {s.name}", a, b) for s, a, b in zip(specs, want_state, got_state, strict=True)]
    worst, name = 0.0, "logits"
    for what, a, b in pairs:
        if a.shape != b.shape:
            return float("inf"), f"{what} has shape {list(b.shape)} instead of {list(a.shape)}"
        scale = max(_rms(a), 1e-3)
        error = float(np.abs(a.astype(np.float64) - b).max()) / scale if a.size else 0.0
        if not np.isfinite(error):
            return float("inf"), f"{what} is not finite"
        if error > worst:
            worst, name = error, what
    return worst, name
