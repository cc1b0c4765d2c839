"""Conformer bundles: against PyTorch on speech, cut into chunks, listening, and what they refuse."""

from __future__ import annotations

import json
import shutil
import wave
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chunk_form import new_state
from click.testing import CliRunner, Result
from tolerances import TOLERANCES

import xexport
from xexport.cli import cli
from xexport.core.contract import InputSpec
from xexport.core.errors import FormError, InputError
from xexport.core.results import read_records
from xexport.evaluate.features import read_clips
from xexport.models._resolve import resolve
from xexport.runtimes.audio import read_audio
from xexport.runtimes.bundle import Bundle
from xexport.runtimes.listen import Listener, hear
from xexport.runtimes.logmel import log_mel

CLIP = Path(str(files("xexport.evaluate") / "audio" / "austen.wav"))
#: of frames in chunks of three positions, 12 frames; and of whole recordings
PRESETS = ("tiny-chunked", "tiny")
SPEC = InputSpec("features", "log_mel", 80, 4)


@pytest.fixture(scope="session")
def bundles(exporter: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``bundles(preset, target)``: an export that was measured on the built-in clip."""
    root, made = tmp_path_factory.mktemp("conformer"), dict[tuple[str, str], Bundle]()

    def bundle(preset: str, target: str) -> Bundle:
        if (preset, target) not in made:
            out = root / f"{preset}-{target}"
            exporter.export("conformer", target, out, preset=preset, eval_text=None)
            made[preset, target] = xexport.load(out)
        return made[preset, target]

    return bundle


def clip(unit: int = 12) -> np.ndarray[Any, Any]:
    features = log_mel(read_audio(CLIP))
    return features[: len(features) // unit * unit]


def expected(preset: str, features: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """PyTorch's logits [n,V] of frames [T,80]."""
    module: Any = resolve("conformer", preset=preset).eager()
    state = [] if module.form == "whole" else new_state(module, 1)
    return np.asarray(module(torch.from_numpy(features)[None], *state)[0][0])


def distance(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> float:
    """RMS of the difference over RMS."""
    assert got.shape == want.shape
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


@pytest.mark.parametrize("target", ["cpu-fp32", "cpu-int8"])
@pytest.mark.parametrize("preset", PRESETS)
def test_bundle_is_pytorch_on_speech(bundles: Any, preset: str, target: str) -> None:
    bundle, features = bundles(preset, target), clip()
    stream = bundle.stream()
    got = stream.feed(features)[0]
    assert distance(got, expected(preset, features)) < TOLERANCES[f"tiny_logits_{target[4:]}"]
    rows = [r for r in read_records(bundle.path / "results.jsonl") if type(r).__name__ == "Fidelity"]
    assert {r.setup.text for r in rows} == {"austen.wav"}
    (row,) = [r for r in rows if r.setup.runner == "bundle"]
    assert len(row.kl) >= 63  # positions of the 256 frames that a test measures
    assert np.mean(row.kl) < TOLERANCES[f"tiny_kl_{target[4:]}"]
    contract = bundle.manifest.model.contract
    assert contract.form == ("whole" if preset == "tiny" else "chunk")


@pytest.mark.parametrize("target", ["cpu-fp32", "cpu-int8"])
def test_any_cut_of_a_bundle_is_the_same(bundles: Any, target: str) -> None:
    stream, features = bundles("tiny-chunked", target).stream(batch=2), np.stack([clip()] * 2)
    features[1] = features[1, ::-1]
    whole, final = stream.feed(features), stream.state()
    allowed = TOLERANCES["model_fp32" if target == "cpu-fp32" else "linear_int8_cut"]
    for sizes in ([12] * 24, [36, 12, 240], [144, 144]):
        stream.reset()
        parts = [stream.feed(p) for p in np.split(features, np.cumsum(sizes)[:-1], axis=1)]
        assert np.abs(np.concatenate(parts, 1) - whole).max() < allowed * max(1, np.abs(whole).max())
        assert stream.position == 288
        for name, value in stream.state().items():
            assert np.abs(value - final[name]).max() < allowed * max(1, np.abs(final[name]).max()), name


@pytest.mark.parametrize(
    ("features", "what"),
    [
        (np.zeros((12, 40), np.float32), "shape"),
        (np.full((12, 80), np.nan, np.float32), "finite"),
        (np.zeros((10, 80), np.float32), "bad number of frames"),
        (np.zeros((0, 80), np.float32), "no features"),
    ],
)
@pytest.mark.parametrize("preset", PRESETS)
def test_bad_features_are_refused(bundles: Any, preset: str, features: Any, what: str) -> None:
    stream = bundles(preset, "cpu-fp32").stream()
    with pytest.raises(InputError, match=what):
        stream.feed(features)
    assert stream.position == 0


@pytest.mark.parametrize("preset", PRESETS)
def test_listening_is_the_whole_clip_at_once(bundles: Any, preset: str) -> None:
    """Ids of every position, the last frames repeated; letters are what is left of repeats and blanks."""
    bundle, features = bundles(preset, "cpu-fp32"), log_mel(read_audio(CLIP))
    listener = Listener(bundle.stream(), blank=0)
    letters = [letter for some in hear(listener, read_audio(CLIP)) for letter in some]
    padded = np.concatenate((features, np.repeat(features[-1:], -len(features) % 12, axis=0)))
    if preset == "tiny":
        padded = padded[: -(-len(features) // 4) * 4]
    want = expected(preset, padded)[: -(-len(features) // 4)].argmax(-1).tolist()
    assert listener.positions == want
    kept = [w for w, before in zip(want, [None, *want[:-1]], strict=True) if w not in (0, before)]
    assert letters == listener.ids == kept
    stats = listener.stats.record()
    assert stats["calls"] == (1 if preset == "tiny" else 25)
    assert stats["audio_seconds"] == 2.99
    assert stats["call_audio_ms"] == (3000 if preset == "tiny" else 120)
    assert 0 < stats["real_time_factor"] < 10


def test_samples_may_come_in_any_pieces(bundles: Any) -> None:
    bundle, samples = bundles("tiny-chunked", "cpu-int8"), read_audio(CLIP)
    results = []
    for pieces in (1, 7, 300):
        listener = Listener(bundle.stream(), frames=24)
        for piece in np.array_split(samples, pieces):
            listener.feed(piece)
        listener.finish()
        results.append((listener.ids, listener.positions))
    assert results[0] == results[1] == results[2]
    assert Listener(bundle.stream()).finish() == []


def test_a_listener_refuses(bundles: Any, toy_bundle: Path) -> None:
    with pytest.raises(FormError, match="log-mel"):
        Listener(xexport.load(toy_bundle).stream())
    stream = bundles("tiny-chunked", "cpu-fp32").stream()
    with pytest.raises(InputError, match="blank"):
        Listener(stream, blank=29)
    with pytest.raises(InputError, match="so many frames"):
        Listener(stream, frames=16)
    with pytest.raises(InputError, match="batch 1"):
        Listener(bundles("tiny-chunked", "cpu-fp32").stream(batch=2))
    listener = Listener(stream)
    with pytest.raises(InputError, match="not finite"):
        listener.feed([np.nan])
    assert listener.stats.audio_seconds == 0


def invoke(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, [*map(str, args)])


@pytest.mark.parametrize("preset", PRESETS)
def test_run_audio(bundles: Any, preset: str) -> None:
    path = bundles(preset, "cpu-int8").path
    result = invoke("run", path, "--audio", CLIP)
    assert result.exit_code == 0, result.output
    as_json = json.loads(invoke("run", path, "--audio", CLIP, "--json", "--threads", "1").stdout)
    assert [int(w) for w in result.stdout.split()] == as_json["ids"]
    assert len(as_json["positions"]) == 75
    assert as_json["notes"] == [f"random weights (preset {preset}, seed 0)"]
    assert "the ids mean nothing" in result.stderr
    assert "2.99 s of audio" in result.stderr
    assert "real-time factor" in result.stderr
    assert ("25 calls of 120 ms" in result.stderr) == (preset != "tiny")


def test_run_audio_refuses(bundles: Any, toy_bundle: Path, tmp_path: Path) -> None:
    path = bundles("tiny-chunked", "cpu-int8").path
    with wave.open(str(tmp_path / "phone.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(16000))
    for args, code, what in (
        (("run", path, "--audio", tmp_path / "phone.wav"), 1, "another sample rate"),
        (("run", path, "--audio", tmp_path / "no.wav"), 1, "does not exist"),
        (("run", path, "--audio", CLIP, "--frames", "16"), 1, "so many frames"),
        (("run", path, "--prompt", "a", "--audio", CLIP), 2, "name one"),
        (("run", path), 2, "name one"),
        (("run", path, "--prompt", "a", "--frames", "12"), 2, "--frames goes with --audio"),
        (("run", toy_bundle, "--audio", CLIP), 1, "does not read log-mel"),
        (("run", path, "--prompt", "a"), 1, "can't generate"),
    ):
        result = invoke(*args)
        assert result.exit_code == code, args
        assert what in result.stderr
        assert "Traceback" not in result.output


def test_evaluation_clips(tmp_path: Path) -> None:
    """The built-in clip, a recording, a folder of them; other models have no recordings."""
    built_in = read_clips(SPEC)
    assert (built_in.name, built_in.clips) == ("austen.wav", (296,))
    assert np.array_equal(built_in.tokens, clip(4))
    for name in ("b.wav", "a.WAV"):
        shutil.copy(CLIP, tmp_path / name)
    (tmp_path / "notes.txt").write_text("no recording")
    assert read_clips(SPEC, tmp_path / "b.wav").sha256 == built_in.sha256
    assert read_clips(SPEC, tmp_path).clips == (296, 296)
    with pytest.raises(InputError, match="does not read log-mel"):
        read_clips(InputSpec("features", "pixels", 80), CLIP)
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="no clip"):
        read_clips(SPEC, tmp_path / "none")
    synthetic = read_clips(InputSpec("features", "other", 80, typical=(14.6, 3.6)))
    assert abs(float(synthetic.tokens.mean()) - 14.6) < 0.1
    assert abs(float(synthetic.tokens.std()) - 3.6) < 0.1
