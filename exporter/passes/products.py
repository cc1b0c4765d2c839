"""Products with constant weights become this project's own: ``linear``, ``linear_int8``, ``linear_int4x8``.

At T=1 a step is as fast as its weights are read, and the native kernels read them as fast as the memory gives
them, straight from the file. A weight then has one row an output, ``[N,K]``, as checkpoints have it and
MatMulNBits too, so nothing is repacked or copied when a session opens; of 4-bit weights eight rows are
interleaved here, once. Each operator's body is the node that it replaces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from xexport.core.manifest import Refusal
from xexport.core.op import DOMAIN
from xexport.exporter.weights import CheckpointTensor
from xexport.ops.linear_int4x8.layout import ROWS, interleaved_codes, interleaved_scales

__all__ = ["replace", "rewrite"]

_PASS = "products"
_BLOCKS = {8: (32, 64, 128), 4: (32,)}


class _Refused(Exception):
    """Why a node is left as it is."""


def rewrite(model: ir.Model) -> list[Refusal]:
    """Replace every product that can be, in the main graph; a node that is not has its reason."""
    refusals = []
    for node in list(model.graph):
        if (node.domain, node.op_type) not in (("", "MatMul"), ("com.microsoft", "MatMulNBits")):
            continue
        if node.graph is None:  # replaced with another product of the same weight
            continue
        try:
            if node.domain:
                _quantized(model, node)
            else:
                _float(model, node)
        except _Refused as refused:
            refusals.append(Refusal(_PASS, node.name or "", str(refused)))
    _drop_unused(model)
    return refusals


def _quantized(model: ir.Model, node: ir.Node) -> None:
    bits, block = (node.attributes[name].as_int() for name in ("bits", "block_size"))
    if bits not in _BLOCKS or block not in _BLOCKS[bits]:
        allowed = " or ".join(map(str, _BLOCKS.get(bits, ())))
        raise _Refused(
            f"{bits} bits in blocks of {block}: the kernel reads blocks of {allowed or 'no such code'}"
        )
    if len([v for v in node.inputs if v is not None]) != 3:
        raise _Refused("it has zero points or a bias of its own")
    x, codes, scales = node.inputs
    assert x is not None
    assert codes is not None
    assert scales is not None
    attributes = {name: node.attributes[name].as_int() for name in ("K", "N")}
    if bits == 8:
        attributes["block_size"] = block
        replace(model, node, "linear_int8", [x, codes, scales], attributes)
        return
    stored = _cast_from(scales, ir.DataType.FLOAT16)
    if stored is None:
        raise _Refused("its scales are out of the range of float16")
    _interleave(codes, interleaved_codes, 4, ROWS, 4)
    _interleave(stored, interleaved_scales, ROWS)
    replace(model, node, "linear_int4x8", [x, codes, stored], attributes)


def _interleave(value: ir.Value, interleaved: Callable[[Any], Any], *inner: int) -> None:
    """Store codes or scales with eight rows side by side, unless another product of them has done so."""
    tensor = value.const_value
    assert tensor is not None
    assert value.dtype is not None
    rows, blocks, *rest = tensor.shape.numpy()
    if rest == list(inner):
        return
    value.const_value = ir.LazyTensor(
        lambda: ir.Tensor(interleaved(tensor.numpy())),
        dtype=value.dtype,
        shape=ir.Shape((-(-rows // ROWS), blocks, *inner)),
        name=value.name,
    )
    value.shape = value.const_value.shape


def _float(model: ir.Model, node: ir.Node) -> None:
    x, right = node.inputs
    assert x is not None
    assert right is not None
    if x.const_value is not None and right.const_value is None:
        raise _Refused("its weight is on the left-hand side")
    weight, swapped = _weight_of(right)
    if swapped:
        replace(model, node, "linear", [x, weight], {})
        return
    if right is not weight:
        raise _Refused("its float16 weight has one column an output")
    uses = list(weight.uses())
    if not all(n.op_type == "MatMul" and not n.domain and i == 1 for n, i in uses):
        raise _Refused("another node reads its weight as it lies")
    _turn(weight)
    for user, _ in uses:
        assert user.inputs[0] is not None
        replace(model, user, "linear", [user.inputs[0], weight], {})


def _weight_of(value: ir.Value) -> tuple[ir.Value, bool]:
    """The initializer behind a product's right-hand side, and whether it is ``[N,K]`` already."""
    swapped = False
    producer = value.producer()
    if producer is not None and producer.op_type == "Transpose" and not producer.domain:
        perm = producer.attributes.get("perm")
        swapped = len(value.shape or ()) == 2 or (perm is not None and list(perm.as_ints()) == [1, 0])
        if swapped and producer.inputs[0] is not None:
            value = producer.inputs[0]
    value = _cast_from(value, ir.DataType.FLOAT16) or value
    if not value.is_initializer() or value.const_value is None:
        raise _Refused(
            "its right-hand side is computed: no weight"
            if not _folds(value)
            else "its weight is small, and ONNX Runtime's own product of it is as fast"
        )
    if len(value.const_value.shape) != 2:
        raise _Refused(f"its weight has {len(value.const_value.shape)} dimensions")
    if value.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        raise _Refused(f"its weight is {value.dtype}")
    return value, swapped


def _folds(value: ir.Value) -> bool:
    """Whether a value is computed from initializers alone (a small matrix that is stored in 8 or 4 bits)."""
    producer = value.producer()
    if producer is None:
        return value.is_initializer()
    return all(v is not None and _folds(v) for v in producer.inputs)


def _cast_from(value: ir.Value, dtype: ir.DataType) -> ir.Value | None:
    """What a Cast to float32 reads, if that is of ``dtype``."""
    producer = value.producer()
    if producer is None or producer.op_type != "Cast" or producer.inputs[0] is None:
        return None
    return producer.inputs[0] if producer.inputs[0].dtype == dtype else None


def _turn(value: ir.Value) -> None:
    """Store a weight ``[K,N]`` transposed under its own name: a view, read when it is written."""
    tensor = value.const_value
    assert tensor is not None
    assert value.dtype is not None
    if isinstance(tensor, CheckpointTensor):
        value.const_value = tensor.transposed()
    else:
        value.const_value = ir.LazyTensor(
            lambda: ir.Tensor(np.ascontiguousarray(tensor.numpy().T)),
            dtype=value.dtype,
            shape=ir.Shape(tuple(reversed(tensor.shape.numpy()))),
            name=value.name,
        )
    value.shape = ir.Shape(value.const_value.shape.numpy())


def replace(
    model: ir.Model, node: ir.Node, op_type: str, inputs: list[ir.Value], attributes: dict[str, int]
) -> None:
    """Put an operator of ours in the place of a product, under its name."""
    old = node.outputs[0]
    name = (node.name or "").replace(node.op_type, op_type)
    made = ir.Node(DOMAIN, op_type, inputs, [ir.AttrInt64(k, v) for k, v in attributes.items()], name=name)
    made.outputs[0].name, made.outputs[0].type, made.outputs[0].shape = old.name, old.type, old.shape
    model.graph.insert_before(node, made)
    ir.convenience.replace_all_uses_with(old, made.outputs[0], replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
    model.opset_imports.setdefault(DOMAIN, 1)


def _drop_unused(model: ir.Model) -> None:
    """Remove casts, transposes and weights that nothing reads any more."""
    for node in reversed(list(model.graph)):
        made = node.outputs[0]
        unread = not list(made.uses()) and not made.is_graph_output()
        if unread and node.op_type in ("Cast", "Transpose"):
            model.graph.remove(node, safe=True)
    for name, value in list(model.graph.initializers.items()):
        if not list(value.uses()) and not value.is_graph_output() and not value.is_graph_input():
            del model.graph.initializers[name]
