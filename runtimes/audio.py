"""Reading a recording: .wav with the standard library, anything else (FLAC) if soundfile is installed."""

from __future__ import annotations

import sys
import wave
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from xexport.core.errors import InputError
from xexport.runtimes.logmel import RATE

__all__ = ["AUDIO_ENDINGS", "read_audio"]

#: file names that are taken for recordings
AUDIO_ENDINGS = (".wav", ".flac", ".ogg")

Samples = npt.NDArray[np.float32]


def read_audio(path: str | Path) -> Samples:
    """The samples of a recording at 16 kHz, float32 ``[n]`` in [-1, 1]; channels are averaged.

    Raises:
        InputError: it can't be read, is empty, or has another sample rate (nothing is resampled: the
            features of a resampled recording are not those of one that was made at 16 kHz).
    """
    where = Path(path)
    if not where.is_file():
        raise InputError("the recording does not exist", got=where, fix="check the path")
    samples, rate = _read_wav(where) if where.suffix.lower() == ".wav" else _read_other(where)
    if rate != RATE:
        raise InputError(
            "the recording has another sample rate than the model",
            got=f"{where.name}: {rate} Hz",
            allowed=f"{RATE} Hz",
            fix=f"resample it: ffmpeg -i {where.name} -ar {RATE} -ac 1 resampled.wav",
        )
    if samples.size == 0:
        raise InputError("the recording is empty", got=where.name, allowed="at least one sample")
    mixed: Samples = samples.mean(axis=1, dtype=np.float32)
    return mixed


def _read_wav(path: Path) -> tuple[Samples, int]:
    """``[n, channels]`` and the rate of an uncompressed .wav of 8, 16, 24 or 32 bits."""
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError, OSError) as error:
        raise InputError(
            "the recording can't be read",
            got=f"{path.name}: {error or 'it ends too early'}",
            allowed="an uncompressed .wav of 8, 16, 24 or 32 bits",
        ) from error
    data = data[: len(data) // (width * channels) * width * channels]
    return _decoded(data, width).reshape(-1, channels), rate


def _decoded(data: bytes, width: int) -> Samples:
    """Little-endian integers of ``width`` bytes as floats in [-1, 1]; one byte is unsigned."""
    if width == 1:
        return (np.frombuffer(data, np.uint8).astype(np.float32) - 128.0) / 128.0
    if width == 3:
        # into the upper three bytes of a 32-bit integer, which keeps the sign
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        data, width = wide.tobytes(), 4
    integers = np.frombuffer(data, f"<i{width}").astype(np.float64)
    return (integers / 2.0 ** (8 * width - 1)).astype(np.float32)


def _read_other(path: Path) -> tuple[Samples, int]:
    if find_spec("soundfile") is None:
        raise InputError(
            "only .wav can be read without the package soundfile",
            got=path.name,
            allowed="an uncompressed .wav",
            fix=f"{Path(sys.executable).name} -m pip install soundfile, or convert it to .wav",
        )
    try:
        samples, rate = import_module("soundfile").read(str(path), dtype="float32", always_2d=True)
    except (RuntimeError, OSError) as error:
        raise InputError("the recording can't be read", got=f"{path.name}: {error}") from error
    return samples, int(rate)
