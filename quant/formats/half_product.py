"""fp16 products: ``MatMul(x, W)`` in half precision, for devices whose units are twice as fast in it.

The activation is rounded to fp16 in front of a product and its result goes back to fp32 behind it: sums of
the residual stream, norms, gates and the state stay in fp32. A processor without fp16 arithmetic gains
nothing from it, and the scheme ``fp16`` (half.py) loses less there.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from xexport.exporter.weights import as_array
from xexport.quant.blocks import relative_error
from xexport.quant.formats import Context, Refusal, Stored
from xexport.quant.formats.block import products_of
from xexport.quant.formats.half import LARGEST

__all__ = ["apply"]


def apply(context: Context, value: ir.Value) -> Stored | Refusal:
    """Store a matrix in fp16 and compute the products that read it in fp16."""
    products, matrix = products_of(value)
    if not products or matrix is None:
        return Refusal("no matrix product reads it as its right-hand side")
    if len(products) != len(list(value.uses())):
        return Refusal("something else than a product reads it too")
    largest = float(np.abs(matrix).max(initial=0.0))
    if largest > LARGEST:
        return Refusal(f"it holds values beyond {LARGEST:.0f}, the largest of fp16")
    name = value.name or ""
    half = as_array(value).astype(np.float16)
    stored = context.initializer(f"{name}.fp16", context.spool.put(name, half))
    for node in products:
        node.replace_input_with(1, stored)
        _in_half(context, node)
    del context.model.graph.initializers[name]
    return Stored("float16 product", half.nbytes, relative_error(as_array(value), half.astype(np.float32)))


def _in_half(context: Context, node: ir.Node) -> None:
    """Casts around one product; two products of one activation share the cast in front."""
    graph, activation, old = context.model.graph, node.inputs[0], node.outputs[0]
    assert activation is not None
    node.replace_input_with(0, _rounded(graph, activation, node))
    back = ir.Node("", "Cast", [old], [ir.AttrInt64("to", int(ir.DataType.FLOAT))], name=f"{node.name}/Cast")
    result = back.outputs[0]
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    back.replace_input_with(0, old)
    result.name, result.type, result.shape = old.name, ir.TensorType(ir.DataType.FLOAT), old.shape
    old.name, old.type = f"{old.name}.product", ir.TensorType(ir.DataType.FLOAT16)
    graph.insert_after(node, back)


def _rounded(graph: ir.Graph, activation: ir.Value, before: ir.Node) -> ir.Value:
    for user, _ in activation.uses():
        if user.op_type == "Cast" and user.attributes["to"].as_int() == int(ir.DataType.FLOAT16):
            return user.outputs[0]
    name = f"{activation.name}.fp16"
    cast = ir.Node("", "Cast", [activation], [ir.AttrInt64("to", int(ir.DataType.FLOAT16))], name=name)
    found = cast.outputs[0]
    found.name, found.type, found.shape = name, ir.TensorType(ir.DataType.FLOAT16), activation.shape
    producer = activation.producer()
    if producer is None:
        graph.insert_before(graph[0], cast)
    else:
        graph.insert_after(producer, cast)
    return found
