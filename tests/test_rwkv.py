"""RWKV-7: parity with rwkv 0.8.32 and published weights, loading, roles."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from chunk_form import (
    error,
    load_module,
    new_state,
    operators,
    random_model,
)
from reversal import VOCABULARY, need, write_published
from safetensors.torch import save_file
from tolerances import TOLERANCES

from xexport.core.checkpoint import open_checkpoint
from xexport.core.errors import CheckpointError
from xexport.core.registry import get_family
from xexport.models.rwkv import Rwkv, RwkvConfig

FAMILY = get_family("rwkv")
TINY = FAMILY.presets["tiny"]


def test_export_keeps_one_operator_a_layer_and_dynamic_axes() -> None:
    assert operators(FAMILY, TINY).count("xexport.wkv7.default") == TINY.layers


@pytest.mark.oracle
def test_logits_of_the_published_test_model() -> None:
    module = load_module(FAMILY, need("rwkv7-834k.pth"))
    expected = np.load(need("rwkv7-834k.expected-logits.npy"))
    logits = module(torch.tensor([list(b'"in')]), *new_state(module, 1))[0][0, -1]
    assert np.abs(logits.numpy() - expected).max() < TOLERANCES["oracle_fp32"]


_ORACLE = """
import sys, numpy as np, torch
from rwkv.model import RWKV
model = RWKV(model=sys.argv[1], strategy="cpu fp32")
tokens = [int(t) for t in sys.argv[3].split(",")]
logits, state = model.forward(tokens, None, full_output=True)
step, state = model.forward([5], state)
np.savez(sys.argv[2], logits=logits.numpy(), step=step.numpy(), wkv=state[4].numpy(), shift=state[5].numpy())
"""


@pytest.mark.oracle
def test_parity_with_the_rwkv_package(tmp_path: Path) -> None:
    if importlib.util.find_spec("rwkv") is None:
        pytest.skip("the package rwkv (0.8.32) is not installed")
    module = random_model(FAMILY, RwkvConfig(3, 128, 50, 64, 200, 16, 12, 8, 24), seed=3)
    torch.save(dict(module.state_dict()), tmp_path / "model.pth")
    tokens = torch.randint(0, 50, (1, 19))
    text = ",".join(str(t) for t in tokens[0].tolist())
    # a process of its own: the package chooses its architecture by the environment when it is imported
    subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            _ORACLE,
            str(tmp_path / "model"),
            str(tmp_path / "o.npz"),
            text,
        ],
        env={**os.environ, "RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"},
        check=True,
        capture_output=True,
    )
    oracle = {k: torch.from_numpy(v) for k, v in np.load(tmp_path / "o.npz").items()}
    logits, *state = module(tokens, *new_state(module, 1))
    assert error(logits[0], oracle["logits"]) < TOLERANCES["oracle_fp32"]
    step, *state = module(torch.tensor([[5]]), *state)
    assert error(step[0, 0], oracle["step"].flatten()) < TOLERANCES["oracle_fp32"]
    assert error(state[4][0], oracle["wkv"]) < TOLERANCES["oracle_fp32"]
    assert error(state[5][0], oracle["shift"].flatten()) < TOLERANCES["oracle_fp32"]


@pytest.fixture(scope="module")
def reversal(tmp_path_factory: pytest.TempPathFactory) -> Rwkv:
    out = tmp_path_factory.mktemp("reversal") / "reverse.pth"
    return load_module(FAMILY, write_published(need("rwkv7-reverse-l2.pth"), out))


@pytest.mark.oracle
def test_trained_model_reverses_every_string_of_1_to_60_digits(reversal: Rwkv) -> None:
    assert not reversal.config.ln0
    assert reversal.config.head_bias
    assert reversal.config.att_output_bias
    rng = random.Random(0)
    wrong = []
    for length in range(1, 61):
        digits = "".join(rng.choice("0123456789") for _ in range(length))
        ids = [VOCABULARY.index(c) for c in digits + ","]
        logits, *state = reversal(torch.tensor([ids]), *new_state(reversal, 1))
        written = ""
        for _ in range(length):
            token = logits[0, -1].argmax().item()
            written += VOCABULARY[token]
            logits, *state = reversal(torch.tensor([[token]]), *state)
        if written != digits[::-1]:
            wrong.append((digits, written))
    assert wrong == []


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_loads_published_bfloat16_with_unread_tensors_of_block_0(tmp_path: Path, suffix: str) -> None:
    module = random_model(FAMILY, TINY)
    tensors = {k: v.bfloat16() for k, v in module.state_dict().items()}
    tensors |= {f"blocks.0.att.v{i}": torch.zeros(2) for i in range(3)}
    path = tmp_path / f"model{suffix}"
    torch.save(tensors, path) if suffix == ".pth" else save_file(tensors, path)
    raw = open_checkpoint(path)
    assert FAMILY.recognise(raw)
    loaded = FAMILY.load(raw)
    assert loaded.config == TINY
    assert loaded.notes == ()
    assert set(loaded.tensors) == set(module.state_dict())
    assert all(t.dtype == torch.bfloat16 for t in loaded.tensors.values())


def test_loads_a_file_of_our_own_training(tmp_path: Path) -> None:
    tensors = {k: v.half() for k, v in random_model(FAMILY, TINY).state_dict().items()}
    metadata = {
        "xexport.family": "rwkv",
        "xexport.layout": "training",
        "xexport.config": json.dumps({"layers": 2, "width": 32, **_tiny_rest(), "group_norm_eps": 1e-5}),
    }
    save_file(tensors, tmp_path / "own.safetensors", metadata)
    loaded = FAMILY.load(open_checkpoint(tmp_path / "own.safetensors"))
    assert loaded.config.group_norm_eps == 1e-5
    assert loaded.config.ffn_width == 72


def _tiny_rest() -> dict[str, int]:
    names = ("vocab_size", "head_size", "ffn_width", "decay_rank", "iclr_rank", "value_rank", "gate_rank")
    return {name: getattr(TINY, name) for name in names}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("head.weight"), "head.weight"),
        (lambda t: t.pop("blocks.1.att.k_a"), "blocks.1.att.k_a"),
        (lambda t: t.update({"blocks.1.att.w2": torch.zeros(3, 32)}), "blocks.1.att.w2"),
        (lambda t: t.update({"ln_out.bias": torch.zeros(31)}), "ln_out.bias"),
    ],
    ids=["no head", "a tensor missing", "a wrong rank", "a wrong width"],
)
def test_a_bad_checkpoint_is_refused_by_tensor_name(tmp_path: Path, change: object, says: str) -> None:
    tensors = dict(random_model(FAMILY, TINY).state_dict())
    assert callable(change)
    change(tensors)
    torch.save(tensors, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError) as caught:
        FAMILY.load(open_checkpoint(tmp_path / "bad.pth"))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("0.1B", 191.034624), ("0.4B", 450.767872), ("1.5B", 1527.404544), ("2.9B", 2947.73504)],
)
def test_presets_have_the_published_parameter_counts(preset: str, millions: float) -> None:
    with torch.device("meta"):
        module = FAMILY.build(FAMILY.presets[preset])
    assert sum(p.numel() for p in module.parameters()) == round(millions * 1e6)
