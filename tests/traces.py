"""Traced graphs in files, for all processes of a run: a module that was traced once is read from then on.

The file has the graph and, of each weight, the shape and type alone: the exporter binds the weights of the
checkpoint after the trace, whoever made it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

__all__ = ["Traces"]


class Traces:
    """A folder of traces.

    Only modules of the families are kept: their configuration says all about them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, module: Any, call: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """The graph of ``module`` traced as ``call`` says: read, or made by ``make()`` and kept."""
        import onnx_ir as ir

        kind, config = type(module), getattr(module, "config", None)
        if config is None or not kind.__module__.startswith("xexport.models."):
            return make()
        key = repr((kind.__module__, kind.__qualname__, config, call))
        path = self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.onnx"
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                made = make()
                unfinished = path.with_suffix(".part")
                ir.save(_without_weights(made), unfinished, format="protobuf")
                unfinished.rename(path)
                return made
        read = ir.load(path)
        for value in read.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = None  # nothing was bound yet
        return read


def _without_weights(model: Any) -> Any:
    """A copy that has the shapes of the weights, which torch's meta tensors are without bytes anyway."""
    import onnx_ir as ir

    copy = model.clone()
    for name, value in copy.graph.initializers.items():
        raw = getattr(value.const_value, "raw", None)
        if getattr(raw, "is_meta", False):
            value.const_value = ir.ExternalTensor(
                "bound later", 0, 0, value.const_value.dtype, shape=value.const_value.shape, name=name
            )
    return copy
