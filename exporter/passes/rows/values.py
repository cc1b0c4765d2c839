"""What a value is to a program over rows: rows, one row a token, a constant, or none of these."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir

from xexport.ops.fused_rows.program import Kind

__all__ = ["Operand", "constant", "lead_of", "operand_of", "spread", "trailing_of"]

Lead = tuple[str, str]


def lead_of(value: ir.Value | None) -> Lead | None:
    """The names of the first two dimensions if the value is float32 rows [B,T,...], else None."""
    if value is None or value.shape is None or value.dtype != ir.DataType.FLOAT or len(value.shape) < 2:
        return None
    first, second, *rest = value.shape
    if isinstance(first, int) or isinstance(second, int):
        return None
    if any(not isinstance(dim, int) or dim < 1 for dim in rest):
        return None
    return str(first), str(second)


def trailing_of(value: ir.Value, skip: int = 2) -> tuple[int, ...]:
    """The dimensions behind the first ``skip``."""
    assert value.shape is not None
    return tuple(int(str(dim)) for dim in list(value.shape)[skip:])


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The value of a small constant, else None."""
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size > 64:
        return None
    return np.asarray(tensor.numpy())


@dataclass(frozen=True)
class Operand:
    """A value as a program reads it.

    Attributes:
        kind: ROWS, TOKENS, FIXED or LITERAL.
        shape: without batch and tokens, as long as the result's.
        literal: the number, of a LITERAL.
    """

    value: ir.Value
    kind: Kind
    shape: tuple[int, ...]
    literal: float = 0.0


def operand_of(value: ir.Value | None, lead: Lead, rank: int) -> Operand | None:
    """The value as an operand of a row-wise node whose result has these leads and this rank."""
    if value is None or value.shape is None or value.dtype != ir.DataType.FLOAT:
        return None
    dims = list(value.shape)
    if lead_of(value) == lead and len(dims) == rank:
        return Operand(value, Kind.ROWS, trailing_of(value))
    width = rank - 2
    if all(isinstance(d, int) for d in dims):
        sizes = [int(str(d)) for d in dims]
        if prod(sizes) == 1 and (number := constant(value)) is not None:
            return Operand(value, Kind.LITERAL, (1,) * width, float(number.reshape(-1)[0]))
        extra = max(len(sizes) - width, 0)
        if any(d != 1 for d in sizes[:extra]):
            return None
        return Operand(value, Kind.FIXED, (1,) * (width - len(sizes)) + tuple(sizes[extra:]))
    if len(dims) == rank - 1 and str(dims[0]) == lead[1] and all(isinstance(d, int) for d in dims[1:]):
        return Operand(value, Kind.TOKENS, trailing_of(value, 1))
    return None


def spread(shape: tuple[int, ...], result: tuple[int, ...]) -> tuple[int, int, bool, int] | None:
    """How an operand of ``shape`` covers ``result``: (outer, inner, single, step), as an Instruction's.

    outer 0 stands for any division of the result.
    """
    size = prod(result)
    if shape == result or prod(shape) == size:
        return 0, size, False, 1
    if prod(shape) == 1:
        return 0, size, True, 0
    for cut in range(1, len(result)):
        outer, inner = prod(result[:cut]), prod(result[cut:])
        if shape[:cut] == result[:cut] and prod(shape[cut:]) == 1:
            return outer, inner, True, 1
        if prod(shape[:cut]) == 1 and shape[cut:] == result[cut:]:
            return outer, inner, False, 0
    return None
