"""Latency, memory, profile and bandwidth: raw samples in, derived numbers out."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from xexport.core.contract import Contract
from xexport.core.errors import FormError, InputError, RuntimeFailure
from xexport.core.records import AtPosition, Bandwidth, Latency, PairedLatency, Prefill, Setup
from xexport.evaluate.bandwidth import measure_bandwidth
from xexport.evaluate.latency import measure_latency, paired_latency
from xexport.evaluate.memory import measure_memory
from xexport.evaluate.optimes import parse_profile, profile_ops
from xexport.evaluate.suite import Sizes, sizes_asked

TOKENS = list(range(16))


def test_derived_numbers_come_from_the_raw_samples(setup: Setup) -> None:
    row = Latency(
        setup=setup,
        batch=2,
        warmup=0,
        step_ns=tuple(range(1_000_000, 101_000_001, 1_000_000)),
        prefill=(Prefill(128, (2_000_000, 1_000_000, 9_000_000)), Prefill(512, (4_000_000,))),
        load_ns=(5_000_000, 7_000_000, 6_000_000),
    )
    assert row.step_ms(50) == 51.0
    assert row.step_ms(90) == 91.0
    assert row.step_ms(99) == 100.0
    assert row.decode_tokens_per_s == pytest.approx(2 * 1000 / 51)
    assert row.prefill[0].tokens_per_s == pytest.approx(64_000)
    assert row.prefill_tokens_per_s == pytest.approx(128_000)
    assert row.load_ms == 6.0
    assert np.isnan(row.first_token_ms)


def test_what_is_fed_when(fake_runner: Any, setup: Setup) -> None:
    runner = fake_runner()
    opened: list[Any] = []

    def open_runner() -> Any:
        opened.append(fake_runner())
        return opened[-1]

    row = measure_latency(
        runner,
        TOKENS,
        setup=setup,
        warmup=3,
        steps=7,
        prefill=(5, 9),
        repeats=2,
        positions=(40,),
        samples=4,
        open_runner=open_runner,
        loads=2,
        prompt=6,
    )
    assert runner.calls == [1] * 10 + [5] * 3 + [9] * 3 + [40] + [1] * 4
    assert [r.calls for r in opened] == [[6], [6]]
    assert len(row.step_ns) == 7
    assert [(p.length, len(p.ns)) for p in row.prefill] == [(5, 2), (9, 2)]
    assert [(p.position, len(p.ns)) for p in row.positions] == [(40, 3)]
    assert (len(row.load_ns), len(row.first_token_ns), row.prompt) == (2, 2, 6)
    assert min(*row.step_ns, *row.load_ns, *row.first_token_ns) > 0
    assert runner.position == 0
    assert gc.isenabled()


def test_times_are_those_of_the_runner(fake_runner: Any, setup: Setup) -> None:
    row = measure_latency(
        fake_runner(delay=0.002), TOKENS, setup=setup, warmup=1, steps=10, prefill=(4,), repeats=2
    )
    assert 2.0 <= row.step_ms(50) < 200.0
    assert row.step_ms(99) >= row.step_ms(50)
    assert 4 / 0.2 < row.prefill_tokens_per_s <= 4 / 0.002


def test_positions_next_to_each_other_are_each_timed_where_they_are(fake_runner: Any, setup: Setup) -> None:
    """The steps at 40 go beyond 42: the stream begins again."""
    runner, near = fake_runner(), (42, 40, 0)
    row = measure_latency(
        runner, TOKENS, setup=setup, warmup=0, steps=1, prefill=(), positions=near, samples=4
    )
    assert runner.calls == [1, *[1] * 4, 36, *[1] * 4, 42, *[1] * 4]
    assert [p.position for p in row.positions] == [0, 40, 42]


def test_what_a_user_asks_for_takes_the_place_of_the_usual() -> None:
    sizes, contract = Sizes(), Contract(max_tokens=100)
    asked = sizes_asked(sizes, contract, steps=3, positions=(60, 0, 60))
    assert (asked.steps, asked.positions, asked.prefill) == (3, (0, 60), sizes.prefill)
    assert sizes_asked(sizes, contract, prefill=(7,)).prefill == (7,)


@pytest.mark.parametrize(
    ("asked", "message", "got"),
    [
        ({"steps": 0}, "--steps is too small", 0),
        ({"prefill": (8, 0)}, "--prefill is too small", 0),
        ({"positions": (-1,)}, "--position is too small", -1),
        ({"positions": (80, 81)}, "ends before --position 81", "81, and 20 steps from there"),
    ],
)
def test_what_can_not_be_timed_is_refused(asked: dict[str, Any], message: str, got: Any) -> None:
    with pytest.raises(InputError, match=message) as caught:
        sizes_asked(Sizes(), Contract(max_tokens=100), **asked)
    assert caught.value.got == got


def test_a_model_of_whole_sequences_has_no_positions() -> None:
    with pytest.raises(FormError, match="position of a stream"):
        sizes_asked(Sizes(), Contract(form="whole"), positions=(5,))


def test_a_growing_cost_shows_at_later_positions(fake_runner: Any, setup: Setup) -> None:
    row = measure_latency(
        fake_runner(delay_per_token=4e-5),
        TOKENS,
        setup=setup,
        steps=5,
        prefill=(),
        positions=(100, 500),
        samples=5,
    )
    near, far = row.positions
    assert (near.position, far.position) == (100, 500)
    assert far.median_ms > 2 * near.median_ms


def test_a_bounded_stream_is_never_overrun(fake_runner: Any, setup: Setup) -> None:
    runner = fake_runner(max_tokens=32)
    row = measure_latency(runner, TOKENS, setup=setup, prefill=(16, 64), positions=(8, 30), samples=4)
    assert len(row.step_ns) + row.warmup == 32
    assert [p.length for p in row.prefill] == [16]
    assert [p.position for p in row.positions] == [8]


def test_no_tokens(fake_runner: Any, setup: Setup) -> None:
    with pytest.raises(InputError, match="no tokens"):
        measure_latency(fake_runner(), [], setup=setup)


def test_paired_rounds_alternate_and_give_the_ratio(fake_runner: Any, setup: Setup) -> None:
    slow, fast = fake_runner(delay=0.02), fake_runner(delay=0.002)
    row = paired_latency(fast, slow, TOKENS, setup=setup, other_name="torch", rounds=6, steps=3, warmup=1)
    ratio, low, high = row.speedup
    assert 1.5 < low <= ratio <= high < 11
    assert [len(r) for r in row.ns] == [len(r) for r in row.other_ns] == [3] * 6


def test_the_interval_of_equal_runners_holds_one(setup: Setup) -> None:
    rng = np.random.default_rng(0)
    rounds = tuple(tuple(int(v) for v in rng.normal(1e6, 1e5, 10)) for _ in range(40))
    row = PairedLatency(setup=setup, other="torch", ns=rounds[:20], other_ns=rounds[20:])
    _, low, high = row.speedup
    assert low < 1 < high
    assert high - low < 0.2


def _event(name: str, ts: int, dur: int, op: str | None = None, index: int = 0) -> dict[str, Any]:
    args = {"op_name": op, "provider": "CPUExecutionProvider", "node_index": str(index)} if op else {}
    return {"name": name, "ts": ts, "dur": dur, "tid": 1, "args": args}


def _write(path: Path, events: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(events), encoding="utf-8")
    return path


def test_a_profile_counts_each_moment_once(setup: Setup, tmp_path: Path) -> None:
    events = []
    for call in range(3):
        at = 1000 * call
        events += [
            _event("a_kernel_time", at + 12, 5, "Mul", 0),  # inside the Scan
            _event("a_kernel_time", at + 20, 5, "Mul", 0),
            _event("scan_kernel_time", at + 10, 20, "Scan", 0),
            _event("m1_kernel_time", at + 30, 40, "MatMul", 1),
            _event("m2_kernel_time", at + 70, 60, "MatMul", 2),
            _event("model_run", at, 150),
        ]
    row = parse_profile(_write(tmp_path / "p.json", events), setup=setup, skip=1)
    assert row.calls == 2
    assert row.run_ns == (150_000, 150_000)
    assert {(o.op, o.nodes, o.calls, o.ns) for o in row.ops} == {
        ("Scan", 1, 2, 20_000),
        ("Mul", 1, 4, 20_000),
        ("MatMul", 2, 4, 200_000),
    }
    assert row.by_op == [("MatMul", 100.0, 2), ("Mul", 10.0, 1), ("Scan", 10.0, 1)]
    assert row.placement == {"CPUExecutionProvider": 4}


def test_nodes_of_two_bodies_are_told_apart_and_neighbours_are_not_nested(
    setup: Setup, tmp_path: Path
) -> None:
    events = [
        _event("if_a_kernel_time", 0, 20, "If", 0),
        _event("mul_kernel_time", 5, 10, "Mul", 0),
        _event("if_b_kernel_time", 20, 20, "If", 1),
        _event("mul_kernel_time", 25, 10, "Mul", 0),
        _event("add_kernel_time", 40, 3, "Add", 2),
        _event("sub_kernel_time", 40, 0, "Sub", 3),
        _event("model_run", 0, 50),
    ]
    row = parse_profile(_write(tmp_path / "p.json", events), setup=setup)
    assert {(o.op, o.nodes, o.ns) for o in row.ops} == {
        ("If", 2, 20_000),
        ("Mul", 2, 20_000),
        ("Add", 1, 3000),
        ("Sub", 1, 0),
    }


def test_a_profile_that_is_none(setup: Setup, tmp_path: Path) -> None:
    with pytest.raises(RuntimeFailure, match="too few"):
        parse_profile(_write(tmp_path / "p.json", [_event("model_run", 0, 5)]), setup=setup, skip=1)
    (tmp_path / "q.json").write_text("{", encoding="utf-8")
    with pytest.raises(RuntimeFailure, match="can't be read"):
        parse_profile(tmp_path / "q.json", setup=setup)


def test_profile_of_a_real_bundle(toy_bundle: Path, setup: Setup) -> None:
    row = profile_ops(toy_bundle, TOKENS, setup=setup, steps=8, warmup=2, threads=1)
    assert row.calls == len(row.run_ns) == 8
    assert row.form == "step"
    assert {"Gather", "MatMul", "CumSum"} <= {o.op for o in row.ops}
    assert set(row.placement) == {"CPUExecutionProvider"}
    assert sum(us for _, us, _ in row.by_op) * row.calls * 1000 <= sum(row.run_ns)
    many = profile_ops(toy_bundle, TOKENS, setup=setup, steps=2, warmup=1, tokens_per_call=33, threads=1)
    assert (many.form, many.tokens_per_call) == ("prefill", 33)


def test_latency_of_a_real_bundle(toy_bundle: Path, setup: Setup) -> None:
    import xexport

    row = measure_latency(
        xexport.load(toy_bundle).stream(threads=1),
        TOKENS,
        setup=setup,
        warmup=2,
        steps=10,
        prefill=(16,),
        repeats=2,
        open_runner=lambda: xexport.load(toy_bundle).stream(threads=1),
        loads=2,
    )
    assert 0 < row.step_ms(50) < row.load_ms
    assert row.prefill_tokens_per_s > 0
    assert row.first_token_ms > 0


def test_memory_of_a_real_bundle_in_its_own_process(toy_bundle: Path, setup: Setup) -> None:
    row = measure_memory(toy_bundle, setup=setup, weights_bytes=100, state_bytes=72, tokens=10)
    assert row.tokens == 10
    assert 1 << 20 < row.start_rss <= row.peak_rss
    assert row.added_rss == row.peak_rss - row.start_rss
    # a process that loaded this test's own libraries (torch among them) would be far larger
    assert row.peak_rss < 400 << 20


def test_memory_of_what_is_no_bundle(tmp_path: Path, setup: Setup) -> None:
    with pytest.raises(RuntimeFailure, match="memory failed"):
        measure_memory(tmp_path, setup=setup, weights_bytes=0, state_bytes=0)


def test_bandwidth_and_its_floor(setup: Setup) -> None:
    row = measure_bandwidth(8 << 20, setup=setup, buffer_bytes=64 << 20, repeats=3)
    assert 1e8 < row.bytes_per_s < 2e12
    made = Bandwidth(setup=setup, threads=1, buffer_bytes=1000, read_ns=(200, 100), bytes_per_token=5000)
    assert made.bytes_per_s == 1e10
    assert made.floor_ms == pytest.approx(0.0005)
    assert made.fraction(0.001) == pytest.approx(0.5)


def test_rows_are_plain_data(setup: Setup) -> None:
    row = AtPosition(100, (1, 2, 3))
    assert msgspec.json.decode(msgspec.json.encode(row), type=AtPosition) == row
