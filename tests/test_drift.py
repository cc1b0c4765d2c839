"""Drift over token index, and the error of the state."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from xexport.core.records import Drift, Setup
from xexport.evaluate.drift import compare_and_drift, state_errors, window_stops
from xexport.evaluate.fidelity import compare

TEXT = np.random.default_rng(5).integers(0, 16, 513)


def drift(*runners: Any, **options: Any) -> dict[str, Drift]:
    """The drift alone."""
    return compare_and_drift(*runners, **options)[1]


@pytest.mark.parametrize("spacing", ["log", "linear"])
@pytest.mark.parametrize("total", [1, 5, 17, 512, 8000])
def test_windows_cover_the_stream_once(total: int, spacing: str) -> None:
    ends = window_stops(total, 16, spacing)
    assert ends[-1] == total
    assert ends == sorted(set(ends))
    assert ends[0] >= 1


def test_a_drifting_runner_gets_worse_along_the_stream(fake_runner: Any, setup: Setup) -> None:
    row = drift(fake_runner(), {"bundle": fake_runner(drift=0.002)}, TEXT, setup=setup, windows=8)["bundle"]
    errors = [w.rms_error for w in row.windows]
    assert all(a < b for a, b in pairwise(errors))
    assert row.windows[-1].kl_mean > 100 * row.windows[0].kl_mean > 0
    state = [w.state_errors["layers.0.hidden"] or 0.0 for w in row.windows]
    assert state[-1] > 10 * state[0]
    assert row.windows[-1].worst_state[0] == "layers.0.hidden"


def test_a_runner_that_does_not_drift_stays_flat(fake_runner: Any, setup: Setup) -> None:
    row = drift(
        fake_runner(), {"bundle": fake_runner(step=0.5)}, TEXT, setup=setup, windows=4, spacing="linear"
    )["bundle"]
    errors = [w.rms_error for w in row.windows]
    assert max(errors) < 1.1 * min(errors)
    assert all(w.state_errors == {"layers.0.hidden": 0.0, "position": 0.0} for w in row.windows)


def test_windows_add_up_to_the_fidelity_of_the_whole(fake_runner: Any, setup: Setup) -> None:
    one = drift(fake_runner(), {"bundle": fake_runner(step=1.0)}, TEXT, setup=setup, chunk=50)["bundle"]
    whole = compare(fake_runner(), {"bundle": fake_runner(step=1.0)}, TEXT, setup=setup)["bundle"]
    assert sum(w.tokens for w in one.windows) == one.tokens == whole.tokens
    assert sum(w.kl_sum or 0 for w in one.windows) == pytest.approx(whole.kl_mean * whole.tokens, rel=1e-4)
    assert sum(w.same_top1 for w in one.windows) == sum(whole.same_top1)
    lost = sum(w.bits_lost * w.tokens for w in one.windows) / one.tokens
    assert lost == pytest.approx(whole.bits_lost[0], abs=1e-4)


def test_one_pass_gives_both_rows_and_runs_the_reference_once(fake_runner: Any, setup: Setup) -> None:
    reference = fake_runner()
    fidelity, drifts = compare_and_drift(
        reference, {"bundle": fake_runner(step=1.0)}, TEXT, setup=setup, text_bytes=1024
    )
    assert sum(reference.calls) == len(TEXT) - 1
    alone = compare(fake_runner(), {"bundle": fake_runner(step=1.0)}, TEXT, setup=setup, text_bytes=1024)
    assert fidelity == alone
    assert drifts == drift(fake_runner(), {"bundle": fake_runner(step=1.0)}, TEXT, setup=setup)


def test_a_stream_is_cut_at_the_models_limit(fake_runner: Any, setup: Setup) -> None:
    row = drift(fake_runner(), {"bundle": fake_runner(max_tokens=100)}, TEXT, setup=setup)["bundle"]
    assert row.tokens == 100
    assert "cut to 101" in row.warnings[0]


def test_a_window_that_is_not_finite_is_no_number(fake_runner: Any, setup: Setup) -> None:
    with pytest.warns(RuntimeWarning, match="not finite"):
        row = drift(fake_runner(), {"bundle": fake_runner(bad_at=300)}, TEXT, setup=setup)["bundle"]
    bad = next(w for w in row.windows if w.start <= 300 < w.stop)
    assert bad.kl_sum is None
    assert math.isnan(bad.kl_mean)
    assert row.non_finite == 1


def test_state_error_is_relative_and_names_what_can_not_be_compared() -> None:
    reference = {"a": np.full((2, 3), 2.0), "zero": np.zeros(4), "shape": np.zeros(3), "inf": np.ones(2)}
    candidate = {
        "a": np.full((2, 3), 2.2, np.float32),
        "zero": np.full(4, 0.5),
        "shape": np.zeros(2),
        "inf": np.array([np.inf, 1.0]),
        "extra": np.zeros(1),
    }
    got = state_errors(reference, candidate)
    assert got["a"] == pytest.approx(0.1, rel=1e-5)
    assert got["zero"] == 0.5
    assert got["shape"] is None
    assert got["inf"] is None
    assert "extra" not in got
