"""Performer: the chunk law, the features against softmax attention, another implementation."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chunk_form import assert_same, in_chunks
from chunk_form import draw_tokens as tokens
from chunk_form import new_state as fresh
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tolerances import TOLERANCES

import xexport
from xexport.core.checkpoint import open_checkpoint
from xexport.core.errors import CheckpointError
from xexport.core.registry import get_family
from xexport.core.state import state_shape
from xexport.models.performer import Performer, PerformerConfig, _directions

FAMILY = get_family("performer")
VARIANTS: dict[str, PerformerConfig] = {k: FAMILY.presets[k] for k in ("tiny", "tiny-relu")}
TINY, WHOLE = VARIANTS["tiny"], FAMILY.presets["tiny-whole"]
each_variant = pytest.mark.parametrize("name", VARIANTS)


def made(config: PerformerConfig = TINY, seed: int = 0) -> Performer:
    module: Performer = FAMILY.build(config)
    FAMILY.init(module, seed)
    return module.eval().requires_grad_(False)


@settings(max_examples=15, deadline=None)
@given(
    length=st.integers(1, 20),
    cuts=st.lists(st.integers(0, 20), max_size=4),
    batch=st.integers(1, 3),
    seed=st.integers(0, 999),
    position=st.sampled_from([0, 1, 100_003]),
    name=st.sampled_from([*VARIANTS]),
)
def test_chunk_law(length: int, cuts: list[int], batch: int, seed: int, position: int, name: str) -> None:
    """Whole = chunks, from sums that are not zero."""
    module, x = made(VARIANTS[name], seed), tokens(batch, length, seed)
    rng = torch.Generator().manual_seed(seed)
    shapes = [state_shape(s, batch) for s in module.state_spec()[:-1]]
    state = [*(torch.rand(s, generator=rng) for s in shapes), torch.tensor([position])]
    cuts = sorted(min(c, length) for c in cuts)
    assert_same(in_chunks(module, x, state, cuts), module(x, *state), TOLERANCES["model_fp32"])


@each_variant
@pytest.mark.parametrize("length", [1, 7, 70])
def test_training_form_is_the_same_function(name: str, length: int) -> None:
    module, train = made(VARIANTS[name]), FAMILY.train_form(VARIANTS[name])
    train.load_state_dict(FAMILY.from_training(VARIANTS[name], module.state_dict()))
    x = tokens(2, length)
    with torch.no_grad():
        assert_same([train(x)], [module(x, *fresh(module, 2))[0]], TOLERANCES["model_fp32"])


def test_training_form_learns() -> None:
    train = FAMILY.train_form(TINY)
    FAMILY.init(train, 0)
    train(tokens(2, 5)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in train.parameters())


def test_init_depends_on_the_seed_alone() -> None:
    a, b, c = made(seed=1).state_dict(), made(seed=1).state_dict(), made(seed=2).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["layers.0.attention.directions"], c["layers.0.attention.directions"])


def test_directions_are_orthogonal_and_as_long_as_gaussian_vectors() -> None:
    w = _directions(4000, 8, torch.Generator().manual_seed(0)).double()
    unit = w / w.norm(dim=1, keepdim=True)
    gram = unit.view(-1, 8, 8) @ unit.view(-1, 8, 8).transpose(1, 2)
    assert float((gram - torch.eye(8)).abs().max()) < TOLERANCES["op_fp32"]
    # chi-squared of 8 degrees: mean 8, variance 16; five standard errors
    assert float(w.square().sum(1).mean()) == pytest.approx(8, abs=5 * 4 / math.sqrt(4000))


def test_the_expected_kernel_is_softmaxs() -> None:
    """Lemma 1: E[phi(q).phi(k)] = exp(q.k / sqrt K), tried with 200 000 features; five standard errors."""
    module = made(dataclasses.replace(TINY, features=4)).double()
    attention = module.blocks()[0].attention
    rng = torch.Generator().manual_seed(3)
    attention.directions = _directions(200_000, 16, rng).double()
    q, k = (torch.randn(1, 1, 1, 16, generator=rng, dtype=torch.float64) * 0.7 for _ in range(2))
    x, w = q * 16**-0.25, attention.directions
    lowered = (x @ w.t() - x.square().sum() * 0.5).amax()
    products = attention.features(q, True) * attention.features(k, False) * lowered.exp()
    want = math.exp(float((q * k).sum()) / 4)
    error = float(products.std()) / math.sqrt(200_000)
    assert float(products.mean()) == pytest.approx(want, abs=5 * error)
    assert error < 0.02 * want, "the test would notice nothing"


def test_large_directions_do_not_overflow() -> None:
    module = made()
    for block in module.blocks():
        block.attention.directions.mul_(6)
        block.attention.k_proj.weight.mul_(30)
    logits, *state = module(tokens(1, 20), *fresh(module, 1))
    assert bool(logits.isfinite().all())
    assert all(bool(s.isfinite().all()) for s in state)


def performer_pytorch() -> dict[str, Any]:
    """The functions of performer-pytorch that compute attention; its imports are for other things."""
    einops = pytest.importorskip("einops")
    spec = importlib.util.find_spec("performer_pytorch")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("performer-pytorch is not installed")
    path = Path(spec.submodule_search_locations[0]) / "performer_pytorch.py"
    wanted = ("softmax_kernel", "generalized_kernel", "causal_linear_attention_noncuda")
    wanted += ("linear_attention",)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in wanted]
    names: dict[str, Any] = {"torch": torch, "nn": torch.nn, "repeat": einops.repeat}
    exec(compile(tree, str(path), "exec"), names)
    return names


@pytest.mark.oracle
@each_variant
def test_performer_pytorch(name: str) -> None:
    """Without its constant on every exponential feature, which makes its keys look ahead."""
    theirs, module = performer_pytorch(), made(VARIANTS[name])
    mine = module.blocks()[0].attention
    x = torch.randn(2, 13, 32, generator=torch.Generator().manual_seed(1))
    none = torch.ones(13, 1, 8), torch.zeros(13, 1, 8)
    q, k, v = (p(x).unflatten(-1, (2, -1)).transpose(1, 2) for p in (mine.q_proj, mine.k_proj, mine.v_proj))
    if VARIANTS[name] == TINY:
        q, k = (
            theirs["softmax_kernel"](y, projection_matrix=mine.directions, is_query=first, eps=0.0)
            for y, first in ((q, True), (k, False))
        )
    else:
        q, k = (theirs["generalized_kernel"](y, projection_matrix=mine.directions) for y in (q, k))
    want = theirs["causal_linear_attention_noncuda"](q, k, v, chunk_size=4, eps=0.0)
    want = mine.o_proj(want.transpose(1, 2).flatten(-2))

    from xexport.ops.linear_attention.reference import linear_attention

    terms = [y.flatten(-2) for y in mine.terms(x, none)]
    empty = fresh(module, 2)[0]
    o, _ = linear_attention(*terms, empty, x.new_zeros(2, 13, 2), 2, 2, 1.0, "gated")
    assert_same([mine.finish(o.unflatten(-1, (2, -1)))], [want], TOLERANCES["oracle_fp32"])


@pytest.mark.oracle
@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def test_performer_pytorch_in_both_directions(kernel: str) -> None:
    """To the letter, with what it adds to every feature."""
    theirs, module = performer_pytorch(), made(dataclasses.replace(WHOLE, kernel=kernel))
    mine = module.blocks()[0].attention
    x = torch.randn(2, 13, 32, generator=torch.Generator().manual_seed(1))
    none = torch.ones(13, 1, 8), torch.zeros(13, 1, 8)
    q, k, v = (p(x).unflatten(-1, (2, -1)).transpose(1, 2) for p in (mine.q_proj, mine.k_proj, mine.v_proj))
    if kernel == "softmax":
        q, k = (
            theirs["softmax_kernel"](y, projection_matrix=mine.directions, is_query=first)
            for y, first in ((q, True), (k, False))
        )
    else:
        q, k = (theirs["generalized_kernel"](y, projection_matrix=mine.directions) for y in (q, k))
    want = mine.o_proj(theirs["linear_attention"](q, k, v).transpose(1, 2).flatten(-2))
    got = mine.finish(mine.whole(*mine.terms(x, none)))
    assert_same([got], [want], TOLERANCES["oracle_fp32"])


def test_the_bidirectional_form_sees_both_sides() -> None:
    module, x = made(WHOLE), tokens(1, 12)
    changed = x.clone()
    changed[0, -1] = (x[0, -1] + 1) % 29
    (one,), (other,) = module(x), module(changed)
    assert bool(((one - other).abs().amax(-1) > 0).all())
    assert module.state_spec() == []
    train = FAMILY.train_form(WHOLE)
    train.load_state_dict(FAMILY.from_training(WHOLE, module.state_dict()))
    assert_same([train(x).detach()], [one], TOLERANCES["model_fp32"])


def test_the_bidirectional_form_exports(exporter: Any, tmp_path: Path) -> None:
    bundle = xexport.load(exporter.export("performer", "cpu-int8", tmp_path / "out", preset="tiny-whole"))
    assert bundle.manifest.model.form == "whole"
    (want,) = made(WHOLE)(tokens(2, 21, seed=3))
    got = bundle.stream(batch=2).feed(tokens(2, 21, seed=3).numpy())
    rms = np.sqrt(np.mean(np.square(got - want.numpy())) / np.mean(np.square(want.numpy())))
    assert rms <= TOLERANCES["tiny_logits_int8"]


def test_own_checkpoint_loads(tmp_path: Path) -> None:
    train = FAMILY.train_form(TINY)
    FAMILY.init(train, 5)
    for family in ("performer", "retnet"):
        metadata = {
            "xexport.family": family,
            "xexport.layout": "training",
            "xexport.config": json.dumps(dataclasses.asdict(TINY)),
        }
        save_file(train.state_dict(), tmp_path / f"{family}.safetensors", metadata)
    raw = open_checkpoint(tmp_path / "performer.safetensors")
    assert FAMILY.recognise(raw)
    loaded = FAMILY.load(raw)
    assert loaded.config == TINY
    assert all(torch.equal(loaded.tensors[k], v) for k, v in train.state_dict().items())
    other = open_checkpoint(tmp_path / "retnet.safetensors")
    assert FAMILY.recognise(other) is None
    with pytest.raises(CheckpointError, match="not a Performer checkpoint"):
        FAMILY.load(other)


def test_export_and_stream(exporter: Any, tmp_path: Path) -> None:
    bundle = xexport.load(exporter.export("performer", "cpu-int8", tmp_path / "out", preset="tiny"))
    exact = xexport.load(exporter.export("performer", "cpu-fp32", tmp_path / "fp32", preset="tiny"))
    module, x = made(), tokens(2, 30, seed=3)
    want = module(x, *fresh(module, 2))[0].numpy()
    results = []
    for each in (exact, bundle):
        stream = each.stream(batch=2)
        parts = [stream.feed(x[:, i : i + 1].numpy()) for i in range(9)] + [stream.feed(x[:, 9:].numpy())]
        results.append(np.concatenate(parts, 1))
    assert np.abs(results[0] - want).max() <= TOLERANCES["model_fp32"] * max(1.0, float(np.abs(want).max()))
    rms = np.sqrt(np.mean(np.square(results[1] - want)) / np.mean(np.square(want)))
    assert rms <= TOLERANCES["tiny_logits_int8"]
