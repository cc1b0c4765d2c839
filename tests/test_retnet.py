"""RetNet: the chunk law, the training form, the rotation far out, checkpoints, other implementations."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from chunk_form import assert_same, in_chunks, random_state
from chunk_form import draw_tokens as tokens
from chunk_form import new_state as fresh
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tolerances import TOLERANCES
from torch import Tensor, nn

from xexport.core.checkpoint import open_checkpoint
from xexport.core.errors import CheckpointError
from xexport.core.registry import get_family
from xexport.models.retnet import RetNet, RetNetConfig, RetNetTrain

FAMILY = get_family("retnet")
TINY: RetNetConfig = FAMILY.presets["tiny"]
VARIANT = dataclasses.replace(TINY, rms=True, glu=True, value_factor=1, heads=4)
DEEPNORM: RetNetConfig = FAMILY.presets["tiny-deepnorm"]


def made(config: RetNetConfig = TINY, seed: int = 0) -> RetNet:
    module: RetNet = FAMILY.build(config)
    FAMILY.init(module, seed)
    return module.eval().requires_grad_(False)


@settings(max_examples=15, deadline=None)
@given(
    length=st.integers(1, 20),
    cuts=st.lists(st.integers(0, 20), max_size=4),
    batch=st.integers(1, 3),
    seed=st.integers(0, 999),
    position=st.sampled_from([0, 1, 100_003, 2**32 + 5]),
    config=st.sampled_from([TINY, VARIANT, DEEPNORM]),
)
def test_chunk_law(
    length: int, cuts: list[int], batch: int, seed: int, position: int, config: RetNetConfig
) -> None:
    """Whole = chunks, from a state that is not zero, far into a stream too."""
    module, x = made(config, seed), tokens(batch, length, seed)
    state = random_state(module, batch, seed, position)
    cuts = sorted(min(c, length) for c in cuts)
    assert_same(in_chunks(module, x, state, cuts), module(x, *state), TOLERANCES["model_fp32"])


@pytest.mark.parametrize("config", [TINY, VARIANT, DEEPNORM], ids=["paper", "torchscale", "deepnorm"])
@pytest.mark.parametrize("length", [1, 7, 129, 260])
def test_training_form_is_the_same_function(config: RetNetConfig, length: int) -> None:
    """Also across its own chunks of 128."""
    train = FAMILY.train_form(config)
    FAMILY.init(train, 3)
    module = made(config)
    module.load_state_dict(FAMILY.from_training(config, train.state_dict()))
    x = tokens(2, length)
    with torch.no_grad():
        assert_same([train(x)], [module(x, *fresh(module, 2))[0]], TOLERANCES["model_fp32"])


def test_training_form_learns() -> None:
    train = FAMILY.train_form(TINY)
    FAMILY.init(train, 0)
    train(tokens(2, 5)).sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in train.parameters())


def test_recurrence_follows_the_paper() -> None:
    """Equation 6 in float64 from the module's own weights, one head at a time, one token at a time."""
    module, x = made().double(), tokens(1, 9)
    block = module._blocks()[0]
    h = block.retention_norm(module.embed(x))[0]
    q, k, v = (getattr(block.retention, f"{n}_proj")(h) for n in "qkv")
    size, value = TINY.key_size, TINY.value_size
    heads = []
    for i in range(TINY.heads):
        gamma, state, rows = 1 - 2.0 ** (-5 - i), torch.zeros(size, value, dtype=torch.float64), []
        for t in range(9):
            pairs = torch.arange(size // 2, dtype=torch.float64)
            turn = torch.polar(torch.ones_like(pairs), t * 10000.0 ** (-pairs / (size // 2 - 1)))
            qt, kt = (
                torch.view_as_real(torch.view_as_complex(y[t, i * size : (i + 1) * size].view(-1, 2)) * turn)
                for y in (q, k)
            )
            state = gamma * state + torch.outer(kt.flatten(), v[t, i * value : (i + 1) * value])
            rows.append(qt.flatten() @ state / math.sqrt(size))
        o = torch.stack(rows)
        heads.append((o - o.mean(1, True)) / (o.var(1, unbiased=False, keepdim=True) + TINY.eps).sqrt())
    gate = block.retention.g_proj(h)
    want = block.retention.out_proj(gate * gate.sigmoid() * torch.cat(heads, 1))

    seen: list[Tensor] = []
    block.retention.out_proj.register_forward_hook(lambda _m, _i, out: seen.append(out))
    module(x, *(s.double() if s.is_floating_point() else s for s in fresh(module, 1)))
    # float32 log gamma and theta rounded to 2^-33 turns against float64 ones
    assert_same([seen[0][0]], [want], TOLERANCES["op_fp32"])


@pytest.mark.parametrize("position", [0, 1000, 100_000, 10**9, 2**33 - 1])
def test_rotation_is_exact_far_out(position: int) -> None:
    """The angle between tokens a lag apart is the same everywhere, and lag * theta."""
    module = made()
    lag = torch.tensor([0, 1, 500])
    cos, sin = (x.double() for x in module.angles(position + lag))
    between = torch.polar(torch.ones_like(cos), torch.atan2(sin, cos))
    between = between * between[:1].conj()
    theta = 10000.0 ** (-torch.arange(8, dtype=torch.float64) / 7)
    want = torch.polar(torch.ones(3, 1, 8, dtype=torch.float64), lag[:, None, None] * theta)
    assert float((between - want).abs().max()) <= TOLERANCES["op_fp32"]


def test_logits_depend_on_relative_position_only() -> None:
    module, x = made(), tokens(1, 12)
    first, *_ = module(x, *fresh(module, 1))
    late = [*fresh(module, 1)[:-1], torch.tensor([123_456_789])]
    assert_same([module(x, *late)[0]], [first], TOLERANCES["model_fp32"])


def test_init_depends_on_the_seed_alone() -> None:
    a, b, c = made(seed=1).state_dict(), made(seed=1).state_dict(), made(seed=2).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


def write(path: Path, config: RetNetConfig, train: RetNetTrain, family: str = "retnet") -> Path:
    metadata = {
        "xexport.family": family,
        "xexport.layout": "training",
        "xexport.config": json.dumps(dataclasses.asdict(config)),
    }
    save_file(train.state_dict(), path, metadata)
    return path


def test_own_checkpoint_loads(tmp_path: Path) -> None:
    train = FAMILY.train_form(TINY)
    FAMILY.init(train, 5)
    raw = open_checkpoint(write(tmp_path / "a.safetensors", TINY, train))
    assert FAMILY.recognise(raw)
    loaded = FAMILY.load(raw)
    with torch.device("meta"):
        wanted = FAMILY.build(loaded.config).state_dict()
    assert {k: v.shape for k, v in loaded.tensors.items()} == {k: v.shape for k, v in wanted.items()}
    assert torch.equal(loaded.tensors["decay"], made().decay)


def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    train = FAMILY.train_form(TINY)
    other = open_checkpoint(write(tmp_path / "b.safetensors", TINY, train, family="hyena"))
    assert FAMILY.recognise(other) is None
    with pytest.raises(CheckpointError, match="not a RetNet checkpoint"):
        FAMILY.load(other)
    narrow = dataclasses.replace(TINY, ffn=24)
    with pytest.raises(CheckpointError, match=r"ffn.fc1.*wrong shape"):
        FAMILY.load(open_checkpoint(write(tmp_path / "c.safetensors", narrow, train)))


@pytest.mark.parametrize(("preset", "billions"), [("1.3b", 1.3), ("2.7b", 2.7), ("6.7b", 6.7)])
def test_paper_sizes(preset: str, billions: float) -> None:
    with torch.device("meta"):
        blocks = FAMILY.build(FAMILY.presets[preset]).layers
    assert sum(p.numel() for p in blocks.parameters()) == pytest.approx(billions * 1e9, rel=0.1)


@pytest.mark.oracle
def test_yet_another_retnet() -> None:
    """Its parallel and its recurrent form; it has one value a key, no last norm, other gammas."""
    theirs = pytest.importorskip("yet_another_retnet.retnet")
    config = RetNetConfig(vocab_size=29, width=32, layers=2, heads=2, ffn=48, value_factor=1)
    oracle = theirs.RetNet(29, 32, 2, 2, dropout=0.0, dim_feedforward=48).eval().requires_grad_(False)
    for layer in oracle.decoder.layers:
        layer.activation = nn.functional.gelu
    module = made(config)
    module.norm = nn.Identity()
    pairs = [(module.embed, oracle.embedding), (module.head, oracle.out)]
    for mine, its in zip(module._blocks(), oracle.decoder.layers, strict=True):
        pairs += [(mine.retention_norm, its.norm1), (mine.ffn_norm, its.norm2)]
        pairs += [(mine.ffn.fc1, its.linear1), (mine.ffn.fc2, its.linear2)]
        names = ("q_proj", "k_proj", "v_proj", "g_proj", "out_proj")
        pairs += [(getattr(mine.retention, n), getattr(its.retention, n)) for n in names]
    for mine, its in pairs:
        its.weight.copy_(torch.randn_like(its.weight) * 0.2)
        mine.load_state_dict({k: v for k, v in its.state_dict().items() if k in mine.state_dict()})
    gammas = pytest.importorskip("yet_another_retnet.retention")._build_decay_gammas(2)
    module.decay.copy_(gammas.log())

    x, state = tokens(2, 11), fresh(module, 2)
    whole, *_ = module(x, *state)
    assert_same([whole], [oracle.forward_parallel(x)], TOLERANCES["oracle_fp32"])
    past: list[Tensor] = []
    for t in range(x.shape[1]):
        want, past = oracle.forward_recurrent(x[:, t], t, past)
        assert_same([whole[:, t]], [want], TOLERANCES["oracle_fp32"])


@pytest.mark.oracle
def test_torchscale_retention() -> None:
    """With its score normalisations, which the norm over a head cancels: see the module's docstring."""
    theirs = pytest.importorskip("torchscale.component.multiscale_retention")
    config = dataclasses.replace(VARIANT, value_factor=2, eps=1e-12)
    module = made(config)
    block = module._blocks()[0]
    args = SimpleNamespace(multiway=False, layernorm_eps=config.eps)
    oracle = theirs.MultiScaleRetention(args, 32, 64, config.heads).requires_grad_(False)
    oracle.load_state_dict(block.retention.state_dict())
    x, T = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(0)), 10
    lag = torch.arange(T)[:, None] - torch.arange(T)
    mask = torch.where(lag >= 0, (module.decay[:, None, None] * lag).exp(), 0.0)
    mask = mask / mask.sum(-1, keepdim=True).sqrt()
    cos, sin = (y[:, 0].repeat_interleave(2, -1) for y in module.angles(torch.arange(T)))
    want = oracle(x, ((sin, cos), mask))

    train = RetNetTrain(config)
    train.load_state_dict(module.state_dict())
    q, k = (y.transpose(1, 2) for y in block.retention.rotated(x, *module.angles(torch.arange(T))))
    v = block.retention.v_proj(x).view(2, T, config.heads, -1).transpose(1, 2)
    got = block.retention.finish(x, train._retain(q, k, v, train._decays(T)).transpose(1, 2))
    assert_same([got], [want], TOLERANCES["oracle_fp32"])


@pytest.fixture
def torchscale_decoder(monkeypatch: pytest.MonkeyPatch) -> Callable[..., nn.Module]:
    """torchscale's decoder; what it imports for distributed training is replaced by nothing."""
    pytest.importorskip("torchscale")
    for name in ("fairscale", "timm", "timm.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, parts in {
        "fairscale.nn": ("checkpoint_wrapper", "wrap"),
        "timm.models.layers": ("drop_path",),
    }.items():
        module = ModuleType(name)
        for part in parts:
            setattr(module, part, None)
        monkeypatch.setitem(sys.modules, name, module)
    decoder = importlib.import_module("torchscale.architecture.retnet").RetNetDecoder
    its_config = importlib.import_module("torchscale.architecture.config").RetNetConfig

    def make(**sizes: Any) -> nn.Module:
        args = its_config(**sizes)
        args.decoder_normalize_before = sizes.get("decoder_normalize_before", args.decoder_normalize_before)
        made: nn.Module = decoder(args, nn.Embedding(args.vocab_size, args.decoder_embed_dim))
        return made.eval().requires_grad_(False)

    return make


#: a fresh decoder's head outputs are tiny, and the norms' usual epsilon would act on them
SIZES: dict[str, Any] = {
    "decoder_embed_dim": 32,
    "decoder_value_embed_dim": 48,
    "decoder_retention_heads": 2,
    "decoder_ffn_embed_dim": 40,
    "decoder_layers": 2,
    "vocab_size": 29,
    "layernorm_eps": 1e-12,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {"no_scale_embedding": True},
    "deepnorm": {"deepnorm": True, "layernorm_embedding": True, "activation_fn": "relu"},
    "example": {"no_scale_embedding": False, "activation_fn": "swish", "layernorm_embedding": True},
    # releases after 0.3 keep the norms before each layer, with the weighted stream
    "deepnorm-before": {"deepnorm": True, "decoder_normalize_before": True},
}


def folder(path: Path, oracle: nn.Module, config: dict[str, Any], prefix: str = "") -> Path:
    """A folder of its weights and config.json."""
    path.mkdir()
    torch.save({prefix + k: v for k, v in oracle.state_dict().items()}, path / "model.pth")
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.oracle
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("prefix", ["", "decoder."])
def test_torchscale_checkpoint(
    tmp_path: Path, torchscale_decoder: Callable[..., nn.Module], prefix: str, options: str
) -> None:
    """A folder of its state dict and options loads, and the whole decoder agrees."""
    row = SIZES | OPTIONS[options]
    oracle = torchscale_decoder(**row)
    raw = open_checkpoint(folder(tmp_path / "a", oracle, row, prefix))
    assert FAMILY.recognise(raw)
    loaded = FAMILY.load(raw)
    module = FAMILY.build(loaded.config).eval()
    module.load_state_dict(loaded.tensors)
    x = tokens(2, 40)
    with torch.no_grad():
        assert_same([module(x, *fresh(module, 2))[0]], [oracle(x)[0]], TOLERANCES["oracle_fp32"])
    said = " ".join(loaded.notes)
    assert all((f"{key} = " in said) == (key not in row) for key in ("activation_fn", "deepnorm"))


@pytest.mark.oracle
@pytest.mark.parametrize("option", ["activation_fn", "no_scale_embedding", "deepnorm"])
def test_each_option_changes_the_function(
    tmp_path: Path, torchscale_decoder: Callable[..., nn.Module], option: str
) -> None:
    """What no tensor shows is not ignored: another value gives other logits, none gives a note."""
    values = {"activation_fn": "swish", "no_scale_embedding": False, "deepnorm": True}
    oracle = torchscale_decoder(**SIZES)
    raw = open_checkpoint(folder(tmp_path / "a", oracle, SIZES))
    other = open_checkpoint(folder(tmp_path / "b", oracle, SIZES | {option: values[option]}))
    logits = []
    for loaded in (FAMILY.load(raw), FAMILY.load(other)):
        module = FAMILY.build(loaded.config).eval().requires_grad_(False)
        module.load_state_dict(loaded.tensors)
        logits.append(module(tokens(1, 9), *fresh(module, 1))[0])
    assert float((logits[0] - logits[1]).abs().max()) > 1e-3
    assert any(option in note for note in FAMILY.load(raw).notes)


def torchscale_like(**extra: Tensor) -> dict[str, Tensor]:
    """Tensors under torchscale's names, of width 8, with its constants."""
    angle = torch.tensor([1.0, 1.0, 1e-4, 1e-4])
    layer = {"retention.v_proj.weight": (8, 8), "ffn.fc1.weight": (12, 8), "ffn.fc2.weight": (8, 12)}
    layer |= {f"retention.{n}_proj.weight": (8, 8) for n in ("q", "k", "g", "out")}
    layer |= {"retention_layer_norm.weight": (8,), "final_layer_norm.weight": (8,)}
    found = {f"layers.0.{k}": torch.ones(shape) for k, shape in layer.items()}
    found |= {"embed_tokens.weight": torch.ones(5, 8), "retnet_rel_pos.angle": angle}
    decay = torch.log(1 - 2.0 ** (-5 - torch.arange(2)))
    return {**found, "layer_norm.weight": torch.ones(8), "retnet_rel_pos.decay": decay, **extra}


def test_a_bare_state_dict_says_what_was_assumed(tmp_path: Path) -> None:
    """All four options that no tensor shows, and the head that it lacks."""
    save_file(torchscale_like(), tmp_path / "a.safetensors")
    said = " ".join(FAMILY.load(open_checkpoint(tmp_path / "a.safetensors")).notes)
    for part in ("activation_fn = gelu", "no_scale_embedding = True", "deepnorm = False", "layernorm_eps"):
        assert part in said
    assert "the head is taken to be the embedding" in said


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({"layers.0.moe_layer.gate.wg.weight": torch.ones(3)}, "experts.*how the sequence is cut"),
        ({"layers.0.retention.q_proj.A.weight": torch.ones(3)}, "multiway"),
        ({"layers.0.ffn.fc3.weight": torch.ones(3)}, "belong to no RetNet.*fc3"),
        ({"retnet_rel_pos.decay": torch.tensor([-0.5, -0.1])}, "decay is not what a RetNet"),
        ({"retnet_rel_pos.angle": torch.ones(4)}, "angle is not what a RetNet"),
    ],
)
def test_what_is_not_computed_is_refused(tmp_path: Path, extra: dict[str, Tensor], text: str) -> None:
    save_file(torchscale_like(**extra), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=f"(?s){text}"):
        FAMILY.load(open_checkpoint(tmp_path / "a.safetensors"))


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"activation_fn": "tanh"}, "unknown activation"),
        ({"deepnorm": "yes"}, "malformed deepnorm"),
        ({"layernorm_eps": "small"}, "malformed layernorm_eps"),
        ({"no_output_layer": True}, "without a head"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, config: dict[str, Any], text: str) -> None:
    save_file(torchscale_like(), tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=text):
        FAMILY.load(open_checkpoint(tmp_path))


def test_norms_behind_need_a_word_on_deepnorm(tmp_path: Path) -> None:
    """No tensor shows how the residual stream is weighted, and either is possible."""
    found = torchscale_like()
    del found["layer_norm.weight"]
    save_file(found, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="does not say deepnorm"):
        FAMILY.load(open_checkpoint(tmp_path / "a.safetensors"))
    for said in (True, False):
        (tmp_path / "config.json").write_text(json.dumps({"deepnorm": said}))
        config = FAMILY.load(open_checkpoint(tmp_path)).config
        assert (config.norms_behind, config.deepnorm) == (True, said)
