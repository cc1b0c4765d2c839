"""Long filters as sums of few damped oscillations: the fit behind constant-state streaming.

    h_t ~ Re sum_n R_n lambda_n^t + [t = 0] D           t = 0 .. L-1, n = 1 .. order, |lambda_n| < 1

Sources:
    1. Massaroli et al., Laughing Hyena Distillery, arXiv 2310.18780: section 3.1 (the modal form, distilled a
       filter at a time), 3.2 (the Hankel singular values say which order a filter needs).
    2. Kung, A new identification and model reduction algorithm via singular value decomposition, 1978: poles
       from the range of the Hankel matrix, which is shift-invariant.
    3. Golub and Pereyra, SIAM J. Numer. Anal. 10 (1973): poles refined with the residues eliminated.

Where it departs from 1: that paper minimises by gradient descent from random poles. Here the poles begin in
the Hankel matrix (2) and are refined by damped Gauss-Newton steps (3) on the error of the taps. Tap 0 costs
nothing, as D, which the operator has anyhow, makes it exact.

The residues are kept from cancelling each other (two poles that meet have infinite ones) by a small ridge.
Poles of a filter longer than 8192 taps are fitted on every s-th tap; residues and errors are those of all.
Everything is deterministic, in float64. No table of powers is made: products with taps are matrix products
over blocks of 64 taps, and those of powers with powers are geometric series in closed form,

    sum_t z^t,  sum_t t z^t,  sum_t t^2 z^t      with z = lambda_i lambda_j and z = lambda_i conj(lambda_j).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from xexport.core.errors import InputError
from xexport.core.progress import Progress, Silent

__all__ = ["Modes", "distill_filters"]

_TAPS = 8192  # that the poles are fitted to
_BLOCK = 64
_TOGETHER = 64  # filters
_STEPS = 30  # Gauss-Newton steps
_RIDGE = 1e-6
_HEAD = 0.05  # weight of tap 0, only so that its correction D stays small
_SLOWEST = 0.1  # the least decay over the length of a filter: |lambda|^L <= exp(-0.1)
_FASTEST = 4.5  # the greatest decay a tap


@dataclass(frozen=True)
class Modes:
    """Filters in the modal form.

    Attributes:
        poles, residues: complex128 ``[F,order]``.
        direct: float64 ``[F]``, what is added to tap 0.
        errors: ``||h - fit|| / ||h||`` of each filter over all of its taps, float64 ``[F]``.
        norms: ``||h||``, float64 ``[F]``.
    """

    poles: Tensor
    residues: Tensor
    direct: Tensor
    errors: Tensor
    norms: Tensor


def distill_filters(filters: Tensor, order: int, progress: Progress | None = None) -> Modes:
    """Fit ``order`` complex modes to each of the filters ``[F,L]``; ``progress`` advances F steps.

    Raises:
        InputError: the order is below 1, or the filters have fewer than 4 taps a mode.
    """
    length = filters.shape[1]
    if not 1 <= order <= length // 4:
        raise InputError(
            "a filter can't be distilled to this many modes", got=order, allowed=f"1 to {length // 4}"
        )
    progress = progress or Silent()
    stride = -(-length // _TAPS)
    parts = []
    for part in torch.split(filters.detach().double(), _TOGETHER):
        log_poles = _fit(part[:, ::stride], order) / stride
        parts.append(_modes(part, log_poles))
        progress.advance(len(part))
    columns = zip(*parts, strict=True)
    return Modes(*(torch.cat(column) for column in columns))


def _fit(h: Tensor, order: int) -> Tensor:
    """Logarithms of the poles, complex ``[F,order]``, in units of the taps given."""
    fit = _Fit(h, _first_poles(h[:, 1:], order))
    for _ in range(_STEPS):
        fit.step()
    log_poles = fit.best.log_poles()
    return torch.gather(log_poles, 1, log_poles.imag.abs().argsort(dim=1, stable=True))


def _modes(h: Tensor, log_poles: Tensor) -> tuple[Tensor, ...]:
    """Poles, residues, the correction of tap 0, and errors and norms over all taps."""
    size = _norms(h)
    point = _Point(_Taps(h / size[:, None]), log_poles.real.neg().log(), log_poles.imag)
    residues = point.residues * size[:, None]
    direct = h[:, 0] - residues.real.sum(1)
    left = h - _made(log_poles, residues, h.shape[1])
    left[:, 0] = 0.0
    return log_poles.exp(), residues, direct, left.norm(dim=1) / size, h.norm(dim=1)


class _Taps:
    """Filters of norm 1, and their products with powers of poles."""

    def __init__(self, h: Tensor) -> None:
        self.length = h.shape[1]
        weighted = h.clone()
        weighted[:, 0] *= _HEAD**2
        self.square = (h * weighted).sum(1)
        time = torch.arange(self.length, dtype=h.dtype)
        rows = torch.stack((weighted, h * time), 1)
        rows = torch.nn.functional.pad(rows, (0, -self.length % _BLOCK))
        self.rows = rows.reshape(*rows.shape[:2], -1, _BLOCK)  # [F,2,blocks,64]

    def moments(self, log_poles: Tensor) -> Tensor:
        """``sum_t h_t lambda^t`` (weighted) and ``sum_t t h_t lambda^t``: complex ``[F,2,order]``."""
        inside = _powers(log_poles, _BLOCK, 1)
        outside = _powers(log_poles, self.rows.shape[2], _BLOCK)
        products = self.rows @ torch.cat((inside.real, inside.imag), -1)[:, None]
        sums: Tensor = (torch.complex(*products.chunk(2, -1)) * outside[:, None]).sum(2)
        return sums


class _Point:
    """Poles of some filters, the best residues for them, and what the error is then."""

    def __init__(self, taps: _Taps, rate: Tensor, angle: Tensor) -> None:
        self.taps, self.rate, self.angle = taps, rate, angle
        log_poles = self.log_poles()
        self.plus = _series(log_poles[:, :, None] + log_poles[:, None], taps.length)
        self.minus = _series(log_poles[:, :, None] + log_poles.conj()[:, None], taps.length)
        self.moments = taps.moments(log_poles)
        self.gram = _gram(self.plus[0] + _HEAD**2 - 1, self.minus[0] + _HEAD**2 - 1)
        right = _pair(self.moments[:, 0])
        self.scale = _mode_scale(self.gram)
        ridged = self.gram + torch.diag_embed(_RIDGE * self.scale)
        self.coefficients = torch.linalg.solve(ridged, right[..., None])[..., 0]
        self.residues = torch.complex(*self.coefficients.chunk(2, -1))
        self.cost = taps.square - (self.coefficients * right).sum(1)  # with the ridge's

    def log_poles(self) -> Tensor:
        """Complex ``[F,order]``."""
        return torch.complex(-self.rate.exp(), self.angle)

    def move(self, damping: Tensor) -> Tensor:
        """The step ``[F,2 order]`` of (rate, angle) that solves the linearised problem."""
        r, slope = self.residues, -self.rate.exp()
        cross = _gram(self.plus[1] * r[:, None], self.minus[1] * r.conj()[:, None])
        square = _gram(
            self.plus[2] * r[:, :, None] * r[:, None], self.minus[2] * r[:, :, None] * r.conj()[:, None]
        )
        ours = torch.cat((slope, torch.ones_like(slope)), 1)  # d log lambda of a step in rate and in angle
        cross, square = cross * ours[:, None], square * ours[:, :, None] * ours[:, None]
        gram = torch.cat((torch.cat((self.gram, cross), 2), torch.cat((cross.mT, square), 2)), 1)
        square_scale = square.diagonal(dim1=1, dim2=2)
        ridge = torch.cat(
            (_RIDGE * self.scale, damping[:, None] * square_scale + _RIDGE * _mode_scale(square)), 1
        )
        right = torch.cat(
            (
                _pair(self.moments[:, 0]) - (self.gram @ self.coefficients[..., None])[..., 0],
                _pair(self.moments[:, 1] * r) * ours - (cross.mT @ self.coefficients[..., None])[..., 0],
            ),
            1,
        )
        step = torch.linalg.solve(gram + torch.diag_embed(ridge), right[..., None])
        move: Tensor = step[:, ridge.shape[1] // 2 :, 0]
        return move


class _Fit:
    """Poles on their way to a least error, each filter by itself."""

    def __init__(self, h: Tensor, poles: Tensor) -> None:
        taps = _Taps(h / _norms(h)[:, None])
        self.limits = math.log(_SLOWEST / h.shape[1]), math.log(_FASTEST)
        rate = (-poles.abs().clamp(1e-9, 1 - 1e-12).log()).log().clamp(*self.limits)
        self.damping = torch.full_like(rate[:, 0], 1e-2)
        self.best = _Point(taps, rate, poles.angle())

    def step(self) -> None:
        """One damped Gauss-Newton step of every filter; a filter that it makes worse stays."""
        move, old = self.best.move(self.damping), self.best
        order = old.rate.shape[1]
        rate = (old.rate + move[:, :order].clamp(-1, 1)).clamp(*self.limits)
        new = _Point(old.taps, rate, old.angle + move[:, order:].clamp(-0.5, 0.5))
        better = new.cost < old.cost
        self.damping = torch.where(better, self.damping * 0.3, self.damping * 4).clamp(1e-8, 1e8)
        kept = better[:, None]
        self.best = _Point(
            old.taps, torch.where(kept, new.rate, old.rate), torch.where(kept, new.angle, old.angle)
        )


def _norms(h: Tensor) -> Tensor:
    """The norm of each filter, 1 for one of zeros."""
    size = h.norm(dim=1)
    return torch.where(size > 0, size, torch.ones_like(size))


def _powers(log_poles: Tensor, count: int, step: int) -> Tensor:
    """``lambda^(step k)`` for k = 0 .. count-1: ``[F,count,order]``."""
    steps = torch.arange(count, dtype=log_poles.real.dtype) * step
    return (log_poles[:, None] * steps[:, None]).exp()


def _made(log_poles: Tensor, residues: Tensor, length: int) -> Tensor:
    """``Re sum_n R_n lambda_n^t`` for t < length: ``[F,length]``."""
    outside = _powers(log_poles, -(-length // _BLOCK), _BLOCK) * residues[:, None]
    inside = _powers(log_poles, _BLOCK, 1)
    rows = torch.cat((outside.real, -outside.imag), -1) @ torch.cat((inside.real, inside.imag), -1).mT
    taps: Tensor = rows.reshape(len(rows), -1)[:, :length]
    return taps


def _series(log_z: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """``sum t^k z^t`` over t = 0 .. length-1, for k = 0, 1, 2."""
    z, end = log_z.exp(), (log_z * length).exp()
    over = -1 / torch.expm1(log_z)  # 1 / (1 - z)
    zero = (1 - end) * over
    one = (z * zero - length * end) * over
    two = (z * (zero + 2 * one) - length**2 * end) * over
    return zero, one, two


def _mode_scale(gram: Tensor) -> Tensor:
    """The size of each mode for both of its columns, one of which vanishes where a pole is real."""
    first, second = gram.diagonal(dim1=1, dim2=2).chunk(2, -1)
    return ((first + second) / 2 + 1e-300).repeat(1, 2)


def _pair(z: Tensor) -> Tensor:
    """Products of h with ``Re x`` and ``Re ix`` from that with x."""
    return torch.cat((z.real, -z.imag), -1)


def _gram(plus: Tensor, minus: Tensor) -> Tensor:
    """Products of (Re x, Re ix) with (Re y, Re iy) from ``sum x y`` and ``sum x conj(y)``: ``[F,2n,2n]``."""
    top = torch.cat(((plus + minus).real, (minus - plus).imag), 2)
    bottom = torch.cat((-(plus + minus).imag, (minus - plus).real), 2)
    return torch.cat((top, bottom), 1) / 2


def _first_poles(h: Tensor, order: int) -> Tensor:
    """Poles from the shift-invariance of the Hankel matrix's leading left vectors: ``[F,order]``.

    Real filters have poles in conjugate pairs, so there are twice as many; sorted by the size of their
    angle, the two of a pair are neighbours, and every second one is kept.
    """
    left = _leading_vectors(h, 2 * order)
    upper = left[:, :-1]
    shift = torch.linalg.solve(upper.mT @ upper, upper.mT @ left[:, 1:])
    poles = torch.linalg.eigvals(shift)
    poles = torch.complex(poles.real, poles.imag.abs())
    return torch.gather(poles, 1, poles.angle().argsort(dim=1, stable=True))[:, ::2]


def _leading_vectors(h: Tensor, rank: int) -> Tensor:
    """``[F,rows,rank]`` of the Hankel matrix ``h[i+j]``, by subspace iteration; its products are FFTs."""
    rows = h.shape[1] // 2
    columns = h.shape[1] + 1 - rows
    size = 1 << (h.shape[1] + columns).bit_length()
    spectrum = torch.fft.rfft(h, n=size)[:, None]

    def product(x: Tensor, count: int) -> Tensor:
        """Rows of ``x`` times the matrix (or its transpose, which is the same formula)."""
        y = torch.fft.irfft(spectrum * torch.fft.rfft(x.flip(-1), n=size), n=size)
        part: Tensor = y[..., x.shape[-1] - 1 : x.shape[-1] - 1 + count]
        return part

    kept = min(rank + 8, rows)
    seed = torch.Generator().manual_seed(0)
    x = torch.randn(1, kept, columns, dtype=h.dtype, generator=seed).expand(len(h), -1, -1)
    y = torch.linalg.qr(product(x, rows).mT)[0].mT
    x = torch.linalg.qr(product(y, columns).mT)[0].mT
    vectors: Tensor = torch.linalg.svd(product(x, rows).mT, full_matrices=False)[0][..., :rank]
    return vectors
