"""Hyena: the chunk law up to the limit, the training form, the formulas term by term, checkpoints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from chunk_form import assert_same, chunk_form, error, in_chunks
from chunk_form import draw_tokens as tokens
from chunk_form import new_state as fresh
from exported import sizes
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tolerances import TOLERANCES
from torch import Tensor

import xexport
from xexport.core.checkpoint import open_checkpoint
from xexport.core.errors import CheckpointError, InputError, LimitError
from xexport.core.records import Fidelity
from xexport.core.registry import get_family
from xexport.core.results import read_records
from xexport.models.hyena import Hyena, HyenaConfig, HyenaTrain
from xexport.runtimes.tokenizers import load_tokenizer

FAMILY = get_family("hyena")
TINY: HyenaConfig = FAMILY.presets["tiny"]
ORDERS = {n: dataclasses.replace(TINY, order=n) for n in (2, 3, 4)}


def made(config: HyenaConfig = TINY, seed: int = 0) -> tuple[Hyena, HyenaTrain]:
    """Both forms with the same weights."""
    train: HyenaTrain = FAMILY.train_form(config)
    FAMILY.init(train, seed)
    return chunk_form(FAMILY, train), train.eval()


@settings(max_examples=15, deadline=None)
@given(
    prefix=st.integers(0, 25),
    length=st.integers(1, 25),
    cuts=st.lists(st.integers(0, 25), max_size=4),
    batch=st.integers(1, 3),
    seed=st.integers(0, 999),
    order=st.sampled_from([2, 3, 4]),
)
def test_chunk_law(prefix: int, length: int, cuts: list[int], batch: int, seed: int, order: int) -> None:
    """Whole = chunks, from the state after a prefix, anywhere up to the limit of 50 tokens."""
    module, _ = made(ORDERS[order], seed)
    x, state = tokens(batch, length, seed), fresh(module, batch)
    if prefix:
        _, *state = module(tokens(batch, prefix, seed + 1), *state)
    cuts = sorted(min(c, length) for c in cuts)
    assert_same(in_chunks(module, x, state, cuts), module(x, *state), TOLERANCES["model_fp32"])


def test_last_token_is_exact_and_the_next_refused() -> None:
    module, train = made()
    x, state = tokens(2, TINY.max_tokens), fresh(module, 2)
    steps = in_chunks(module, x, state, range(1, TINY.max_tokens))
    assert_same(steps, module(x, *state), TOLERANCES["model_fp32"])
    assert int(steps[-1]) == TINY.max_tokens
    with pytest.raises(LimitError):
        module(x[:, :1], *steps[1:])
    with pytest.raises(InputError, match="longer than the filters"):
        train(tokens(1, TINY.max_tokens + 1))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("length", [1, 2, 17, 50])
def test_training_form_is_the_same_function(order: int, length: int) -> None:
    """The filters' FFN runs in float32 there and in float64 here; sines of 14 radians amplify that."""
    module, train = made(ORDERS[order])
    x = tokens(2, length)
    with torch.no_grad():
        assert_same([train(x)], [module(x, *fresh(module, 2))[0]], TOLERANCES["model_fp32"])


def test_training_form_learns() -> None:
    _, train = made()
    train(tokens(2, 9)).sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in train.parameters())


def filters_by_hand(config: HyenaConfig, w: dict[str, np.ndarray]) -> np.ndarray:
    """Section 3.2 with safari's constants, a point at a time, in float64: ``[N-1,d,L]``."""
    L, channels = config.max_tokens, config.width * (config.order - 1)
    bands = (config.filter_features - 1) // 2
    h = np.zeros((channels, L))
    for t in range(L):
        turns = [
            2 * np.pi * t / L * (1e-4 + b * (bands - 1 - 1e-4) / max(bands - 1, 1)) for b in range(bands)
        ]
        z = np.array([t / (L - 1), *np.cos(turns), *(-np.sin(turns))])
        for i in range(config.filter_inner + 1):
            z = np.sin(w["frequency"] * (w[f"ffn.{i}.weight"] @ z + w[f"ffn.{i}.bias"]))
        delta = np.linspace(np.log(1e-2) / 1.5, np.log(1e-2) / 0.3, channels)
        h[:, t] = w["last.weight"] @ z * np.exp(-abs(delta) * t / (L - 1))
    return h.reshape(config.width, config.order - 1, L).transpose(1, 0, 2)


def operator_by_hand(
    config: HyenaConfig, w: dict[str, np.ndarray], h: np.ndarray, x: np.ndarray
) -> np.ndarray:
    """The order-N recurrence on ``x [T,d]``, every convolution as its sum."""
    d, T = config.width, len(x)
    u = x @ w["in_proj.weight"].T + w["in_proj.bias"]
    taps, z = w["conv_weight"], np.zeros_like(u)
    for t in range(T):
        for lag in range(min(t, 2) + 1):
            z[t] += taps[2 - lag] * u[t - lag]
    z += w["conv_bias"]
    *gates, v = (z[:, i * d : (i + 1) * d] for i in range(config.order + 1))
    for n in range(config.order - 1, 0, -1):
        g, j = gates[n] * v, config.order - 1 - n
        y = w["filter_skip"][j] * g
        for t in range(T):
            for s in range(t + 1):
                y[t] = y[t] + h[j, :, t - s] * g[s]
        v = y
    return (gates[0] * v) @ w["out_proj.weight"].T + w["out_proj.bias"]


@pytest.mark.oracle
@pytest.mark.parametrize("order", ORDERS)
def test_formulas_term_by_term(order: int) -> None:
    """Filters and operator of the first block, derived again from the papers' formulas in float64."""
    config = ORDERS[order]
    module, train = made(config)
    weights = {k: v.detach().double().numpy() for k, v in train.state_dict().items()}

    def under(prefix: str) -> dict[str, np.ndarray]:
        return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}

    h = filters_by_hand(config, under("layers.0.filters."))
    got = torch.stack([p.detach() for p in module._blocks()[0].filters]).double()
    assert_same([got], [torch.from_numpy(h)], TOLERANCES["op_fp32"])

    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    hyena = module._blocks()[0].hyena
    hyena.in_proj.register_forward_hook(lambda _m, i, _o: inputs.append(i[0]))
    hyena.out_proj.register_forward_hook(lambda _m, _i, o: outputs.append(o))
    module(tokens(1, 23), *fresh(module, 1))
    want = operator_by_hand(config, under("layers.0.hyena."), h, inputs[0][0].double().numpy())
    assert_same([outputs[0][0].double()], [torch.from_numpy(want)], TOLERANCES["oracle_fp32"])


@pytest.mark.oracle
def test_stripedhyena_operator() -> None:
    """Its short convolution, and its long one with a given filter: the order-2 operator."""
    engine = pytest.importorskip("stripedhyena.engine").HyenaInferenceEngine()
    config = ORDERS[2]
    module, _ = made(config)
    block, T, d = module._blocks()[0], 31, config.width
    u = torch.randn(2, T, d, generator=torch.Generator().manual_seed(1))
    projected = block.hyena.in_proj(u)
    taps = block.hyena.conv_weight.T[:, None]
    z, _ = engine.parallel_fir(
        torch.nn.functional.conv1d, projected, taps, block.hyena.conv_bias, T, fir_length=3
    )
    h, skip = block.filters[0][None, :, :T], block.hyena.filter_skip[0]
    want = engine.parallel_iir(
        z, h, skip, T, poles=None, residues=None, t=None, dims=(d, 1, d, 2, 1), layer_idx=0
    )
    seen: list[Tensor] = []
    block.hyena.out_proj.register_forward_hook(lambda _m, i, _o: seen.append(i[0]))
    block.hyena_norm = torch.nn.Identity()
    module.embed = torch.nn.Module()
    module.embed.forward = lambda _t: u
    module(tokens(2, T), *fresh(module, 2))
    assert_same([seen[0]], [want], TOLERANCES["oracle_fp32"])


def test_init_depends_on_the_seed_alone_and_agrees_between_forms() -> None:
    direct: Hyena = FAMILY.build(TINY)
    FAMILY.init(direct, 4)
    through_training, _ = made(TINY, 4)
    other, _ = made(TINY, 5)
    a, b, c = (m.state_dict() for m in (direct, through_training, other))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


def write(path: Path, config: HyenaConfig, train: HyenaTrain, family: str = "hyena") -> Path:
    metadata = {
        "xexport.family": family,
        "xexport.layout": "training",
        "xexport.config": json.dumps(dataclasses.asdict(config)),
    }
    save_file(train.state_dict(), path, metadata)
    return path


def test_own_checkpoint_loads(tmp_path: Path) -> None:
    module, train = made(seed=6)
    raw = open_checkpoint(write(tmp_path / "a.safetensors", TINY, train))
    assert FAMILY.recognise(raw)
    loaded = FAMILY.load(raw)
    assert loaded.config == TINY
    assert set(loaded.tensors) == set(module.state_dict())
    assert all(torch.equal(v, loaded.tensors[k]) for k, v in module.state_dict().items())


def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    _, train = made()
    other = open_checkpoint(write(tmp_path / "b.safetensors", TINY, train, family="retnet"))
    assert FAMILY.recognise(other) is None
    with pytest.raises(CheckpointError, match="not a Hyena"):
        FAMILY.load(other)
    narrow = dataclasses.replace(TINY, ffn=24)
    with pytest.raises(CheckpointError, match=r"fc1.*wrong shape"):
        FAMILY.load(open_checkpoint(write(tmp_path / "c.safetensors", narrow, train)))


def dna_folder(folder: Path, config: HyenaConfig, train: HyenaTrain) -> Path:
    """The training form's weights as Hugging Face's HyenaDNA lays them out."""
    L, bands = config.max_tokens, (config.filter_features - 1) // 2
    angle = torch.linspace(1e-4, bands - 1, bands) * (2 * np.pi * torch.arange(L) / L)[:, None]
    z = torch.cat((torch.linspace(0, 1, L)[:, None], torch.cos(-angle), torch.sin(-angle)), 1)
    deltas = torch.linspace(np.log(1e-2) / 1.5, np.log(1e-2) / 0.3, config.width)
    names = {
        "hyena_norm": "norm1",
        "mlp_norm": "norm2",
        "hyena.in_proj": "mixer.in_proj",
        "hyena.out_proj": "mixer.out_proj",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
        "filters.last": f"mixer.filter_fn.implicit_filter.{2 * config.filter_inner + 2}",
    }
    names |= {
        f"filters.ffn.{i}": f"mixer.filter_fn.implicit_filter.{2 * i}" for i in range(config.filter_inner + 1)
    }
    w, out = train.state_dict(), {}
    out["hyena.backbone.embeddings.word_embeddings.weight"] = w["embed.weight"]
    out |= {f"hyena.backbone.ln_f.{k}": w[f"norm.{k}"] for k in ("weight", "bias")}
    for i in range(config.layers):
        ours, its = f"layers.{i}.", f"hyena.backbone.layers.{i}."
        for name, other in names.items():
            out |= {
                f"{its}{other}.{k}": w[f"{ours}{name}.{k}"]
                for k in ("weight", "bias")
                if f"{ours}{name}.{k}" in w
            }
        out[f"{its}mixer.short_filter.weight"] = w[f"{ours}hyena.conv_weight"].T[:, None].contiguous()
        out[f"{its}mixer.short_filter.bias"] = w[f"{ours}hyena.conv_bias"]
        out[f"{its}mixer.filter_fn.bias"] = w[f"{ours}hyena.filter_skip"][0]
        out[f"{its}mixer.filter_fn.implicit_filter.1.freq"] = w[f"{ours}filters.frequency"][None]
        out[f"{its}mixer.filter_fn.pos_emb.z"] = z[None].clone()
        out[f"{its}mixer.filter_fn.modulation.deltas"] = deltas[None, None].clone()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "hyenadna"}))
    save_file(out, folder / "model.safetensors")
    return folder


def test_hyenadna_checkpoint_loads(tmp_path: Path) -> None:
    config = dataclasses.replace(ORDERS[2], filter_shift=0.05)
    module, train = made(config)
    raw = open_checkpoint(dna_folder(tmp_path / "dna", config, train))
    assert FAMILY.recognise(raw)
    loaded = FAMILY.load(raw)
    assert dataclasses.replace(loaded.config, filter_frequency=config.filter_frequency) == config
    want = module.state_dict() | {"head.weight": module.embed.weight}
    assert set(loaded.tensors) == set(want)
    # the features of the checkpoint are a table of float32, made in float64 otherwise; sines of 14 of them
    for key, tensor in want.items():
        tolerance = TOLERANCES["model_fp32"] if ".filters." in key else 0.0
        assert_same([loaded.tensors[key]], [tensor], tolerance)


GOLDEN = np.load(Path(__file__).parent / "golden" / "hyenadna" / "golden.npz")


def authors_own(path: Path, rename: dict[str, str]) -> Path:
    """The checkpoint whose hidden states the authors' code gave, with some parts of its names changed."""
    out = {}
    for name in GOLDEN.files:
        if name.startswith("hyena."):
            renamed = name
            for theirs, other in rename.items():
                renamed = renamed.replace(theirs, other)
            out[renamed] = torch.from_numpy(GOLDEN[name])
    save_file(out, path)
    return path


@pytest.mark.oracle
@pytest.mark.parametrize(
    "rename",
    [{}, {"hyena.": "model.", ".mixer.": ".mixer.layer.", ".mlp.": ".mlp.layer."}],
    ids=["hugging-face", "recomputed"],
)
def test_hyenadna_standalone_code(tmp_path: Path, rename: dict[str, str]) -> None:
    """Logits of a whole window, by its tied head, from the authors' hidden states; made once (golden/)."""
    raw = open_checkpoint(authors_own(tmp_path / "dna.safetensors", rename))
    assert FAMILY.recognise(raw)
    loaded = FAMILY.load(raw)
    assert loaded.tokenizer == "dna"
    module = FAMILY.build(loaded.config).eval().requires_grad_(False)
    module.load_state_dict(loaded.tensors)
    want = torch.from_numpy(GOLDEN["hidden"]) @ module.head.weight.T
    got = module(torch.from_numpy(GOLDEN["tokens"]), *fresh(module, 2))[0]
    assert error(got, want) < TOLERANCES["oracle_fp32"]


def test_dna_letters_have_the_authors_ids() -> None:
    tokenizer = load_tokenizer({"kind": "dna"}, Path())
    assert tokenizer.encode("ACGTNNTTGACaGXC") == GOLDEN["ids"].tolist()
    assert tokenizer.encode("AC\nGT\n") == tokenizer.encode("ACGT")
    assert tokenizer.decode([7, 8, 9, 10, 11, 6, 1, 14]) == "ACGTN[UNK][SEP]\ufffd"
    assert tokenizer.end_ids == {1}
    with pytest.raises(InputError, match="no DNA"):
        tokenizer.encode("Call me Ishmael"[:4].lower())


def test_hyenadna_exports_and_streams_letters(tmp_path: Path) -> None:
    """From its own file to letters; judged on the built-in genome."""
    path = authors_own(tmp_path / "dna.safetensors", {})
    bundle = xexport.export(str(path), target="cpu-int8", out=tmp_path / "out", sizes=sizes(), distill=4)
    assert bundle.manifest.tokenizer["kind"] == "dna"
    stream = bundle.stream()
    text = "".join(stream.generate("ACGTACGT", 20, temperature=1.0, seed=0))
    assert text
    row = next(r for r in read_records(bundle.path / "results.jsonl") if isinstance(r, Fidelity))
    assert row.setup.text == "lambda_phage.txt"


def test_truncated_hyenadna_is_refused(tmp_path: Path) -> None:
    config = ORDERS[2]
    raw = open_checkpoint(dna_folder(tmp_path / "dna", config, made(config)[1]))
    less = {k: v for k, v in raw.tensors.items() if not k.endswith("layers.1.mlp.fc2.weight")}
    with pytest.raises(CheckpointError, match="lacks a tensor"):
        FAMILY.load(dataclasses.replace(raw, tensors=less))


@pytest.mark.parametrize(("preset", "millions"), [("125m", 125), ("153m", 153), ("355m", 355)])
def test_paper_sizes(preset: str, millions: float) -> None:
    """The embedding is tied in the paper, so it counts once."""
    with torch.device("meta"):
        train = FAMILY.train_form(FAMILY.presets[preset])
    count = sum(p.numel() for n, p in train.named_parameters() if n != "head.weight")
    assert count == pytest.approx(millions * 1e6, rel=0.1)
