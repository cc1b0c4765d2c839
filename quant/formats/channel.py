"""8-bit products with one scale an output channel, and activations rounded to 8 bits a row: for WebAssembly.

    m = max |x| of the row;  q = round(127 x / m) + 128;  y = m / 127 * s_n * sum_k (q_k - 128) (w_kn - 128)

onnxruntime-web's MatMulNBits is slow (532 us for 512x512 where float32 takes 114), its integer GEMM is not:
at 768x768 1.4 to 1.7 times the float32 product at one token, 1.7 to 2.3 times at 64
(benchmarks/web_products.py). DynamicQuantizeMatMul is that in one node, but its one scale for all tokens
breaks the chunk law: a token's result would depend on its neighbours. Here every row has its own, which
costs six small nodes (5 us together).

Both sides are unsigned around 128: with signed weights the products saturate on x86 CPUs without VNNI, so
that ONNX Runtime would compute something else there than in a browser; WebAssembly takes both in the same
time. Signed activations are eight times slower there.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from xexport.quant.blocks import quantize_rows, relative_error
from xexport.quant.formats import Context, Refusal, Stored
from xexport.quant.formats.block import drop_unused, products_of
from xexport.quant.formats.stored import store

__all__ = ["apply"]

#: elements of a matrix from which the 8-bit product is no slower than the float one at T=1 (measured in Node:
#: 0.5 times as fast at 256x256, the same at 512x512, 1.7 times at 768x768; at T=64 2.3 times at 512x512)
FASTER_ABOVE = 1 << 18
_ZERO = 128
_TOP = 127
_TINY = 1e-30  # a row of zeros is divided by it


def apply(context: Context, value: ir.Value) -> Stored | Refusal:
    """Rewrite every ``MatMul(x, W)`` of a float32 ``[K,N]`` weight."""
    products, matrix = products_of(value)
    if not products:
        return Refusal("no matrix product reads it as its right-hand side")
    if matrix is None:
        return Refusal("it is not a float32 matrix")
    if matrix.size < FASTER_ABOVE:
        stored = store(context, value, products, matrix, 8)
        drop_unused(context, value)
        return stored
    codes, scales = quantize_rows(matrix)  # [N,K], [N,1]
    name = value.name or ""
    turned = np.ascontiguousarray((codes.astype(np.int16) + _ZERO).astype(np.uint8).T)
    w = context.initializer(f"{name}.int8", context.spool.put(name, turned))
    s = context.initializer(f"{name}.scale", context.spool.put(name, scales[:, 0]))
    for node in products:
        _rewrite(context, node, w, s)
    drop_unused(context, value)
    error = relative_error(matrix, codes.astype(np.float32) * scales)
    return Stored("int8 per channel", turned.nbytes + scales.nbytes, error)


def _rewrite(context: Context, node: ir.Node, w: ir.Value, s: ir.Value) -> None:
    """``MatMul(x, W)`` -> the rows' codes, the integer product, the rows' scale."""
    x, old = node.inputs[0], node.outputs[0]
    assert x is not None
    prefix = node.name or old.name or ""
    zero, step = _constants(context)
    codes, largest = _rows(context, x, zero, step)
    made = ir.Node(
        "com.microsoft",
        "MatMulIntegerToFloat",
        [codes, w, step, s, zero, zero],
        name=prefix.replace("MatMul", "MatMulIntegerToFloat"),
    )
    scaled = ir.Node("", "Mul", [made.outputs[0], largest], name=f"{prefix}/scale")
    made.outputs[0].name = f"{prefix}/product"
    made.outputs[0].type, made.outputs[0].shape = old.type, old.shape
    out = scaled.outputs[0]
    out.name, out.type, out.shape = old.name, old.type, old.shape
    graph = context.model.graph
    graph.insert_before(node, [made, scaled])
    ir.convenience.replace_all_uses_with(old, out, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    context.model.opset_imports.setdefault("com.microsoft", 1)


def _rows(context: Context, x: ir.Value, zero: ir.Value, step: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The codes of x and the largest value of each row, made once however many products read x."""
    name = f"{x.name}/rows"
    graph = context.model.graph
    for user, _ in x.uses():
        if user.name == f"{name}/Div":
            divided, largest = user.outputs[0], user.inputs[1]
            (quantized,) = [n for n, _ in divided.uses() if n.op_type == "QuantizeLinear"]
            assert largest is not None
            return quantized.outputs[0], largest
    axis = _initializer(context, "quant.last_axis", np.array([-1], np.int64))
    tiny = _initializer(context, "quant.tiny", np.array(_TINY, np.float32))
    size = ir.Node("", "Abs", [x], name=f"{name}/Abs")
    top = ir.Node(
        "", "ReduceMax", [size.outputs[0], axis], [ir.AttrInt64("keepdims", 1)], name=f"{name}/ReduceMax"
    )
    safe = ir.Node("", "Max", [top.outputs[0], tiny], name=f"{name}/Max")
    unit = ir.Node("", "Div", [x, safe.outputs[0]], name=f"{name}/Div")
    codes = ir.Node("", "QuantizeLinear", [unit.outputs[0], step, zero], name=f"{name}/QuantizeLinear")
    nodes = [size, top, safe, unit, codes]
    for node in nodes:
        node.outputs[0].name = node.name
        node.outputs[0].type = ir.TensorType(ir.DataType.UINT8 if node is codes else ir.DataType.FLOAT)
        if x.shape is not None:
            dims = list(x.shape)
            node.outputs[0].shape = ir.Shape([*dims[:-1], 1] if node in (top, safe) else dims)
    producer = x.producer()  # right behind it, so that they come before every product that reads x
    if producer is None:
        graph.insert_before(graph[0], nodes)
    else:
        graph.insert_after(producer, nodes)
    return codes.outputs[0], safe.outputs[0]


def _constants(context: Context) -> tuple[ir.Value, ir.Value]:
    """The zero point of both sides, and the step of an activation whose row's largest value is 1."""
    zero = _initializer(context, "quant.zero", np.array(_ZERO, np.uint8))
    return zero, _initializer(context, "quant.step", np.array(1 / _TOP, np.float32))


def _initializer(context: Context, name: str, array: np.ndarray) -> ir.Value:
    found = context.model.graph.initializers.get(name)
    return found if found is not None else context.initializer(name, ir.Tensor(array))
