"""8-bit matrices with one scale an output: ``MatMul(x, DequantizeLinear(W, scale))``, standard operators.

Two uses. With float32 activations (OpenVINO) a token's result does not depend on its neighbours, and nothing
needs calibration; OpenVINO keeps the 8 bits in memory and multiplies by them as they are read. Measured on
AVX2 without VNNI with products of 1024 x 1024, one thread: a step takes 0.5 of the float32 time, 64 tokens
take 0.9; with quantized activations (QDQ) 1.0 and 0.9. ONNX Runtime makes MatMulNBits of it and rounds
activations to 8 bits, unless QDQ is disabled (runtimes/opening.py); its own formats are those of block.py.

With activations quantized on both sides (quant/qdq.py) the product is one of integers: the form that integer
hardware takes, which wants a zero point too. Source: ONNX operator DequantizeLinear (per-axis), and ONNX
Runtime's "QDQ format".
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from xexport.quant.blocks import quantize_rows, relative_error
from xexport.quant.formats import Context, Refusal, Stored
from xexport.quant.formats.block import drop_unused, products_of

__all__ = ["QDQ_SUFFIX", "apply", "apply_qdq"]

#: of the names of what a weight becomes for integer products: quant/qdq.py finds them by it
QDQ_SUFFIX = "/dequantized"


def apply(context: Context, value: ir.Value) -> Stored | Refusal:
    """Store a float32 matrix ``[K,N]`` as int8 codes with N scales, for float products."""
    return _store(context, value, "/DequantizeLinear", "int8 per channel, float products")


def apply_qdq(context: Context, value: ir.Value) -> Stored | Refusal:
    """Store a float32 matrix ``[K,N]`` as int8 codes with N scales and zero points, for integer products."""
    return _store(context, value, QDQ_SUFFIX, "int8 per channel", zero_point=True)


def _store(
    context: Context, value: ir.Value, suffix: str, format: str, *, zero_point: bool = False
) -> Stored | Refusal:
    products, matrix = products_of(value)
    if not products:
        return Refusal("no matrix product reads it as its right-hand side")
    if matrix is None:
        return Refusal("it is not a float32 matrix")
    codes, scales = quantize_rows(matrix)
    name = value.name or ""
    inputs = [
        context.initializer(f"{name}.int8", context.spool.put(name, np.ascontiguousarray(codes.T))),
        context.initializer(f"{name}.scale", context.spool.put(name, scales[:, 0].copy())),
    ]
    if zero_point:
        inputs.append(context.initializer(f"{name}.zero", ir.Tensor(np.zeros(len(scales), np.int8))))
    node = ir.node("DequantizeLinear", inputs, {"axis": 1}, name=f"{name}{suffix}")
    result = node.outputs[0]
    result.name = node.name
    result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(matrix.T.shape)
    context.model.graph.insert_before(context.model.graph[0], node)
    for product in products:
        product.replace_input_with(1, result)
    drop_unused(context, value)
    error = relative_error(matrix, codes.astype(np.float32) * scales)
    return Stored(format, codes.nbytes + scales.nbytes, error)
