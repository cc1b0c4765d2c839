"""8 bits, one scale an output channel: ``DequantizeLinear(codes)``, the form that integer hardware takes.

With quantized activations on both sides (quant/qdq.py) the product is one of integers. Source: ONNX operator
DequantizeLinear (per-axis), and ONNX Runtime's "QDQ format".
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from xexport.exporter.weights import as_array
from xexport.quant.blocks import quantize_rows, relative_error
from xexport.quant.formats import Context, Refusal, Stored

__all__ = ["SUFFIX", "apply"]

#: of the names of what these weights become: quant/qdq.py finds them by it
SUFFIX = "/dequantized"


def apply(context: Context, value: ir.Value) -> Stored | Refusal:
    """Store a matrix ``[K,N]`` that MatMul reads on the right as int8 with N scales."""
    products = [n for n, i in value.uses() if n.op_type == "MatMul" and not n.domain and i == 1]
    if not products:
        return Refusal("no matrix product reads it as its right-hand side")
    matrix = as_array(value)
    if matrix.dtype != np.float32 or matrix.ndim != 2:
        return Refusal(f"it is {matrix.dtype} with {matrix.ndim} dimensions, not a float32 matrix")
    codes, scales = quantize_rows(np.ascontiguousarray(matrix.T))
    name = value.name or ""
    q = context.initializer(f"{name}.int8", context.spool.put(name, np.ascontiguousarray(codes.T)))
    s = context.initializer(f"{name}.scale", context.spool.put(name, scales[:, 0]))
    zero = context.initializer(f"{name}.zero", ir.Tensor(np.zeros(len(scales), np.int8)))
    node = ir.node("DequantizeLinear", [q, s, zero], {"axis": 1}, name=f"{name}{SUFFIX}")
    made = node.outputs[0]
    made.name, made.type, made.shape = node.name, value.type, value.shape
    context.model.graph.insert_before(context.model.graph[0], node)
    for product in products:
        product.replace_input_with(1, made)
    if not list(value.uses()):
        del context.model.graph.initializers[name]
    error = relative_error(matrix, (codes * scales).T)
    return Stored("int8 per channel", codes.nbytes + scales.nbytes, error)
