"""A causal convolution through a two-factor (Monarch) DFT, written as matrix products of standard ONNX.

With N = n1*n2, an input of N/2 real points (the rest is padding) is laid out as a matrix X [n1/2, n2],
point ``a*n2 + c`` at (a, c). Its spectrum at ``k1 + n1*k2`` is, with w_M = exp(-2 pi i / M),

    Z[k1,k2] = sum_c  w_N^{c (k1 + n1 k2)}  sum_a  w_n1^{a k1} X[a,c]

which is two products (Monarch Mixer, arXiv 2310.12109, section 3; FlashFFTConv, arXiv 2311.05908): by one
matrix for the inner sum, then for each k1 by a matrix of its own, which holds the twiddle factors. Complex
numbers are pairs of reals, ``[re | im]``. As the input is real, k1 = 0 .. n1/2 suffices, and half of the
rows of X are padding: three quarters of the first product are never done. The inverse runs backwards
through the transposed matrices and yields the first N/2 points only.

All tables come from one cosine and one sine table of N points through exact integer phases modulo N, so
a transform of 2^17 points is as accurate as a short one. Where the sizes are constants, ONNX Runtime
computes the tables, and the spectrum of a constant filter, once when it loads the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from xexport.ops.builder import BodyBuilder

__all__ = ["Monarch", "convolve", "monarch"]


@dataclass(frozen=True)
class Monarch:
    """Names of the values that describe one transform; H1 = n1/2 + 1, R = n1/2.

    Attributes:
        rows, bins, n2: R, H1 and n2 as int64 vectors of one; half: R*n2, the points of the input.
        first: ``[2*H1,R]``, the inner sum; first_back: ``[R,2*H1]``, its inverse with the scale 1/N.
        second: ``[H1,2*n2,2*n2]``, the outer sum; second_back: its inverse.
    """

    rows: str
    bins: str
    n2: str
    half: str
    first: str
    first_back: str
    second: str
    second_back: str


def monarch(b: BodyBuilder, n1: str, n2: str) -> Monarch:
    """The tables of a transform of ``n1*n2`` points; both are int64 vectors of one."""
    one, two = b.ints(1), b.ints(2)
    rows = b.op("Div", n1, two)
    bins, size = b.op("Add", rows, one), b.op("Mul", n1, n2)
    cos, sin = _circle(b, size)
    k1, a, c = (_count(b, n) for n in (bins, rows, n2))

    phase = b.op("Mul", b.op("Mod", b.op("Mul", _axes(b, k1, 1), a), n1), n2)
    first = b.op("Concat", b.op("Gather", cos, phase), b.op("Gather", sin, phase), axis=0)

    outer = b.op("Add", _axes(b, k1, 1, 2), b.op("Mul", n1, c))
    phase = b.op("Mod", b.op("Mul", _axes(b, c, 1), outer), size)
    second = _turned(b, *(b.op("Gather", table, phase) for table in (cos, sin)))
    # OpenVINO 2026.4 multiplies wrongly by the transpose of the product's matrix itself
    phase = b.op("Transpose", phase, perm=[0, 2, 1])
    back = _turned(b, b.op("Gather", cos, phase), b.op("Neg", b.op("Gather", sin, phase)))
    return Monarch(
        rows=rows,
        bins=bins,
        n2=n2,
        half=b.op("Mul", rows, n2),
        first=first,
        first_back=b.op("Transpose", b.op("Mul", first, _weights(b, k1, rows, size)), perm=[1, 0]),
        second=second,
        second_back=back,
    )


def _turned(b: BodyBuilder, re: str, im: str) -> str:
    """Multiplication of a row ``[re | im]`` by a complex matrix: ``[[re, im], [-im, re]]``."""
    upper = b.op("Concat", re, im, axis=2)
    return b.op("Concat", upper, b.op("Concat", b.op("Neg", im), re, axis=2), axis=1)


def _circle(b: BodyBuilder, size: str) -> tuple[str, str]:
    """cos and -sin of ``2 pi i / N``; the angle is kept in [-pi, pi), where float32 is finest."""
    half = b.op("Div", size, b.ints(2))
    signed = b.op("Sub", b.op("Mod", b.op("Add", _count(b, size), half), size), half)
    turn = b.op("Div", b.const([2 * math.pi], np.float32), _float(b, size))
    angle = b.op("Mul", _float(b, signed), turn)
    return b.op("Cos", angle), b.op("Neg", b.op("Sin", angle))


def _weights(b: BodyBuilder, k1: str, rows: str, size: str) -> str:
    """``[2*H1,1]``: a bin stands for its mirror image too, but for the first and the last; over N."""
    ends = b.op("Or", b.op("Equal", k1, b.ints(0)), b.op("Equal", k1, rows))
    share = b.op("Where", ends, b.const(1.0, np.float32), b.const(2.0, np.float32))
    scaled = _axes(b, b.op("Div", share, _float(b, size)), 1)
    return b.op("Concat", scaled, scaled, axis=0)


def spectrum(b: BodyBuilder, x: str, m: Monarch) -> list[str]:
    """Real and imaginary part ``[H1,M,n2]`` of the spectra of ``x [M,S]``, S <= N/2."""
    missing = b.op("Sub", m.half, b.op("Shape", x, start=1))
    padded = b.op("Pad", x, b.op("Concat", b.ints(0, 0, 0), missing, axis=0))
    grid = b.op("Reshape", padded, b.op("Concat", b.ints(-1), m.rows, m.n2, axis=0))
    columns = b.op("Reshape", b.op("Transpose", grid, perm=[1, 0, 2]), _shape(b, m.rows, b.ints(-1)))
    inner = b.op("Reshape", b.op("MatMul", m.first, columns), _shape(b, b.ints(2), m.bins, b.ints(-1), m.n2))
    pairs = b.op("Transpose", inner, perm=[1, 2, 0, 3])
    flat = b.op("Reshape", pairs, _shape(b, m.bins, b.ints(-1), b.op("Mul", m.n2, b.ints(2))))
    return b.multi("Split", b.op("MatMul", flat, m.second), outs=2, axis=2, num_outputs=2)


def convolve(b: BodyBuilder, u: str, h: str, m: Monarch) -> str:
    """The causal convolution of ``u [B,D,S]`` with ``h [D,L]``, S and L <= N/2; ``[B,D,N/2]``."""
    batch, width = (b.op("Shape", u, start=i, end=i + 1) for i in (0, 1))
    hr, hi = spectrum(b, h, m)
    flat = spectrum(b, b.op("Reshape", u, _shape(b, b.ints(-1), b.op("Shape", u, start=2))), m)
    each = _shape(b, m.bins, batch, width, m.n2)
    ur, ui = (b.op("Reshape", x, each) for x in flat)
    hr, hi = (_axes(b, x, 1) for x in (hr, hi))
    re = b.op("Sub", b.op("Mul", ur, hr), b.op("Mul", ui, hi))
    im = b.op("Add", b.op("Mul", ur, hi), b.op("Mul", ui, hr))
    pairs = b.op("Reshape", b.op("Concat", re, im, axis=3), _shape(b, m.bins, b.ints(-1), _double(b, m.n2)))
    inner = b.op("MatMul", pairs, m.second_back)
    split = b.op("Reshape", inner, _shape(b, m.bins, b.ints(-1, 2), m.n2))
    columns = b.op(
        "Reshape", b.op("Transpose", split, perm=[2, 0, 1, 3]), _shape(b, _double(b, m.bins), b.ints(-1))
    )
    grid = b.op("Reshape", b.op("MatMul", m.first_back, columns), _shape(b, m.rows, b.ints(-1), m.n2))
    return b.op("Reshape", b.op("Transpose", grid, perm=[1, 0, 2]), _shape(b, batch, width, m.half))


def _count(b: BodyBuilder, n: str) -> str:
    """0 .. n-1 for an int64 vector of one."""
    return b.op("Range", b.const(0, np.int64), b.op("Squeeze", n), b.const(1, np.int64))


def _axes(b: BodyBuilder, x: str, *axes: int) -> str:
    return b.op("Unsqueeze", x, b.ints(*axes))


def _shape(b: BodyBuilder, *parts: str) -> str:
    return b.op("Concat", *parts, axis=0)


def _double(b: BodyBuilder, n: str) -> str:
    return b.op("Mul", n, b.ints(2))


def _float(b: BodyBuilder, x: str) -> str:
    return b.op("Cast", x, to=1)
