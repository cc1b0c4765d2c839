"""8-bit matrices with one scale an output: ``MatMul(x, DequantizeLinear(W, scale))``, standard operators.

Activations stay float32, so a token's result does not depend on its neighbours, and nothing needs
calibration. OpenVINO keeps the 8 bits in memory and multiplies by them as they are read. Measured on AVX2
without VNNI with products of 1024 x 1024, one thread: a step takes 0.5 of the float32 time, 64 tokens take
0.9; with quantized activations (QDQ) 1.0 and 0.9. ONNX Runtime makes MatMulNBits of it and rounds activations
to 8 bits, unless QDQ is disabled (runtimes/opening.py); its own formats are those of block.py.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from xexport.quant.blocks import quantize_rows, relative_error
from xexport.quant.formats import Context, Refusal, Stored
from xexport.quant.formats.block import drop_unused, products_of

__all__ = ["apply"]


def apply(context: Context, value: ir.Value) -> Stored | Refusal:
    """Store a float32 matrix ``[K,N]`` as int8 codes with N scales."""
    products, matrix = products_of(value)
    if not products:
        return Refusal("no matrix product reads it as its right-hand side")
    if matrix is None:
        return Refusal("it is not a float32 matrix")
    codes, scales = quantize_rows(matrix)
    name = value.name or ""
    q = context.initializer(f"{name}.int8", context.spool.put(name, np.ascontiguousarray(codes.T)))
    s = context.initializer(f"{name}.scale", context.spool.put(name, scales[:, 0].copy()))
    node = ir.Node("", "DequantizeLinear", [q, s], [ir.AttrInt64("axis", 1)], name=f"{name}/DequantizeLinear")
    result = node.outputs[0]
    result.name = node.name
    result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(matrix.T.shape)
    context.model.graph.insert_before(context.model.graph[0], node)
    for product in products:
        product.replace_input_with(1, result)
    drop_unused(context, value)
    error = relative_error(matrix, codes.astype(np.float32) * scales)
    return Stored("int8 per channel, float products", codes.nbytes + scales.nbytes, error)
