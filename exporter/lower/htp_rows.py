"""Products of 16 rows of 16-bit activations, for Qualcomm's HTP: fed as two blocks of eight rows.

A LayerNormalization, its result quantized to 16 bits, and a product of exactly 16 rows with weights that have
a scale a channel: onnxruntime-qnn 2.7.0 (HTP simulator) computes the rows from the third on wrongly, off by
their RMS. The minimal graph is

    LayerNormalization [1,16,K] -> QuantizeLinear (uint16) -> DequantizeLinear -> MatMul (int8, a scale a
    column) -> QuantizeLinear -> DequantizeLinear

Right are 1, 2, 4, 8 to 15, 17, 18, 20, 24, 32, 48, 64, 80 and 128 rows (others were not tried), 8-bit
activations, one scale for all weights, Add, Mul, Relu, Tanh, Sigmoid or RMSNormalization in front, and the
same rows as ``[2,8,K]``, which is what is done here.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from xexport.exporter.lower.builder import Builder

__all__ = ["rewrite"]

_ROWS, _BLOCKS = 16, 2


def rewrite(model: ir.Model) -> int:
    """Returns how many products were changed."""
    count = 0
    for node in list(model.graph):
        around = _around(node)
        if around is not None:
            builder = Builder(model.graph, around.last)
            builder.replace(_blocks(builder, node, around))
            count += 1
    return count


class _Around(NamedTuple):
    """The nodes in front of a product and behind it, which the HTP takes together with it as one."""

    first: ir.Node
    next_to_last: ir.Node
    last: ir.Node


def _around(node: ir.Node) -> _Around | None:
    """Of a product of 16 rows of 16-bit codes with weights that have a scale a channel; else None."""
    if node.op_type != "MatMul" or node.domain:
        return None
    x, weight = (_made_by(value, "DequantizeLinear") for value in node.inputs)
    first = _made_by(x.inputs[0], "QuantizeLinear") if x is not None else None
    behind = _only_user(node, "QuantizeLinear")
    last = _only_user(behind, "DequantizeLinear")
    if weight is None or first is None or behind is None or last is None:
        return None
    (value, _, zero), scales = first.inputs, weight.inputs[1]
    if zero is None or zero.dtype != ir.DataType.UINT16 or scales is None or not scales.shape:
        return None
    if value is None or value.shape is None or not value.shape.is_static() or last.outputs[0].shape is None:
        return None
    *lead, rows, _ = (int(d) for d in value.shape.numpy())
    return _Around(first, behind, last) if rows == _ROWS and math.prod(lead) == 1 else None


def _made_by(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == kind else None


def _only_user(node: ir.Node | None, kind: str) -> ir.Node | None:
    users = [user for user, _ in node.outputs[0].uses()] if node is not None else []
    return users[0] if len(users) == 1 and users[0].op_type == kind else None


def _blocks(b: Builder, node: ir.Node, around: _Around) -> ir.Value:
    """The product between two changes of shape, outside of the pairs: between them there is no other node."""
    value, scale, zero = _three(around.first)
    assert value.shape is not None
    assert node.inputs[1] is not None
    shape = [_BLOCKS, _ROWS // _BLOCKS, int(value.shape.numpy()[-1])]
    blocks = b.op("Reshape", value, b.constant(np.array(shape, np.int64)))
    product = b.op("MatMul", _rounded(b, blocks, scale, zero), node.inputs[1])
    result = around.last.outputs[0].shape
    assert result is not None
    rounded = _rounded(b, product, *_three(around.next_to_last)[1:])
    return b.op("Reshape", rounded, b.constant(np.array(result.numpy(), np.int64)))


def _rounded(b: Builder, value: ir.Value, scale: ir.Value, zero: ir.Value) -> ir.Value:
    codes = b.op("QuantizeLinear", value, scale, zero)
    codes.type = ir.TensorType(ir.DataType.UINT16)
    made = b.op("DequantizeLinear", codes, scale, zero)
    made.type = value.type
    return made


def _three(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value]:
    value, scale, zero = node.inputs
    assert value is not None
    assert scale is not None
    assert zero is not None
    return value, scale, zero
