"""One node of an operator in ONNX Runtime, with the native kernels or without: for tests of operators."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import helper

from xexport.core.op import DOMAIN
from xexport.core.registry import get_op
from xexport.runtimes.native import find_native

__all__ = ["Arrays", "body_only", "error", "kernel", "native_library", "node_types"]

Arrays = dict[str, np.ndarray]
Attributes = Mapping[str, int | float]


def native_library() -> Path:
    """The kernels; their absence is a failure where they are required, and otherwise a reason to skip."""
    native = find_native()
    if native.path is None:
        if os.environ.get("XEXPORT_REQUIRE_NATIVE") == "1":
            pytest.fail(native.reason)
        pytest.skip(native.reason)
    return native.path


def error(got: np.ndarray, want: np.ndarray) -> float:
    """Largest error, relative to the largest expected value if that is above 1."""
    assert got.shape == want.shape
    return float(np.abs(got - want).max(initial=0) / max(1.0, np.abs(want).max(initial=0)))


def _options(library: Path | None, isa: str = "", threads: int = 1) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if isa:
        options.add_session_config_entry("xexport.isa", isa)
    if library is None:
        return options
    try:
        options.register_custom_ops_library(str(library))
    except Exception as reason:  # ORT's exception classes share no public base
        if "no instruction set" not in str(reason):
            raise
        pytest.skip(f"this machine lacks {isa}")
    return options


def _model(name: str, x: Arrays, attributes: Attributes) -> bytes:
    """The node "mixer0"; every dimension is symbolic, so that ONNX Runtime itself can't see a wrong shape."""
    spec = get_op(name)
    inputs = [
        helper.make_tensor_value_info(
            n, helper.np_dtype_to_tensor_dtype(a.dtype), [f"{n}{i}" for i in range(a.ndim)]
        )
        for n, a in x.items()
    ]
    outputs = [helper.make_tensor_value_info(n, 1, None) for n in spec.outputs]
    node = helper.make_node(
        spec.graph_name, list(spec.inputs), list(spec.outputs), "mixer0", domain=DOMAIN, **attributes
    )
    specs = [spec, *map(get_op, spec.depends)]
    bodies = [next(iter(s.bodies.values())).build(23) for s in specs]
    domains = {"": 23} | {s.domain: 1 for s in specs}
    opsets = [helper.make_opsetid(d, v) for d, v in domains.items()]
    graph = helper.make_graph([node], name, inputs, outputs)
    model: bytes = helper.make_model(
        graph, functions=bodies, opset_imports=opsets, ir_version=10
    ).SerializeToString()
    return model


def _run(name: str, x: Arrays, options: ort.SessionOptions, attributes: Attributes) -> list[np.ndarray]:
    session = ort.InferenceSession(_model(name, x, attributes), options, providers=["CPUExecutionProvider"])
    outputs: list[np.ndarray] = session.run(None, x)
    return outputs


def kernel(
    name: str, x: Arrays, library: Path, isa: str = "", *, threads: int = 1, **attributes: int | float
) -> list[np.ndarray]:
    """The outputs of the native kernel."""
    return _run(name, x, _options(library, isa, threads), attributes)


def body_only(name: str, x: Arrays, **attributes: int | float) -> list[np.ndarray]:
    """The outputs of the same file where no kernel is registered."""
    return _run(name, x, _options(None), attributes)


def node_types(
    name: str, x: Arrays, library: Path | None, folder: Path, **attributes: int | float
) -> set[str]:
    """The types of the nodes that ran."""
    options = _options(library)
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = ort.InferenceSession(_model(name, x, attributes), options, providers=["CPUExecutionProvider"])
    session.run(None, x)
    rows = json.loads(Path(session.end_profiling()).read_text())
    return {row["args"]["op_name"] for row in rows if row.get("cat") == "Node"}
