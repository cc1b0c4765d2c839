"""What Qualcomm's HTP can't compute, or not well in 16-bit floats, in operators that it can.

Measured with onnxruntime-qnn 2.7.0 (HTP simulator). Not taken: CumSum, Trilu, Min with a constant, Log and
Round of five dimensions. Softplus loses 6% of a small value, since 1 + e^x is rounded to 11 bits before the
logarithm. Integers have 32 bits, a product beyond them saturates, and Mod is computed in floats. A Reshape
of what Split gives is zero in Mamba-2; Slice does the same and is right. Expand of five dimensions and
RMSNormalization of four give wrong numbers, of three right ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from xexport.exporter.lower.builder import Builder, constant_of

__all__ = ["rewrite"]

_RANK = 4
_TURN = 1 << 32
_DIGITS, _BASE = 4, 64  # positions below 2^24, in four tables of 64 angles


def rewrite(model: ir.Model) -> int:
    """Returns how many nodes were replaced."""
    count = 0
    for node in list(model.graph):
        make = _RULES.get(node.op_type)
        if make is None or node.domain:
            continue
        builder = Builder(model.graph, node)
        made = make(builder, node)
        if made is not None:
            builder.replace(*made) if isinstance(made, tuple) else builder.replace(made)
            count += 1
    return count


def _split(b: Builder, node: ir.Node) -> tuple[ir.Value, ...] | None:
    """A Slice a part."""
    x, shapes = node.inputs[0], [v.shape for v in node.outputs]
    if x is None or x.shape is None:
        return None
    axis = node.attributes.get_int("axis", 0) % x.shape.rank()
    ends = [0]
    for shape in shapes:
        size = None if shape is None else shape[axis]
        if not isinstance(size, int):
            return None
        ends.append(ends[-1] + size)
    marks = [b.constant(np.array([n], np.int64)) for n in (axis, *ends)]
    return tuple(b.op("Slice", x, a, e, marks[0]) for a, e in itertools.pairwise(marks[1:]))


def _softplus(b: Builder, node: ir.Node) -> ir.Value | None:
    """``max(x, 0) + ln(1 + u)`` with ``u = e^-|x|``; the logarithm as 2 artanh(u / (2 + u)), whose series
    ends after four terms (relative error 1e-5), so a small u keeps its digits."""
    x = node.inputs[0]
    assert x is not None
    u = b.op("Exp", b.op("Neg", b.op("Abs", x)))
    s = b.op("Div", u, b.op("Add", u, b.scalar(2.0)))
    square = b.op("Mul", s, s)
    series = b.scalar(1 / 7)
    for term in (1 / 5, 1 / 3, 1.0):
        series = b.op("Add", b.op("Mul", square, series), b.scalar(term))
    log = b.op("Mul", b.op("Mul", s, b.scalar(2.0)), series)
    return b.op("Add", b.op("Relu", x), log)


def _cumsum(b: Builder, node: ir.Node) -> ir.Value | None:
    """A running sum along the last axis but one: a product with a triangle of ones."""
    x, axis = node.inputs[0], constant_of(node.inputs[1])
    if x is None or x.shape is None or axis is None or node.attributes.get_int("exclusive", 0) != 0:
        return None
    rank = x.shape.rank()
    at = int(axis.reshape(-1)[0]) % rank
    size = x.shape[at]
    assert isinstance(size, int)
    ones = np.tril(np.ones((size, size), np.float32))
    if node.attributes.get_int("reverse", 0) != 0:
        ones = ones.T
    if at == rank - 1:
        return b.op("MatMul", x, b.constant(np.ascontiguousarray(ones.T)))
    turned = at != rank - 2
    perm = list(range(rank))
    perm[at], perm[rank - 2] = perm[rank - 2], perm[at]
    value = b.op("Transpose", x, perm=perm) if turned else x
    value = b.op("MatMul", b.constant(ones), value)
    return b.op("Transpose", value, perm=perm) if turned else value


def _trilu(b: Builder, node: ir.Node) -> ir.Value | None:
    """A product with zeros and ones; what it removes is finite in the bodies that use it."""
    x = node.inputs[0]
    shift = constant_of(node.inputs[1]) if len(node.inputs) > 1 else np.zeros(1, np.int64)
    if x is None or x.shape is None or shift is None or not x.shape.is_static():
        return None
    rows, columns = (int(d) for d in x.shape.numpy()[-2:])
    cut = np.triu if node.attributes.get_int("upper", 1) != 0 else np.tril
    return b.op("Mul", x, b.constant(cut(np.ones((rows, columns), np.float32), int(shift.reshape(-1)[0]))))


def _min(b: Builder, node: ir.Node) -> ir.Value | None:
    """``c - max(c - x, 0)`` for a constant c."""
    if len(node.inputs) != 2:
        return None
    for x, c in (node.inputs, tuple(reversed(node.inputs))):
        if x is not None and c is not None and c.const_value is not None and x.dtype == ir.DataType.FLOAT:
            return b.op("Sub", c, b.op("Relu", b.op("Sub", c, x)))
    return None


def _flat(b: Builder, node: ir.Node) -> ir.Value | None:
    """A function of single elements, through a shape of three dimensions."""
    x = node.inputs[0]
    if x is None or x.shape is None or not x.shape.is_static() or x.shape.rank() <= _RANK:
        return None
    shape = [int(d) for d in x.shape.numpy()]
    flat = b.op("Reshape", x, b.constant(np.array([1, -1, shape[-1]], np.int64)))
    return b.op("Reshape", b.op(node.op_type, flat), b.constant(np.array(shape, np.int64)))


def _expand(b: Builder, node: ir.Node) -> ir.Value | None:
    """One axis of 1 repeated: through ``[before, 1, after]``, joined with itself."""
    x, result = node.inputs[0], node.outputs[0]
    if x is None or x.shape is None or result.shape is None or x.shape.rank() != result.shape.rank():
        return None
    old, new = ([int(d) for d in s.numpy()] for s in (x.shape, result.shape))
    axes = [i for i, (m, n) in enumerate(zip(old, new, strict=True)) if m != n]
    if len(axes) != 1:
        return None
    at = axes[0]
    flat = np.array([math.prod(old[:at]), 1, math.prod(old[at + 1 :])], np.int64)
    row = b.op("Reshape", x, b.constant(flat))
    return b.op("Reshape", b.op("Concat", *[row] * new[at], axis=1), b.constant(np.array(new, np.int64)))


def _norm(b: Builder, node: ir.Node) -> ir.Value | None:
    """Over the last axis, of three dimensions."""
    x, weight = node.inputs[:2]
    if x is None or weight is None or x.shape is None or not x.shape.is_static():
        return None
    shape = [int(d) for d in x.shape.numpy()]
    axis = node.attributes.get_int("axis", -1)
    if len(shape) <= 3 or axis not in (-1, len(shape) - 1):
        return None
    flat = b.op("Reshape", x, b.constant(np.array([1, -1, shape[-1]], np.int64)))
    kept = {
        name: node.attributes[name].value for name in ("epsilon", "stash_type") if name in node.attributes
    }
    normed = b.op("RMSNormalization", flat, weight, axis=-1, **kept)
    return b.op("Reshape", normed, b.constant(np.array(shape, np.int64)))


def _rotation(b: Builder, node: ir.Node) -> ir.Value | None:
    """cos or sin of ``2 pi / 2^32 ((position * turns) mod 2^32)``, the exact angles of models/_rotary.py.

    The position's digits to base 64 choose an angle in each of four tables, and the angles are added as
    rotations: ``(c + is)(c' + is')``. Exact integers stay below 2^24.
    """
    found = _angle(node.inputs[0])
    if found is None:
        return None
    position, turns = found
    assert position.shape is not None
    shape = [*(int(d) for d in position.shape.numpy()[:-1]), turns.size]
    parts = []
    rest = b.op("Cast", position, to=int(ir.DataType.INT32))
    base = b.constant(np.array(_BASE, np.int32))
    for digit in range(_DIGITS):
        above = b.op("Div", rest, base)
        index = b.op("Sub", rest, b.op("Mul", above, base)) if digit < _DIGITS - 1 else rest
        steps = np.arange(_BASE, dtype=object)[:, None] * (_BASE**digit) * turns.astype(object)
        angles = np.array(steps % _TURN, dtype=np.float64) * (2 * np.pi / _TURN)
        target = b.constant(np.array(shape, np.int64))

        def looked_up(table: np.ndarray, index: ir.Value = index, target: ir.Value = target) -> ir.Value:
            return b.op(
                "Reshape", b.op("Gather", b.constant(table.astype(np.float32)), index, axis=0), target
            )

        parts.append((looked_up(np.cos(angles)), looked_up(np.sin(angles))))
        rest = above
    cos, sin = parts[0]
    for c, s in parts[1:]:
        cos, sin = (
            b.op("Sub", b.op("Mul", cos, c), b.op("Mul", sin, s)),
            b.op("Add", b.op("Mul", sin, c), b.op("Mul", cos, s)),
        )
    return cos if node.op_type == "Cos" else sin


def _angle(value: ir.Value | None) -> tuple[ir.Value, np.ndarray] | None:
    """(positions [...,1], turns [n]) of an angle, if it is one of models/_rotary.py."""
    expected = (("Mul", None), ("Cast", None), ("Mod", _TURN), ("Mul", None))
    for kind, wanted in expected:
        node = value.producer() if value is not None else None
        if node is None or node.op_type != kind or node.domain:
            return None
        constants = [constant_of(v) for v in node.inputs[1:]]
        if wanted is not None and (constants[0] is None or int(constants[0].reshape(-1)[0]) != wanted):
            return None
        value, last = node.inputs[0], node
    if last.inputs[0] is not None and last.inputs[0].const_value is not None:
        turns, value = constant_of(last.inputs[0]), last.inputs[1]
    else:
        turns = constant_of(last.inputs[1])
    if turns is None or value is None or value.shape is None or not value.shape.is_static():
        return None
    return (value, turns.reshape(-1)) if value.shape[-1] == 1 else None


_RULES: dict[str, Callable[[Builder, ir.Node], ir.Value | tuple[ir.Value, ...] | None]] = {
    "Split": _split,
    "Softplus": _softplus,
    "CumSum": _cumsum,
    "Trilu": _trilu,
    "Min": _min,
    "Log": _flat,
    "Round": _flat,
    "Expand": _expand,
    "RMSNormalization": _norm,
    "Cos": _rotation,
    "Sin": _rotation,
}
