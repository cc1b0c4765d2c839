"""Binding a traced graph's initializers to checkpoint tensors without copying them.

An initializer's value is a lazy tensor: shape and dtype are known, the bytes are read from the
memory-mapped checkpoint, converted and transposed only when the bundle is written, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from xexport.core.errors import CheckpointError

__all__ = ["as_array", "bind", "check_tensors", "derive", "is_weight", "lazy"]

_FLOATS = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.DOUBLE: torch.float64,
}


def check_tensors(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Every parameter and buffer of the module must be there, of its shape, and finite.

    Raises:
        CheckpointError: naming the first tensors that are missing, misshapen or not finite.
    """
    wanted = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    missing = [k for k in wanted if k not in tensors]
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} of {len(wanted)} tensors",
            got=source,
            allowed=f"among others {', '.join(missing[:4])}",
            fix="is it a checkpoint of another model, or a truncated one?",
        )
    for name, shape in wanted.items():
        got = tuple(tensors[name].shape)
        if got != shape:
            raise CheckpointError(
                f"tensor {name!r} has a wrong shape", got=list(got), allowed=list(shape), fix=source
            )
    for name in wanted:
        _check_finite(name, tensors[name], source)


def _check_finite(name: str, tensor: torch.Tensor, source: str, rows: int = 1 << 22) -> None:
    if not tensor.is_floating_point():
        return
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), rows):
        part = flat[start : start + rows]
        if not bool(torch.isfinite(part).all()):
            bad = int((~torch.isfinite(part)).sum())
            raise CheckpointError(
                f"tensor {name!r} holds NaN or infinite values",
                got=f"{bad} in elements {start}..{start + part.numel() - 1} of {source}",
                fix="the training run diverged or the file is corrupt: use an earlier checkpoint",
            )


def bind(model: ir.Model, tensors: Mapping[str, torch.Tensor]) -> int:
    """Make every initializer named in ``tensors`` a lazy view of it, and return how many there were.

    Raises:
        CheckpointError: an initializer has neither a value nor a tensor.
    """
    count = 0
    for name, value in model.graph.initializers.items():
        if name in tensors:
            value.const_value = lazy(name, tensors[name], value)
            count += 1
        elif _is_meta(value.const_value):
            raise CheckpointError(
                f"the graph needs a constant {name!r} that is not in the checkpoint",
                fix="register it as a parameter or buffer, and return it from the loader",
            )
    return count


def lazy(name: str, tensor: torch.Tensor, value: ir.Value) -> ir.LazyTensor:
    """A lazy initializer of the value's dtype, read from ``tensor`` when it is written."""
    dtype = value.dtype
    assert dtype is not None

    def read() -> ir.Tensor[Any]:
        source = tensor.detach()
        if dtype in _FLOATS:
            source = source.to(_FLOATS[dtype])
        return ir.Tensor(np.ascontiguousarray(source.numpy()), name=name)

    return ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(tensor.shape), name=name)


def derive(
    source: ir.TensorProtocol,
    name: str,
    shape: tuple[int, ...],
    dtype: ir.DataType,
    compute: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]],
) -> ir.LazyTensor:
    """A lazy initializer computed from another one when it is written."""

    def read() -> ir.Tensor[Any]:
        return ir.Tensor(np.ascontiguousarray(compute(source.numpy())), dtype=dtype, name=name)

    return ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(shape), name=name)


def is_weight(value: ir.Value | None) -> bool:
    """Whether a value is an initializer (a weight or a constant of the graph)."""
    return value is not None and value.is_initializer()


def as_array(value: ir.Value) -> np.ndarray[Any, Any]:
    """The bytes of an initializer, read now."""
    assert value.const_value is not None
    return value.const_value.numpy()


def _is_meta(tensor: object) -> bool:
    raw = getattr(tensor, "raw", None)
    return tensor is None or (isinstance(raw, torch.Tensor) and raw.is_meta)
