"""Log-mel features against two other derivations, whole against streamed; recordings that can't be read."""

from __future__ import annotations

import wave
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import TOLERANCES

from xexport.core.errors import InputError
from xexport.runtimes.audio import read_audio
from xexport.runtimes.logmel import BINS, RATE, SHIFT, WINDOW, LogMelStream, log_mel

CLIP = Path(str(files("xexport.evaluate") / "audio" / "austen.wav"))


def clip() -> np.ndarray[Any, Any]:
    return read_audio(CLIP)


def write_wav(path: Path, data: bytes, width: int = 2, channels: int = 1, rate: int = RATE) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)
    return path


def naive(samples: np.ndarray[Any, Any], frame: int) -> list[float]:
    """One frame from the formulas of the module's docstring, a Fourier sum at a time."""
    s = samples[frame * 160 : frame * 160 + 400].astype(float) * 32768
    s = s - s.mean()
    x = np.array([s[i] - 0.97 * s[max(i - 1, 0)] for i in range(400)])
    i = np.arange(400)
    x *= (0.5 - 0.5 * np.cos(2 * np.pi * i / 399)) ** 0.85
    power = [abs((x * np.exp(-2j * np.pi * i * k / 512)).sum()) ** 2 for k in range(256)]

    def mel(f: float) -> float:
        return 1127 * float(np.log(1 + f / 700))

    points = np.linspace(mel(20), mel(8000), 82)
    out = []
    for m in range(80):
        energy = 0.0
        for k in range(256):
            at = mel(k * 16000 / 512)
            if points[m] < at <= points[m + 1]:
                energy += power[k] * (at - points[m]) / (points[m + 1] - points[m])
            elif points[m + 1] < at < points[m + 2]:
                energy += power[k] * (points[m + 2] - at) / (points[m + 2] - points[m + 1])
        out.append(float(np.log(max(energy, 2.0**-23))))
    return out


@pytest.mark.parametrize("frame", [0, 17, 296])
def test_features_by_the_formulas(frame: int) -> None:
    features = log_mel(clip())
    assert features.shape == (297, BINS)
    assert features.dtype == np.float32
    assert np.abs(features[frame] - naive(clip(), frame)).max() < TOLERANCES["features"]


@pytest.mark.oracle
def test_features_are_what_transformers_computes() -> None:
    """Its emulation of Kaldi's fbank, which feature extractors of published models use."""
    audio = pytest.importorskip("transformers.audio_utils")
    filters = audio.mel_filter_bank(
        257, BINS, 20, 8000, RATE, norm=None, mel_scale="kaldi", triangularize_in_mel_space=True
    )
    want = audio.spectrogram(
        clip() * 32768.0,
        audio.window_function(WINDOW, "povey", periodic=False),
        frame_length=WINDOW,
        hop_length=SHIFT,
        fft_length=512,
        power=2.0,
        center=False,
        preemphasis=0.97,
        mel_filters=filters,
        log_mel="log",
        mel_floor=2.0**-23,
        remove_dc_offset=True,
    ).T
    got = log_mel(clip())
    assert got.shape == want.shape
    assert np.abs(got - want).max() < TOLERANCES["features"]


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 4000), max_size=6), seed=st.integers(0, 99))
def test_streamed_features_are_the_whole_ones(cuts: list[int], seed: int) -> None:
    samples = (np.random.default_rng(seed).normal(size=4000) * 0.1).astype(np.float32)
    stream = LogMelStream()
    parts = []
    for piece in np.split(samples, sorted(cuts)):
        parts.append(stream.feed(piece))
        assert len(stream.carried) < WINDOW
    whole = log_mel(samples)
    assert np.abs(np.concatenate(parts) - whole).max() < TOLERANCES["features"]
    stream.reset()
    assert np.array_equal(stream.feed(samples), whole)


def test_silence_and_short_recordings() -> None:
    assert np.allclose(log_mel(np.zeros(WINDOW, np.int16)), np.log(2.0**-23))
    assert log_mel(np.zeros(WINDOW - 1, np.int16)).shape == (0, BINS)
    assert log_mel([]).shape == (0, BINS)


def test_int16_and_float_samples_are_the_same() -> None:
    samples = (clip() * 32768).astype(np.int16)
    assert np.array_equal(log_mel(samples), log_mel(clip()))


@pytest.mark.parametrize(
    ("samples", "what"),
    [
        (np.zeros((2, 500), np.float32), "one row"),
        (np.full(500, np.nan, np.float32), "not finite"),
        (np.array([0.0] * 400 + [np.inf]), "not finite"),
        (np.zeros(500, np.int32), "unknown type"),
    ],
)
def test_bad_samples_are_refused(samples: np.ndarray[Any, Any], what: str) -> None:
    stream = LogMelStream()
    stream.feed(np.zeros(10, np.int16))
    for feed in (log_mel, stream.feed):
        with pytest.raises(InputError, match=what):
            feed(samples)
    assert len(stream.carried) == 10


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_every_width_of_wav(tmp_path: Path, width: int) -> None:
    wanted = np.array([0, 0.5, -0.5, -1.0], np.float32)
    values = [int(v * 2 ** (8 * width - 1)) + (128 if width == 1 else 0) for v in wanted]
    data = b"".join(v.to_bytes(width, "little", signed=width > 1) for v in values)
    assert np.array_equal(read_audio(write_wav(tmp_path / "a.wav", data, width)), wanted)


def test_channels_are_averaged(tmp_path: Path) -> None:
    data = np.array([[16384, 0], [-16384, -16384]], "<i2").tobytes()
    assert read_audio(write_wav(tmp_path / "a.wav", data, channels=2)).tolist() == [0.25, -0.5]


def test_recordings_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_audio(tmp_path / "absent.wav")
    with pytest.raises(InputError, match="another sample rate") as caught:
        read_audio(write_wav(tmp_path / "phone.wav", bytes(800), rate=8000))
    assert caught.value.got == "phone.wav: 8000 Hz"
    assert caught.value.fix is not None
    assert "ffmpeg" in caught.value.fix
    with pytest.raises(InputError, match="is empty"):
        read_audio(write_wav(tmp_path / "empty.wav", b""))
    for name, data in (("text.wav", b"not a recording"), ("cut.wav", CLIP.read_bytes()[:20])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match="can't be read"):
            read_audio(tmp_path / name)
    monkeypatch.setattr("xexport.runtimes.audio.find_spec", lambda name: None)
    (tmp_path / "a.flac").write_bytes(b"fLaC")
    with pytest.raises(InputError, match="without the package soundfile"):
        read_audio(tmp_path / "a.flac")


def test_flac_by_soundfile(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "a.flac", clip(), RATE)
    assert np.array_equal(read_audio(tmp_path / "a.flac"), clip())
    (tmp_path / "bad.flac").write_bytes(b"fLaC")
    with pytest.raises(InputError, match="can't be read"):
        read_audio(tmp_path / "bad.flac")
