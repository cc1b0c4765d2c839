"""fp16 storage: the initializer is half as large, and a Cast gives the graph its fp32 value back.

ONNX Runtime folds the Cast once when the session opens, so on CPUs without fp16 arithmetic the
step is as fast as in fp32 and the sums are exact fp32 sums. A matrix of a product is stored with one row
an output, as the native kernel reads it (exporter/passes/products.py), and then stays in 16 bits.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from xexport.exporter.weights import as_array
from xexport.quant.blocks import relative_error
from xexport.quant.formats import Context, Refusal, Stored
from xexport.quant.formats.block import to_float

__all__ = ["LARGEST", "apply"]

#: of float16
LARGEST = 65504.0


def apply(context: Context, value: ir.Value) -> Stored | Refusal:
    """Store a float32 weight as float16."""
    array = as_array(value)
    if array.dtype != np.float32:
        return Refusal(f"it is {array.dtype}, not float32")
    if float(np.abs(array).max(initial=0.0)) > LARGEST:
        return Refusal(f"it holds values beyond {LARGEST:.0f}, the largest of fp16")
    half = array.astype(np.float16)
    name = value.name or ""
    uses = list(value.uses())
    turned = array.ndim == 2 and all(n.op_type == "MatMul" and i == 1 for n, i in uses)
    stored = context.initializer(f"{name}.fp16", context.spool.put(name, half.T if turned else half))
    result = to_float(context, stored)
    if turned:
        swap = ir.Node("", "Transpose", [result], [ir.AttrInt64s("perm", [1, 0])], name=f"{name}/Transpose")
        context.model.graph.insert_after(_producer(result), swap)
        result = swap.outputs[0]
        result.name, result.type, result.shape = f"{name}/Transpose", value.type, value.shape
    for node, index in uses:
        node.replace_input_with(index, result)
    del context.model.graph.initializers[name]
    return Stored("float16", half.nbytes, relative_error(array, half.astype(np.float32)))


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node
