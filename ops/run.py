"""Running one operator alone in ONNX Runtime: for parity tests and benchmarks of its bodies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from xexport.core.op import DOMAIN, OpSpec
from xexport.core.registry import get_op

__all__ = ["op_model", "run_body"]

_ELEM = {
    np.dtype(np.float32): onnx.TensorProto.FLOAT,
    np.dtype(np.float16): onnx.TensorProto.FLOAT16,
    np.dtype(np.uint8): onnx.TensorProto.UINT8,
    np.dtype(np.int64): onnx.TensorProto.INT64,
}


def op_model(
    spec: OpSpec,
    inputs: Mapping[str, np.ndarray],
    variant: str,
    opset: int,
    attributes: Mapping[str, Any],
    *,
    functions: Sequence[onnx.FunctionProto] = (),
    constant: Sequence[str] = (),
) -> onnx.ModelProto:
    """A one-node model of ``spec`` with its body ``variant``; ``constant`` inputs become initializers.

    Operators that the body calls get their default bodies.
    """
    from onnx import numpy_helper

    infos = [
        helper.make_tensor_value_info(n, _ELEM[np.asarray(a).dtype], list(np.asarray(a).shape))
        for n, a in inputs.items()
        if n not in constant
    ]
    outs = [helper.make_value_info(o, onnx.TypeProto()) for o in spec.outputs]
    for info in outs:
        info.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    node = helper.make_node(
        spec.graph_name, list(spec.inputs), list(spec.outputs), domain=spec.domain, **dict(attributes)
    )
    inits = [numpy_helper.from_array(np.asarray(inputs[n]), n) for n in constant]
    graph = helper.make_graph([node], spec.name, infos, outs, inits)
    body = spec.bodies[variant].build(opset)
    called = [next(iter(get_op(name).bodies.values())).build(opset) for name in spec.depends]
    domains = {"": opset, DOMAIN: 1, spec.domain: 1}
    return helper.make_model(
        graph,
        functions=[body, *called, *functions],
        opset_imports=[helper.make_opsetid(d, v) for d, v in domains.items()],
        ir_version=10,
    )


def run_body(
    spec: OpSpec,
    inputs: Mapping[str, np.ndarray],
    variant: str,
    *,
    opset: int = 23,
    attributes: Mapping[str, Any] | None = None,
    functions: Sequence[onnx.FunctionProto] = (),
    threads: int = 1,
) -> list[np.ndarray]:
    """The outputs of one body of ``spec``, run by ONNX Runtime on the CPU."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    model = op_model(spec, inputs, variant, opset, attributes or {}, functions=functions)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs: list[np.ndarray] = session.run(None, dict(inputs))
    return outputs
