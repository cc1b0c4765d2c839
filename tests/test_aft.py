"""AFT: the paper's equations token by token, aft-pytorch, the chunk law, exports, refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chunk_form import (
    TARGETS,
    check_cuts,
    check_export,
    chunk_form,
    error,
    new_state,
    operators,
    random_model,
    trained,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import TOLERANCES
from torch import Tensor

import xexport
from xexport.core.errors import InputError, LimitError
from xexport.core.registry import get_family
from xexport.models.aft import AftConfig, AftTraining

FAMILY = get_family("aft")
IMAGE: AftConfig = FAMILY.presets["tiny-image"]
VARIANTS: dict[str, AftConfig] = {
    k: v for k, v in FAMILY.presets.items() if k.startswith("tiny") and v is not IMAGE
}
TINY = VARIANTS["tiny"]
each_variant = pytest.mark.parametrize("name", VARIANTS)


def mixed(module: AftTraining, x: Tensor) -> Tensor:
    """The first layer's AFT of x [T,d], by the chunk form."""
    made = chunk_form(FAMILY, module)
    mixer: Any = made.blocks()[0].mixer
    each = len(mixer.states(made.config))
    y: Tensor = mixer(x[None], torch.arange(x.shape[0]), *new_state(made, 1)[:each])[0][0]
    return y


def by_equations(module: AftTraining, x: Tensor) -> Tensor:
    """The same as [1] writes it, one target at a time, in double precision: equations 2, 4, 5 and 6, 8."""
    c, mixer = module.config, module.blocks()[0].mixer
    w = {name: p.detach().double() for name, p in mixer.named_parameters()}
    x = x.double()
    q, k, v = (x @ w[f"{name}_proj.weight"].T for name in "qkv")
    length, each = x.shape[0], c.width // k.shape[1]
    rows = []
    for t in range(length):
        bias = torch.zeros(t + 1, k.shape[1], dtype=torch.float64)
        for s in range(t + 1):
            if c.kind == "full" or (c.kind == "local" and t - s < c.window):
                bias[s] = w["u"][t] @ w["v"][s]
            elif c.kind == "conv" and t - s < c.window:
                for head in range(c.heads):
                    taps = w["filter"][head]
                    tap = (taps[c.window - 1 - (t - s)] - taps.mean()) / taps.std()
                    bias[s, head] = w["gain"][head] * tap + w["shift"][head]
        key = k[: t + 1].exp().repeat_interleave(each, 1)
        near = bias.exp().repeat_interleave(each, 1) - 1
        top = (near * key * v[: t + 1]).sum(0) + (key * v[: t + 1]).sum(0)
        bottom = (near * key).sum(0) + key.sum(0)
        rows.append(torch.sigmoid(q[t]) * top / bottom)
    return (torch.stack(rows) @ w["o_proj.weight"].T + w["o_proj.bias"]).float()


@pytest.mark.oracle
@each_variant
def test_formulas_of_the_paper(name: str) -> None:
    module = trained(FAMILY, VARIANTS[name], noise=0.3)
    x = torch.randn(21, 32)
    assert error(mixed(module, x), by_equations(module, x)) < TOLERANCES["oracle_fp32"]


def image_by_equations(module: Any, x: Tensor) -> Tensor:
    """Equations 2, 6 and 8 on two axes, x [R*S,d], one pair of patches at a time, in double precision."""
    c, mixer = module.config, module.blocks()[0].mixer
    w = {name: p.detach().double() for name, p in mixer.named_parameters()}
    x = x.double()
    q, k, v = (x @ w[f"{name}_proj.weight"].T for name in "qkv")
    places, half = [divmod(t, c.grid[1]) for t in range(x.shape[0])], c.window // 2
    rows = []
    for t, (row, column) in enumerate(places):
        bias = torch.zeros(len(places), c.heads, dtype=torch.float64)
        for u, (other_row, other_column) in enumerate(places):
            down, right = other_row - row, other_column - column
            if max(abs(down), abs(right)) <= half:
                taps = w["filter"].flatten(1)
                tap = (w["filter"][:, half + down, half + right] - taps.mean(1)) / taps.std(1)
                bias[u] = w["gain"] * tap + w["shift"]
        weight = (k + bias).exp().repeat_interleave(c.width // c.heads, 1)
        rows.append(torch.sigmoid(q[t]) * (weight * v).sum(0) / weight.sum(0))
    return (torch.stack(rows) @ w["o_proj.weight"].T + w["o_proj.bias"]).float()


@pytest.mark.oracle
@pytest.mark.parametrize(("grid", "window"), [((4, 5), 3), ((1, 6), 5), ((3, 2), 7), ((5, 5), 5)])
def test_images_follow_the_formulas_of_the_paper(grid: tuple[int, int], window: int) -> None:
    """Windows within the image, as long as one side, and larger than all of it."""
    module = trained(FAMILY, dataclasses.replace(IMAGE, grid=grid, window=window), noise=0.3)
    x = torch.randn(grid[0] * grid[1], 32)
    mixer = chunk_form(FAMILY, module).blocks()[0].mixer
    assert (
        error(mixer(x[None], torch.arange(0))[0][0], image_by_equations(module, x))
        < TOLERANCES["oracle_fp32"]
    )


def test_an_image_in_patches() -> None:
    """The training form is the exported one; every parameter learns; places count."""
    module = trained(FAMILY, IMAGE, noise=0.3)
    x = torch.randn(3, 20, 12)
    want = chunk_form(FAMILY, module)(x)[0]
    assert want.shape == (3, 1, 11)
    module.requires_grad_(True)
    got = module(x)
    assert error(got.detach(), want) < TOLERANCES["model_fp32"]
    got.log_softmax(-1)[..., 3].mean().backward()
    assert [n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    moved = chunk_form(FAMILY, module)(x.flip(1))[0]
    assert error(moved, want) > 1e-4  # its place counts, though nothing else says where a patch is


def test_large_keys_and_filters_of_an_image_do_not_overflow() -> None:
    module = trained(FAMILY, IMAGE, noise=0.3)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith(("k_proj.weight", ".gain")):
                p.mul_(200)
    assert bool(chunk_form(FAMILY, module)(torch.randn(1, 20, 12))[0].isfinite().all())


@pytest.mark.parametrize("target", ["cpu-fp32", "cpu-int8"])
def test_images_export(exporter: Any, tmp_path: Path, target: str) -> None:
    """One image a call, of one size; nothing is carried."""
    bundle = xexport.load(
        exporter.export("aft", target, tmp_path / "out", preset="tiny-image", eval_text=None)
    )
    module: Any = FAMILY.build(IMAGE).eval().requires_grad_(False)
    FAMILY.init(module, 0)
    images = np.random.default_rng(0).standard_normal((2, 20, 12), "float32")
    got, want = bundle.stream(batch=2).feed(images), module(torch.from_numpy(images))[0].numpy()
    assert got.shape == want.shape == (2, 1, 11)
    allowed = TOLERANCES[f"tiny_logits_{target.removeprefix('cpu-')}"]
    assert np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)) < allowed
    with pytest.raises(InputError, match="one length: 20 frames"):
        bundle.stream().feed(images[0, :7])


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["simple", "full", "local"])
def test_parity_with_aft_pytorch(kind: str) -> None:
    """It is not causal: what a token sees is the sequence up to it."""
    theirs = pytest.importorskip("aft_pytorch.aft_pytorch", reason="the oracle is not installed")
    length = 11
    config = dataclasses.replace(TINY, kind=kind, max_tokens=length, rank=length)
    module = trained(FAMILY, config, noise=0.3)
    mixer: Any = module.blocks()[0].mixer
    options = {"s": config.window} if kind == "local" else {}
    oracle = getattr(theirs, f"AFT{kind.capitalize()}")(length, 32, 32, **options)
    with torch.no_grad():
        for name, layer in (("q", oracle.to_q), ("k", oracle.to_k), ("v", oracle.to_v)):
            layer.weight.copy_(getattr(mixer, f"{name}_proj").weight)
            layer.bias.zero_()
        oracle.project.load_state_dict(mixer.o_proj.state_dict())
        if kind != "simple":  # any matrix of biases is a product by the identity
            mixer.u.copy_(oracle.wbias)
            mixer.v.copy_(torch.eye(length))
        x = torch.randn(length, 32)
        want = torch.stack([oracle(x[None, : t + 1])[0, t] for t in range(length)])
    assert error(mixed(module, x), want) < TOLERANCES["oracle_fp32"]


@settings(max_examples=10, deadline=None)
@given(
    batch=st.integers(1, 2),
    lengths=st.lists(st.integers(1, 13), min_size=1, max_size=4),
    seed=st.integers(0, 50),
    name=st.sampled_from([*VARIANTS]),
)
def test_any_cut_gives_the_same_logits_and_state(
    batch: int, lengths: list[int], seed: int, name: str
) -> None:
    check_cuts(random_model(FAMILY, VARIANTS[name], seed), batch, lengths)


@each_variant
def test_training_form_is_the_chunk_form_from_the_first_state(name: str) -> None:
    module = trained(FAMILY, VARIANTS[name], noise=0.3)
    made, tokens = chunk_form(FAMILY, module), torch.randint(0, 29, (2, 37))
    want = made(tokens, *new_state(made, 2))[0]
    assert error(module(tokens).detach(), want) < TOLERANCES["model_fp32"]


@each_variant
def test_every_parameter_gets_a_gradient(name: str) -> None:
    module = trained(FAMILY, VARIANTS[name], noise=0.3).requires_grad_()
    module(torch.randint(0, 29, (2, 20))).log_softmax(-1)[..., 3].mean().backward()
    assert [n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("name", ["tiny", "tiny-simple", "tiny-conv"])
def test_large_keys_and_biases_do_not_overflow(name: str) -> None:
    training = trained(FAMILY, VARIANTS[name], noise=0.3)
    with torch.no_grad():
        for name, p in training.named_parameters():
            if name.endswith(("k_proj.weight", ".u", ".gain")):
                p.mul_(200)
    module = chunk_form(FAMILY, training)
    logits, *state = module(torch.randint(0, 29, (1, 40)), *new_state(module, 1))
    assert bool(logits.isfinite().all())
    assert all(bool(s.isfinite().all()) for s in state)


def test_a_long_stream_of_simple_keeps_its_average() -> None:
    """8 000 tokens with keys from e^-100 to e^100 in their exponents, against double precision."""
    from xexport.ops.wkv4.reference import wkv4

    rng = torch.Generator().manual_seed(0)
    k = torch.randn(1, 8_000, 3, generator=rng) * 2 + torch.tensor([-100.0, 0.0, 100.0])
    v = torch.randn(1, 8_000, 3, generator=rng)
    zero = torch.zeros(3)
    y, *_ = wkv4(zero, zero, k, v, *(torch.full((1, 3), x) for x in (0.0, 0.0, -1e30)))
    weight = (k.double() - k.double().amax(1, keepdim=True)).exp()
    want = (weight * v.double()).sum(1) / weight.sum(1)
    assert error(y[:, -1], want.float()) < TOLERANCES["model_fp32"]


def test_export_keeps_one_operator_a_layer_and_dynamic_axes() -> None:
    assert operators(FAMILY, TINY).count("xexport.band_product.default") == TINY.layers


@pytest.mark.parametrize("target", TARGETS)
def test_bundle_is_pytorch(exporter: Any, target: str) -> None:
    check_export(exporter, "aft", target)


@pytest.mark.parametrize("name", [n for n in VARIANTS if n != "tiny"])
def test_other_kinds_export_and_stream(exporter: Any, tmp_path: Path, name: str) -> None:
    bundle = xexport.load(exporter.export("aft", "cpu-int8", tmp_path / "out", preset=name))
    module: Any = FAMILY.build(VARIANTS[name]).eval().requires_grad_(False)
    FAMILY.init(module, 0)
    tokens = torch.randint(0, 29, (2, 30))
    want = module(tokens, *new_state(module, 2))[0].numpy()
    stream = bundle.stream(batch=2)
    parts = [stream.feed(tokens[:, i : i + 1].numpy()) for i in range(9)]
    got = np.concatenate([*parts, stream.feed(tokens[:, 9:].numpy())], 1)
    assert np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)) < TOLERANCES["tiny_logits_int8"]
    checks = bundle.manifest.checks
    assert max(*checks["parity"].values(), checks["chunk_error_onnx"]) < TOLERANCES["model_fp32"]


def test_a_stream_ends_where_the_biases_do(exporter: Any) -> None:
    assert FAMILY.build(VARIANTS["tiny-simple"]).max_tokens is None
    assert FAMILY.build(VARIANTS["tiny-conv"]).max_tokens is None
    stream = xexport.load(exporter("aft", "cpu-int8")).stream()
    stream.feed(np.zeros(TINY.max_tokens, np.int64))
    with pytest.raises(LimitError):
        stream.feed([0])
