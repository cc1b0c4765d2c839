"""RWKV-5 and 6: parity with rwkv 0.8.32, the chunk law, exports, and telling the versions apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chunk_form import (
    TARGETS,
    check_cuts,
    check_export,
    error,
    load_module,
    new_state,
    operators,
    random_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from rwkv_package import rwkv_package
from safetensors.torch import save_file
from tolerances import TOLERANCES

from xexport.core.checkpoint import RawCheckpoint, open_checkpoint
from xexport.core.errors import CheckpointError
from xexport.core.registry import family_names, get_family

FIVE, SIX = get_family("rwkv5"), get_family("rwkv6")
FAMILIES = {"rwkv5": FIVE, "rwkv6": SIX}
OLD = {
    "5.0": {"per_channel": False, "gate": False, "log_bonus": True},
    "5.1": {"per_channel": False, "log_bonus": True},
    "5.1 faaaa": {"per_channel": False},
    "5.2": {},
}
each_family = pytest.mark.parametrize("name", FAMILIES)
each_version = pytest.mark.parametrize("version", [*OLD, "6"])


def config_of(version: str, **sizes: Any) -> tuple[Any, Any]:
    """The family and a configuration of a version: tiny, or of other sizes."""
    if version == "6":
        return SIX, replace(SIX.presets["tiny"], **sizes)
    return FIVE, replace(FIVE.presets["tiny"], **OLD[version], **sizes)


@settings(max_examples=16, deadline=None)
@given(
    version=st.sampled_from([*OLD, "6"]),
    batch=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 13), min_size=1, max_size=4),
    seed=st.integers(0, 50),
)
def test_any_cut_gives_the_same_logits_and_state(
    version: str, batch: int, lengths: list[int], seed: int
) -> None:
    check_cuts(random_model(*config_of(version), seed), batch, lengths)


@each_family
def test_export_keeps_one_operator_a_layer_and_dynamic_axes(name: str) -> None:
    family = FAMILIES[name]
    assert operators(family, family.presets["tiny"]).count("xexport.wkv6.default") == 2


@pytest.mark.parametrize("target", TARGETS)
@each_family
def test_bundle_is_pytorch(exporter: Any, name: str, target: str) -> None:
    check_export(exporter, name, target)


def published(module: Any, version: str) -> dict[str, Any]:
    """The state dict as checkpoints of that version have it: one number a head is stored as [H]."""
    flat = ("time_decay", "time_first", "time_faaaa")
    one = version.startswith(("5.0", "5.1"))
    return {n: p.squeeze(-1) if one and n.endswith(flat) else p for n, p in module.state_dict().items()}


@pytest.mark.oracle
@each_version
def test_parity_with_the_rwkv_package(tmp_path: Path, version: str) -> None:
    family, config = config_of(version, layers=3, width=48, vocab_size=50, head_size=16, att_width=0)
    module = random_model(family, config, 3)
    tensors = published(module, version)
    tokens = torch.randint(0, 50, (1, 19))
    want, step, oracle = rwkv_package(tensors, tokens[0].tolist(), tmp_path)
    assert family.recognise(open_checkpoint(tmp_path / "model.pth"))
    module = load_module(family, tmp_path / "model.pth")
    assert module.config == replace(config, att_width=48)
    logits, *state = module(tokens, *new_state(module, 1))
    assert error(logits[0], want) < TOLERANCES["oracle_fp32"]
    logits, *state = module(torch.tensor([[5]]), *state)
    assert error(logits[0, 0], step) < TOLERANCES["oracle_fp32"]
    assert len(oracle) == len(state)
    for mine, theirs in zip(state, oracle, strict=True):
        assert error(mine[0], theirs.reshape(mine[0].shape)) < TOLERANCES["oracle_fp32"]


@pytest.mark.parametrize("version", ["4", *OLD, "6", "7"])
def test_every_version_is_recognised_as_itself_alone(version: str) -> None:
    family, config = {
        "4": (get_family("rwkv4"), get_family("rwkv4").presets["tiny"]),
        "7": (get_family("rwkv"), get_family("rwkv").presets["tiny"]),
    }.get(version) or config_of(version)
    raw = RawCheckpoint(Path("x.pth"), published(random_model(family, config), version))
    reasons = {n: get_family(n).recognise(raw) for n in family_names()}
    assert {n for n, reason in reasons.items() if reason} == {family.name}


@each_family
def test_loads_a_file_of_our_own_training(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    tiny = family.presets["tiny"]
    config = {"layers": 2, "width": 32, "vocab_size": 61, "head_size": 8, "att_width": 24, "ffn_width": 72}
    config |= {"mix_rank": 5, "decay_rank": 7} if name == "rwkv6" else {}
    metadata = {
        "xexport.family": name,
        "xexport.layout": "training",
        "xexport.config": json.dumps(config | {"group_norm_eps": 1e-5}),
    }
    tensors = {k: v.half() for k, v in random_model(family, tiny).state_dict().items()}
    save_file(tensors, tmp_path / "own.safetensors", metadata)
    raw = open_checkpoint(tmp_path / "own.safetensors")
    assert "metadata" in str(family.recognise(raw))
    assert family.load(raw).config == replace(tiny, group_norm_eps=1e-5)


@each_family
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("head.weight"), "head.weight"),
        (lambda t: t.pop("blocks.1.att.time_faaaa"), "blocks.1.att.time_faaaa"),
        (lambda t: t.update({"blocks.1.att.ln_x.bias": torch.zeros(3)}), "blocks.1.att.ln_x.bias"),
        (lambda t: t.update({"blocks.1.att.time_state": torch.zeros(3, 8, 8)}), "no place in this model"),
    ],
    ids=["no head", "a tensor missing", "a wrong width", "a tuned state"],
)
def test_a_bad_checkpoint_is_refused_by_tensor_name(
    tmp_path: Path, name: str, change: Callable[[Any], None], says: str
) -> None:
    tensors = dict(random_model(FAMILIES[name], FAMILIES[name].presets["tiny"]).state_dict())
    change(tensors)
    torch.save(tensors, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError) as caught:
        FAMILIES[name].load(open_checkpoint(tmp_path / "bad.pth"))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("name", "preset", "a_layer"),
    [("rwkv5", p, 14) for p in ("0.4B", "1.5B", "3B", "7B")] + [("rwkv6", p, 464) for p in ("1.6B", "3B")],
)
def test_presets_have_the_published_parameter_counts(name: str, preset: str, a_layer: int) -> None:
    """The counts of arXiv 2404.05892, appendix: 13 D^2 L + (14 or 464) D L + 4 D + 2 D V."""
    c = FAMILIES[name].presets[preset]
    with torch.device("meta"):
        module = FAMILIES[name].build(c)
    D, L = c.width, c.layers
    want = 13 * D * D * L + a_layer * D * L + 4 * D + 2 * D * 65536
    assert sum(p.numel() for p in module.parameters()) == want
