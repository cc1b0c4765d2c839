"""Conformer: the chunk law, its forms against each other, loops over the formulas, other implementations."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chunk_form import assert_same, chunk_form, error, in_chunks, new_state, random_state
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tolerances import TOLERANCES
from torch import Tensor, nn

from xexport.core.checkpoint import open_checkpoint
from xexport.core.errors import CheckpointError
from xexport.core.registry import get_family
from xexport.models._conformer import Places, position_table
from xexport.models.conformer import ConformerConfig, ConformerTraining

FAMILY = get_family("conformer")
VARIANTS: dict[str, ConformerConfig] = {k: v for k, v in FAMILY.presets.items() if k.startswith("tiny")}
STREAMING = [k for k, v in VARIANTS.items() if v.streaming]
TINY, CHUNKED = VARIANTS["tiny"], VARIANTS["tiny-chunked"]
each_variant = pytest.mark.parametrize("name", VARIANTS)
each_streaming = pytest.mark.parametrize("name", STREAMING)


def trained(config: ConformerConfig, seed: int = 0) -> ConformerTraining:
    """Initial weights plus noise, also where training would have left none of the initial values."""
    rng = torch.Generator().manual_seed(seed)
    module: ConformerTraining = FAMILY.train_form(config)
    FAMILY.init(module, seed)
    module.eval().requires_grad_(False)
    for p in module.parameters():
        p.add_(0.1 * torch.randn(p.shape, generator=rng))
    for name, b in module.named_buffers():
        if name.endswith("running_mean"):
            b.copy_(0.1 * torch.randn(b.shape, generator=rng))
        elif name.endswith("running_var"):
            b.copy_(0.5 + torch.rand(b.shape, generator=rng))
    return module


def made(config: ConformerConfig, seed: int = 0) -> Any:
    """The form that is exported, of the same weights."""
    return chunk_form(FAMILY, trained(config, seed))


def frames(batch: int, length: int, seed: int = 0) -> Tensor:
    """As large as log-mel frames are."""
    return 14.6 + 3.6 * torch.randn(batch, length, 80, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=20, deadline=None)
@given(
    units=st.integers(1, 9),
    cuts=st.lists(st.integers(0, 9), max_size=4),
    batch=st.integers(1, 3),
    seed=st.integers(0, 999),
    position=st.sampled_from([0, 2, 100_000]),
    name=st.sampled_from(STREAMING),
)
def test_chunk_law(units: int, cuts: list[int], batch: int, seed: int, position: int, name: str) -> None:
    """Every cut at a multiple of 4 chunk frames, from the first state and from used ones."""
    module = made(VARIANTS[name], seed)
    unit = module.input_spec.multiple
    assert unit == 4 * VARIANTS[name].chunk
    x = frames(batch, units * unit, seed)
    state = random_state(module, batch, seed, position) if position else new_state(module, batch)
    at = sorted(min(c, units) * unit for c in cuts)
    whole = module(x, *state)
    assert whole[0].shape == (batch, units * unit // 4, module.vocab_size)
    assert_same(in_chunks(module, x, state, at), whole, TOLERANCES["model_fp32"])


@each_variant
@pytest.mark.parametrize("units", [1, 2, 7])
def test_training_form_is_the_same_function(name: str, units: int) -> None:
    """It masks where the streaming form has caches, and has the batch norms and W_r that are folded there."""
    config = VARIANTS[name]
    module = made(config)
    x = frames(2, units * module.input_spec.multiple)
    state = new_state(module, 2) if config.streaming else []
    assert error(module(x, *state)[0], trained(config)(x)) < TOLERANCES["model_fp32"]


def test_one_chunk_over_everything_is_the_whole_form() -> None:
    """A kernel of two taps looks back in either form: then they differ in who sees whom alone."""
    whole = dataclasses.replace(TINY, kernel=2)
    streaming = dataclasses.replace(whole, streaming=True, left=3, chunk=11)
    x = frames(2, 44)
    module = made(streaming)
    assert error(module(x, *new_state(module, 2))[0], made(whole)(x)[0]) < TOLERANCES["model_fp32"]


@each_streaming
def test_nothing_after_its_chunk_is_seen(name: str) -> None:
    module = made(VARIANTS[name])
    unit = module.input_spec.multiple
    x = frames(1, 4 * unit)
    y = torch.cat((x[:, : 2 * unit], frames(1, 2 * unit, seed=1)), 1)
    a, b = (module(z, *new_state(module, 1))[0] for z in (x, y))
    seen = unit // 2
    assert torch.equal(a[:, :seen], b[:, :seen])
    assert not torch.equal(a[:, seen:], b[:, seen:])
    if VARIANTS[name].chunk > 1:  # and a chunk is seen up to its end
        y = torch.cat((x[:, : 4 * unit - 4], frames(1, 4, seed=1)), 1)
        c = module(y, *new_state(module, 1))[0]
        assert not torch.equal(a[:, -VARIANTS[name].chunk], c[:, -VARIANTS[name].chunk])


def naive_attention(attention: Any, config: ConformerConfig, x: Tensor) -> Tensor:
    """The formula of A^rel a score at a time, in double precision; ``attention`` is of the training form."""
    n, d = x.shape
    size = d // config.heads
    q, k, v = (p(x).double() for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    W = attention.pos_proj.weight.double()
    out = torch.zeros(n, d, dtype=torch.float64)
    for t in range(n):
        begin = t // config.chunk * config.chunk
        keys = range(max(0, begin - config.left), min(n, begin + config.chunk))
        for h in range(config.heads):
            own = slice(h * size, (h + 1) * size)
            scores = []
            for s in keys:
                angles = [(t - s) / 10000 ** (2 * i / d) for i in range(d // 2)]
                R = torch.tensor([*map(np.sin, angles), *map(np.cos, angles)], dtype=torch.float64)
                content = (q[t, own] + attention.u[h, 0].double()) @ k[s, own]
                place = (q[t, own] + attention.v[h, 0].double()) @ (W @ R)[own]
                scores.append((content + place) / size**0.5)
            weights = torch.stack(scores).softmax(0)
            out[t, own] = sum(w * v[s, own] for w, s in zip(weights, keys, strict=True))
    return attention.o_proj(out.float())


@pytest.mark.parametrize(
    ("left", "chunk", "n"), [(5, 1, 9), (4, 3, 12), (2, 5, 10), (1, 1, 4)], ids="left{0}".format
)
def test_attention_by_the_formula(left: int, chunk: int, n: int) -> None:
    """Loops against the caches, masks and shifts of the streaming form, which is fed in two calls."""
    config = dataclasses.replace(TINY, streaming=True, left=left, chunk=chunk)
    source = trained(config).layers()[0].attention
    module = made(config)
    x = torch.randn(1, n, config.width, generator=torch.Generator().manual_seed(0))
    past = (torch.zeros(1, left, config.width),) * 2
    parts, at = [], torch.tensor([0])
    for piece in x.split([chunk, n - chunk], 1):
        y, k, v = module.layers()[0].attention(piece, module.places(piece, at), past)
        past, at = (k, v), at + piece.shape[1]
        parts.append(y)
    assert error(torch.cat(parts, 1)[0], naive_attention(source, config, x[0])) < TOLERANCES["model_fp32"]


def test_whole_attention_by_the_formula() -> None:
    source = trained(TINY).layers()[0].attention
    x = torch.randn(1, 9, TINY.width, generator=torch.Generator().manual_seed(0))
    got = source(x, Places(position_table(8, -8, TINY.width, x), 8), None)[0]
    wide = dataclasses.replace(TINY, left=99, chunk=99)
    assert error(got[0], naive_attention(source, wide, x[0])) < TOLERANCES["model_fp32"]


def test_subsampling_by_the_formula() -> None:
    """One output of the second convolution, summed tap by tap; rows before the first frame are zero."""
    sub = trained(TINY).subsample
    x = torch.randn(1, 12, 80, generator=torch.Generator().manual_seed(0))
    sub.out = nn.Identity()
    y = sub(x, x.new_zeros(1, 1, 1, 80), x.new_zeros(1, 4, 1, 40))[0].view(3, 4, 20)

    def conv(image: Tensor, c: nn.Conv2d, channel: int, t: int, f: int) -> Tensor:
        """Output (t, f) sees rows 2t-1 .. 2t+1 and columns 2f-1 .. 2f+1."""
        total = c.bias[channel].clone() if c.bias is not None else torch.zeros(())
        for dt in range(3):
            for df in range(3):
                row, column = 2 * t - 1 + dt, 2 * f - 1 + df
                if row >= 0 and 0 <= column < image.shape[2]:
                    total += c.weight[channel, :, dt, df] @ image[:, row, column]
        return total.relu()

    rows, columns = range(6), range(40)
    middle = torch.stack(
        [
            torch.stack([torch.stack([conv(x, sub.conv1, c, t, f) for f in columns]) for t in rows])
            for c in range(4)
        ]
    )
    for t, channel, f in ((0, 0, 0), (1, 3, 7), (2, 2, 19)):
        assert error(y[t, channel, f], conv(middle, sub.conv2, channel, t, f)) < TOLERANCES["model_fp32"]


def transformers_layers(
    config: ConformerConfig, source: ConformerTraining
) -> tuple[list[nn.Module], nn.Module]:
    """Blocks of transformers' Wav2Vec2-Conformer with our weights, and its table of positions."""
    theirs = pytest.importorskip("transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer")
    sizes = theirs.Wav2Vec2ConformerConfig(
        hidden_size=config.width,
        num_attention_heads=config.heads,
        intermediate_size=config.ffn,
        conv_depthwise_kernel_size=config.kernel,
        hidden_act="swish",
        position_embeddings_type="relative",
        max_source_positions=64,
        attn_implementation="eager",
    )
    half = torch.arange(config.width // 2)
    interleaved = torch.stack((half, half + config.width // 2), 1).flatten()
    layers = []
    for block in source.layers():
        ours = dict(block.state_dict())
        layer = theirs.Wav2Vec2ConformerEncoderLayer(sizes).eval().requires_grad_(False)
        taken = {}
        for name in layer.state_dict():
            key = name
            for a, b in _NAMES:
                key = key.replace(a, b)
            value = ours.pop(key)
            if key.endswith("pos_proj.weight"):
                value = value[:, interleaved]
            elif key.endswith((".u", ".v")):
                value = value[:, 0]
            elif "pointwise" in name:
                value = value[:, :, None]
            taken[name] = value
        assert all(v.abs().sum() == 0 for v in ours.values()), "biases that theirs has not"
        layer.load_state_dict(taken)
        layers.append(layer)
    return layers, theirs.Wav2Vec2ConformerRelPositionalEmbedding(sizes)


_NAMES = (
    ("ffn1_layer_norm", "ff1_norm"),
    ("ffn2_layer_norm", "ff2_norm"),
    ("ffn1.", "ff1."),
    ("ffn2.", "ff2."),
    ("intermediate_dense", "up"),
    ("output_dense", "down"),
    ("self_attn_layer_norm", "attention_norm"),
    ("self_attn.linear_pos", "self_attn.pos_proj"),
    ("self_attn.linear_out", "self_attn.o_proj"),
    ("self_attn.linear_q", "self_attn.q_proj"),
    ("self_attn.linear_k", "self_attn.k_proj"),
    ("self_attn.linear_v", "self_attn.v_proj"),
    ("self_attn.pos_bias_", "self_attn."),
    ("self_attn", "attention"),
    ("conv_module.layer_norm", "conv_norm"),
    ("conv_module.pointwise_conv1", "conv.up"),
    ("conv_module.pointwise_conv2", "conv.down"),
    ("conv_module.depthwise_conv", "conv.depthwise.conv"),
    ("conv_module.batch_norm", "conv.depthwise.norm"),
    ("final_layer_norm", "norm"),
)


@pytest.mark.oracle
def test_blocks_are_what_transformers_computes() -> None:
    """The exported whole form's encoder, all folded, against Wav2Vec2-Conformer's blocks."""
    source = trained(TINY)
    for block in source.layers():  # biases that theirs has not
        for bias in (block.conv.up.bias, block.conv.down.bias, block.conv.depthwise.conv.bias):
            bias.zero_()
    layers, positions = transformers_layers(TINY, source)
    module = chunk_form(FAMILY, source)
    x = torch.randn(2, 23, TINY.width, generator=torch.Generator().manual_seed(0))
    got = want = x
    places = Places(position_table(22, -22, TINY.width, x), 22)
    for block, layer in zip(module.layers(), layers, strict=True):
        got, _ = block(got, places, None, x.new_zeros(2, TINY.kernel - 1, TINY.width))
        want = layer(want, relative_position_embeddings=positions(x))
    assert error(got, want) < TOLERANCES["oracle_fp32"]


def conformer_package() -> Any:
    """conformer/conformer.py of the package, by path: a checkout of that name would hide it."""
    pytest.importorskip("einops")
    try:
        path = importlib.metadata.distribution("conformer").locate_file("conformer/conformer.py")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("conformer is not installed")
    spec = importlib.util.spec_from_file_location("conformer_package", str(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["tiny", "tiny-streaming"])
def test_convolution_and_feed_forward_are_those_of_the_package_conformer(name: str) -> None:
    """Its causal form has no batch norm: ours is the identity there."""
    theirs = conformer_package()
    config = VARIANTS[name]
    source = trained(config)
    if config.streaming:
        for norm in (b.conv.depthwise.norm for b in source.layers()):
            nn.init.ones_(norm.weight).mul_((1 + norm.eps) ** 0.5)
            nn.init.zeros_(norm.bias)
            norm.reset_running_stats()
    ours = chunk_form(FAMILY, source)
    block, exported = source.layers()[0], ours.layers()[0]
    d = config.width
    conv = (
        theirs.ConformerConvModule(d, causal=config.streaming, expansion_factor=1, kernel_size=config.kernel)
        .eval()
        .requires_grad_(False)
    )
    conv.net[0].load_state_dict(block.conv_norm.state_dict())
    for mine, other in ((block.conv.up, conv.net[2]), (block.conv.down, conv.net[7])):
        other.weight.copy_(mine.weight[:, :, None])
        other.bias.copy_(mine.bias)
    conv.net[4].conv.load_state_dict(block.conv.depthwise.conv.state_dict())
    if not config.streaming:
        conv.net[5].load_state_dict(block.conv.depthwise.norm.state_dict())
    x = torch.randn(2, 13, d, generator=torch.Generator().manual_seed(0))
    got, _ = exported.conv(exported.conv_norm(x), x.new_zeros(2, config.kernel - 1, d))
    assert error(got, conv(x)) < TOLERANCES["oracle_fp32"]

    ff = theirs.FeedForward(d, mult=config.ffn // d).eval().requires_grad_(False)
    ff.net[0].load_state_dict(block.ff1.up.state_dict())
    ff.net[3].load_state_dict(block.ff1.down.state_dict())
    assert error(exported.ff1(x), ff(x)) < TOLERANCES["oracle_fp32"]


@each_variant
def test_training_form_learns(name: str) -> None:
    """Every parameter gets a gradient but the keys' bias, which softmax takes out."""
    train = FAMILY.train_form(VARIANTS[name])
    FAMILY.init(train, 0)
    train(frames(2, 24)).log_softmax(-1)[..., 3].mean().backward()
    without = {n for n, p in train.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert without <= {n for n, _ in train.named_parameters() if n.endswith("k_proj.bias")}


def test_own_checkpoint_loads(tmp_path: Path) -> None:
    source = trained(CHUNKED)
    for family in ("conformer", "retnet"):
        metadata = {
            "xexport.family": family,
            "xexport.layout": "training",
            "xexport.config": json.dumps(dataclasses.asdict(CHUNKED)),
        }
        save_file(source.state_dict(), tmp_path / f"{family}.safetensors", metadata)
    raw = open_checkpoint(tmp_path / "conformer.safetensors")
    assert FAMILY.recognise(raw)
    loaded = FAMILY.load(raw)
    module = FAMILY.build(loaded.config)
    module.load_state_dict(loaded.tensors)
    assert loaded.config == CHUNKED
    assert all(torch.equal(v, made(CHUNKED).state_dict()[k]) for k, v in module.state_dict().items())
    with pytest.raises(CheckpointError, match="not a Conformer checkpoint"):
        FAMILY.load(open_checkpoint(tmp_path / "retnet.safetensors"))


def test_paper_sizes() -> None:
    """Table 1's encoders; its parameters count a decoder of one LSTM as well."""
    with torch.device("meta"):
        sizes = {k: sum(p.numel() for p in FAMILY.build(FAMILY.presets[k]).parameters()) for k in "sml"}
    assert 8e6 < sizes["s"] < 10.3e6
    assert 26e6 < sizes["m"] < 30.7e6
    assert 114e6 < sizes["l"] < 118.8e6
