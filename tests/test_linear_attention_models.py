"""Linear attention models: the chunk law of every rule, other implementations, checkpoints."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
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
from torch import Tensor

import xexport
from xexport.core.checkpoint import open_checkpoint
from xexport.core.errors import CheckpointError
from xexport.core.registry import get_family
from xexport.core.state import state_shape
from xexport.models.linear_attention import LinearAttention, LinearAttentionConfig

FAMILY = get_family("linear_attention")
VARIANTS: dict[str, LinearAttentionConfig] = {k: v for k, v in FAMILY.presets.items() if k.startswith("tiny")}
each_variant = pytest.mark.parametrize("name", VARIANTS)
BY_RULE = {c.rule: c for c in VARIANTS.values()}


def made(config: LinearAttentionConfig, seed: int = 0) -> LinearAttention:
    """A module whose vectors are not all zero or one."""
    module: LinearAttention = FAMILY.build(config)
    FAMILY.init(module, seed)
    rng = torch.Generator().manual_seed(seed)
    for p in module.requires_grad_(False).parameters():
        if p.ndim == 1:
            p.add_(torch.randn(p.shape, generator=rng) * 0.3)
    return module.eval()


@settings(max_examples=20, deadline=None)
@given(
    length=st.integers(1, 20),
    cuts=st.lists(st.integers(0, 20), max_size=4),
    batch=st.integers(1, 3),
    seed=st.integers(0, 999),
    name=st.sampled_from([*VARIANTS]),
)
def test_chunk_law(length: int, cuts: list[int], batch: int, seed: int, name: str) -> None:
    """Whole = chunks, from a state that is not zero."""
    module, x = made(VARIANTS[name], seed), tokens(batch, length, seed)
    rng = torch.Generator().manual_seed(seed)
    state = [torch.rand(state_shape(s, batch), generator=rng) for s in module.state_spec()]
    cuts = sorted(min(c, length) for c in cuts)
    assert_same(in_chunks(module, x, state, cuts), module(x, *state), TOLERANCES["model_fp32"])


@each_variant
@pytest.mark.parametrize("length", [1, 7, 70])
def test_training_form_is_the_same_function(name: str, length: int) -> None:
    """Also across its own chunks."""
    module, train = made(VARIANTS[name]), FAMILY.train_form(VARIANTS[name])
    train.load_state_dict(FAMILY.from_training(VARIANTS[name], module.state_dict()))
    x = tokens(2, length)
    with torch.no_grad():
        assert_same([train(x)], [module(x, *fresh(module, 2))[0]], TOLERANCES["model_fp32"])


@each_variant
def test_training_form_learns(name: str) -> None:
    train = FAMILY.train_form(VARIANTS[name])
    FAMILY.init(train, 0)
    train(tokens(2, 40)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in train.parameters())


def test_strong_decays_of_the_training_form_do_not_overflow() -> None:
    config = BY_RULE["gla"]
    module, train = made(config), FAMILY.train_form(config)
    for block in module.blocks():
        block.attn.gk_proj[1].bias.sub_(3000)
    train.load_state_dict(module.state_dict())
    x = tokens(1, 40)
    with torch.no_grad():
        assert_same([train(x)], [module(x, *fresh(module, 1))[0]], TOLERANCES["model_fp32"])


def test_init_depends_on_the_seed_alone() -> None:
    a, b, c = (made(BY_RULE["gated_delta"], s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


# Other implementations


def test_linear_attention_is_the_quadratic_form() -> None:
    """Source 1, equation 9 with the causal mask, in float64: weights phi(q).phi(k), normed to one."""
    module = made(BY_RULE["linear"]).double()
    mixer = module.blocks()[0].attn
    x = torch.randn(1, 15, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    heads = []
    for h in range(2):
        q, k = (
            torch.nn.functional.elu(p(x)[0, :, 8 * h : 8 * h + 8]) + 1 for p in (mixer.q_proj, mixer.k_proj)
        )
        weight = (q @ k.T).tril()
        heads.append(
            weight / (weight.sum(1, keepdim=True) + 1e-6) @ mixer.v_proj(x)[0, :, 12 * h : 12 * h + 12]
        )
    want = mixer.o_proj(torch.cat(heads, 1))
    assert_same([layer(module, x)[0]], [want], TOLERANCES["op_fp64"])


def layer(module: LinearAttention, x: Tensor) -> Tensor:
    """The first layer's mixer of the chunk form on ``x [B,T,d]``, from an empty state."""
    from xexport.models.linear_attention import _recur

    mixer, c = module.blocks()[0].attn, module.config
    state = [s.to(x.dtype) for s in fresh(module, x.shape[0])]
    terms, _ = mixer.terms(x, state[1] if c.conv_size else None)
    o, _ = _recur(c, terms, state[0], mixer.scale)
    return mixer.finish(x, torch.unflatten(o, -1, (c.heads, -1)))


def naive(folder: str) -> Any:
    """flash-linear-attention's plain functions, by path: its packages need a GPU's compiler."""
    spec = importlib.util.find_spec("fla")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("fla-core is not installed")
    path = Path(spec.submodule_search_locations[0]) / "ops" / folder / "naive.py"
    if not path.is_file():
        pytest.skip("fla-core is not installed")
    inner = importlib.util.spec_from_file_location(f"fla_{folder}_naive", path)
    assert inner is not None
    assert inner.loader is not None
    module = importlib.util.module_from_spec(inner)
    inner.loader.exec_module(module)
    return module


def conv(x: Tensor, weight: Tensor) -> Tensor:
    """Causal depthwise convolution and SiLU by torch: ``x [B,T,C]``, ``weight [K,C]``."""
    padded = torch.nn.functional.pad(x.transpose(1, 2), (len(weight) - 1, 0))
    y = torch.nn.functional.conv1d(padded, weight.t()[:, None].contiguous(), groups=x.shape[2])
    return torch.nn.functional.silu(y).transpose(1, 2)


@pytest.mark.oracle
@pytest.mark.parametrize("rule", ["gla", "delta", "gated_delta"])
@pytest.mark.parametrize("conv_size", [0, 4])
@pytest.mark.parametrize("gate", [False, True])
def test_flash_linear_attention(rule: str, conv_size: int, gate: bool) -> None:
    """The layer as fla's layers/*.py write it, around its naive recurrences."""
    module = made(dataclasses.replace(BY_RULE[rule], conv_size=conv_size, gate=gate))
    m = module.blocks()[0].attn
    x = torch.randn(2, 13, 32, generator=torch.Generator().manual_seed(1))
    q, k, v = m.q_proj(x), m.k_proj(x), m.v_proj(x)
    if conv_size:
        q, k, v = (conv(y, w) for y, w in zip((q, k, v), m.conv_weight.split([16, 16, 24], 1), strict=True))
    elif rule != "gla":
        q, k, v = (torch.nn.functional.silu(y) for y in (q, k, v))
    q, k, v = (y.unflatten(-1, (2, -1)) for y in (q, k, v))
    if rule == "gla":
        g = torch.nn.functional.logsigmoid(m.gk_proj(x)).unflatten(-1, (2, -1)) / 16
        o, _ = naive("gla").naive_recurrent_gla(q, k, v, g)
    else:
        q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
        beta = m.b_proj(x).sigmoid()
        if rule == "delta":
            pytest.importorskip("einops")
            turned = (y.transpose(1, 2) for y in (q, k, v, beta))
            o = naive("delta_rule").delta_rule_recurrence(*turned)[0].transpose(1, 2)
        else:
            g = -m.A_log.exp() * torch.nn.functional.softplus(m.a_proj(x) + m.dt_bias)
            o, _ = naive("gated_delta_rule").naive_recurrent_gated_delta_rule(q, k, v, beta, g)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * m.o_norm.weight
    o = o.flatten(-2)
    want = m.o_proj(o * torch.nn.functional.silu(m.g_proj(x)) if gate else o)
    assert_same([layer(module, x)], [want], TOLERANCES["oracle_fp32"])


@pytest.mark.oracle
def test_transformers_gated_delta_rule() -> None:
    """Qwen3-Next's own loop, with its own normalisation of q and k."""
    theirs = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    module = made(BY_RULE["gated_delta"])
    m = module.blocks()[0].attn
    x = torch.randn(2, 13, 32, generator=torch.Generator().manual_seed(1))
    terms, _ = m.terms(x, torch.zeros(2, 3, 56))
    raw = conv(torch.cat((m.q_proj(x), m.k_proj(x), m.v_proj(x)), -1), m.conv_weight)
    q, k, v = (y.unflatten(-1, (2, -1)) for y in raw.split([16, 16, 24], -1))
    want, _ = theirs.torch_recurrent_gated_delta_rule(
        q,
        k,
        v,
        g=terms.decay,
        beta=terms.beta,
        initial_state=None,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    from xexport.models.linear_attention import _recur

    got, _ = _recur(module.config, terms, fresh(module, 2)[0], m.scale)
    assert_same([got], [want.flatten(-2)], TOLERANCES["oracle_fp32"])


# Checkpoints


def published(folder: Path, rule: str) -> LinearAttention:
    """A folder in flash-linear-attention's layout, written from a module of this family."""
    module = made(BY_RULE[rule])
    c, tensors = module.config, {}
    for key, tensor in module.state_dict().items():
        if key.endswith("conv_weight"):
            for n, part in zip("qkv", tensor.split([16, 16, 24], 1), strict=True):
                name = key.replace("conv_weight", f"{n}_conv1d.weight")
                tensors[name] = part.t()[:, None].contiguous()
        elif rule == "gla":
            tensors[key.replace("attn.o_norm", "attn.g_norm_swish_gate")] = tensor
        else:
            tensors[key] = tensor
    save_file(tensors, folder / "model.safetensors")
    kinds = {"gla": "gla", "delta": "delta_net", "gated_delta": "gated_deltanet"}
    row: dict[str, Any] = {
        "model_type": kinds[rule],
        "vocab_size": 29,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 2,
        "hidden_act": "swish",
        "use_short_conv": bool(c.conv_size),
        "conv_size": 4,
        "norm_eps": 1e-6,
        "attn": None,
    }
    if rule == "gated_delta":
        row |= {"head_dim": 8, "expand_v": 1.5, "use_gate": c.gate}
    else:
        row |= {"expand_k": 0.5, "expand_v": 0.75, "use_gate": c.gate}
    (folder / "config.json").write_text(json.dumps(row), encoding="utf-8")
    return module


@pytest.mark.parametrize("rule", ["gla", "delta", "gated_delta"])
def test_published_layout_loads(tmp_path: Path, rule: str) -> None:
    """Its names and sizes."""
    wanted = published(tmp_path, rule)
    raw = open_checkpoint(tmp_path)
    assert FAMILY.recognise(raw)
    loaded = FAMILY.load(raw)
    module = FAMILY.build(loaded.config)
    module.load_state_dict(loaded.tensors)
    x = tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(module(x, *fresh(module, 2))[0], wanted(x, *fresh(wanted, 2))[0])


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("qk_norm", "sum", "qk_norm that is not computed"),
        ("attn", {"layers": [1]}, "attn that is not computed"),
        ("num_heads", "two", "malformed"),
        ("num_v_heads", 4, "num_v_heads"),
        ("num_hidden_layers", 3, "missing"),
        ("expand_v", 1.0, "wrong shape"),
        ("model_type", "mamba", "not a linear attention checkpoint"),
    ],
)
def test_other_configs_are_refused(tmp_path: Path, key: str, value: object, match: str) -> None:
    published(tmp_path, "delta")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {key: value}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=match):
        FAMILY.load(open_checkpoint(tmp_path))


@each_variant
def test_own_checkpoint_loads(tmp_path: Path, name: str) -> None:
    train = FAMILY.train_form(VARIANTS[name])
    FAMILY.init(train, 5)
    metadata = {
        "xexport.family": "linear_attention",
        "xexport.layout": "training",
        "xexport.config": json.dumps(dataclasses.asdict(VARIANTS[name])),
    }
    save_file(train.state_dict(), tmp_path / "a.safetensors", metadata)
    raw = open_checkpoint(tmp_path / "a.safetensors")
    assert FAMILY.recognise(raw)
    loaded = FAMILY.load(raw)
    assert loaded.config == VARIANTS[name]
    assert all(torch.equal(loaded.tensors[k], v) for k, v in train.state_dict().items())


@pytest.mark.parametrize("preset", ["gla-1.3b", "deltanet-1.3b", "gated-deltanet-1.3b"])
def test_published_sizes(preset: str) -> None:
    with torch.device("meta"):
        module = FAMILY.build(FAMILY.presets[preset])
    assert sum(p.numel() for p in module.parameters()) == pytest.approx(1.37e9, rel=0.08)


@pytest.mark.parametrize("preset", ["tiny-gated-delta", pytest.param("tiny-linear", marks=pytest.mark.slow)])
def test_rules_export_and_stream(exporter: Any, tmp_path: Path, preset: str) -> None:
    """GLA is in test_export.py; DeltaNet is Gated DeltaNet's operator without decay."""
    bundle = xexport.load(exporter.export("linear_attention", "cpu-fp32", tmp_path / "out", preset=preset))
    module: LinearAttention = FAMILY.build(VARIANTS[preset]).requires_grad_(False)
    FAMILY.init(module, 0)
    x = tokens(2, 30, seed=3)
    want = module(x, *fresh(module, 2))[0].numpy()
    stream = bundle.stream(batch=2)
    got = [stream.feed(x[:, i : i + 1].numpy()) for i in range(9)] + [stream.feed(x[:, 9:].numpy())]
    error = np.abs(np.concatenate(got, 1) - want).max()
    assert error <= TOLERANCES["model_fp32"] * max(1.0, float(np.abs(want).max()))
