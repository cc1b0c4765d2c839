"""The chunk law: what obeys it passes, what does not is caught with the cut that shows it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xexport.core.errors import InputError
from xexport.core.records import Setup
from xexport.evaluate.chunks import chunk_law, random_cuts

TEXT = np.random.default_rng(2).integers(0, 16, 97)


@settings(deadline=None)
@given(st.integers(2, 500), st.integers(1, 6), st.integers(0, 99))
def test_cuts_are_odd_add_up_and_repeat_with_their_seed(total: int, count: int, seed: int) -> None:
    cuts = random_cuts(total, count, seed)
    assert all(sum(c) == total for c in cuts)
    assert all(n % 2 == 1 for c in cuts for n in c[:-1])
    assert cuts == random_cuts(total, count, seed)


def test_a_runner_in_the_chunk_form_obeys(fake_runner: Any, setup: Setup) -> None:
    row = chunk_law(fake_runner(), TEXT, setup=setup)
    assert row.error < 1e-6
    assert row.start == 24
    assert row.tokens == 73
    assert len(row.cuts) == 5
    assert row.cuts[-1].pieces == (1,) * 73
    assert all(sum(c.pieces) == 73 for c in row.cuts)


def test_a_runner_that_breaks_the_law_is_caught(fake_runner: Any, setup: Setup) -> None:
    row = chunk_law(fake_runner(leak=0.01), TEXT, setup=setup)
    assert row.error > 1e-3
    assert row.worst.pieces == (1,) * 73
    assert row.worst.state == "layers.0.hidden"


def test_a_break_that_only_the_state_shows_is_caught(fake_runner: Any, setup: Setup) -> None:
    class Forgets(fake_runner):  # type: ignore[misc]
        def state(self) -> dict[str, Any]:
            return {"calls": np.array([float(len(self.calls))])}

    row = chunk_law(Forgets(), TEXT, setup=setup)
    assert row.worst.logit_error == pytest.approx(0.0, abs=1e-6)
    assert row.error > 0.1


def test_logits_that_are_not_finite_are_an_infinite_error(fake_runner: Any, setup: Setup) -> None:
    row = chunk_law(fake_runner(bad_at=50), TEXT, setup=setup)
    assert row.error == float("inf")
    assert row.worst.logit_error is None


def test_the_state_before_the_cuts_is_not_the_first_one(fake_runner: Any, setup: Setup) -> None:
    runner = fake_runner()
    chunk_law(runner, TEXT, setup=setup, start=10)
    assert runner.calls[:2] == [10, 87]
    assert runner.position == 0


def test_batches_and_limits(fake_runner: Any, setup: Setup) -> None:
    assert chunk_law(fake_runner(batch=3), TEXT, setup=setup).error < 1e-6
    assert chunk_law(fake_runner(max_tokens=20), TEXT, setup=setup).tokens == 15


@pytest.mark.parametrize(("tokens", "start"), [([1, 2], None), ([1, 2, 3, 4, 5], 4), ([1, 2, 3, 4, 5], -1)])
def test_too_little_to_cut(fake_runner: Any, setup: Setup, tokens: list[int], start: int | None) -> None:
    with pytest.raises(InputError):
        chunk_law(fake_runner(), tokens, setup=setup, start=start)
