"""Causal long convolution of a whole sequence, one filter a channel: the definition.

    y[b,d,t] = sum_{s=0..t} h[d,t-s] u[b,d,s]

The sum is taken as a product of spectra in float64, zero-padded so that nothing wraps around (the
convolution theorem; Hyena, arXiv 2302.10866, section 2.1), and is exact to about 1e-15.
"""

from __future__ import annotations

import torch

__all__ = ["causal_conv", "fft_conv", "fft_sizes"]


def fft_sizes(length: int) -> tuple[int, int]:
    """Factors (n1, n2), n1 even, of the transform that convolves ``length`` points: n1*n2 >= 2*length.

    n1 is the larger, as the first product works on real, half-empty input and is the cheaper one.
    """
    bits = max((2 * length - 1).bit_length(), 2)
    low = max((bits - 1) // 2, 1)
    return 1 << (bits - low), 1 << low


def causal_conv(u: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """The convolution in the dtype of its inputs, differentiable: ``u [B,D,S]``, ``h [D,L]``, S <= L."""
    length = u.shape[-1]
    size = 2 * length
    spectrum = torch.fft.rfft(u, n=size) * torch.fft.rfft(h[:, :length], n=size)
    y: torch.Tensor = torch.fft.irfft(spectrum, n=size)
    return y[..., :length]


@torch.library.custom_op("xexport::fft_conv", mutates_args=())
def fft_conv(u: torch.Tensor, h: torch.Tensor, n1: int, n2: int) -> torch.Tensor:
    """Convolve ``u [B,D,S]`` with ``h [D,L]``, S <= L; the result is ``[B,D,S]``.

    ``n1`` and ``n2`` are the factors of the transform that an implementation may use; the result does
    not depend on them. See :func:`fft_sizes`.
    """
    if u.shape[-1] > h.shape[-1] or n1 * n2 < 2 * h.shape[-1]:
        raise ValueError(f"{u.shape[-1]} points, a filter of {h.shape[-1]}, a transform of {n1}*{n2}")
    return causal_conv(u.double(), h.double()).to(u.dtype)


@fft_conv.register_fake
def _(u, h, n1, n2):  # type: ignore[no-untyped-def]
    return torch.empty_like(u)
