"""Writes the cases of harness.cc: for every native operator some sizes, and what its reference makes of them.

    python tests/native/cases.py FILE

A new kernel needs one row in ``TABLE``; the harness refuses a library with an operator that has none. The
references run in double precision. Needs torch; the file that it writes needs nothing.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from test_rows import shifting, values
from tolerances import TOLERANCES

from xexport.ops.cached_attention.reference import cached_attention
from xexport.ops.causal_conv1d.reference import causal_conv1d
from xexport.ops.dilated_attention.reference import cache_rows, dilated_attention
from xexport.ops.fft_conv.reference import causal_conv, fft_sizes
from xexport.ops.fft_conv_cached.reference import fft_conv_cached
from xexport.ops.fused_rows.reference import run_program
from xexport.ops.hyena_conv.reference import hyena_conv
from xexport.ops.linear.reference import linear
from xexport.ops.linear_int4x8.reference import linear_int4x8
from xexport.ops.linear_int6x8.reference import linear_int6x8
from xexport.ops.linear_int8.reference import linear_int8
from xexport.ops.linear_recurrence.reference import linear_recurrence
from xexport.ops.modal_conv.reference import modal_conv
from xexport.ops.selective_scan.reference import selective_scan
from xexport.ops.window_attention.reference import window_attention
from xexport.ops.wkv4.reference import wkv4
from xexport.ops.wkv6.reference import wkv6
from xexport.ops.wkv7.reference import wkv7

__all__ = ["TABLE", "Case", "Row", "write"]

Arrays = dict[str, np.ndarray]
Numbers = dict[str, Any]  # integers, floats, strings, lists of integers, tuples of floats
_ELEMENTS = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "float16": 10}


@dataclass(frozen=True)
class Case:
    """The inputs of one run in the operator's order, its attributes, and the inputs that are initializers."""

    inputs: Arrays
    attributes: Numbers
    constant: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """An operator: its reference, how a case is made of sizes, which sizes, and the tolerance."""

    reference: Callable[..., Any]
    make: Callable[..., Case]
    sizes: tuple[tuple[int, ...], ...]
    tolerance: str = "op_fp32"


def _random(*sizes: int) -> Callable[..., np.ndarray]:
    return np.random.default_rng(sizes).standard_normal


def _wkv7(B: int, T: int, H: int, N: int, faint: int = 0) -> Case:
    """``faint``: decays that are 0 or nearly so among the usual ones."""
    normal = _random(B, T, H, N)
    r, k, v, w, g = normal((5, B, T, H, N))
    kk = k / np.linalg.norm(k, axis=-1, keepdims=True)
    decay = np.exp(-np.exp(-0.5) / (1 + np.exp(-w)))
    if faint:
        decay[:, ::5, :, 1] = 0
        decay[:, ::7] *= 1e-4
    named = {"r": r, "w": decay, "k": k, "v": v, "a": -kk, "b": kk / (1 + np.exp(-g))}
    return Case(named | {"state": normal((B, H, N, N))}, {})


def _wkv6(B: int, T: int, H: int, N: int, M: int, same: int = 0) -> Case:
    normal = _random(B, T, H, N, M)
    r, k = normal((2, B, T, H, N))
    w = np.exp(-np.exp(2 * normal((1, 1, H, N) if same else (B, T, H, N)) - 1))
    rest = {"v": normal((B, T, H, M)), "u": normal((H, N)), "state": normal((B, H, N, M))}
    return Case({"r": r, "w": w, "k": k} | rest, {})


def _wkv4(B: int, T: int, C: int) -> Case:
    normal = _random(B, T, C)
    k, v = normal((2, B, T, C))
    aa, bb, pp = normal((3, B, C))
    w, u = -np.exp(3 * normal(C) - 2), normal(C)
    return Case({"w": w, "u": u, "k": 4 * k, "v": v, "aa": aa, "bb": np.exp(bb), "pp": pp}, {})


def _selective_scan(B: int, T: int, D: int, N: int, even: int = 0) -> Case:
    """``even``: A near -1 .. -N, as Mamba's."""
    normal = _random(B, T, D, N)
    x = {"u": normal((B, T, D)), "dt": np.log1p(np.exp(normal((B, T, D)) - 2)), "A": -np.exp(normal((D, N)))}
    if even:
        x["A"] = -np.arange(1, N + 1) - 0.1 * normal((D, N))
    x |= {"B": normal((B, T, N)), "C": normal((B, T, N)), "D": normal(D), "state": normal((B, D, N))}
    return Case(x, {})


def _modal_conv(B: int, T: int, D: int, N: int) -> Case:
    normal = _random(B, T, D, N)
    size, angle = np.exp(-np.exp(normal((N, D)) - 2)), 3 * normal((N, D))
    poles = np.stack((size * np.cos(angle), size * np.sin(angle)), 1)
    x = {"packed": normal((B, T, 3 * D)), "poles": poles, "residues": normal((N, 2, D)) / N}
    return Case(x | {"skip": normal(D), "state": normal((B, N, 2, D))}, {})


def _linear_recurrence(B: int, T: int, H: int, K: int, V: int, a_key: int) -> Case:
    normal = _random(B, T, H, K, V)
    q, k = normal((2, B, T, H * K))
    decay = -0.3 * np.abs(normal((B, T, H * K if a_key else H)))
    x = {"q": q, "k": k, "v": normal((B, T, H * V)), "state": normal((B, H, K, V)), "decay": decay}
    return Case(x, {"heads": H, "scale": 0.375})


def _linear(B: int, T: int, K: int, N: int, half: int) -> Case:
    normal = _random(B, T, K, N)
    weight = normal((N, K)).astype(np.float16 if half else np.float32)
    return Case({"x": normal((B, T, K)), "weight": weight}, {})


def _whole_numbers(B: int, T: int, K: int, block: int, top: int) -> np.ndarray:
    """Activations that rounding to ``top`` levels leaves as they are: every block has ``top`` itself."""
    x = np.clip(np.rint(_random(B, T, K)((B, T, K)) * top / 4), -top, top)
    x[:, :, ::block] = top
    return np.asarray(x)


def _linear_int8(B: int, T: int, K: int, N: int, block: int) -> Case:
    rng, blocks = np.random.default_rng((B, T, K, N)), -(-K // block)
    codes = rng.integers(0, 256, (N, blocks, block), dtype=np.uint8)
    x = {
        "x": _whole_numbers(B, T, K, block, 32767),
        "weight": codes,
        "scales": rng.random((N, blocks)) + 0.01,
    }
    return Case(x, {"K": K, "N": N, "block_size": block})


def _linear_int4x8(B: int, T: int, K: int, N: int) -> Case:
    return _interleaved(B, T, K, N, 4)


def _linear_int6x8(B: int, T: int, K: int, N: int) -> Case:
    return _interleaved(B, T, K, N, 6)


def _interleaved(B: int, T: int, K: int, N: int, dwords: int) -> Case:
    """Eight rows side by side; a block of a row is so many times four bytes."""
    rng, groups, blocks = np.random.default_rng((B, T, K, N)), -(-N // 8), -(-K // 32)
    codes = rng.integers(0, 256, (groups, blocks, dwords, 8, 4), dtype=np.uint8)
    scales = (rng.random((groups, blocks, 8)) + 0.01).astype(np.float16)
    return Case({"x": _whole_numbers(B, T, K, 32, 127), "weight": codes, "scales": scales}, {"K": K, "N": N})


def _linear_group(B: int, T: int, K: int, N: int) -> Case:
    """Every format, of 1, 2, 3 ... times T tokens and N columns."""
    rows = range(1, 6)
    made = [_linear(B, i * T, K, i * N, i - 1) for i in rows[:2]]
    made += [_linear_int8(B, 3 * T, K, 3 * N, 64), _linear_int4x8(B, 4 * T, K, 4 * N)]
    made.append(_linear_int6x8(B, 5 * T, K, 5 * N))
    blocks = (0, 0, 64, 32, 32)
    numbers = [n for i, block in zip(rows, blocks, strict=True) for n in (i - 1, K, i * N, block)]
    inputs = {f"{i}.{name}": a for i, case in enumerate(made) for name, a in case.inputs.items()}
    return Case(inputs, {"products": numbers})


def _apart(*x: torch.Tensor, products: list[int]) -> tuple[torch.Tensor, ...]:
    (f32, f16), *rest = (x[:2], x[2:4]), x[4:7], x[7:10], x[10:]
    last = [products[i + 1 : i + 4] for i in range(0, len(products), 4)]
    eight, four, six = (
        f(*given, *numbers)
        for f, given, numbers in zip(
            (linear_int8, linear_int4x8, linear_int6x8),
            rest,
            (last[2], last[3][:2], last[4][:2]),
            strict=True,
        )
    )
    return linear(*f32), linear(*f16), eight, four, six


def _sequence(B: int, T: int, K: int, N: int) -> Case:
    """A product, its rows in one axis, a product of those, and one more of both kinds of memory."""
    normal = _random(B, T, K, N)
    x = {"x": normal((B, T, K)), "down": normal((N, K)), "up": normal((K, N))}

    def part(op: str, inputs: list[int], place: int) -> list[int]:
        return [len(op), *op.encode(), len(inputs), *inputs, 1, place]

    plan = [3, *part("linear", [0, 1], -1), *part("reshape", [3], -1), *part("linear", [4, 2], -2)]
    plan += [*part("linear", [5, 1], 1), *part("linear", [6, 2], -1), *part("reshape", [7], -1)]
    plan += part("linear", [8, 1], 0)
    return Case(x, {"plan": plan, "p1_shape": [-1, N], "p5_shape": [B, T, K]}, constant=("up",))


def _in_a_row(
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    plan: list[int],
    p1_shape: list[int],
    p5_shape: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    y = (x @ down.T).reshape(p1_shape) @ up.T @ down.T
    return (y @ up.T).reshape(p5_shape) @ down.T, y


def _causal_conv1d(B: int, T: int, D: int, K: int, silu: int) -> Case:
    normal = _random(B, T, D, K)
    x = {"x": normal((B, T, D)), "weight": normal((K, D)), "bias": normal(D), "state": normal((B, K - 1, D))}
    return Case(x, {"channels": D, "silu": silu})


def _filter(D: int, L: int) -> np.ndarray:
    filters: np.ndarray = _random(D, L)((D, L)) * np.exp(-4 * np.arange(L) / L)
    return filters


def _fft_conv(B: int, D: int, L: int, S: int, constant: int) -> Case:
    n1, n2 = fft_sizes(L)
    x = {"u": _random(B, D, L, S)((B, D, S)), "h": _filter(D, L)}
    return Case(x, {"n1": n1, "n2": n2}, ("h",) if constant else ())


def _fft_conv_cached(B: int, D: int, L: int, T: int, pos: int, constant: int) -> Case:
    n1, n2 = fft_sizes(L)
    normal = _random(B, D, L, T)
    x = {"u": normal((B, D, T)), "h": _filter(D, L), "cache": normal((B, D, L)), "pos": np.array([pos])}
    return Case(x, {"n1": n1, "n2": n2}, ("h",) if constant else ())


def _cached_attention(B: int, T: int, H: int, G: int, K: int, L: int, pos: int) -> Case:
    normal = _random(B, T, H, G, K, L)
    x = {"q": normal((B, T, H * K)), "k": normal((B, T, G * K)), "v": normal((B, T, G * K))}
    x |= {"k_cache": normal((B, G, L, K)), "v_cache": normal((B, G, L, K)), "pos": np.array([pos])}
    return Case(x, {"heads": H, "kv_heads": G, "scale": 0.375})


def _window_attention(B: int, T: int, H: int, G: int, K: int, W: int, S: int, pos: int) -> Case:
    normal = _random(B, T, H, G, K, W, S)
    x = {"q": normal((B, T, H * K)), "q_sinks": normal((B, T, H * K))}
    x |= {"k": normal((B, T, G * K)), "v": normal((B, T, G * K))}
    x |= {"k_cache": normal((B, G, S + W, K)), "v_cache": normal((B, G, S + W, K)), "pos": np.array([pos])}
    return Case(x, {"heads": H, "kv_heads": G, "window": W, "sinks": S, "scale": 0.375})


def _dilated_attention(B: int, T: int, H: int, K: int, pos: int) -> Case:
    segments, rates = np.array([5, 9, 24]), np.array([1, 3, 4])
    rows = sum(map(cache_rows, segments.tolist(), rates.tolist()))
    normal = _random(B, T, H, K, pos)
    x = {"q": normal((B, T, H * K)), "k": normal((B, T, H * K)), "v": normal((B, T, H * K))}
    x |= {"k_cache": normal((B, H, rows, K)), "v_cache": normal((B, H, rows, K)), "pos": np.array([pos])}
    x |= {"segments": segments, "rates": rates, "offsets": np.arange(H) % rates[:, None]}
    return Case(x, {"heads": H, "scale": 0.375})


def _hyena_conv(B: int, D: int, L: int, T: int, pos: int, constant: int) -> Case:
    n1, n2 = fft_sizes(L)
    normal = _random(B, D, L, T)
    x = {"packed": normal((B, T, 3 * D)), "h": _filter(D, L), "skip": normal(D), "cache": normal((B, D, L))}
    return Case(x | {"pos": np.array([pos])}, {"n1": n1, "n2": n2}, ("h",) if constant else ())


def _fused_rows(B: int, T: int, width: int) -> Case:
    program = shifting(width)
    inputs = {str(i): a for i, a in enumerate(values(program, B, T))}
    return Case(inputs, {"program": program.encode(), "constants": tuple(program.constants)})


def _shifting(*x: torch.Tensor, program: list[int], constants: tuple[float, ...]) -> tuple[torch.Tensor, ...]:
    made = run_program(shifting(x[0].shape[-1]), [a.numpy() for a in x])
    return tuple(torch.from_numpy(np.ascontiguousarray(a)) for a in made)


def _causal_conv(u: torch.Tensor, h: torch.Tensor, n1: int, n2: int) -> torch.Tensor:
    return causal_conv(u, h)


def _short_conv(*x: torch.Tensor, channels: int, silu: int) -> tuple[torch.Tensor, torch.Tensor]:
    return causal_conv1d(*x, silu=bool(silu))


TABLE: dict[str, Row] = {
    "wkv7": Row(
        wkv7,
        _wkv7,
        ((1, 1, 2, 64), (2, 3, 3, 16), (2, 40, 7, 64), (1, 21, 2, 7), (1, 33, 1, 72), (1, 40, 2, 64, 1)),
    ),
    "wkv6": Row(wkv6, _wkv6, ((1, 1, 2, 64, 64), (2, 9, 3, 8, 5), (1, 20, 2, 33, 40), (2, 18, 2, 64, 64, 1))),
    "wkv4": Row(wkv4, _wkv4, ((1, 1, 64), (2, 9, 37), (1, 30, 200))),
    "selective_scan": Row(
        selective_scan,
        _selective_scan,
        (
            (1, 1, 40, 16),
            (2, 3, 33, 32),
            (1, 40, 600, 16),
            (2, 9, 70, 5),
            (1, 17, 129, 24),
            (2, 19, 70, 16, 1),
        ),
    ),
    "modal_conv": Row(
        modal_conv, _modal_conv, ((1, 1, 64, 16), (2, 3, 33, 5), (1, 40, 200, 8), (2, 9, 70, 1), (1, 2, 7, 3))
    ),
    "linear_recurrence": Row(
        linear_recurrence,
        _linear_recurrence,
        (
            (1, 1, 2, 64, 64, 0),
            (2, 5, 3, 16, 37, 1),
            (1, 33, 2, 64, 128, 1),
            (1, 18, 3, 7, 5, 0),
            (1, 45, 2, 130, 64, 0),
        ),
    ),
    "linear": Row(
        linear,
        _linear,
        ((1, 1, 96, 40, 0), (2, 3, 65, 33, 0), (1, 40, 70, 50, 0), (1, 1, 96, 40, 1), (1, 30, 65, 33, 1)),
    ),
    "linear_int8": Row(
        linear_int8, _linear_int8, ((1, 1, 128, 40, 128), (2, 3, 70, 33, 32), (1, 40, 192, 50, 64))
    ),
    "linear_int4x8": Row(linear_int4x8, _linear_int4x8, ((1, 1, 128, 40), (2, 3, 70, 33), (1, 40, 192, 50))),
    "linear_int6x8": Row(linear_int6x8, _linear_int6x8, ((1, 1, 128, 40), (2, 3, 70, 33), (1, 40, 192, 50))),
    # the same kernel under many names
    "linear_group_0": Row(_apart, _linear_group, ((1, 1, 128, 40), (2, 3, 70, 33))),
    "sequence_0": Row(
        _in_a_row,
        _sequence,
        # a team that shares jobs, with large pages; too little work for one; too many tokens for one
        ((1, 1, 640, 840), (1, 1, 96, 40), (2, 3, 65, 33), (2, 31, 300, 40)),
    ),
    "causal_conv1d": Row(
        _short_conv,
        _causal_conv1d,
        ((1, 1, 40, 4, 1), (2, 7, 33, 3, 0), (1, 20, 130, 1, 1)),
    ),
    "fft_conv": Row(
        _causal_conv,
        _fft_conv,
        ((1, 3, 1, 1, 0), (2, 5, 300, 300, 1), (1, 9, 900, 500, 0), (1, 2, 5000, 5000, 1)),
        "native_fft",
    ),
    "hyena_conv": Row(hyena_conv, _hyena_conv, ((1, 3, 9, 1, 4, 0), (2, 9, 300, 40, 17, 1)), "native_fft"),
    "cached_attention": Row(
        cached_attention, _cached_attention, ((1, 1, 2, 2, 16, 9, 4), (2, 7, 4, 2, 24, 40, 11))
    ),
    "window_attention": Row(
        window_attention,
        _window_attention,
        ((1, 1, 2, 2, 16, 9, 0, 4), (2, 7, 4, 2, 24, 5, 3, 1), (1, 40, 4, 1, 20, 11, 2, 30)),
    ),
    "dilated_attention": Row(
        dilated_attention, _dilated_attention, ((1, 1, 2, 16, 31), (2, 7, 3, 20, 0), (1, 60, 5, 8, 40))
    ),
    # the same kernel under many names
    "fused_rows_0": Row(_shifting, _fused_rows, ((1, 1, 8), (2, 5, 37)), "fused_rows"),
    "fft_conv_cached": Row(
        fft_conv_cached,
        _fft_conv_cached,
        ((1, 3, 9, 1, 4, 0), (2, 9, 300, 40, 17, 1), (1, 5, 900, 700, 100, 1)),
        "native_fft",
    ),
}


def _expected(row: Row, case: Case) -> list[np.ndarray]:
    """The reference on the float32 inputs, computed in double."""
    tensors = [torch.from_numpy(_single(a)) for a in case.inputs.values()]
    tensors = [t.double() if t.is_floating_point() else t for t in tensors]
    out = row.reference(*tensors, **case.attributes)
    return [_single(y.numpy()) for y in (out if isinstance(out, tuple) else (out,))]


def _single(a: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(a.astype(np.float32) if a.dtype == np.float64 else a)


def _text(text: str) -> bytes:
    return struct.pack("<q", len(text)) + text.encode("ascii")


def _array(a: np.ndarray, constant: bool) -> bytes:
    head = struct.pack(f"<{4 + a.ndim}q", _ELEMENTS[str(a.dtype)], int(constant), a.ndim, *a.shape, a.nbytes)
    return head + a.tobytes()


def _attribute(name: str, value: Any) -> bytes:
    """Its name, its kind and the lists of its integers, of its floats and of its characters."""
    items = list(value) if isinstance(value, list | tuple) else [value]
    kind = "s" if isinstance(value, str) else "f" if isinstance(items[0], float) else "i"
    integers, reals = (items if kind == "i" else []), (items if kind == "f" else [])
    numbers = struct.pack(f"<q{len(integers)}q", len(integers), *integers)
    numbers += struct.pack(f"<q{len(reals)}d", len(reals), *reals)
    return _text(name) + _text(kind) + numbers + _text(value if kind == "s" else "")


def _blobs() -> Iterator[bytes]:
    for name, row in TABLE.items():
        for sizes in row.sizes:
            case = row.make(*sizes)
            yield _text(name) + _text(str(sizes)) + struct.pack("<d", TOLERANCES[row.tolerance])
            yield struct.pack("<q", len(case.attributes))
            yield from (_attribute(k, v) for k, v in case.attributes.items())
            yield struct.pack("<q", len(case.inputs))
            yield from (_array(_single(a), n in case.constant) for n, a in case.inputs.items())
            outputs = _expected(row, case)
            yield struct.pack("<q", len(outputs))
            yield from (_array(a, False) for a in outputs)


def write(file: BinaryIO) -> None:
    """All cases, in the format that cases.h reads."""
    file.write(_text("xexport cases 1"))
    file.write(struct.pack("<q", sum(len(row.sizes) for row in TABLE.values())))
    for blob in _blobs():
        file.write(blob)


if __name__ == "__main__":
    with Path(sys.argv[1]).open("wb") as out:
        write(out)
