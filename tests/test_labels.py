"""Labels of a chart's points: none covers another or a point, whatever the points are."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xexport.report import charts_pareto
from xexport.report.labels import Box, Spot, place
from xexport.report.pareto import Point

FRAME = Box(0, 0, 860, 330)
NAMES = ("PyTorch", "ONNX fp32", "cpu-int8", "openvino-int8", "webgpu-fp32")


def marks(points: Sequence[tuple[float, float]]) -> list[Box]:
    return [Box(x - 6, y - 6, x + 6, y + 6) for x, y in points]


def covered(points: Sequence[tuple[float, float]], spots: Sequence[Spot]) -> float:
    """The area that labels share with each other, with points, and with what is outside of the frame."""
    boxes = [s.box for s in spots]
    between = sum(a.shared(b) for a, b in itertools.combinations(boxes, 2))
    outside = sum((b.right - b.left) * (b.bottom - b.top) - b.shared(FRAME) for b in boxes)
    return between + outside + sum(b.shared(m) for b in boxes for m in marks(points))


def test_a_label_alone_stands_where_it_was_asked_to() -> None:
    (spot,) = place([(400, 100)], ["cpu-int8"], FRAME, ["top right"])
    assert (spot.side, spot.x, spot.y) == ("top right", 400, 100)
    assert spot.box.left > 400
    assert spot.box.bottom < 100


def test_two_points_in_one_place_have_labels_side_by_side() -> None:
    points = [(400.0, 100.0), (401.0, 101.0)]
    spots = place(points, ["cpu-int8", "cpu-int4"], FRAME)
    assert covered(points, spots) == 0
    assert [(s.x, s.y) for s in spots] == points, "both beside their points: no line is needed"


def test_at_the_edge_a_label_turns_inwards() -> None:
    (spot,) = place([(855, 325)], ["openvino-int8"], FRAME)
    assert spot.side == "top left"


def test_a_crowd_is_led_away_by_lines() -> None:
    points = [(430 + 3.0 * (i % 4), 160 + 3.0 * (i // 4)) for i in range(20)]
    spots = place(points, [NAMES[i % 5] for i in range(20)], FRAME)
    assert covered(points, spots) == 0
    assert any((s.x, s.y) != p for s, p in zip(spots, points, strict=True))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(40, 820), st.floats(20, 310)), min_size=1, max_size=24))
def test_no_label_covers_another(points: list[tuple[float, float]]) -> None:
    spots = place(points, [NAMES[i % 5] for i in range(len(points))], FRAME)
    assert covered(points, spots) == 0


@pytest.mark.parametrize("apart", [0.0, 1e-5], ids=["one place", "nearly"])
def test_every_label_of_the_chart_is_there_once(monkeypatch: pytest.MonkeyPatch, apart: float) -> None:
    labels = [f"target-{i}" for i in range(16)]
    found = [
        Point(f"m{i % 2}", label, "bundle", 1 + i * apart, 2 + i * apart, 0.01, "")
        for i, label in enumerate(labels)
    ]
    monkeypatch.setattr(charts_pareto, "points", lambda _: [*found, Point("m0", "far", "torch", 9, 3, 0, "")])
    traces = json.loads(str(charts_pareto.scatter([])))["data"]
    shown = [t for trace in traces for t in trace.get("text", ()) if t]
    assert sorted(shown) == sorted([*labels, "far"])
    led = [t for t in traces if t["mode"] == "lines+text"]
    assert {t["legendgroup"] for t in led} <= {"m0", "m1"}
    assert led, "sixteen labels of one point don't fit beside it"
    for trace in led:
        assert trace["showlegend"] is False
        assert trace["x"][2::3] == [None] * (len(trace["x"]) // 3), "one line ends before the next begins"
