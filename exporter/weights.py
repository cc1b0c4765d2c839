"""Binding a traced graph's initializers to checkpoint tensors without copying them.

An initializer's value is a lazy tensor: shape and dtype are known, the bytes are read from the
memory-mapped checkpoint, converted and transposed only when the bundle is written, one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from xexport.core.errors import CheckpointError

__all__ = ["CheckpointTensor", "as_array", "bind", "check_tensors"]

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
    parameters = module.state_dict()
    wanted = {k: tuple(v.shape) for k, v in parameters.items()}
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
        if parameters[name].is_floating_point() != tensors[name].is_floating_point():
            raise CheckpointError(
                f"tensor {name!r} has a wrong type",
                got=f"{tensors[name].dtype} in {source}",
                allowed=f"{'a float type' if parameters[name].is_floating_point() else 'whole numbers'}",
                fix="a quantized checkpoint can't be read: use the float one it was made from",
            )
    for name in wanted:
        _check_finite(name, tensors[name], source)


def _check_finite(name: str, tensor: torch.Tensor, source: str, rows: int = 1 << 22) -> None:
    if not tensor.is_floating_point():
        return
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), rows):
        part = flat[start : start + rows]
        # the extremes of values with a NaN are NaN: one pass, nothing allocated
        if not all(map(math.isfinite, torch.stack(torch.aminmax(part)).tolist())):
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
            assert value.dtype is not None
            value.const_value = CheckpointTensor(tensors[name], value.dtype, name)
            count += 1
        elif _is_meta(value.const_value):
            raise CheckpointError(
                f"the graph needs a constant {name!r} that is not in the checkpoint",
                fix="register it as a parameter or buffer, and return it from the loader",
            )
    return count


class CheckpointTensor(ir.LazyTensor):
    """An initializer that is a view of a checkpoint tensor, converted only while it is read.

    Args:
        source: the stored tensor or a view of it (memory-mapped as a rule), of any float dtype.
        dtype: what the graph wants.
        name: of the initializer.
    """

    def __init__(self, source: torch.Tensor, dtype: ir.DataType, name: str) -> None:
        super().__init__(self._whole, dtype=dtype, shape=ir.Shape(source.shape), name=name)
        self._source = source.detach()

    def transposed(self) -> CheckpointTensor:
        """The same matrix with rows and columns exchanged."""
        return CheckpointTensor(self._source.t(), self.dtype, self.name or "")

    def blocks(self, limit: int) -> Iterator[np.ndarray[Any, Any]]:
        """The tensor's rows in order, as contiguous arrays of at most about ``limit`` bytes."""
        source = self._source
        if source.dim() == 0:
            yield self._converted(source.reshape(1))
            return
        rows = max(1, limit * len(source) // max(1, self.nbytes))
        for start in range(0, len(source), rows):
            yield self._converted(source[start : start + rows])

    def _converted(self, part: torch.Tensor) -> np.ndarray[Any, Any]:
        wanted = _FLOATS.get(self.dtype, part.dtype)
        return part.to(wanted).contiguous().numpy()

    def _whole(self) -> ir.Tensor[Any]:
        return ir.Tensor(self._converted(self._source), name=self.name)


def as_array(value: ir.Value) -> np.ndarray[Any, Any]:
    """The bytes of an initializer, read now."""
    assert value.const_value is not None
    return value.const_value.numpy()


def _is_meta(tensor: object) -> bool:
    raw = getattr(tensor, "raw", None)
    return tensor is None or (isinstance(raw, torch.Tensor) and raw.is_meta)
