"""The whole-sequence form and features, end to end: small modules exported, run, refused and reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tolerances import TOLERANCES
from whole_form import FRAME, ChunksOfFrames, Encoder, WholeFrames, sizes

import xexport
from xexport.cli import cli
from xexport.core.contract import Contract, InputSpec, contract_of
from xexport.core.errors import BundleError, ChunkLawError, FormError, InputError, LimitError
from xexport.core.manifest import decode_manifest, encode_manifest
from xexport.core.results import read_records
from xexport.evaluate.features import corpus_of_clips, read_clips, synthetic_clips
from xexport.runtimes.torch_eager import TorchStream

MAKERS: dict[str, Any] = {
    "encoder": Encoder,
    "fixed": lambda: Encoder(48),
    "frames": WholeFrames,
    "chunks": ChunksOfFrames,
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``bundles("encoder") -> Bundle`` of cpu-int8, each exported once; the encoder's is timed."""
    root, made = tmp_path_factory.mktemp("whole"), {}

    def get(name: str) -> xexport.Bundle:
        if name not in made:
            made[name] = xexport.export(
                MAKERS[name](), target="cpu-int8", out=root / name, name=name, sizes=sizes(name == "encoder")
            )
        return made[name]

    return get


def inputs_of(contract: Contract, batch: int, length: int) -> Any:
    return contract.inputs.random(np.random.default_rng(5), batch, contract.nearest(length), 11)


@pytest.mark.parametrize("name", MAKERS)
def test_exports_are_what_pytorch_computes(name: str, bundles: Any) -> None:
    bundle, module = bundles(name), MAKERS[name]()
    contract = bundle.manifest.model.contract
    assert contract == contract_of(module)
    for batch, length in ((1, 9), (3, 44)):
        given = inputs_of(contract, batch, length)
        state = [torch.zeros(batch, 2, 24)] if contract.streams else []
        want = module(torch.from_numpy(given), *state)[0].detach().numpy()
        got = bundle.stream(batch=batch).feed(given)
        assert got.shape == want.shape
        off = float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))
        assert off < TOLERANCES["tiny_logits_int8"]
    assert max(bundle.manifest.checks["parity"].values()) < TOLERANCES["model_fp32"]


def test_a_fixed_length_is_static_in_the_graph(bundles: Any) -> None:
    manifest = bundles("fixed").manifest
    assert [t.shape for t in manifest.inputs] == [("B", 48)]
    assert [t.shape[:2] for t in manifest.outputs] == [("B", 48)]
    assert manifest.model.fixed_length == 48


def test_nothing_is_carried_between_whole_sequences(bundles: Any) -> None:
    stream = bundles("encoder").stream()
    first = stream.feed([1, 2, 3])
    stream.feed([7, 8, 9, 10])
    np.testing.assert_array_equal(stream.feed([1, 2, 3]), first)
    assert (stream.position, stream.state()) == (0, {})


@pytest.mark.parametrize("act", ["save", "generate", "restore"])
def test_what_needs_a_state_is_refused(act: str, bundles: Any) -> None:
    stream = bundles("encoder").stream()
    calls = {
        "save": stream.save,
        "generate": lambda: stream.generate([1, 2]),
        "restore": lambda: stream.restore(None),
    }
    with pytest.raises(FormError, match=f"can't {act}") as refused:
        calls[act]()
    assert "whole-sequence form" in str(refused.value)
    assert "feed whole sequences" in str(refused.value)


def test_features_can_not_be_generated(bundles: Any) -> None:
    with pytest.raises(FormError, match="reads features"):
        bundles("chunks").stream().generate([1])


def test_chunks_of_frames_keep_the_chunk_law(bundles: Any) -> None:
    stream = bundles("chunks").stream(batch=2)
    given = inputs_of(stream.contract, 2, 40)
    whole = stream.feed(given)
    assert whole.shape == (2, 10, 11)
    assert stream.position == 40
    stream.reset()
    parts = [stream.feed(given[:, a:b]) for a, b in ((0, 4), (4, 20), (20, 24), (24, 40))]
    assert float(np.abs(np.concatenate(parts, 1) - whole).max()) < TOLERANCES["linear_int8_cut"]
    checks = bundles("chunks").manifest.checks
    assert max(checks["chunk_error_torch"], checks["chunk_error_onnx"]) < TOLERANCES["model_fp32"]


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (np.zeros((6, FRAME)), "a multiple of 4"),
        (np.zeros((4, FRAME + 1)), "wrong shape"),
        (np.zeros((2, 4, FRAME)), "wrong shape"),
        (np.zeros((0, FRAME)), "no features"),
        (np.full((4, FRAME), np.nan), "not finite"),
        (np.full((4, FRAME), 1e300), "not finite"),
        ([[1.0], [2.0, 3.0]], "rectangular"),
        ("text", "not numbers"),
    ],
)
def test_bad_features_are_refused(given: Any, what: str, bundles: Any) -> None:
    stream = bundles("chunks").stream()
    with pytest.raises(InputError) as refused:
        stream.feed(given)
    assert what in str(refused.value)
    assert stream.position == 0


def test_bad_lengths_are_refused(bundles: Any) -> None:
    with pytest.raises(InputError, match="one length: 48 tokens"):
        bundles("fixed").stream().feed([1] * 47)
    with pytest.raises(InputError, match="number of frames"):
        bundles("frames").stream().feed(np.zeros((6, FRAME)))
    stream = TorchStream(ChunksOfFrames(most=8))
    stream.feed(np.zeros((8, FRAME)))
    with pytest.raises(LimitError, match="8 frames"):
        stream.feed(np.zeros((4, FRAME)))


def test_run_prints_the_likeliest_tokens(bundles: Any) -> None:
    bundle = bundles("encoder")
    command = ["run", str(bundle.path), "--prompt", "1 2 3", "--ids", "--top-k", "2", "--json"]
    found = json.loads(CliRunner().invoke(cli, command).stdout)["positions"]
    logits = bundle.stream().feed([1, 2, 3])[0]
    assert [row["token"] for row in found] == [1, 2, 3]
    for row, want in zip(found, logits, strict=True):
        assert [p["token"] for p in row["predictions"]] == np.argsort(-want)[:2].tolist()
    odds = np.exp(logits[0] - logits[0].max())
    assert found[0]["predictions"][0]["probability"] == pytest.approx(
        float(odds.max() / odds.sum()), rel=1e-4
    )


def test_run_refuses_features(bundles: Any) -> None:
    done = CliRunner().invoke(cli, ["run", str(bundles("frames").path), "--prompt", "1", "--ids"])
    assert done.exit_code == 1
    assert "doesn't read text" in done.stderr


def test_the_records_have_no_steps_and_no_law(bundles: Any) -> None:
    bundle = bundles("encoder")
    kinds = {type(r).__name__ for r in read_records(bundle.path / "results.jsonl")}
    assert kinds == {"Fidelity", "Passes", "PairedLatency", "Memory", "OpTimes"}
    figures = bundle.manifest.figures
    assert (figures["form"], figures["chunk_error"], figures["bits_lost"]) == ("whole", None, None)
    assert set(figures["passes"]) == {"4", "16"}
    assert figures["kl"]["mean"] < TOLERANCES["tiny_kl_int8"]
    assert figures["same_top1"] > 0.9


def test_the_report_leaves_out_what_does_not_apply(bundles: Any) -> None:
    page = (bundles("encoder").path / "report.html").read_text("utf-8")
    assert "whole-sequence form only" in page
    assert "can't stream" in page or "can&#39;t stream" in page
    assert "Pass of 16" in page
    for absent in ("Chunk law</h3>", "Prefill", "Step p50", "Bits per byte", "Decode /s"):
        assert absent not in page, absent
    chunks = (bundles("chunks").path / "report.html").read_text("utf-8")
    assert "Chunk law</h3>" in chunks
    assert "Bits per byte</td>" not in chunks


@pytest.mark.parametrize("name", MAKERS)
def test_validate_needs_no_next_token(name: str, bundles: Any) -> None:
    from xexport import pipeline

    found = pipeline.validate(bundles(name).path)
    assert found["ok"], found["problems"]
    assert found["kl"]["mean"] < TOLERANCES["tiny_kl_int8"]
    assert (found["chunk_error"] is None) == (name != "chunks")
    assert found["bits_per_byte"]["here"] is None


def test_validate_finds_other_logits(bundles: Any, tmp_path: Path) -> None:
    """At the positions that were kept, of a sequence whose logits would be too many."""
    from xexport.evaluate.recorded import Recording
    from xexport.evaluate.validate import _whole_against

    bundle = bundles("encoder")
    stream = bundle.stream()
    values, at = np.arange(20), np.array([0, 7, 19])
    logits = stream.feed(values)[0]
    same = _whole_against(Recording(values, logits[at], at), stream, _setup())
    other = _whole_against(Recording(values, logits[at - 1], at), stream, _setup())
    assert same.kl_mean == 0
    assert other.kl_mean > 1e-3


def _setup() -> Any:
    from xexport.evaluate.environment import make_setup

    return make_setup(model="toy", target="cpu-int8", bundle="toy", text="made up", threads=1)


def test_whole_and_chunk_models_are_not_compared(bundles: Any) -> None:
    from xexport.evaluate.rivals import measure_bundles

    with pytest.raises(FormError, match="timed against each other"):
        measure_bundles([bundles("frames"), bundles("chunks")], rounds=2)
    one, other = measure_bundles([bundles("encoder"), bundles("fixed")], rounds=2, prefill=[16, 48])
    assert [t.at for t in one.prefill] == [16, 48]
    assert [t.at for t in other.prefill] == [48]
    assert one.steps == other.steps == ()


def test_a_model_that_looks_ahead_is_told_of_the_whole_form(tmp_path: Path) -> None:
    class Ahead(ChunksOfFrames):
        def forward(self, features: Any, last: Any) -> Any:
            logits, new = super().forward(features, last)
            return logits + logits.mean(1, keepdim=True), new

    with pytest.raises(ChunkLawError, match='form = "whole"'):
        xexport.export(Ahead(), target="cpu-fp32", out=tmp_path / "out", sizes=sizes())


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"form": "half"}, "unknown form"),
        ({"fixed_length": 0}, "bad fixed length"),
        ({"form": "chunk", "fixed_length": 8}, "bad fixed length"),
        ({"input_spec": "tokens"}, "input_spec must be"),
        ({"state_spec": lambda: [1]}, "has a state"),
    ],
)
def test_impossible_modules_are_refused(changes: dict[str, Any], what: str, tmp_path: Path) -> None:
    module = Encoder()
    for name, value in changes.items():
        setattr(module, name, value)
    with pytest.raises(InputError, match=what):
        xexport.export(module, target="cpu-fp32", out=tmp_path / "out")


@pytest.mark.parametrize(
    "spec", [{"kind": "sound"}, {"kind": "features"}, {"width": 3}, {"multiple": 0}, {"name": ""}]
)
def test_impossible_inputs_are_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        InputSpec(**spec)


def test_lengths_are_the_nearest_allowed() -> None:
    frames = Contract("whole", InputSpec("features", width=3, multiple=4, least=8), max_tokens=42)
    assert frames.lengths([1, 8, 9, 40, 41, 99]) == (8, 12, 40)
    assert [n for n in range(50) if frames.allows(n)] == [*range(8, 41, 4)]
    assert Contract("whole", fixed_length=6).lengths([1, 99]) == (6,)


def test_a_manifest_with_an_impossible_form_is_refused(bundles: Any) -> None:
    data = encode_manifest(bundles("encoder").manifest)
    assert decode_manifest(data).model.form == "whole"
    for old, new in ((b'"form": "whole"', b'"form": "hole"'), (b'"kind": "tokens"', b'"kind": "sound"')):
        with pytest.raises(BundleError, match="not valid"):
            decode_manifest(data.replace(old, new, 1))


def test_clips_are_read_and_cut(tmp_path: Path) -> None:
    spec = InputSpec("features", width=3, multiple=4)
    clips = {"a": np.ones((9, 3), np.float32), "b": np.zeros((3, 3)), "c": np.full((8, 3), 2.0)}
    np.savez(tmp_path / "clips.npz", **clips)
    corpus = read_clips(spec, tmp_path / "clips.npz")
    assert corpus.clips == (8, 8)  # 9 are cut to 8, and 3 are too few
    assert corpus.tokens.shape == (16, 3)
    assert corpus.head(10).clips == (8, 2)
    for wrong in ({"a": np.ones((4, 2))}, {"a": np.ones((2, 3))}):
        np.savez(tmp_path / "wrong.npz", **wrong)
        with pytest.raises(InputError):
            read_clips(spec, tmp_path / "wrong.npz")
    (tmp_path / "text").write_text("no array")
    with pytest.raises(InputError, match="not features"):
        read_clips(spec, tmp_path / "text")
    with pytest.raises(InputError, match="can't be read"):
        read_clips(spec, tmp_path / "missing.npz")
    again = (
        corpus_of_clips("x", synthetic_clips(spec), spec),
        corpus_of_clips("x", synthetic_clips(spec), spec),
    )
    assert again[0].sha256 == again[1].sha256


def test_windows_stay_inside_their_clips() -> None:
    from types import SimpleNamespace

    from xexport.evaluate.whole import windows

    runner: Any = SimpleNamespace(contract=Contract("whole", InputSpec("features", width=1, multiple=2)))
    values = np.arange(2100, dtype=np.float32)[:, None]
    found = windows(values, runner, clips=(2000, 3, 97))
    assert [(int(w[0, 0]), len(w)) for w in found] == [(0, 1024), (1024, 976), (2000, 2), (2003, 96)]
    assert len(windows(values, runner, clips=(2000, 100), count=500)) == 1
