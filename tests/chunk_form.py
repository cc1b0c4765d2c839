"""What every family is asked: the chunk law, its training form, and its exports to every target."""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import TARGETS
from safetensors.torch import save_file
from tolerances import TOLERANCES
from torch import Tensor

from xexport.core.checkpoint import RawCheckpoint, open_checkpoint
from xexport.core.contract import contract_of
from xexport.core.errors import CheckpointError
from xexport.core.family import Family
from xexport.core.registry import family_names, get_family
from xexport.core.state import StateSpec, state_shape

__all__ = [
    "TARGETS",
    "assert_same",
    "check_cuts",
    "check_export",
    "check_gradients",
    "check_init",
    "check_own_file",
    "check_training_form",
    "check_whole_export",
    "chunk_form",
    "draw_tokens",
    "error",
    "in_chunks",
    "load_module",
    "new_state",
    "operators",
    "random_model",
    "random_state",
    "recognised_by",
    "role",
    "trained",
]


def random_model(family: Family, config: Any, seed: int = 0) -> Any:
    """Initial weights plus noise, so that no path is close to zero."""
    torch.manual_seed(seed)
    module = family.build(config).eval().requires_grad_(False)
    family.init(module, seed)
    for p in module.parameters():
        p.add_(torch.randn_like(p) * (0.2 if p.dim() == 1 else 0.5 * p.shape[-1] ** -0.5))
    return module


def trained(family: Family, config: Any, seed: int = 0, noise: float = 0.2) -> Any:
    """The training form with initial weights plus noise, so that none of them is zero; no gradients."""
    module = family.train_form(config)
    family.init(module, seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * noise)
    return module.eval().requires_grad_(False)


def chunk_form(family: Family, training: Any) -> Any:
    """The form that is exported, chunk or whole, of a training form's weights."""
    made = family.build(training.config).eval().requires_grad_(False)
    made.load_state_dict(family.from_training(training.config, training.state_dict()))
    return made


def new_state(module: Any, batch: int) -> list[Tensor]:
    """The state before the first token."""
    specs: list[StateSpec] = module.state_spec()
    return [torch.full(state_shape(s, batch), s.init, dtype=getattr(torch, s.dtype)) for s in specs]


def random_state(module: Any, batch: int, seed: int, position: int | None = None) -> list[Tensor]:
    """A state far from the first one; with ``position`` the last tensor, [1] int64, says that."""
    rng = torch.Generator().manual_seed(seed)
    specs = module.state_spec()[: None if position is None else -1]
    drawn = [torch.randn(state_shape(s, batch), generator=rng) for s in specs]
    return drawn if position is None else [*drawn, torch.tensor([position])]


def draw_tokens(batch: int, length: int, seed: int = 0, vocab: int = 29) -> Tensor:
    """Random tokens [B,T] of a small vocabulary."""
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def in_chunks(module: Any, tokens: Tensor, state: Sequence[Tensor], cuts: Sequence[int]) -> list[Tensor]:
    """The logits of the whole and the last state, fed piece by piece; ``cuts`` are positions in order."""
    logits = []
    for a, b in itertools.pairwise((0, *cuts, tokens.shape[1])):
        if a < b:
            out, *state = module(tokens[:, a:b], *state)
            logits.append(out)
    return [torch.cat(logits, 1), *state]


def assert_same(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float) -> None:
    """Tensor by tensor, by :func:`error`."""
    for a, b in zip(got, want, strict=True):
        assert error(a, b) <= tolerance


def load_module(family: Family, path: Path) -> Any:
    """The module of a checkpoint, with its weights."""
    loaded = family.load(open_checkpoint(path))
    module = family.build(loaded.config).eval().requires_grad_(False)
    module.load_state_dict(loaded.tensors)
    return module


def recognised_by(raw: RawCheckpoint) -> set[str]:
    """The families that say they can read it."""
    return {name for name in family_names() if get_family(name).recognise(raw)}


def check_own_file(
    family: Family,
    config: Any,
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    folder: Path,
    *,
    another: Mapping[str, Tensor] | None = None,
) -> None:
    """A file of our own training is recognised and read; one of another family is refused.

    Args:
        tensors: what the training leaves; ``wanted``: what is read from it.
        another: the other family's tensors, where these could be read as somebody else's file.
    """

    def path(name: str, row: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Path:
        about = {"xexport.family": name, "xexport.layout": "training", "xexport.config": json.dumps(row)}
        save_file(dict(stored), folder / f"{name}.safetensors", about)
        return folder / f"{name}.safetensors"

    row = dataclasses.asdict(config)
    short = {f.name: row[f.name] for f in dataclasses.fields(config) if getattr(config, f.name) != f.default}
    for given in (short, row):  # what is a default may be left out
        raw = open_checkpoint(path(family.name, given, tensors))
        assert "metadata" in str(family.recognise(raw))
        loaded = family.load(raw)
        assert loaded.config == config
        assert set(loaded.tensors) == set(wanted)
        assert all(torch.equal(loaded.tensors[k], v) for k, v in wanted.items())
    with pytest.raises(CheckpointError, match="can be read"):
        family.load(open_checkpoint(path("another", row, another or tensors)))


def error(got: Tensor, want: Tensor) -> float:
    """Largest error, relative to the largest expected value if that is above 1."""
    assert got.shape == want.shape
    return ((got - want).abs().max() / max(1.0, want.abs().max().item())).item()


def check_cuts(module: Any, batch: int, lengths: list[int]) -> None:
    """The chunk law from a state that has seen some tokens, and from the first one."""
    tokens = torch.randint(0, module.vocab_size, (batch, sum(lengths)))
    first = new_state(module, batch)
    _, *used = module(torch.randint(0, module.vocab_size, (batch, 5)), *first)
    for start in (first, used):
        whole, *end = module(tokens, *start)
        logits, *state = in_chunks(module, tokens, start, [*itertools.accumulate(lengths[:-1])])
        assert error(logits, whole) < TOLERANCES["model_fp32"]
        for spec, got, want in zip(module.state_spec(), state, end, strict=True):
            assert error(got, want) < TOLERANCES["model_fp32"], spec.name


def check_training_form(family: Family, config: Any) -> None:
    """It is the chunk form from the first state, and shares its parameters."""
    module = random_model(family, config)
    training = family.train_form(config)
    training.load_state_dict(module.state_dict())
    tokens = torch.randint(0, module.vocab_size, (2, 37))
    want = module(tokens, *new_state(module, 2))[0]
    assert error(training(tokens).detach(), want) < TOLERANCES["model_fp32"]
    assert set(family.from_training(config, training.state_dict())) == set(module.state_dict())


def check_gradients(family: Family, config: Any) -> None:
    """Every parameter gets one from the initial values."""
    training = family.train_form(config)
    family.init(training, 0)
    tokens = torch.randint(0, training.vocab_size, (2, 20))
    training(tokens).log_softmax(-1)[..., 3].mean().backward()
    without = [n for n, p in training.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def check_init(family: Family, config: Any) -> None:
    """The initial values depend on the seed alone."""
    one, two, other = (family.build(config) for _ in range(3))
    for module, seed in ((one, 7), (two, 7), (other, 8)):
        family.init(module, seed)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def operators(family: Family, config: Any) -> list[str]:
    """The operators of an export with dynamic batch and length: nothing of it depends on either."""
    with torch.device("meta"):
        module = family.build(config)
        args = (torch.zeros(2, 3, dtype=torch.int64), *new_state(module, 2))
    batch, length = torch.export.Dim("B"), torch.export.Dim("T")
    states = tuple({i: batch for i, d in enumerate(s.shape) if d == "B"} for s in module.state_spec())
    shapes = {"tokens": {0: batch, 1: length}, "state": states}
    program = torch.export.export(module, args, dynamic_shapes=shapes)
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function"]


def check_export(exporter: Any, family: str, target: str) -> None:
    """The bundle of the tiny preset against PyTorch: at once, step by step, and what its manifest says."""
    import xexport
    from xexport.models._resolve import resolve

    bundle = xexport.load(exporter(family, target))
    module: Any = resolve(family, preset="tiny").eager()
    tokens = np.random.default_rng(2).integers(0, module.vocab_size, 23)
    want = module(torch.from_numpy(tokens)[None], *new_state(module, 1))[0][0].numpy()
    stream = bundle.stream()
    at_once = stream.feed(tokens)[0]
    stream.reset()
    steps = np.concatenate([stream.feed([t])[0] for t in tokens])
    allowed = TOLERANCES[f"tiny_logits_{bundle.manifest.precision}"]
    for got in (at_once, steps):
        assert got.shape == want.shape
        assert float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))) < allowed
    checks = bundle.manifest.checks
    assert set(checks["parity"]) >= {"B=1,T=1", "B=2,T=1", "B=1,T=3", "B=3,T=5"}
    assert max(*checks["parity"].values(), checks["chunk_error_onnx"]) < TOLERANCES["model_fp32"]


def check_whole_export(exporter: Any, family: str, target: str, share: float = 1.0) -> None:
    """The bundle of a tiny preset in the whole form against PyTorch, at several lengths.

    Args:
        share: of the sequences, those with the least error, that must be within the tolerance. Below 1 for a
            model that decides by comparing (a hash bucket): rounded weights turn a decision here and there,
            which moves all that is sorted behind it, and more than rounding does.
    """
    import xexport
    from xexport.models._resolve import resolve

    bundle = xexport.load(exporter(family, target))
    module: Any = resolve(family, preset="tiny").eager()
    allowed = TOLERANCES[f"tiny_logits_{target.removeprefix('cpu-')}"]
    errors = []
    for length in contract_of(module).lengths((1, 2, 23, 24, 61, 130)):
        tokens = np.random.default_rng(length).integers(0, module.vocab_size, length)
        want = module(torch.from_numpy(tokens)[None])[0][0].numpy()
        got = bundle.stream().feed(tokens)[0]
        assert got.shape == want.shape
        errors.append(float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))))
    assert max(sorted(errors)[: math.ceil(share * len(errors))]) < allowed, errors
    assert max(bundle.manifest.checks["parity"].values()) < TOLERANCES["model_fp32"]
    assert "chunk_law" in bundle.manifest.checks


def role(family: Family, config: Any, name: str) -> str:
    """The role of a parameter that the model has."""
    assert name in family.build(config).state_dict()
    return next(r for pattern, r in family.roles if fnmatch.fnmatchcase(name, pattern))
