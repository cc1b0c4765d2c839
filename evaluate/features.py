"""Clips of features for models that don't read tokens: recordings, the user's own, or synthetic ones."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xexport.core.contract import InputSpec
from xexport.core.errors import InputError
from xexport.evaluate.corpus import Corpus
from xexport.runtimes.audio import AUDIO_ENDINGS, read_audio
from xexport.runtimes.inputs import check_features
from xexport.runtimes.logmel import log_mel, reads_log_mel

__all__ = ["corpus_of_clips", "read_clips", "synthetic_clips"]

BUILT_IN_AUDIO = "austen.wav"
_SYNTHETIC = (512, 1024, 300, 2048)


def read_clips(inputs: InputSpec, path: str | Path | None = None) -> Corpus:
    """The clips of a .npz file (one array ``[T,F]`` each) or .npy file (one clip).

    A model of log-mel frames reads recordings too, a file or a folder of them; without a path the built-in
    one. For other models clips are synthetic then, and the name of the corpus says so: that shows what an
    export changes, not what the model knows.

    Raises:
        InputError: the file can't be read, an array is not ``[T,F]`` of finite numbers, or a recording
            is given to a model of other features.
    """
    if path is None and reads_log_mel(inputs):
        path = Path(str(files("xexport.evaluate") / "audio" / BUILT_IN_AUDIO))
    if path is None:
        return corpus_of_clips("synthetic features", synthetic_clips(inputs), inputs)
    where = Path(path)
    if where.is_dir() or where.suffix.lower() in AUDIO_ENDINGS:
        return _recordings(where, inputs)
    try:
        with where.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            clips = [found] if isinstance(found, np.ndarray) else [found[name] for name in found.files]
    except OSError as error:
        raise InputError("the evaluation clips can't be read", got=f"{where}: {error.strerror}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            "the evaluation clips are not features",
            got=f"{where}: {error}",
            allowed=f"a .npz file with one float32 array [T, {inputs.width}] a clip, or one .npy",
        ) from error
    return corpus_of_clips(where.name, clips, inputs)


def _recordings(where: Path, inputs: InputSpec) -> Corpus:
    """The features of a recording, or of every one in a folder by name."""
    if not reads_log_mel(inputs):
        raise InputError(
            "this model does not read log-mel frames of recordings",
            got=where,
            allowed=f"a .npz file with one float32 array [T, {inputs.width}] a clip, or one .npy",
        )
    found = (
        sorted(f for f in where.iterdir() if f.suffix.lower() in AUDIO_ENDINGS) if where.is_dir() else [where]
    )
    return corpus_of_clips(where.name, [log_mel(read_audio(f)) for f in found], inputs)


def corpus_of_clips(name: str, clips: Sequence[NDArray[np.float32]], inputs: InputSpec) -> Corpus:
    """A corpus of clips ``[T,F]``, each cut to a multiple of what the model takes at once.

    Raises:
        InputError: no clip is long enough, or one is not ``[T,F]`` of finite numbers.
    """
    unit = inputs.multiple
    checked = [check_features(clip, 1, inputs)[0] for clip in clips]
    kept = [clip[: len(clip) // unit * unit] for clip in checked if len(clip) >= unit]
    if not kept:
        raise InputError("no clip to evaluate on", got=f"{name}: {len(clips)} clips", allowed="one or more")
    frames = np.concatenate(kept)
    digest = hashlib.sha256(frames.tobytes()).hexdigest()
    return Corpus(name, digest, frames, 0, tuple(len(clip) for clip in kept))


def synthetic_clips(inputs: InputSpec, lengths: Sequence[int] = _SYNTHETIC) -> list[NDArray[np.float32]]:
    """Clips that change slowly in time, as recordings do: each feature a low-passed noise."""
    rng = np.random.default_rng(0)
    clips = []
    for length in lengths:
        noise = rng.standard_normal((length + 8, inputs.width))
        smooth = sum(noise[lag : lag + length] for lag in range(8)) / np.sqrt(8)
        clips.append(inputs.scaled(smooth))
    return clips
