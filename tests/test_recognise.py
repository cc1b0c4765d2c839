"""``xexport PATH``: what a checkpoint is, and from what that is known."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_mamba import save_hugging_face
from test_tokenizer_files import bpe  # noqa: F401  (a fixture)
from tolerances import TOLERANCES

import xexport
from xexport.cli import cli
from xexport.core.checkpoint import open_checkpoint
from xexport.core.errors import CheckpointError, InputError, XexportError
from xexport.core.registry import family_names, get_family
from xexport.models._resolve import recognise, resolve


def tiny_tensors(family: str) -> dict[str, torch.Tensor]:
    made = get_family(family)
    module = made.build(made.presets["tiny"])
    made.init(module, 0)
    return {k: v.detach().contiguous() for k, v in module.state_dict().items()}


def own_file(folder: Path, family: str) -> Path:
    made = get_family(family)
    training = made.train_form(made.presets["tiny"]).state_dict()
    metadata = {
        "xexport.family": family,
        "xexport.layout": "training",
        "xexport.config": json.dumps(dataclasses.asdict(made.presets["tiny"])),
    }
    path = folder / f"{family}.safetensors"
    save_file({k: v.clone().contiguous() for k, v in training.items()}, path, metadata)
    return path


@pytest.mark.parametrize("family", family_names())
def test_a_file_of_our_own_training_is_of_one_family(tmp_path: Path, family: str) -> None:
    found, why = recognise(open_checkpoint(own_file(tmp_path, family)))
    assert found.name == family
    assert "metadata" in why


@pytest.mark.parametrize("family", ["rwkv", "rwkv4", "rwkv5", "rwkv6"])
def test_a_published_rwkv_is_known_by_its_keys(tmp_path: Path, family: str) -> None:
    torch.save(tiny_tensors(family), tmp_path / "model.pth")
    source = resolve(str(tmp_path / "model.pth"))
    assert source.family == family
    assert "layout" in source.recognised
    assert source.notes[0] == f"recognised as {family}: {source.recognised}"
    assert source.path == tmp_path / "model.pth"


def test_what_nobody_knows_says_what_was_looked_for(tmp_path: Path) -> None:
    save_file({"encoder.weight": torch.zeros(2, 2)}, tmp_path / "bert.safetensors")
    with pytest.raises(CheckpointError) as caught:
        resolve(str(tmp_path / "bert.safetensors"))
    text = str(caught.value)
    assert "encoder.weight" in text
    assert "xexport.family" in text
    for family in family_names():
        assert f"{family}: {get_family(family).reads or 'files of our own training'}" in text
    assert "--weights" in text
    (tmp_path / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="name its folder"):
        resolve(str(tmp_path / "bert.safetensors"))
    with pytest.raises(CheckpointError, match="model_type 'bert'"):
        resolve(str(tmp_path))


def test_two_families_at_once_are_an_error(tmp_path: Path) -> None:
    tensors = {**tiny_tensors("rwkv"), "layers.0.retnet_rel_pos.decay": torch.zeros(2)}
    torch.save(tensors, tmp_path / "both.pth")
    with pytest.raises(CheckpointError, match="several families") as caught:
        resolve(str(tmp_path / "both.pth"))
    assert "rwkv: " in str(caught.value)
    assert "retnet: " in str(caught.value)
    assert "xexport retnet --weights" in str(caught.value)


def test_a_bundle_is_no_checkpoint(toy_bundle: Path) -> None:
    with pytest.raises(CheckpointError, match="is a bundle"):
        resolve(str(toy_bundle))


def test_a_path_brings_its_own_size(tmp_path: Path) -> None:
    path = own_file(tmp_path, "rwkv")
    for options in ({"preset": "tiny"}, {"weights": path}):
        with pytest.raises(InputError, match="brings its own"):
            resolve(str(path), **options)


@pytest.mark.parametrize("model", ["nowhere/model.pth", "model.pth", "./nowhere"])
def test_a_path_that_is_not_there(model: str) -> None:
    result = click.testing.CliRunner().invoke(cli, [model, "--target", "cpu-fp32"])
    assert result.exit_code == 1
    assert "does not exist" in result.output


def shard(folder: Path) -> None:
    """Cut a folder's model.safetensors in three, as Hugging Face does."""
    raw = open_checkpoint(folder)
    names = sorted(raw.tensors)
    parts = [names[i::3] for i in range(3)]
    index: dict[str, Any] = {"metadata": {}, "weight_map": {}}
    tables = [{n: raw.tensors[n].clone() for n in part} for part in parts]
    (folder / "model.safetensors").unlink()
    for number, table in enumerate(tables, 1):
        name = f"model-{number:05}-of-00003.safetensors"
        save_file(table, folder / name, {"format": "pt"})
        index["weight_map"] |= dict.fromkeys(table, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def test_shards_are_read_where_they_lie(tmp_path: Path) -> None:
    """No tensor is copied: each points into the pages of its file, as one of a single file does."""
    big = torch.randn(1 << 20)
    save_file({"a": big, "b": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    shard(tmp_path)
    raw = open_checkpoint(tmp_path)
    assert torch.equal(raw.tensors["a"], big)
    where = raw.tensors["a"].data_ptr()
    lines = Path("/proc/self/maps").read_text(encoding="ascii").splitlines()
    spans = [line for line in lines if "of-00003.safetensors" in line]
    ends = [[int(n, 16) for n in line.split()[0].split("-")] for line in spans]
    assert any(low <= where < high for low, high in ends)


@pytest.mark.oracle
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_a_hugging_face_folder_goes_all_the_way(
    tmp_path: Path,
    exporter: Any,
    bpe: Path,  # noqa: F811
    sharded: bool,
) -> None:
    folder = tmp_path / "tiny-mamba-hf"
    model = save_hugging_face(folder, vocab_size=400, eos_token_id=0)
    (folder / "tokenizer.json").write_bytes(bpe.read_bytes())
    if sharded:
        shard(folder)
    text = tmp_path / "text.txt"
    text.write_text(
        "Call me Ishmael. Some years ago - never mind how long precisely - " * 8, encoding="utf-8"
    )
    out = exporter.export(str(folder), "cpu-fp32", tmp_path / "out", eval_text=text)
    bundle = xexport.load(out)
    assert bundle.manifest.model.family == "mamba"
    assert bundle.manifest.model.notes[0] == "recognised as mamba: its config.json says mamba"
    assert bundle.manifest.tokenizer == {"kind": "huggingface", "file": "tokenizer.json", "end": [0]}
    tokenizer = bundle.tokenizer()
    ids = tokenizer.encode("Call me Ishmael.")
    got = bundle.stream(threads=1).feed(ids)
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits.numpy()
    assert np.abs(got - want).max() < TOLERANCES["oracle_fp32"] * max(1.0, np.abs(want).max())
    result = click.testing.CliRunner().invoke(
        cli, ["run", str(out), "--prompt", "Call me", "--max-tokens", "12", "--seed", "1", "--json"]
    )
    assert result.exit_code == 0, result.output
    row = json.loads(result.output)
    assert row["text"] == tokenizer.decode(row["ids"])


def test_the_command_line_says_what_it_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Refused right after: what matters here is that the path reached the exporter and was named."""
    from xexport import pipeline

    def stop(_output: Any, source: Any, *_rest: Any) -> None:
        raise XexportError(f"got {source.family}")

    monkeypatch.setattr(pipeline, "_export_into", stop)
    monkeypatch.chdir(tmp_path)
    path = own_file(tmp_path, "rwkv")
    result = click.testing.CliRunner().invoke(cli, [path.name, "--target", "cpu-fp32"])
    assert result.exit_code == 1
    assert "this is rwkv: its metadata says rwkv" in result.output
    assert "got rwkv" in result.output
