"""LongNet: the chunk law, torchscale's own decoder (golden tensors), its checkpoints, exports, refusals."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chunk_form import (
    TARGETS,
    assert_same,
    check_cuts,
    check_export,
    draw_tokens,
    load_module,
    new_state,
    random_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tolerances import TOLERANCES
from torch import Tensor

from xexport.core.checkpoint import open_checkpoint
from xexport.core.errors import CheckpointError
from xexport.core.registry import family_names, get_family
from xexport.models.longnet import LongNetConfig

FAMILY = get_family("longnet")
VARIANTS: dict[str, LongNetConfig] = {k: v for k, v in FAMILY.presets.items() if k.startswith("tiny")}
TINY = VARIANTS["tiny"]
GOLDEN = Path(__file__).parent / "golden"
CASES = ("deepnorm", "odd", "xpos")
each_variant = pytest.mark.parametrize("name", VARIANTS)


@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 19), min_size=2, max_size=3),
    batch=st.integers(1, 2),
    name=st.sampled_from([*VARIANTS]),
)
def test_chunk_law(lengths: list[int], batch: int, name: str) -> None:
    check_cuts(random_model(FAMILY, VARIANTS[name]), batch, lengths)


@pytest.mark.parametrize("position", [10**6 * 16, 2**31 - 64])
def test_far_into_a_stream_it_is_the_same(position: int) -> None:
    """Where all segments begin, nothing of what was before counts, however far that is."""
    module, x = random_model(FAMILY, TINY), draw_tokens(1, 40)
    late = [*(s + 1.0 for s in new_state(module, 1)[:-1]), torch.tensor([position])]
    assert_same([module(x, *late)[0]], [module(x, *new_state(module, 1))[0]], TOLERANCES["model_fp32"])


def test_state_is_what_the_segments_need() -> None:
    """Rows of the paper's 125 M model: 11 606 in place of 32 768, whatever the stream's length."""
    with torch.device("meta"):
        specs = FAMILY.build(FAMILY.presets["125m"]).state_spec()
    assert specs[0].shape == ("B", 12, 2048 * 3 + 2731 * 2, 64)
    assert len(specs) == 2 * 12 + 1


# torchscale


def golden(case: str) -> tuple[dict[str, Any], dict[str, Tensor], Tensor, Tensor]:
    """What config.json says, the state dict, tokens and logits."""
    spec = importlib.util.spec_from_file_location("golden_longnet", GOLDEN / "longnet.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    arrays = np.load(GOLDEN / "longnet.npz")
    found = {k.removeprefix(f"{case} "): torch.from_numpy(arrays[k]) for k in arrays if k.startswith(case)}
    return script.SIZES | script.CASES[case], found, found.pop("tokens"), found.pop("logits")


def folder(path: Path, config: dict[str, Any], tensors: dict[str, Tensor], prefix: str = "") -> Path:
    """A checkpoint with its arguments beside it."""
    (path / "config.json").write_text(json.dumps(config), "utf-8")
    save_file({prefix + k: v.clone() for k, v in tensors.items()}, path / "model.safetensors")
    return path


@pytest.mark.oracle
@pytest.mark.parametrize(("case", "prefix"), [*zip(CASES, ("", "decoder.", ""), strict=True)])
def test_torchscale_decoder(tmp_path: Path, case: str, prefix: str) -> None:
    """Its weights in its layout give its logits."""
    config, tensors, tokens, want = golden(case)
    where = folder(tmp_path, config, tensors, prefix)
    raw = open_checkpoint(where)
    assert [name for name in family_names() if get_family(name).recognise(raw)] == ["longnet"]
    module = load_module(FAMILY, where)
    assert_same([module(tokens, *new_state(module, 2))[0]], [want], TOLERANCES["oracle_fp32"])


def test_lists_and_texts_of_segments_are_the_same(tmp_path: Path) -> None:
    config, tensors, *_ = golden("xpos")
    config |= {k: json.loads(config[k]) for k in ("segment_length", "dilated_ratio")}
    loaded = FAMILY.load(open_checkpoint(folder(tmp_path, config, tensors)))
    assert (loaded.config.segments, loaded.config.rates) == ((4, 8, 16), (1, 2, 4))
    assert loaded.config.spread == "blocks"


def test_trained_positions_lose_fairseqs_first_rows(tmp_path: Path) -> None:
    config, tensors, *_ = golden("odd")
    table = torch.randn(9, 12)
    loaded = FAMILY.load(
        open_checkpoint(folder(tmp_path, config, tensors | {"embed_positions.weight": table}))
    )
    assert torch.equal(loaded.tensors["embed_positions.weight"], table[2:])
    assert FAMILY.build(loaded.config).max_tokens == 7


@pytest.mark.parametrize(
    ("changes", "extra", "text"),
    [
        ({"segment_length": None}, {}, "config.json lacks what"),
        ({"decoder_attention_heads": "many"}, {}, "config.json lacks what"),
        ({"dilated_ratio": "__import__('os')"}, {}, "config.json lacks what"),
        ({}, {"layers.1.moe_layer.gate.wg.weight": torch.zeros(2, 2)}, "mixture of experts"),
        ({}, {"embed_positions._float_tensor": torch.zeros(1)}, "positions of sines"),
        ({}, {"layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}, "wrong shape"),
    ],
)
def test_what_cannot_be_read_is_refused(
    tmp_path: Path, changes: dict[str, Any], extra: dict[str, Tensor], text: str
) -> None:
    config, tensors, *_ = golden("xpos")
    with pytest.raises(CheckpointError, match=text):
        FAMILY.load(open_checkpoint(folder(tmp_path, config | changes, tensors | extra)))


def test_weights_alone_are_not_enough(tmp_path: Path) -> None:
    """They are those of torchscale's Transformer too, and don't say heads or segments."""
    _, tensors, *_ = golden("xpos")
    save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / "a.safetensors")
    raw = open_checkpoint(tmp_path / "a.safetensors")
    assert FAMILY.recognise(raw) is None
    with pytest.raises(CheckpointError, match=r"as config\.json"):
        FAMILY.load(raw)


def test_norms_behind_without_deepnorm_are_refused(tmp_path: Path) -> None:
    config, tensors, *_ = golden("deepnorm")
    with pytest.raises(CheckpointError, match="norms behind"):
        FAMILY.load(open_checkpoint(folder(tmp_path, config | {"deepnorm": False}, tensors)))


def test_own_checkpoint_loads(tmp_path: Path) -> None:
    train = FAMILY.train_form(TINY)
    FAMILY.init(train, 5)
    metadata = {"xexport.family": "longnet", "xexport.layout": "training"}
    metadata["xexport.config"] = json.dumps(dataclasses.asdict(TINY))
    save_file(train.state_dict(), tmp_path / "a.safetensors", metadata)
    loaded = FAMILY.load(open_checkpoint(tmp_path / "a.safetensors"))
    assert loaded.config == TINY
    assert all(torch.equal(v, loaded.tensors[k]) for k, v in train.state_dict().items())


# Exports, sizes, refusals


@pytest.mark.parametrize("target", TARGETS)
def test_exports(exporter: Any, target: str) -> None:
    check_export(exporter, "longnet", target)


@pytest.mark.parametrize(("preset", "millions"), [("125m", 85), ("2.7b", 2516), ("zoo", 1.8)])
def test_sizes(preset: str, millions: float) -> None:
    with torch.device("meta"):
        blocks = FAMILY.build(FAMILY.presets[preset]).layers
    assert sum(p.numel() for p in blocks.parameters()) == pytest.approx(millions * 1e6, rel=0.02)


def test_no_two_rows_of_a_pair_are_one_token() -> None:
    """The caches after 16 tokens hold every head's own places of the last segments."""
    module, x = random_model(FAMILY, TINY), draw_tokens(1, 16)
    keys = module(x, *new_state(module, 1))[1][0]
    for a, b in itertools.combinations(range(keys.shape[1]), 2):
        if (a < 4) == (b < 4) and (a < 8) == (b < 8):
            assert not torch.equal(keys[0, a], keys[0, b])
