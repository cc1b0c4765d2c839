"""The recurrences of Mamba-1 and RWKV-7 in C++ for training on a CPU: two to three times the tokens.

A convenience of the recipe alone: the models do not know of it. ``zoo/scan.cc`` is compiled with the
machine's own compiler when a run begins, and :func:`native_recurrences` puts the functions in place of the
ones that the model files import, for as long as the run lasts. Without a compiler, on another device, or
for a state size that is not compiled in, the torch implementations run.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib import import_module
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["native_recurrences", "native_selective_scan", "native_wkv7"]

_BLOCK = 16
_FLAGS = ("-O3", "-march=native", "-ffast-math", "-std=c++17", "-shared", "-fPIC")


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled library, or None where there is no compiler or it fails."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder, as_file(files("xexport.zoo") / "scan.cc") as source:
        built = Path(folder) / "scan.so"
        done = subprocess.run(
            [compiler, *_FLAGS, str(source), "-o", str(built), "-lm"], capture_output=True, check=False
        )
        return ctypes.CDLL(str(built)) if done.returncode == 0 else None


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))


def _call(
    name: str,
    sizes: Sequence[int],
    inputs: Sequence[Tensor],
    rest: Sequence[Tensor | None],
    outputs: Sequence[Tensor],
) -> None:
    library = _library()
    assert library is not None
    pointers = (ctypes.c_void_p(None if t is None else t.data_ptr()) for t in rest)
    code = getattr(library, name)(*sizes, _pointers(inputs), *pointers, _pointers(outputs))
    assert code == 0, "the caller has checked the state size"


class _Scan(torch.autograd.Function):
    """(dt, q, A, B, C, state) -> (C.h, last h); no gradient reaches or leaves the states."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        dt, q, A, B, C, state = (x.contiguous() for x in inputs)
        batch, T, D = dt.shape
        N = A.shape[1]
        after, y = state.clone(), torch.empty_like(dt)
        kept = dt.new_empty(batch, -(-T // _BLOCK), D, N)
        sizes = (N, batch, T, D)
        _call("xexport_train_scan", sizes, (dt, q, A, B, C), (after, y, kept, None), ())
        ctx.save_for_backward(dt, q, A, B, C, kept)
        ctx.mark_non_differentiable(after)
        return y, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, kept = ctx.saved_tensors
        dt, q, A, B, C = inputs
        out = [torch.empty_like(dt), torch.empty_like(q), torch.zeros_like(A)]
        out += [torch.empty_like(B), torch.empty_like(C)]
        sizes = (A.shape[1], *dt.shape)
        _call("xexport_train_scan", sizes, inputs, (None, None, kept, gy.contiguous()), out)
        return (*out, None)


class _Wkv7(torch.autograd.Function):
    """(r, w, k, v, a, b, state) -> (y, last state); no gradient reaches or leaves the states."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        *six, state = (x.contiguous() for x in inputs)
        batch, T, H, N = six[0].shape
        after, y = state.transpose(2, 3).contiguous(), torch.empty_like(six[0])
        kept = y.new_empty(batch, H, -(-T // _BLOCK), N, N)
        _call("xexport_train_wkv7", (N, batch, T, H), six, (after, y, kept, None), ())
        ctx.save_for_backward(*six, kept)
        last = after.transpose(2, 3)
        ctx.mark_non_differentiable(last)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *six, kept = ctx.saved_tensors
        batch, T, H, N = six[0].shape
        out = [torch.empty_like(x) for x in six]
        _call("xexport_train_wkv7", (N, batch, T, H), six, (None, None, kept, gy.contiguous()), out)
        return (*out, None)


def native_selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`xexport.ops.selective_scan.reference.selective_scan` without gradients to or from the states."""
    y, last = _Scan.apply(dt, dt * u, A, B, C, state)  # type: ignore[no-untyped-call]
    return y + u * D, last


def native_wkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`xexport.ops.wkv7.reference.wkv7` without gradients to or from the states."""
    y, last = _Wkv7.apply(r, w, k, v, a, b, state)  # type: ignore[no-untyped-call]
    return y, last


#: (model file, the name it imports, what takes its place, whether a state size is compiled in)
_PLACES: tuple[tuple[str, str, Callable[..., Any], tuple[int, ...]], ...] = (
    ("_mamba", "selective_scan", native_selective_scan, (4, 8, 16)),
    ("rwkv", "wkv7", native_wkv7, (16, 32, 64)),
)


@contextmanager
def native_recurrences(device: str = "cpu") -> Iterator[bool]:
    """Within this block the models use the compiled recurrences; yields whether they do."""
    if device != "cpu" or _library() is None:
        yield False
        return
    with ExitStack() as stack:
        for model, name, native, sizes in _PLACES:
            module = import_module(f"xexport.models.{model}")
            stack.enter_context(patch.object(module, name, _chosen(native, getattr(module, name), sizes)))
        yield True


def _chosen(
    native: Callable[..., Any], otherwise: Callable[..., Any], sizes: tuple[int, ...]
) -> Callable[..., Any]:
    """``native`` for float32 tensors on the CPU with a compiled state size, else ``otherwise``."""

    def call(*inputs: Tensor) -> Any:
        state = inputs[-1]
        fits = state.shape[-1] in sizes and all(x.dtype == torch.float32 and x.is_cpu for x in inputs)
        return (native if fits else otherwise)(*inputs)

    return call
