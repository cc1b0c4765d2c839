"""Reformer: transformers' own model at every kind of length, its folders, the sorting, what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chunk_form import TARGETS, check_whole_export, error, random_model
from safetensors.torch import save_file
from tolerances import TOLERANCES
from torch import Tensor

from xexport.core.checkpoint import RawCheckpoint, open_checkpoint
from xexport.core.errors import CheckpointError, InputError, LimitError
from xexport.core.registry import get_family
from xexport.models.reformer import Reformer, ReformerConfig

FAMILY = get_family("reformer")
TINY: ReformerConfig = FAMILY.presets["tiny"]
#: config.json of the tiny preset
SIZES: dict[str, Any] = {
    "vocab_size": 29,
    "hidden_size": 32,
    "attn_layers": ["local", "lsh"],
    "num_attention_heads": 2,
    "attention_head_size": 12,
    "feed_forward_size": 48,
    "lsh_attn_chunk_length": 8,
    "local_attn_chunk_length": 12,
    "num_hashes": 2,
    "num_buckets": 4,
    "axial_pos_shape": [9, 20],
    "axial_pos_embds_dim": [12, 20],
    "max_position_embeddings": 170,
    "is_decoder": True,
    "hash_seed": 5,
}
KINDS: dict[str, dict[str, Any]] = {
    "both": {},
    "one round": {"num_hashes": 1},
    "two factors": {"num_buckets": [4, 6]},
    "short local chunks": {"lsh_attn_chunk_length": 16, "local_attn_chunk_length": 8},
    "two chunks back": {"lsh_num_chunks_before": 2, "local_num_chunks_before": 2},
    "own chunk alone": {"lsh_num_chunks_before": 0, "local_num_chunks_before": 0},
    "plain positions": {"axial_pos_embds": False, "axial_pos_shape": [1, 1]},
    "hashed alone": {"attn_layers": ["lsh", "lsh"], "hidden_act": "gelu"},
}


@pytest.fixture
def draws_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random numbers of any type are those of float32, so that a model in float64 has the same buckets."""
    real = torch.randn

    def randn(*size: Any, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
        return real(*size, **rest).to(dtype or torch.float32)

    monkeypatch.setattr(torch, "randn", randn)


def folder(path: Path, model: Any, config: dict[str, Any]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "reformer", **config}))
    save_file({k: v.float().contiguous() for k, v in model.state_dict().items()}, path / "model.safetensors")
    return path


def loaded(raw: RawCheckpoint) -> Reformer:
    found = FAMILY.load(raw)
    module: Reformer = FAMILY.build(found.config).eval().requires_grad_(False)
    module.load_state_dict(found.tensors)
    return module


@pytest.mark.oracle
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("draws_float32")
def test_transformers(kind: str, tmp_path: Path) -> None:
    """Theirs in float64, as it loses digits in float32 where a token sees itself alone; ours in both."""
    transformers = pytest.importorskip("transformers")
    config = SIZES | KINDS[kind]
    torch.manual_seed(1)
    theirs = transformers.ReformerModelWithLMHead(transformers.ReformerConfig(**config)).eval()
    for p in theirs.parameters():
        p.data += torch.randn_like(p) * (0.2 if p.dim() == 1 else 0.5 * p.shape[-1] ** -0.5)
    raw = open_checkpoint(folder(tmp_path / "hf", theirs, config))
    assert FAMILY.recognise(raw)
    single, ours, theirs = loaded(raw), loaded(raw).double(), theirs.double()
    for length in (1, 7, 8, 9, 12, 13, 24, 25, 67, 144):
        tokens = torch.randint(0, 29, (2, length))
        with torch.no_grad():
            # the bias of the head is in every published file, but transformers 5 does not add it
            want = theirs(tokens, use_cache=False).logits + theirs.lm_head.bias
        assert error(ours(tokens)[0], want) < TOLERANCES["op_fp32"], length
        assert error(single(tokens)[0].double(), want) < TOLERANCES["oracle_fp32"], length


def test_without_a_mask_every_token_counts() -> None:
    """The form for masked tokens: what comes later changes what comes before."""
    module = random_model(FAMILY, dataclasses.replace(TINY, causal=False, lsh_after=1, local_after=1))
    tokens = torch.randint(0, 29, (1, 40))
    other = tokens.clone()
    other[0, 39] = (other[0, 39] + 1) % 29
    assert error(module(tokens)[0][:, :30], module(other)[0][:, :30]) > TOLERANCES["model_fp32"]
    assert module.predicts_next is False


def test_a_chunk_that_holds_all_is_attention_with_a_causal_mask() -> None:
    """Equation 2 of the paper with k = q/|q| and the token itself excluded, one head at a time."""
    c = dataclasses.replace(TINY, attention=("lsh",), lsh_chunk=32)
    module = random_model(FAMILY, c).double()
    part = module.reformer.encoder.layers[0].attention.self_attention
    x = torch.randn(1, 32, c.width, dtype=torch.float64)
    length = 21
    q, v = ((x[0, :length] @ p.weight.T).split(c.head_size, -1) for p in (part.query_key, part.value))
    heads = []
    for qh, vh in zip(q, v, strict=True):
        kh = qh / (qh.square().mean(-1, keepdim=True) + 1e-6).sqrt() / c.head_size**0.5
        out = [vh[0]]
        out += [(kh[:t] @ qh[t]).softmax(0) @ vh[:t] for t in range(1, length)]
        heads.append(torch.stack(out))
    got = part(x, length)[0, :length]
    assert error(got, torch.cat(heads, -1)) < TOLERANCES["op_fp64"]


def test_sorting_is_by_bucket_and_position() -> None:
    module = random_model(FAMILY, TINY)
    part = module.reformer.encoder.layers[1].attention.self_attention
    qk = torch.randn(2, 2, 24, TINY.head_size)
    buckets = part.buckets(qk, 19)
    assert int(buckets[..., 19:].min()) == int(buckets.max()) == 4
    order = part.sorted(buckets)
    for b, o in zip(buckets.flatten(0, 2), order.flatten(0, 2), strict=True):
        assert o.tolist() == sorted(range(24), key=lambda t: (int(b[t]), t))
    straight = torch.einsum("bhtk,hkrn->bhrtn", qk, part.rotations)
    assert torch.equal(torch.cat((straight, -straight), -1).argmax(-1)[..., :19], buckets[..., :19])


def test_longer_than_the_positions_is_refused() -> None:
    with pytest.raises(LimitError, match="longer than the positions"):
        random_model(FAMILY, TINY)(torch.zeros(1, 171, dtype=torch.int64))


@pytest.mark.usefixtures("draws_float32")
def test_rotations_without_a_seed_belong_to_the_model(tmp_path: Path) -> None:
    config = SIZES | {"hash_seed": None, "num_buckets": None, "attn_layers": ["lsh", "lsh"]}
    model = random_model(FAMILY, dataclasses.replace(TINY, attention=("lsh", "lsh"), buckets=(4, 8)))
    path = folder(tmp_path / "hf", model, config)
    first, second = (FAMILY.load(open_checkpoint(path)) for _ in range(2))
    assert len(first.notes) == 2
    assert first.config.buckets == (4, 8)  # 2 * 170 // 8 = 42, so 32, which is more than 2 * 8: two factors
    names = [k for k in first.tensors if k.endswith("rotations")]
    assert len(names) == 2
    assert all(torch.equal(first.tensors[k], second.tensors[k]) for k in names)
    assert not torch.equal(*(first.tensors[k] for k in names))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"model_type": "bert"}, "not a Reformer"),
        ({"hidden_size": "wide"}, "malformed"),
        ({"hidden_act": "tanh"}, "unknown activation"),
        ({"num_buckets": 5}, "even"),
        ({"hidden_size": 16, "axial_pos_embds_dim": [8, 8]}, "wrong shape"),
    ],
)
def test_other_folders_are_refused(config: dict[str, Any], match: str, tmp_path: Path) -> None:
    raw = open_checkpoint(folder(tmp_path / "hf", random_model(FAMILY, TINY), SIZES | config))
    with pytest.raises((CheckpointError, InputError), match=match):
        FAMILY.load(raw)


def test_a_model_without_a_head_is_refused(tmp_path: Path) -> None:
    raw = open_checkpoint(folder(tmp_path / "hf", random_model(FAMILY, TINY), SIZES))
    less = {k: v for k, v in raw.tensors.items() if not k.startswith("lm_head")}
    with pytest.raises(CheckpointError, match="missing"):
        FAMILY.load(dataclasses.replace(raw, tensors=less))


@pytest.mark.parametrize("target", TARGETS)
def test_exports(exporter: Any, target: str) -> None:
    check_whole_export(exporter, "reformer", target, 1.0 if target == "cpu-fp32" else 0.8)
