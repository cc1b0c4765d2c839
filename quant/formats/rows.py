"""Embedding tables in int8 with one scale a row: ``Gather(codes) * Gather(scales)``, standard operators."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from xexport.exporter.weights import as_array
from xexport.quant.blocks import quantize_rows, relative_error
from xexport.quant.formats import Context, Refusal, Stored

__all__ = ["apply"]


def apply(context: Context, value: ir.Value) -> Stored | Refusal:
    """Rewrite every ``Gather(W, ids)`` on axis 0 of a float32 [rows, depth] table."""
    gathers = [n for n, i in value.uses() if n.op_type == "Gather" and i == 0 and _axis(n) == 0]
    others = [n.op_type for n, _ in value.uses() if n not in gathers]
    if not gathers:
        return Refusal("no table look-up reads it")
    array = as_array(value)
    if array.dtype != np.float32 or array.ndim != 2:
        return Refusal(f"it is {array.dtype} with {array.ndim} dimensions, not a float32 table")
    codes, scales = quantize_rows(array)
    name = value.name or ""
    q = context.initializer(f"{name}.int8", context.spool.put(name, codes))
    s = context.initializer(f"{name}.scale", context.spool.put(name, scales))
    for node in gathers:
        _rewrite(context, node, q, s)
    if not others:
        del context.model.graph.initializers[name]
    error = relative_error(array, codes.astype(np.float32) * scales)
    return Stored("int8 per row", codes.nbytes + scales.nbytes, error)


def _axis(node: ir.Node) -> int:
    axis = node.attributes.get("axis")
    return 0 if axis is None else axis.as_int()


def _rewrite(context: Context, node: ir.Node, codes: ir.Value, scales: ir.Value) -> None:
    ids, old = node.inputs[1], node.outputs[0]
    prefix = node.name or "embedding"
    row = ir.Node("", "Gather", [codes, ids], [ir.AttrInt64("axis", 0)], name=f"{prefix}/codes")
    scale = ir.Node("", "Gather", [scales, ids], [ir.AttrInt64("axis", 0)], name=f"{prefix}/scales")
    cast = ir.Node(
        "", "Cast", [row.outputs[0]], [ir.AttrInt64("to", int(ir.DataType.FLOAT))], name=f"{prefix}/cast"
    )
    mul = ir.Node("", "Mul", [cast.outputs[0], scale.outputs[0]], name=f"{prefix}/dequantize")
    for made in (row, scale, cast, mul):
        made.outputs[0].name = made.name
    mul.outputs[0].type, mul.outputs[0].shape = old.type, old.shape
    context.model.graph.insert_before(node, [row, scale, cast, mul])
    old.replace_all_uses_with(mul.outputs[0])
    context.model.graph.remove(node, safe=True)
