"""Static activations: QuantizeLinear and DequantizeLinear around the products with 8-bit weights.

What enters and what leaves such a product gets the range that calibration found. Everything else, the state
among it, stays float: the recurrence, norms, gates and low-rank paths are not touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from xexport.core.manifest import Activation
from xexport.exporter.constants import initializer
from xexport.quant.formats.dequantize import QDQ_SUFFIX
from xexport.quant.ranges import Histogram, Range, choose
from xexport.quant.scheme import Activations

__all__ = ["insert", "places"]

_WIDE = 16


def places(model: ir.Model) -> list[ir.Value]:
    """The values to calibrate: what enters and leaves a product with weights of formats/dequantize.py."""
    found: dict[ir.Value, None] = {}
    for node in model.graph:
        if _is_product(node):
            for value in (node.inputs[0], node.outputs[0]):
                assert value is not None
                found[value] = None
    return list(found)


def insert(
    model: ir.Model, values: Sequence[ir.Value], seen: Mapping[str, Histogram], wanted: Activations
) -> list[Activation]:
    """Put a pair of nodes behind every value of :func:`places`; who read it reads the rounded value.

    Args:
        seen: histograms by the values' names.
        wanted: method and bits, and where they don't do.

    Returns:
        A record a value.
    """
    records = []
    wide = _coarse(values, seen, wanted)
    for value in values:
        name = value.name or ""
        bits = _WIDE if value in wide else wanted.bits
        chosen = choose(seen[name], wanted.method, bits)
        _round(model, value, chosen)
        records.append(
            Activation(name, chosen.low, chosen.high, bits, wanted.method, seen[name].low, seen[name].high)
        )
    return records


def _coarse(values: Sequence[ir.Value], seen: Mapping[str, Histogram], wanted: Activations) -> set[ir.Value]:
    """What enters or leaves a product that needs 16 bits on one side, and so has them on both."""
    if wanted.coarse is None:
        return set()

    def is_coarse(value: ir.Value) -> bool:
        histogram = seen[value.name or ""]
        return choose(histogram, wanted.method, wanted.bits).noise(histogram) > (wanted.coarse or 0.0)

    wide = {value for value in values if is_coarse(value)}
    sides = [_sides(node) for value in values for node, _ in value.uses() if _is_product(node)]
    while more := {v for pair in sides if wide & set(pair) for v in pair} - wide:
        wide |= more
    return wide


def _sides(product: ir.Node) -> tuple[ir.Value, ir.Value]:
    assert product.inputs[0] is not None
    return product.inputs[0], product.outputs[0]


def _is_product(node: ir.Node) -> bool:
    if node.op_type != "MatMul" or node.domain:
        return False
    weight = node.inputs[1].producer() if node.inputs[1] is not None else None
    return weight is not None and (weight.name or "").endswith(QDQ_SUFFIX)


def _round(model: ir.Model, value: ir.Value, chosen: Range) -> None:
    graph, name = model.graph, value.name or ""
    kind = np.uint8 if chosen.bits == 8 else np.uint16
    scale = initializer(graph, f"{name}/range.scale", np.array(chosen.scale, np.float32))
    zero = initializer(graph, f"{name}/range.zero", np.array(chosen.zero, kind))
    users = list(value.uses())
    quantize = ir.node("QuantizeLinear", [value, scale, zero], name=f"{name}/QuantizeLinear")
    codes = quantize.outputs[0]
    codes.name, codes.type, codes.shape = (
        quantize.name,
        ir.TensorType(ir.DataType.from_numpy(np.dtype(kind))),
        value.shape,
    )
    back = ir.node("DequantizeLinear", [codes, scale, zero], name=f"{name}/DequantizeLinear")
    rounded = back.outputs[0]
    rounded.name, rounded.type, rounded.shape = back.name, value.type, value.shape
    made = value.producer()
    graph.insert_after(made, [quantize, back]) if made is not None else graph.insert_before(
        graph[0], [quantize, back]
    )
    for user, place in users:
        user.replace_input_with(place, rounded)
    for place, output in enumerate(graph.outputs):
        if output is value:  # the logits: the graph's output keeps its name
            value.name, rounded.name = f"{name}/exact", name
            graph.outputs[place] = rounded
