"""Log-mel features of speech: 80 numbers every 10 ms, in numpy alone, whole or as the samples come in.

The definition is Kaldi's ``fbank`` (its defaults without dither, 80 bins, snip-edges), which most published
Conformers read. Of samples s at 16 kHz in the range of 16-bit integers (floats in [-1, 1] are multiplied by
32768), frame t is

    x[i] = s[160 t + i], i = 0..399           25 ms every 10 ms; a frame is whole or it is not made
    x    = x - mean(x)                        no direct current
    x[i] = x[i] - 0.97 x[i-1]                 emphasis; the first sample of a frame precedes itself
    x[i] = x[i] (0.5 - 0.5 cos(2 pi i / 399))^0.85                        the Povey window
    P[k] = |sum_i x[i] exp(-2 pi j i k / 512)|^2,  k = 0..255
    feature[t, m] = log(max(2^-23, sum_k W[m,k] P[k]))

W[m] is a triangle over the mel scale mel(f) = 1127 log(1 + f/700): of 82 points evenly spaced from 20 to
8000 Hz it rises from point m to m+1 and falls to m+2. (2^-23 is Kaldi's floor, float32's epsilon.)

Sources:
    [1] S. B. Davis, P. Mermelstein, "Comparison of parametric representations for monosyllabic word
        recognition in continuously spoken sentences", 1980: a logarithm of triangular filters' energies.
    [2] github kaldi-asr/kaldi, src/feat: feature-window.cc, mel-computations.cc, feature-fbank.cc.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from xexport.core.contract import InputSpec
from xexport.core.errors import InputError

__all__ = ["BINS", "INPUT", "RATE", "SHIFT", "WINDOW", "LogMelStream", "log_mel", "reads_log_mel"]

#: what the input of a graph is called that reads these features
INPUT = "log_mel"
#: samples a second, a frame, and from one frame's beginning to the next; numbers a frame
RATE, WINDOW, SHIFT, BINS = 16_000, 400, 160, 80
_FFT = 512
_LOW, _HIGH = 20.0, 8000.0
_EMPHASIS = 0.97
_FLOOR = 2.0**-23
_BLOCK = 1024  # frames transformed at a time: 4 MB

Doubles = npt.NDArray[np.float64]
Features = npt.NDArray[np.float32]


def log_mel(samples: Any) -> Features:
    """Features of a whole recording.

    Args:
        samples: ``[n]`` at 16 kHz: floats in [-1, 1], or int16.

    Returns:
        float32 ``[frames, 80]``, frames = 1 + (n - 400) // 160, or 0 of less than 25 ms.

    Raises:
        InputError: not one row of such samples, or a sample that is not finite.
    """
    return _frames(_scaled(samples))


def reads_log_mel(spec: InputSpec) -> bool:
    """Whether a model's input is these features."""
    return spec.name == INPUT and spec.width == BINS


class LogMelStream:
    """The same features as the samples come in, in pieces of any size.

    Attributes:
        carried: float64 ``[n]``, n <= 399: samples that wait for the rest of their frame.
    """

    def __init__(self) -> None:
        self.carried: Doubles = np.empty(0)

    def feed(self, samples: Any) -> Features:
        """The frames ``[n,80]`` that these samples complete, n >= 0.

        Raises:
            InputError: as :func:`log_mel`; nothing has been taken.
        """
        waiting = np.concatenate((self.carried, _scaled(samples)))
        features = _frames(waiting)
        self.carried = waiting[len(features) * SHIFT :].copy()
        return features

    def reset(self) -> None:
        """Forget the samples that wait."""
        self.carried = np.empty(0)


def _scaled(samples: Any) -> Doubles:
    """Samples in the range of 16-bit integers."""
    array = np.asarray(samples)
    if array.ndim != 1:
        raise InputError("samples are one row", got=f"shape {list(array.shape)}", allowed="[n], one channel")
    if array.dtype == np.int16 or array.size == 0:
        return array.astype(np.float64)
    if array.dtype.kind != "f":
        raise InputError("unknown type of samples", got=array.dtype, allowed="int16, or floats in [-1, 1]")
    if not np.isfinite(array).all():
        raise InputError("a sample is not finite", got="nan or inf", allowed="floats in [-1, 1]")
    return array.astype(np.float64) * 32768.0


def _frames(samples: Doubles) -> Features:
    """The features of every whole frame."""
    if len(samples) < WINDOW:
        return np.empty((0, BINS), np.float32)
    rows = np.lib.stride_tricks.sliding_window_view(samples, WINDOW)[::SHIFT]
    parts = [_transformed(rows[i : i + _BLOCK]) for i in range(0, len(rows), _BLOCK)]
    return np.concatenate(parts)


def _transformed(frames: Doubles) -> Features:
    """``[n,400]`` samples -> ``[n,80]``; no row depends on another."""
    x = frames - frames.mean(axis=1, keepdims=True)
    x = (x - _EMPHASIS * np.concatenate((x[:, :1], x[:, :-1]), axis=1)) * _window()
    spectrum = np.fft.rfft(x, _FFT, axis=1)[:, : _FFT // 2]
    power = np.square(spectrum.real) + np.square(spectrum.imag)
    return np.log(np.maximum(power @ _filters(), _FLOOR)).astype(np.float32)


@cache
def _window() -> Doubles:
    """Povey's: a Hann window to the power of 0.85."""
    turn = 2 * np.pi * np.arange(WINDOW) / (WINDOW - 1)
    window: Doubles = (0.5 - 0.5 * np.cos(turn)) ** 0.85
    return window


@cache
def _filters() -> Doubles:
    """``[256,80]``: the weight of every frequency below the Nyquist in every triangle."""
    mel = 1127.0 * np.log1p(np.arange(_FFT // 2) * (RATE / _FFT) / 700.0)[:, None]
    low, high = (1127.0 * np.log1p(f / 700.0) for f in (_LOW, _HIGH))
    points = low + (high - low) / (BINS + 1) * np.arange(BINS + 2)
    rising = (mel - points[:-2]) / (points[1:-1] - points[:-2])
    falling = (points[2:] - mel) / (points[2:] - points[1:-1])
    weights: Doubles = np.maximum(0.0, np.minimum(rising, falling))
    return weights
