"""Fidelity against closed forms, and results.jsonl."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xexport.core import stats
from xexport.core.errors import BundleError, InputError, OutputError
from xexport.core.records import Fidelity, Setup
from xexport.core.results import append_records, read_records
from xexport.evaluate.fidelity import compare
from xexport.evaluate.metrics import compare_logits
from xexport.evaluate.streaming import NonFiniteWarning

TEXT = np.random.default_rng(3).integers(0, 16, 300)


def test_kl_of_two_known_distributions() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.2, 0.2, 0.6])
    got = compare_logits(np.log(p)[None] + 5, np.log(q)[None] - 3, np.array([2]))
    assert got.kl[0] == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-12)
    assert got.nll_reference[0] == pytest.approx(-math.log(0.25), rel=1e-12)
    assert got.nll_candidate[0] == pytest.approx(-math.log(0.6), rel=1e-12)
    assert not got.same_top1[0]


def test_kl_is_stable_for_logits_of_thousands() -> None:
    big = np.array([[4000.0, -4000.0, 0.0]], np.float32)
    got = compare_logits(big, np.roll(big, 1, axis=1), np.array([0]))
    assert got.kl[0] == pytest.approx(4000.0)
    assert compare_logits(big, big, np.array([0])).kl[0] == 0.0


@settings(deadline=None)
@given(st.lists(st.floats(-30, 30), min_size=4, max_size=4), st.floats(-50, 50))
def test_a_constant_added_to_all_logits_changes_nothing_but_the_error(row: list[float], shift: float) -> None:
    a = np.array([row])
    got = compare_logits(a, a + shift, np.array([1]))
    assert abs(got.kl[0]) < 1e-12
    assert got.nll_candidate[0] == pytest.approx(got.nll_reference[0], abs=1e-9)
    assert got.error_max[0] == pytest.approx(abs(shift), abs=1e-9)


def test_a_uniform_model_costs_log2_of_the_vocabulary(fake_runner: Any, setup: Setup) -> None:
    row = compare(fake_runner(), {"bundle": fake_runner(uniform=True)}, TEXT, setup=setup)["bundle"]
    bits, error = row.bits_per_byte("candidate")
    assert bits == pytest.approx(4.0, abs=1e-5)  # rows keep six digits
    assert error == pytest.approx(0.0, abs=1e-9)
    assert row.perplexity("candidate")[0] == pytest.approx(16.0, rel=1e-5)


def test_bits_per_byte_counts_bytes_and_not_tokens(fake_runner: Any, setup: Setup) -> None:
    row = compare(fake_runner(), {"bundle": fake_runner(uniform=True)}, TEXT, setup=setup, text_bytes=598)
    assert row["bundle"].bits_per_byte("candidate")[0] == pytest.approx(2.0, abs=1e-5)


def test_a_model_against_itself_loses_nothing(fake_runner: Any, setup: Setup) -> None:
    row = compare(fake_runner(), {"onnx": fake_runner()}, TEXT, setup=setup)["onnx"]
    assert (row.max_error, row.rms_error, row.kl_percentile(100), row.agreement) == (0.0, 0.0, 0.0, 1.0)
    assert row.bits_lost == (0.0, 0.0)
    assert row.agreement_se > 0
    assert row.tokens == len(TEXT) - 1
    assert row.setup.runner == "onnx"


def test_coarser_rounding_has_a_higher_kl(fake_runner: Any, setup: Setup) -> None:
    steps = {
        "fine": fake_runner(step=0.05),
        "coarse": fake_runner(step=1.0),
        "coarser": fake_runner(step=4.0),
    }
    rows = compare(fake_runner(), steps, TEXT, setup=setup)
    kl = [rows[n].kl_mean for n in steps]
    assert 0 < kl[0] < kl[1] / 10 < kl[2] / 10
    assert rows["coarser"].agreement < rows["fine"].agreement
    assert rows["coarse"].max_error <= 0.5 + 1e-5
    # uniform rounding error of a step h has RMS h / sqrt(12)
    assert rows["coarse"].rms_error == pytest.approx(1 / math.sqrt(12), rel=0.05)
    assert rows["coarse"].relative_rms_error == pytest.approx(
        rows["coarse"].rms_error / math.sqrt(np.mean(rows["coarse"].reference_ms)), rel=1e-9
    )


@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_the_chunk_changes_no_figure(fake_runner: Any, setup: Setup, chunk: int) -> None:
    reference = fake_runner()
    rows = compare(
        reference, {"a": fake_runner(step=0.3), "b": fake_runner(step=0.6)}, TEXT, setup=setup, chunk=chunk
    )
    whole = compare(fake_runner(), {"a": fake_runner(step=0.3)}, TEXT, setup=setup, chunk=1000)
    assert rows["a"].kl == whole["a"].kl
    assert sum(reference.calls) == len(TEXT) - 1
    assert max(reference.calls) == min(chunk, len(TEXT) - 1)


def test_logits_that_are_not_finite_are_warned_of(fake_runner: Any, setup: Setup, tmp_path: Path) -> None:
    with pytest.warns(NonFiniteWarning, match="1 of 299"):
        row = compare(fake_runner(), {"bundle": fake_runner(bad_at=40)}, TEXT, setup=setup)["bundle"]
    assert row.non_finite == 1
    assert row.kl[40] is None
    assert row.same_top1[40] == 0
    assert math.isnan(row.kl_mean)
    assert math.isnan(row.bits_per_byte("candidate")[0])
    assert "not finite" in row.warnings[0]
    append_records(tmp_path / "results.jsonl", [row])
    assert read_records(tmp_path / "results.jsonl") == [row]


def test_a_text_longer_than_the_model_can_hold_is_cut_and_said_so(fake_runner: Any, setup: Setup) -> None:
    row = compare(fake_runner(), {"bundle": fake_runner(max_tokens=64)}, TEXT, setup=setup, text_bytes=598)
    assert row["bundle"].tokens == 64
    assert row["bundle"].text_bytes == 128
    assert "cut to 65 tokens" in row["bundle"].warnings[0]


@pytest.mark.parametrize(
    ("tokens", "what"), [([1], "too few"), ([1, 2, 99], "outside the vocabulary"), ([-1, 2, 3], "outside")]
)
def test_tokens_that_can_not_be_scored(fake_runner: Any, setup: Setup, tokens: list[int], what: str) -> None:
    with pytest.raises(InputError, match=what):
        compare(fake_runner(), {"bundle": fake_runner()}, tokens, setup=setup)


def test_a_batch_is_refused(fake_runner: Any, setup: Setup) -> None:
    with pytest.raises(InputError, match="batch 2"):
        compare(fake_runner(), {"bundle": fake_runner(batch=2)}, TEXT, setup=setup)


def test_block_error_of_independent_samples_is_the_usual_one() -> None:
    samples = np.random.default_rng(0).normal(size=3200)
    assert stats.block_se(samples) == pytest.approx(1 / math.sqrt(3200), rel=0.35)


def test_block_error_sees_correlation_that_the_usual_one_misses() -> None:
    runs = np.repeat(np.random.default_rng(0).normal(size=320), 10)
    naive = runs.std() / math.sqrt(len(runs))
    assert stats.block_se(runs) > 2 * naive


def test_binomial_error() -> None:
    assert stats.binomial_se(50, 100) == pytest.approx(0.05, rel=1e-3)
    assert 0 < stats.binomial_se(100, 100) < 0.01


def _row(fake_runner: Any, setup: Setup) -> Fidelity:
    return compare(fake_runner(), {"bundle": fake_runner(step=0.5)}, TEXT[:20], setup=setup)["bundle"]


def test_rows_repeat_their_configuration_and_survive_a_round_trip(
    fake_runner: Any, setup: Setup, tmp_path: Path
) -> None:
    path = tmp_path / "results.jsonl"
    row = _row(fake_runner, setup)
    append_records(path, [row])
    append_records(path, [row, row])
    assert read_records(path) == [row, row, row]
    plain = msgspec.json.decode(path.read_bytes().splitlines()[0])
    assert plain["kind"] == "fidelity"
    assert plain["setup"]["environment"]["cpu"] == setup.environment.cpu != ""
    assert plain["setup"]["model"] == "toy"
    assert len(plain["kl"]) == 19


def test_an_unfinished_last_line_is_passed_over(fake_runner: Any, setup: Setup, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    row = _row(fake_runner, setup)
    append_records(path, [row])
    with path.open("ab") as handle:
        handle.write(b'{"kind":"fidelity","setup":{"mod')
    assert read_records(path) == [row]
    append_records(path, [row])
    assert read_records(path) == [row, row]


@pytest.mark.parametrize("line", [b"not json\n", b'{"kind":"weather"}\n', b'{"kind":"drift"}\n', b"\xff\n"])
def test_a_broken_line_names_its_number(fake_runner: Any, setup: Setup, tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "results.jsonl"
    append_records(path, [_row(fake_runner, setup)])
    with path.open("ab") as handle:
        handle.write(line)
    with pytest.raises(BundleError, match="line 2"):
        read_records(path)


def test_no_results_yet(tmp_path: Path) -> None:
    assert read_records(tmp_path / "results.jsonl") == []


def test_results_that_can_not_be_written(fake_runner: Any, setup: Setup, tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        append_records(tmp_path / "nowhere" / "results.jsonl", [_row(fake_runner, setup)])
