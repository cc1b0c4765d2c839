"""Listening: samples in, letters out, by a model of log-mel frames with a CTC head.

Greedy CTC (A. Graves et al., 2006, section 3.2): the likeliest id of every position, repeats and blanks
dropped. A streaming model is fed as soon as its smallest call is complete; one in the whole form when the
recording ends.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from xexport.core.errors import FormError, InputError, LimitError
from xexport.runtimes.logmel import BINS, INPUT, RATE, SHIFT, LogMelStream, reads_log_mel

if TYPE_CHECKING:
    from xexport.runtimes.stream import Stream

__all__ = ["Listener", "ListeningStats", "hear"]


@dataclass
class ListeningStats:
    """What a listener has done so far.

    Attributes:
        samples: how many it was given.
        call_seconds: for every call of the model, the time that features and model took.
        form: of the model.
        call_frames: frames of a call (of the longest, in the whole form).
    """

    form: str = "chunk"
    samples: int = 0
    call_frames: int = 0
    call_seconds: list[float] = field(default_factory=list)

    @property
    def audio_seconds(self) -> float:
        """Length of what it was given."""
        return self.samples / RATE

    @property
    def real_time_factor(self) -> float:
        """Computing time over the recording's: below 1 keeps up."""
        return sum(self.call_seconds) / self.audio_seconds if self.audio_seconds else 0.0

    def record(self) -> dict[str, Any]:
        """Plain data, the latency of a call as percentiles in milliseconds."""
        calls = np.array(self.call_seconds or [0.0]) * 1e3
        return {
            "form": self.form,
            "audio_seconds": self.audio_seconds,
            "calls": len(self.call_seconds),
            "call_audio_ms": self.call_frames * SHIFT * 1e3 / RATE,
            **{f"call_ms_p{p}": float(np.percentile(calls, p)) for p in (50, 90, 99)},
            "real_time_factor": self.real_time_factor,
        }

    def sentence(self) -> str:
        """For a person: how long the recording was, and how long it took."""
        row = self.record()
        how = "heard in one call at its end"
        if self.form != "whole":
            how = f"{row['calls']} calls of {row['call_audio_ms']:.0f} ms in {row['call_ms_p50']:.2f} ms each"
            how += f" (90%: {row['call_ms_p90']:.2f}, 99%: {row['call_ms_p99']:.2f})"
        return f"{self.audio_seconds:.2f} s of audio, {how}; real-time factor {self.real_time_factor:.4f}"


class Listener:
    """A stream of a model that reads log-mel frames, fed with samples.

    Args:
        stream: of batch 1, at its first frame.
        blank: the id that stands for "no new letter".
        frames: frames a call of a streaming model; its smallest call by default.

    Attributes:
        ids: the letters so far.
        positions: the likeliest id of every position so far, blanks and repeats included.
        piece: samples of a call, or a second of a model in the whole form.
        stats: as above.

    Raises:
        FormError: the model reads something else.
        InputError: the batch is not 1, ``blank`` is no id, or a call can't have so many frames.
    """

    def __init__(self, stream: Stream, blank: int = 0, frames: int | None = None) -> None:
        spec = stream.contract.inputs
        if not reads_log_mel(spec):
            raise FormError(
                "this model does not read log-mel frames of speech",
                got=f"input {spec.name!r} of {spec.kind}",
                allowed=f"input {INPUT!r} of {BINS} features",
            )
        if stream.batch != 1:
            raise InputError("listening needs a stream of batch 1", got=stream.batch)
        if not 0 <= blank < stream.vocab_size:
            raise InputError(
                "the blank is no id of the model", got=blank, allowed=f"0..{stream.vocab_size - 1}"
            )
        unit = spec.multiple
        self._frames = unit if frames is None else frames
        if not stream.contract.allows(self._frames):
            raise InputError(
                "a call can't have so many frames",
                got=frames,
                allowed=f"a multiple of {unit}, such as {unit}",
            )
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.stats = ListeningStats(stream.contract.form)
        self.piece = self._frames * SHIFT if stream.contract.streams else RATE
        self._stream, self._blank = stream, blank
        self._log_mel = LogMelStream()
        self._waiting = np.empty((0, BINS), np.float32)
        self._heard = 0.0  # seconds of work since the last call of the model

    def feed(self, samples: Any) -> list[int]:
        """Take samples ``[n]`` (float in [-1, 1], or int16) and return the new letters, often none.

        Raises:
            InputError: as :func:`xexport.runtimes.logmel.log_mel`.
            LimitError: beyond the model's longest stream.
        """
        began = time.perf_counter()
        self._waiting = np.concatenate((self._waiting, self._log_mel.feed(samples)))
        self.stats.samples += len(samples)
        self._heard += time.perf_counter() - began
        before = len(self.ids)
        while self._stream.contract.streams and len(self._waiting) >= self._frames:
            self._call(self._frames)
        return self.ids[before:]

    def finish(self) -> list[int]:
        """The recording has ended: the letters of what still waits.

        The last frame is repeated up to what the model takes; positions of repeated frames alone are
        dropped. Less than a frame of samples is not heard.

        Raises:
            LimitError: longer than the model's longest sequence.
        """
        rest, before = len(self._waiting), len(self.ids)
        if rest:
            length = self._stream.contract.nearest(rest)
            if length < rest:
                raise LimitError(
                    "the recording is longer than the model takes",
                    got=f"{rest} frames of 10 ms",
                    allowed=f"at most {length}",
                )
            last = np.repeat(self._waiting[-1:], max(0, length - rest), axis=0)
            self._waiting = np.concatenate((self._waiting, last))
            self._call(length, real=rest)
        return self.ids[before:]

    def _call(self, frames: int, real: int | None = None) -> None:
        """Feed the first ``frames`` that wait, of which ``real`` are of the recording."""
        began = time.perf_counter()
        given, self._waiting = self._waiting[:frames], self._waiting[frames:]
        logits: npt.NDArray[np.float32] = self._stream.feed(given[None])[0]
        count = len(logits) if real is None else -(-len(logits) * real // frames)
        self._take(logits[:count].argmax(-1))
        self.stats.call_frames = max(self.stats.call_frames, frames)
        self.stats.call_seconds.append(self._heard + time.perf_counter() - began)
        self._heard = 0.0

    def _take(self, found: npt.NDArray[np.intp]) -> None:
        for position in found.tolist():
            if position != self._blank and (not self.positions or position != self.positions[-1]):
                self.ids.append(position)
            self.positions.append(position)


def hear(listener: Listener, samples: npt.NDArray[Any]) -> Iterator[list[int]]:
    """A recording ``[n]`` as it would come from a microphone: the new letters, call by call.

    A model in the whole form hears it second by second and answers at the end.
    """
    for at in range(0, len(samples), listener.piece):
        yield listener.feed(samples[at : at + listener.piece])
    yield listener.finish()
