"""Transformer: the chunk law of every option, the papers' formulas, Hugging Face checkpoints, limits."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chunk_form import assert_same, in_chunks, random_state
from chunk_form import draw_tokens as tokens
from chunk_form import new_state as fresh
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tolerances import TOLERANCES
from torch import Tensor

import xexport
from xexport.core.checkpoint import open_checkpoint
from xexport.core.errors import CheckpointError, LimitError
from xexport.core.registry import get_family
from xexport.models.transformer import Transformer, TransformerConfig

FAMILY = get_family("transformer")
VARIANTS: dict[str, TransformerConfig] = {k: v for k, v in FAMILY.presets.items() if k.startswith("tiny")}
TINY = VARIANTS["tiny"]
WINDOW = VARIANTS["tiny-window"]
SIMPLIFIED = VARIANTS["tiny-simplified"]
each_variant = pytest.mark.parametrize("name", VARIANTS)


def made(config: TransformerConfig = TINY, seed: int = 0) -> Transformer:
    """A module whose every parameter matters: what begins at zero or one is moved away from it."""
    module: Transformer = FAMILY.build(config)
    FAMILY.init(module, seed)
    rng = torch.Generator().manual_seed(seed)
    for name, p in module.requires_grad_(False).named_parameters():
        if p.ndim == 1 or not bool(p.any()):
            p.add_(torch.randn(p.shape, generator=rng) * 0.3)
        if name.endswith("bias"):
            p.normal_(generator=rng)
    return module.eval()


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(1, 30),
    cuts=st.lists(st.integers(0, 30), max_size=4),
    batch=st.integers(1, 3),
    seed=st.integers(0, 999),
    position=st.sampled_from([0, 1, 2, 3, 5, 11, 60, 100_003, 2**31 - 40]),
    name=st.sampled_from([*VARIANTS]),
)
def test_chunk_law(length: int, cuts: list[int], batch: int, seed: int, position: int, name: str) -> None:
    """Whole = chunks, from a used state, over chunks shorter and longer than the window."""
    module, x = made(VARIANTS[name], seed), tokens(batch, length, seed)
    if module.max_tokens is not None:
        position %= 64
    state = random_state(module, batch, seed, position)
    cuts = sorted(min(c, length) for c in cuts)
    assert_same(in_chunks(module, x, state, cuts), module(x, *state), TOLERANCES["model_fp32"])


@each_variant
def test_training_form_is_the_same_function(name: str) -> None:
    """Over a stream several windows long."""
    module, train = made(VARIANTS[name]), FAMILY.train_form(VARIANTS[name])
    train.load_state_dict(module.state_dict())
    tensors = FAMILY.from_training(VARIANTS[name], train.state_dict())
    assert all(torch.equal(tensors[k], v) for k, v in module.state_dict().items())
    x = tokens(2, 50)
    with torch.no_grad():
        assert_same([train(x)], [module(x, *fresh(module, 2))[0]], TOLERANCES["model_fp32"])


@each_variant
def test_training_form_learns(name: str) -> None:
    train = FAMILY.train_form(VARIANTS[name])
    train.load_state_dict(made(VARIANTS[name]).state_dict())
    train(tokens(2, 12)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in train.parameters())


def test_init_depends_on_the_seed_alone() -> None:
    a, b, c = made(seed=1).state_dict(), made(seed=1).state_dict(), made(seed=2).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


def test_a_simplified_block_begins_as_the_paper_says() -> None:
    """Queries of zero make A = C, so the attention is the identity and the block is nearly so."""
    module: Transformer = FAMILY.build(dataclasses.replace(SIMPLIFIED, windows=()))
    FAMILY.init(module, 0)
    block, _ = module.model.blocks()[0]
    x = torch.randn(2, 9, 32)
    place = module._places(0, torch.tensor([0]), 9)
    with torch.no_grad():
        out, _ = block.self_attn(x, place, torch.tensor([0]), fresh(module, 2)[:3])
    assert_same([out], [x], TOLERANCES["op_fp32"])


def test_one_shared_ffn_is_that_ffn_in_every_layer() -> None:
    config = VARIANTS["tiny-shared-ffn"]
    shared, own = made(config), made(dataclasses.replace(config, shared_ffn=False))
    state = shared.state_dict()
    copies = {
        k: state["model.mlp." + k.split(".mlp.")[1]] if ".mlp." in k else state[k] for k in own.state_dict()
    }
    own.load_state_dict(copies)
    x = tokens(2, 9)
    assert torch.equal(shared(x, *fresh(shared, 2))[0], own(x, *fresh(own, 2))[0])
    more = sum(p.numel() for p in own.parameters()) - sum(p.numel() for p in shared.parameters())
    assert more == 2 * 32 * 96


# Formulas of the papers, a second time, in float64


def rotated(x: Tensor, place: int, base: float = 10000.0) -> Tensor:
    """RoFormer, equation 15, for pairs (i, i + K/2)."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half], x[..., half:])
    rate = base ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = pairs * torch.polar(torch.ones_like(rate), place * rate)
    return torch.cat((turned.real, turned.imag), -1)


def streaming_llm(attention: Any, z: Tensor, sinks: int, window: int) -> Tensor:
    """Source 5: a cache of keys that are not rotated, evicted between sinks and window, numbered anew
    inside the cache at every token. ``z [T,d]`` -> ``[T,d]``.
    """
    c = attention.c
    q = attention.q_proj(z).unflatten(-1, (c.heads, -1))
    k, v = (p(z).unflatten(-1, (c.groups, -1)) for p in (attention.k_proj, attention.v_proj))
    cache: list[int] = []
    rows = []
    for t in range(z.shape[0]):
        cache.append(t)
        if len(cache) > sinks + window:
            del cache[sinks]
        heads = []
        for h in range(c.heads):
            g = h // (c.heads // c.groups)
            query = rotated(q[t, h], len(cache) - 1)
            keys = torch.stack([rotated(k[s, g], place) for place, s in enumerate(cache)])
            heads.append((keys @ query / math.sqrt(c.size)).softmax(0) @ v[cache, g])
        rows.append(attention.o_proj(torch.cat(heads)))
    return torch.stack(rows)


@pytest.mark.parametrize(("window", "sinks"), [(9, 3), (2, 1), (5, 0), (4, 6)])
@pytest.mark.parametrize("cut", [40, 17, 1], ids=["whole", "chunks", "steps"])
def test_sinks_and_window_follow_the_paper(window: int, sinks: int, cut: int) -> None:
    module = made(dataclasses.replace(WINDOW, windows=(window,), sinks=sinks)).double()
    block, _ = module.model.blocks()[0]
    z = torch.randn(1, 40, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want = streaming_llm(block.self_attn, z[0], sinks, window)
    state = [s.double() for s in fresh(module, 1)[:2]]
    got = []
    for begin in range(0, 40, cut):
        part, position = z[:, begin : begin + cut], torch.tensor([begin])
        places = module._places(window, position, part.shape[1])
        out, state = block.self_attn(part, places, position, state)
        got.append(out)
    # frequencies rounded to 2^-33 turns a token
    assert_same([torch.cat(got, 1)[0]], [want], TOLERANCES["op_fp32"])


@pytest.mark.parametrize("window", [0, 7])
def test_simplified_attention_follows_equation_13(window: int) -> None:
    module = made(dataclasses.replace(SIMPLIFIED, windows=(window,))).double()
    block, ffn = module.model.blocks()[1]
    a, T = block.self_attn, 20
    x = torch.randn(1, T, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z = block.input_layernorm(x)
    lag = torch.arange(T)[:, None] - torch.arange(T)
    seen = (lag >= 0) & (lag < (window or T))
    uniform = seen.double() / seen.sum(1, keepdim=True)
    heads = []
    for h in range(4):
        part = slice(8 * h, 8 * h + 8)
        q, k = (
            torch.stack([rotated(y, t) for t, y in enumerate(p(z)[0, :, part])]) for p in (a.q_proj, a.k_proj)
        )
        A = torch.where(seen, q @ k.T / math.sqrt(8), -math.inf).softmax(-1)
        heads.append((a.alpha[h] * torch.eye(T) + a.beta[h] * A - a.gamma[h] * uniform) @ z[0, :, part])
    want = block.ffn_gain * ffn(z[0]) + block.attention_gain * torch.cat(heads, 1)
    position = torch.tensor([0])
    state = [s.double() for s in fresh(module, 1)][:-1]
    count = len(state) // 2
    out, _ = a(z, module._places(window, position, T), position, state[count:])
    assert_same([block.finish(x, z, out, ffn)[0]], [want], TOLERANCES["op_fp32"])


def test_logits_depend_on_relative_position_only() -> None:
    """Far into a stream, with a full window: the last logits depend on the last windows' tokens alone."""
    module = made(dataclasses.replace(WINDOW, sinks=0))
    x = tokens(1, 60)
    near, far = fresh(module, 1), [*fresh(module, 1)[:-1], torch.tensor([123_456_789])]
    assert_same([module(x, *far)[0][:, -5:]], [module(x, *near)[0][:, -5:]], TOLERANCES["model_fp32"])


# Hugging Face


def hugging_face(folder: Path, kind: str, **changes: Any) -> Any:
    """A random model of transformers, saved to a folder as it saves them."""
    transformers = pytest.importorskip("transformers")
    row = {
        "vocab_size": 29,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 96,
    }
    config = getattr(transformers, f"{kind}Config")(**(row | changes))
    torch.manual_seed(0)
    oracle = getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
    for p in oracle.parameters():
        p.add_(torch.randn_like(p) * 0.2)
    oracle.save_pretrained(folder)
    return oracle


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CHECKPOINTS = {
    "llama": ("Llama", {}),
    "llama-tied-mqa": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama-head-size": ("Llama", {"head_dim": 12, "num_attention_heads": 2, "num_key_value_heads": 2}),
    "llama-3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "mistral-window": ("Mistral", {"sliding_window": 7}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
}


@pytest.mark.oracle
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_hugging_face_checkpoint(tmp_path: Path, name: str) -> None:
    """Prefill, and decoding with its own cache."""
    kind, changes = CHECKPOINTS[name]
    oracle = hugging_face(tmp_path, kind, **changes)
    raw = open_checkpoint(tmp_path)
    assert FAMILY.recognise(raw)
    loaded = FAMILY.load(raw)
    module = FAMILY.build(loaded.config).eval().requires_grad_(False)
    module.load_state_dict(loaded.tensors)
    assert (module.max_tokens is None) == (name == "mistral-window")
    x = tokens(2, 40)
    state = fresh(module, 2)
    whole, *_ = module(x, *state)
    assert_same([whole], [oracle(x).logits], TOLERANCES["oracle_fp32"])
    theirs = oracle(x[:, :9], use_cache=True)
    _, *state = module(x[:, :9], *state)
    for t in range(9, 20):
        theirs = oracle(x[:, t : t + 1], past_key_values=theirs.past_key_values, use_cache=True)
        got, *state = module(x[:, t : t + 1], *state)
        assert_same([got], [theirs.logits], TOLERANCES["oracle_fp32"])


def write(path: Path, config: TransformerConfig, family: str = "transformer") -> Path:
    train = FAMILY.train_form(config)
    FAMILY.init(train, 5)
    metadata = {
        "xexport.family": family,
        "xexport.layout": "training",
        "xexport.config": json.dumps(dataclasses.asdict(config)),
    }
    save_file(train.state_dict(), path, metadata)
    return path


@each_variant
def test_own_checkpoint_loads(tmp_path: Path, name: str) -> None:
    raw = open_checkpoint(write(tmp_path / "a.safetensors", VARIANTS[name]))
    assert FAMILY.recognise(raw)
    loaded = FAMILY.load(raw)
    assert loaded.config == VARIANTS[name]
    with torch.device("meta"):
        wanted = FAMILY.build(loaded.config).state_dict()
    assert {k: v.shape for k, v in loaded.tensors.items()} == {k: v.shape for k, v in wanted.items()}


def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    other = open_checkpoint(write(tmp_path / "b.safetensors", TINY, family="hyena"))
    assert FAMILY.recognise(other) is None
    with pytest.raises(CheckpointError, match="not a Transformer checkpoint"):
        FAMILY.load(other)


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("hidden_act", "gelu", "does not compute"),
        ("mlp_bias", True, "does not compute"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "rope scaling"),
        ("intermediate_size", 50, "wrong shape"),
        ("hidden_size", "wide", "malformed"),
        ("num_hidden_layers", 3, "missing"),
    ],
)
def test_hugging_face_configs_that_mean_something_else_are_refused(
    tmp_path: Path, key: str, value: object, match: str
) -> None:
    hugging_face(tmp_path, "Llama")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text("utf-8"))
    if key == "rope_scaling":
        config.pop("rope_parameters", None)
    path.write_text(json.dumps({**config, key: value}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=match):
        FAMILY.load(open_checkpoint(tmp_path))


def test_a_long_maximum_is_bounded_and_said(tmp_path: Path) -> None:
    state = {k: v for k, v in made().state_dict().items() if k != "model.turns"}
    save_file(state, tmp_path / "model.safetensors")
    config = {
        "model_type": "llama",
        "vocab_size": 29,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 80,
        "max_position_embeddings": 131072,
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    loaded = FAMILY.load(open_checkpoint(tmp_path))
    assert loaded.config.max_tokens == 4096
    assert any("4096 of the 131072" in note for note in loaded.notes)


# Limits and bad input


def test_a_stream_ends_at_max_tokens() -> None:
    module = made(dataclasses.replace(TINY, max_tokens=10))
    _, *state = module(tokens(1, 9), *fresh(module, 1))
    module(tokens(1, 1), *state)
    with pytest.raises(LimitError, match="longer than the cache"):
        module(tokens(1, 2), *state)
    assert made(WINDOW).max_tokens is None
    assert made(VARIANTS["tiny-mixed"]).max_tokens == 96


@pytest.mark.parametrize(("preset", "millions"), [("135m", 134.5), ("1.1b", 1100), ("7b", 6738)])
def test_published_sizes(preset: str, millions: float) -> None:
    with torch.device("meta"):
        module = FAMILY.build(FAMILY.presets[preset])
    assert sum(p.numel() for p in module.parameters()) == pytest.approx(millions * 1e6, rel=0.005)


# Exports of the options; the plain one is in test_export.py


@pytest.mark.parametrize("preset", ["tiny-window", pytest.param("tiny-simplified", marks=pytest.mark.slow)])
def test_options_export_and_stream(exporter: Any, tmp_path: Path, preset: str) -> None:
    """The export has compared graph and PyTorch at chunks longer than the window; here it is streamed."""
    folder = exporter.export("transformer", "cpu-fp32", tmp_path / "out", preset=preset)
    bundle = xexport.load(folder)
    module: Transformer = FAMILY.build(VARIANTS[preset]).requires_grad_(False)
    FAMILY.init(module, 0)
    x = tokens(2, 60, seed=3)
    want = module(x, *fresh(module, 2))[0].numpy()
    stream = bundle.stream(batch=2)
    got = [stream.feed(x[:, i : i + 1].numpy()) for i in range(25)] + [stream.feed(x[:, 25:].numpy())]
    error = np.abs(np.concatenate(got, 1) - want).max()
    assert error <= TOLERANCES["model_fp32"] * max(1.0, float(np.abs(want).max()))
    assert bundle.manifest.model.max_tokens == module.max_tokens


def test_a_stream_of_a_bundle_ends_with_an_error(exporter: Any) -> None:
    stream = xexport.load(exporter("transformer", "cpu-fp32")).stream()
    stream.feed(tokens(1, 96)[0].numpy())
    before = stream.state()
    with pytest.raises(LimitError, match="can hold 96 tokens"):
        stream.feed([1])
    assert all(np.array_equal(before[k], v) for k, v in stream.state().items())
    stream.reset()
    assert stream.feed([1]).shape == (1, 1, 29)
