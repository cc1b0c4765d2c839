"""Finding where the exported graph first parts from the module: used only after a parity failure.

Every submodule's input and output are captured in PyTorch; the values that the graph computed inside that
submodule (their names carry its path, passes/names.py) are captured in ONNX Runtime. The first
submodule, in order of execution, none of whose values equals its output, is the culprit; if the graph
has not got its input either, then its parent is, which computed that input.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from xexport.core.contract import TOKENS, InputSpec
from xexport.core.state import StateSpec, zero_state

__all__ = ["locate"]

Array = np.ndarray[Any, Any]
_TOLERANCE = 1e-3


def locate(
    module: torch.nn.Module,
    specs: Sequence[StateSpec],
    graph: Path,
    batch: int,
    length: int,
    vocab: int,
    inputs: InputSpec = TOKENS,
) -> str:
    """A sentence that names the layer, and the custom operators in it."""
    rng = np.random.default_rng(batch * 1000 + length)
    tokens = inputs.random(rng, batch, length, vocab)
    state = zero_state(specs, batch)
    wanted = _module_outputs(module, tokens, state)
    values, operators = _graph_values(graph, tokens, state)
    for path, given, reference in wanted:
        # its own nodes and its submodules': what a module returns is often what its last child made
        inside = [v for name, v in values.items() if name.startswith((f"{path}/", f"{path}."))]
        error = _nearest(inside, reference)
        if error is None or error <= _TOLERANCE:
            continue
        arrived = None if given is None else _nearest(values.values(), given)
        if arrived is not None and not arrived <= _TOLERANCE:  # it was fed a wrong value
            path, child = path.rpartition(".")[::2]
            return f"the two first part in {_layer(path, operators)} before its part {child!r}"
        return f"the two first part in {_layer(path, operators)}, error {error:.2e}"
    if not state:
        return "every layer that could be compared agrees on another input"
    return "every layer that could be compared agrees from a fresh state: the fault is in a state tensor"


def _layer(path: str, operators: Sequence[tuple[str, str]]) -> str:
    ops = sorted({op for scope, op in operators if scope == path})
    holds = f" (it holds {', '.join(ops)})" if ops else ""
    return f"layer {path!r}{holds}" if path else f"the model's own forward{holds}"


def _nearest(values: Iterable[Array], reference: Array) -> float | None:
    """The error of the value nearest to the reference, relative to its RMS; None if none has its shape."""
    scale = max(float(np.sqrt(np.mean(np.square(reference, dtype=np.float64)))), 1e-6)
    errors = [float(np.abs(v - reference).max()) / scale for v in values if v.shape == reference.shape]
    return min(errors, default=None)


def _module_outputs(
    module: torch.nn.Module, tokens: Array, state: Sequence[Array]
) -> list[tuple[str, Array | None, Array]]:
    """(path, first input, first output) of every submodule that returns floats, in order of execution."""
    captured: list[tuple[str, Array | None, Array]] = []
    handles = []
    for path, child in module.named_modules():
        if not path:
            continue

        def hook(_m: Any, inputs: Any, out: Any, path: str = path) -> None:
            given = _floats(inputs)
            first = _floats(out)
            if first is not None:
                captured.append((path, given, first))

        handles.append(child.register_forward_hook(hook))
    try:
        with torch.inference_mode():
            module(torch.from_numpy(tokens), *map(torch.from_numpy, state))
    finally:
        for handle in handles:
            handle.remove()
    return captured


def _floats(value: Any) -> Array | None:
    """A copy of a float tensor, or of the first of a tuple of tensors."""
    first = value[0] if isinstance(value, tuple) and value else value
    if not isinstance(first, torch.Tensor) or not first.is_floating_point():
        return None
    return first.detach().float().numpy().copy()


def _graph_values(
    graph: Path, tokens: Array, state: Sequence[Array]
) -> tuple[dict[str, Array], list[tuple[str, str]]]:
    """Every float value of the main graph by name, and (scope, operator) of the custom nodes."""
    import onnxruntime as ort

    model = onnx.load(graph, load_external_data=False)
    known = {o.name for o in model.graph.output}
    operators = []
    for node in model.graph.node:
        if node.domain:
            operators.append((node.name.rpartition("/")[0], f"{node.domain}::{node.op_type}"))
        for name in node.output:
            if name and name not in known:
                model.graph.output.append(onnx.helper.make_value_info(name, onnx.TypeProto()))
    probe = graph.with_name("probe.onnx")
    probe.write_bytes(model.SerializeToString())
    try:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(str(probe), options, providers=["CPUExecutionProvider"])
        names = [i.name for i in session.get_inputs()]
        results = session.run(None, dict(zip(names, [tokens, *state], strict=True)))
        outputs = [o.name for o in session.get_outputs()]
    finally:
        probe.unlink(missing_ok=True)
    floats = {n: np.asarray(r) for n, r in zip(outputs, results, strict=True)}
    return {n: r for n, r in floats.items() if r.dtype == np.float32}, operators
