"""Sampling: greedy, temperature, top-k, top-p; the distribution itself, not only that it runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xexport.core.errors import InputError, RuntimeFailure
from xexport.runtimes.sampling import Sampler, probabilities

LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))


def test_temperature_one_is_softmax() -> None:
    np.testing.assert_allclose(probabilities(LOGITS, Sampler()), [0.5, 0.25, 0.15, 0.1], rtol=1e-6)


def test_temperature_is_a_power_of_the_odds() -> None:
    chances = probabilities(LOGITS, Sampler(temperature=0.5))
    np.testing.assert_allclose(chances[0] / chances[1], 4.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("top_p", "top_k", "kept"),
    [
        (1.0, 0, [0, 1, 2, 3]),
        (1.0, 1, [0]),
        (1.0, 3, [0, 1, 2]),
        (1.0, 9, [0, 1, 2, 3]),
        (0.4, 0, [0]),
        (0.6, 0, [0, 1]),
        (0.95, 0, [0, 1, 2, 3]),
        (0.7, 2, [0, 1]),  # top-k first: of 0.75 the half-and-a-bit that 0.5 alone (0.67) doesn't reach
        (0.6, 2, [0]),
    ],
)
def test_what_top_p_and_top_k_keep(top_p: float, top_k: int, kept: list[int]) -> None:
    chances = probabilities(LOGITS, Sampler(1.0, top_p, top_k))
    assert np.flatnonzero(chances).tolist() == kept
    np.testing.assert_allclose(chances.sum(), 1.0)


def test_ties_go_to_the_lower_id() -> None:
    flat = np.zeros(6, np.float32)
    assert np.flatnonzero(probabilities(flat, Sampler(top_k=2))).tolist() == [0, 1]
    assert Sampler(0).choose(flat, np.random.default_rng(0)) == 0


def test_drawn_frequencies_are_the_probabilities() -> None:
    rng, sampler = np.random.default_rng(0), Sampler(temperature=1.0, top_p=0.9)
    drawn = np.bincount([sampler.choose(LOGITS, rng) for _ in range(20_000)], minlength=4) / 20_000
    expected = probabilities(LOGITS, sampler)
    # four standard errors of the widest frequency; the seed is fixed
    assert np.abs(drawn - expected).max() < 4 * np.sqrt(0.25 / 20_000)
    assert drawn[3] == 0


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    st.floats(0.01, 10),
    st.floats(0.01, 1.0),
    st.integers(0, 50),
    st.integers(0, 2**32 - 1),
)
def test_a_choice_always_has_a_chance(
    logits: list[float], temperature: float, top_p: float, top_k: int, seed: int
) -> None:
    sampler = Sampler(temperature, top_p, top_k)
    row = np.array(logits, np.float32)
    choice = sampler.choose(row, np.random.default_rng(seed))
    assert probabilities(row, sampler)[choice] > 0


def test_greedy_draws_nothing() -> None:
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    assert Sampler(temperature=0).choose(LOGITS, rng) == 0
    assert rng.bit_generator.state == before


def test_a_masked_token_is_never_drawn() -> None:
    row = np.array([0.0, -np.inf, 0.0], np.float32)
    rng = np.random.default_rng(1)
    assert {Sampler().choose(row, rng) for _ in range(200)} == {0, 2}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(bad: float, temperature: float) -> None:
    row = np.array([0.0, bad, 1.0], np.float32)
    with pytest.raises(RuntimeFailure, match="not finite"):
        Sampler(temperature).choose(row, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": True}, "top_k"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options: dict[str, Any], name: str) -> None:
    with pytest.raises(InputError, match=name):
        Sampler(**options)
