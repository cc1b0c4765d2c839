"""Distilling: the fit against filters that are known, the distilled Hyena, its export, what is said of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chunk_form import TARGETS, check_cuts, draw_tokens, error, new_state
from exported import Exporter
from tolerances import TOLERANCES
from torch import Tensor

import xexport
from xexport.core.errors import InputError
from xexport.core.progress import Silent
from xexport.core.records import Fidelity
from xexport.core.registry import get_family
from xexport.core.results import read_records
from xexport.models._distill import Modes, distill_filters
from xexport.models._resolve import distilled, from_module, resolve
from xexport.models.hyena import Hyena, HyenaConfig, HyenaDistilled, HyenaTrain

FAMILY = get_family("hyena")
TINY: HyenaConfig = FAMILY.presets["tiny"]


def oscillations(poles: list[complex], length: int, filters: int = 3) -> Tensor:
    """Sums of damped oscillations, from numpy's own powers: [filters,length]."""
    rng = np.random.default_rng(len(poles))
    residues = rng.standard_normal((filters, len(poles))) + 1j * rng.standard_normal((filters, len(poles)))
    powers = np.asarray(poles)[:, None] ** np.arange(length)
    return torch.from_numpy((residues @ powers).real)


def made(modes: Modes, length: int) -> Tensor:
    """The filters that the modes stand for, by numpy's own powers."""
    poles, residues = modes.poles.numpy(), modes.residues.numpy()
    taps = (residues[:, :, None] * poles[:, :, None] ** np.arange(length)).real.sum(1)
    taps[:, 0] += modes.direct.numpy()
    return torch.from_numpy(taps)


@pytest.mark.parametrize("length", [200, 20000], ids=["every-tap", "every-third-tap"])
def test_filters_of_few_modes_are_found(length: int) -> None:
    slow = 1 - 8 / length
    h = oscillations([slow, 0.99 * slow * np.exp(0.05j), 0.97 * slow * np.exp(0.4j)], length)
    for order in (3, 6):  # as many as there are, and more
        modes = distill_filters(h, order)
        assert float(modes.errors.max()) < TOLERANCES["distill_exact"]
        torch.testing.assert_close(modes.norms, h.norm(dim=1))


def test_the_error_is_that_of_all_taps_and_falls_with_the_order() -> None:
    rng = torch.Generator().manual_seed(0)
    h = torch.randn(5, 300, generator=rng) * torch.exp(-torch.arange(300) / 60)
    errors = []
    for order in (2, 8, 24):
        modes = distill_filters(h, order)
        left = (h.double() - made(modes, 300)).norm(dim=1) / h.double().norm(dim=1)
        torch.testing.assert_close(modes.errors, left)
        assert float(modes.poles.abs().max()) < 1
        errors.append(float(left.max()))
        again = distill_filters(h, order)
        assert torch.equal(modes.poles, again.poles)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1


def test_refinement_beats_the_poles_it_began_with() -> None:
    """No filter is left as Kung's method gives it."""
    from xexport.models import _distill

    rng = torch.Generator().manual_seed(1)
    h = (torch.randn(6, 256, generator=rng) * torch.exp(-torch.arange(256) / 40)).double()
    first = _distill._Fit(h, _distill._first_poles(h[:, 1:], 6)).best.cost
    assert bool((distill_filters(h, 6).errors.square() < first).all())


def test_a_filter_of_zeros_stays_one() -> None:
    modes = distill_filters(torch.zeros(2, 64), 3)
    assert float(modes.residues.abs().max()) == float(modes.direct.abs().max()) == 0
    assert float(modes.errors.max()) == 0


@pytest.mark.parametrize("order", [0, 13])
def test_impossible_orders_are_refused(order: int) -> None:
    with pytest.raises(InputError, match="modes") as caught:
        distill_filters(torch.ones(2, 50), order)
    assert "1 to 12" in str(caught.value)


@pytest.fixture(scope="module", params=[2, 3], ids=["order-2", "order-3"])
def pair(request: Any) -> tuple[Hyena, HyenaDistilled]:
    """An exact model, and the same distilled to 5 modes."""
    exact: Hyena = FAMILY.build(dataclasses.replace(TINY, order=request.param))
    FAMILY.init(exact, 0)
    assert FAMILY.distill is not None
    config, tensors, _ = FAMILY.distill(exact.config, exact.state_dict(), 5, Silent())
    module = FAMILY.build(config)
    module.load_state_dict(tensors)
    return exact.eval().requires_grad_(False), module.eval().requires_grad_(False)


def test_chunk_law(pair: tuple[Hyena, HyenaDistilled]) -> None:
    check_cuts(pair[1], 2, [1, 7, 1, 30])


def test_it_is_the_exact_model_of_the_distilled_filters(pair: tuple[Hyena, HyenaDistilled]) -> None:
    """The exact form says the same, given the taps that the modes stand for."""
    exact, module = pair
    weights = exact.state_dict()
    for i in range(TINY.layers):
        for j in range(exact.config.order - 1):
            name = f"layers.{i}.filters.{j}"
            modes = distill_filters(weights[name], 5)
            weights[name] = made(modes, TINY.max_tokens).float()
    beside = Hyena(exact.config)
    beside.load_state_dict(weights)
    tokens = draw_tokens(2, TINY.max_tokens)
    with torch.no_grad():
        want = beside(tokens, *new_state(beside, 2))[0]
        got = module(tokens, *new_state(module, 2))[0]
    assert error(got, want) < TOLERANCES["model_fp32"]


def test_it_goes_on_beyond_the_filters(pair: tuple[Hyena, HyenaDistilled]) -> None:
    module = pair[1]
    assert module.max_tokens is None
    logits, *state = module(draw_tokens(1, 4 * TINY.max_tokens), *new_state(module, 1))
    assert bool(logits.isfinite().all())
    assert [tuple(s.shape) for s in state] == [(1, *s.shape[1:]) for s in module.state_spec()]


def test_source_says_what_it_was_and_what_it_costs() -> None:
    exact = resolve("hyena", preset="tiny")
    source = distilled(exact, 5)
    assert source.exact is exact
    assert source.contract.max_tokens is None
    assert source.config == exact.config | {"distilled_order": 5}
    text = "\n".join(source.notes)
    assert "distilled to 5 modes a filter: an approximation" in text
    for i in range(TINY.layers):
        assert f"layers.{i}.filters.1: relative L2 error of the 24 distilled filters" in text
    roles = {n: source._role(n) for n in source.tensors}
    assert {roles[n] for n in roles if n.endswith("poles")} == {"decay"}
    with pytest.raises(InputError, match="distilled already"):
        distilled(source, 5)


def test_what_has_no_long_filters_is_refused() -> None:
    with pytest.raises(InputError, match="no long filters") as caught:
        distilled(resolve("rwkv", preset="tiny"), 4)
    assert "hyena" in str(caught.value)
    own: Any = Hyena(TINY)
    with pytest.raises(InputError, match="no long filters"):
        distilled(from_module(own, "mine"), 4)


def test_distilled_filters_are_not_trained() -> None:
    with pytest.raises(InputError, match="not trained"):
        HyenaTrain(dataclasses.replace(TINY, distilled_order=4))


def test_init_of_a_distilled_model_is_that_of_the_exact_one_distilled() -> None:
    module = FAMILY.build(dataclasses.replace(TINY, distilled_order=4))
    FAMILY.init(module, 3)
    exact = FAMILY.build(TINY)
    FAMILY.init(exact, 3)
    assert torch.equal(module.state_dict()["embed.weight"], exact.state_dict()["embed.weight"])
    assert float(module.state_dict()["layers.0.filters.0.poles"].abs().max()) > 0


@pytest.fixture(scope="module")
def bundles(exporter: Exporter, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("distilled")
    return {t: exporter.export("hyena", t, root / t, preset="tiny", distill=5) for t in TARGETS}


@pytest.mark.parametrize("target", TARGETS)
def test_export(bundles: dict[str, Path], target: str) -> None:
    bundle = xexport.load(bundles[target])
    module: Any = distilled(resolve("hyena", preset="tiny"), 5).eager()
    tokens = np.random.default_rng(2).integers(0, module.vocab_size, 70)  # beyond the filters' 50 taps
    want = module(torch.from_numpy(tokens)[None], *new_state(module, 1))[0][0].numpy()
    stream = bundle.stream()
    at_once = stream.feed(tokens)[0]
    stream.reset()
    steps = np.concatenate([stream.feed([t])[0] for t in tokens])
    allowed = TOLERANCES[f"tiny_logits_{target.removeprefix('cpu-')}"]
    for got in (at_once, steps):
        assert float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))) < allowed
    assert bundle.manifest.model.max_tokens is None
    formats = {d.tensor: d.format for d in bundle.manifest.decisions if ".filters." in d.tensor}
    assert len(formats) == 8
    assert set(formats.values()) == {"float32"}
    assert "modal_conv" in {low.op for low in bundle.manifest.lowerings}


def test_the_price_is_measured_against_the_exact_filters(bundles: dict[str, Path]) -> None:
    bundle = xexport.load(bundles["cpu-int8"])
    rows = [r for r in read_records(bundle.path / "results.jsonl") if isinstance(r, Fidelity)]
    row = next(r for r in rows if r.setup.runner == "distilled")
    assert row.reference == "exact"
    assert 0 < row.tokens <= TINY.max_tokens
    figures = bundle.manifest.figures["distilled"]
    assert figures["bits_per_byte"]["exact"] == pytest.approx(row.bits_per_byte("reference")[0], rel=1e-3)
    assert figures["bits_per_byte"]["distilled"] == pytest.approx(row.bits_per_byte("candidate")[0], rel=1e-3)
    report = (bundle.path / "report.html").read_text(encoding="utf-8")
    assert "Its filters are distilled" in report
    assert "relative L2 error of the 24 distilled filters" in report
