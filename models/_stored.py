"""Parameters that stay in the checkpoint's file and dtype, and are widened to float32 where they are used.

A float32 copy of a 1.5-billion-parameter checkpoint takes 6 GB. Comparing an exported graph with
PyTorch needs a handful of forward passes only, so here every torch function that is given a stored
parameter sees a float32 copy of that one parameter, which is gone when the function returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = ["assign_stored"]

_PART = 1 << 22  # elements of a weight that are widened at a time
#: they return rows of the table, so the rows are widened and not the table
_LOOKUPS = {F.embedding, torch.embedding}
_DTYPE = Tensor.dtype.__get__  # type: ignore[attr-defined]
#: they return no values: widening for them would be work for nothing
_QUESTIONS = {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point}


class _Stored(Tensor):
    """A tensor of any float dtype that takes part in every computation as float32."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func == _DTYPE:  # a new object at every access
                return torch.float32  # as it takes part
            if func in _QUESTIONS or getattr(func, "__name__", "") == "__get__":
                return func(*args, **kwargs)
            if func in _LOOKUPS:
                return func(*args, **kwargs).to(torch.float32)
            if func is F.linear:
                return _linear(*args, **kwargs)
            return func(*tree_map(_widened, args), **tree_map(_widened, kwargs))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product by a few rows of the weight at a time, which are widened into one small buffer."""
    rows = min(len(weight), max(1, _PART // weight.shape[1]))
    buffer = torch.empty(rows, weight.shape[1], dtype=torch.float32)
    x = _widened(x)
    parts = [F.linear(x, buffer[: len(part)].copy_(part)) for part in torch.split(weight, rows)]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return y if bias is None else y + _widened(bias)


def _widened(value: Any) -> Any:
    return value.to(torch.float32) if isinstance(value, _Stored) else value


def assign_stored(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give a module its parameters and buffers without copying a weight.

    Tensors that already have the dtype the module wants are used as they are, vectors (where the
    cost is nothing) are converted now, and larger ones whenever they are used.
    """
    for prefix, child in module.named_modules():
        for table in (child._parameters, child._buffers):
            for name, old in table.items():
                if old is None:
                    continue
                tensor = tensors[f"{prefix}.{name}" if prefix else name].detach()
                if tensor.dtype != old.dtype:
                    wide = old.dtype == torch.float32 and tensor.is_floating_point() and tensor.dim() > 1
                    tensor = tensor.as_subclass(_Stored) if wide else tensor.to(old.dtype)
                table[name] = tensor
