"""The shipped checkpoints give the recorded figures; the recipe trains, resumes and refuses clearly."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import TOLERANCES

from xexport.core.checkpoint import open_checkpoint
from xexport.core.errors import CheckpointError, InputError
from xexport.core.registry import get_family
from xexport.zoo import checkpoint_path, shipped
from xexport.zoo.data import Windows, normalise, read_corpus
from xexport.zoo.native import native_recurrences
from xexport.zoo.optim import orthogonalise
from xexport.zoo.score import HEAD, bits_of_stream, bits_of_windows, built_in_text
from xexport.zoo.train import Recipe, main, train

#: those of the long runs; the others trained for a few minutes by the same recipe
FAMILIES = ("hyena", "mamba", "retnet", "rwkv")
SHIPPED = (
    *FAMILIES,
    "aft",
    "block_transformer",
    "gtrxl",
    "hourglass",
    "hybrid",
    "linear_attention",
    "lmuformer",
    "longnet",
    "m2_gpt",
    "mamba2",
    "mamba_mixer",
    "megabyte",
    "performer",
    "reformer",
    "rwkv4",
    "rwkv5",
    "rwkv6",
    "slab",
    "striped_hyena",
    "tokenformer",
    "transformer",
)
PROSE = "It was the best of times, it was the worst of times.\n" * 80


def _results() -> dict[str, Any]:
    rows: dict[str, Any] = json.loads((files("xexport.zoo") / "results.json").read_text(encoding="utf-8"))
    return rows


def _built(name: str) -> Any:
    path = checkpoint_path(name)
    assert path is not None
    family = get_family(name)
    loaded = family.load(open_checkpoint(path))
    module = family.build(loaded.config)
    module.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in loaded.tensors.items()})
    return module


def test_every_family_of_the_recipe_ships_a_checkpoint() -> None:
    assert set(shipped()) == set(SHIPPED)
    assert checkpoint_path("gpt") is None


def test_finding_checkpoints_needs_no_torch() -> None:
    code = "import sys, xexport.zoo as z; assert z.shipped(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_checkpoint_is_small_finite_and_says_how_it_was_made(name: str) -> None:
    path = checkpoint_path(name)
    assert path is not None
    assert path.stat().st_size < 8e6
    raw = open_checkpoint(path)
    assert all(bool(torch.isfinite(t).all()) for t in raw.tensors.values())
    recipe = json.loads(raw.metadata["xexport.recipe"])
    assert recipe["parameters"] >= 1_000_000
    assert recipe["tokens"] > 0
    assert all(len(text["sha256"]) == 64 for text in recipe["texts"].values())
    assert not any("moby" in text for text in recipe["texts"])


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_checkpoint_gives_the_recorded_bits_per_byte(name: str) -> None:
    module = _built(name)
    with native_recurrences():
        bits = bits_of_stream(module, built_in_text()[:HEAD], limit=getattr(module, "max_tokens", None))
    assert bits == pytest.approx(_results()[name]["head"], abs=TOLERANCES["zoo_bits_per_byte"])


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text(PROSE, encoding="utf-8")
    return path


def _recipe(name: str, steps: int = 3) -> Recipe:
    return Recipe(name, "tiny", steps, batch=2, length=16, late_length=32, late_from=0.6, warmup=1)


def _config(name: str) -> Any:
    return replace(get_family(name).presets["tiny"], vocab_size=256)


@pytest.mark.parametrize("name", FAMILIES)
def test_three_steps_train_a_model_that_its_family_can_read(name: str, prose: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    lines: list[str] = []
    bits = train(_recipe(name), read_corpus([prose]), out, config=_config(name), say=lines.append)
    raw = open_checkpoint(out)
    assert get_family(name).load(raw).config == _config(name)
    recipe = json.loads(raw.metadata["xexport.recipe"])
    assert (recipe["steps"], recipe["tokens"]) == (3, 96)
    assert recipe["validation_bits_per_byte"] == pytest.approx(bits, abs=1e-4)
    assert 0 < bits < 20


def test_a_resumed_run_ends_where_an_unbroken_one_does(
    prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, config = read_corpus([prose]), _config("retnet")
    train(_recipe("retnet", 4), corpus, tmp_path / "whole.safetensors", config=config, say=_quiet)
    with monkeypatch.context() as patch:
        patch.setattr("xexport.zoo.train._save_due", lambda *_: True)
        patch.setattr("xexport.zoo.train._update", _stop_at(2))
        with pytest.raises(KeyboardInterrupt):
            train(_recipe("retnet", 4), corpus, tmp_path / "cut.safetensors", config=config, say=_quiet)
    train(_recipe("retnet", 4), corpus, tmp_path / "cut.safetensors", config=config, resume=True, say=_quiet)
    whole, cut = (open_checkpoint(tmp_path / f"{n}.safetensors").tensors for n in ("whole", "cut"))
    for key, value in whole.items():
        torch.testing.assert_close(cut[key], value, rtol=0, atol=0)


def _quiet(_: str) -> None:
    """Says nothing."""


def _stop_at(step: int) -> Any:
    from xexport.zoo import train as module

    update = module._update

    def stopping(run: Any, recipe: Recipe, done: float) -> None:
        if run.step == step:
            raise KeyboardInterrupt
        update(run, recipe, done)

    return stopping


def test_resuming_without_a_run_or_with_another_recipe_is_refused(prose: Path, tmp_path: Path) -> None:
    corpus, out, config = read_corpus([prose]), tmp_path / "m.safetensors", _config("retnet")
    with pytest.raises(CheckpointError, match="no run to resume"):
        train(_recipe("retnet"), corpus, out, resume=True, config=config, say=_quiet)
    train(_recipe("retnet"), corpus, out, config=config, say=_quiet)
    other = replace(_recipe("retnet"), lr=1.0)
    with pytest.raises(InputError, match="another recipe"):
        train(other, corpus, out, resume=True, config=config, say=_quiet)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["retnet", "--steps", "1"], "no training text was named"),
        (["retnet", "--steps", "1", "--text", "/nowhere"], "does not exist"),
        (["retnet", "--text", "."], "budget is unclear"),
        (["retnet", "--steps", "1", "--minutes", "1"], "budget is unclear"),
        (["retnet", "--minutes", "-1"], "must be positive"),
        (["retnet", "--steps", "1", "--optimizer", "sgd"], "unknown optimizer"),
    ],
    ids=["no text", "missing text", "no budget", "two budgets", "negative budget", "unknown optimizer"],
)
def test_a_bad_command_line_is_refused_with_a_reason(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    assert expected in capsys.readouterr().err


def test_an_unknown_family_and_preset_are_refused(prose: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpt", "--steps", "1", "--text", str(prose)]) == 1
    assert "unknown model 'gpt'" in capsys.readouterr().err
    assert main(["retnet", "--steps", "1", "--text", str(prose), "--preset", "huge"]) == 1
    assert "no preset 'huge'" in capsys.readouterr().err


def test_text_that_is_not_utf8_or_too_short_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="can't be read"):
        read_corpus([bad])
    with pytest.raises(InputError, match="too short"):
        Windows(np.zeros(20, np.uint8), 16, seed=0)
    with pytest.raises(InputError, match="no training text found"):
        read_corpus([tmp_path / "bad.txt", _folder(tmp_path)])


def _folder(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    (tmp_path / "bad.txt").write_text("good now")
    return folder


def test_normalising_collapses_newlines_and_spells_punctuation_one_way() -> None:
    assert normalise("a “b”\r\nc--d\n\n\n  _e_ don’t ") == 'a "b" c—d\n\ne don\'t'


def test_folders_are_read_with_their_formats_marks_removed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Ge1:1 In the beginning.\nGe1:2 And the earth.\nGe2:1 Thus.")
    (tmp_path / "b.md").write_text("## ACT I\n\n**HAMLET**  \nWords, _words_,  \nwords.")
    (tmp_path / "c.json").write_text('{"text": "from json", "title": "no"}')
    (tmp_path / "a.json").write_text('{"text": "twin of a.txt"}')
    corpus = read_corpus([tmp_path])
    got = corpus.train.tobytes().decode() + corpus.validation.tobytes().decode()
    want = "In the beginning. And the earth.\n\nThus.\n\nACT I\n\nHAMLET. Words, words, words.\n\nfrom json"
    assert sum(size for size, _ in corpus.sources.values()) == len(want)
    assert want.startswith(got[:40])


def test_an_epoch_shows_every_window_once_and_a_position_resumes_it() -> None:
    text = np.arange(200, dtype=np.uint8)
    windows = Windows(text, 10, seed=3)
    rows = windows.take(18)
    assert len({int(r[0]) for r in rows}) == 18
    again = Windows(text, 10, seed=3, position=7)
    np.testing.assert_array_equal(again.take(11), rows[7:])


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((2, 24, 40), (2, 40, 24)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert float(values.min()) > 0.5
        assert float(values.max()) < 1.3


@pytest.mark.parametrize("name", ["mamba", "rwkv"])
@pytest.mark.parametrize("length", [1, 16, 37], ids=["T=1", "T=16", "T=37"])
def test_compiled_recurrences_have_the_gradients_of_the_torch_ones(name: str, length: int) -> None:
    family = get_family(name)
    config = _config(name)
    module = family.train_form(config)
    family.init(module, 1)
    tokens = torch.randint(0, 256, (2, length), generator=torch.Generator().manual_seed(0))

    def gradients() -> dict[str, torch.Tensor]:
        module.zero_grad()
        module(tokens).square().sum().backward()
        return {k: p.grad.clone() for k, p in module.named_parameters() if p.grad is not None}

    want = gradients()
    with native_recurrences() as native:
        if not native:
            pytest.skip("no C++ compiler here")
        got = gradients()
    assert got.keys() == want.keys()
    for key, value in want.items():
        error = float((got[key] - value).abs().max() / value.abs().max().clamp(min=1))
        assert error < TOLERANCES["model_fp32"], key


def test_windows_and_streams_count_every_byte_once() -> None:
    """A model that knows nothing costs 8 bits a byte however the text is cut."""

    class Uniform(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(1))

        def state_spec(self) -> list[Any]:
            return []

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*tokens.shape, 256)

    class Stream(Uniform):
        def forward(self, tokens: torch.Tensor) -> Any:
            return (super().forward(tokens),)

    text = np.frombuffer(PROSE.encode(), np.uint8)
    for cut in (2, 100, 513, 777, len(text)):
        assert bits_of_windows(Uniform(), text[:cut], window=64, overlap=32) == pytest.approx(8.0)
        assert bits_of_stream(Stream(), text[:cut], chunk=50) == pytest.approx(8.0)
        assert bits_of_stream(Stream(), text[:cut], chunk=50, rows=3) == pytest.approx(8.0)
        assert bits_of_stream(Stream(), text[:cut], chunk=50, limit=60) == pytest.approx(8.0)
