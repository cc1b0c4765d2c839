"""Where the labels of a chart's points go, so that none covers another or a point.

A label stands beside its point, in one of eight places, if one of them is free; else away from it, at the
end of a line. The labels are placed one after another, those with the most neighbours first, each in the
first place that is free. Everything is counted in pixels: a chart knows its axes, and about how wide it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

__all__ = ["Box", "Spot", "place", "width_of"]

_LETTER, _HEIGHT = 7.0, 17.0  # of the page's 13 px letters; a little more than most are
_MARK = 8.0  # half of a point's side, with its line
_GAP = 9.0  # between a point and its label
_NEAR = 60.0  # other points nearer than this may be in the way
_RINGS = (26.0, 40.0, 56.0, 74.0, 94.0, 116.0, 140.0, 166.0)
_ANGLES = 16
#: plotly's names of the places beside a point: step to the right, step down
_BESIDE = {
    "bottom right": (1, 1),
    "top right": (1, -1),
    "middle right": (1, 0),
    "bottom left": (-1, 1),
    "top left": (-1, -1),
    "middle left": (-1, 0),
    "bottom center": (0, 1),
    "top center": (0, -1),
}


class Box(NamedTuple):
    """A rectangle in pixels; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def shared(self, other: Box) -> float:
        """The area that both cover."""
        across = min(self.right, other.right) - max(self.left, other.left)
        down = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(across, 0.0) * max(down, 0.0)


class Spot(NamedTuple):
    """Where one label goes.

    Attributes:
        side: plotly's ``textposition`` of it, seen from (``x``, ``y``).
        x, y: pixels; the point itself, or the end of a line that leads from it.
        box: what the label covers.
    """

    side: str
    x: float
    y: float
    box: Box


def width_of(text: str) -> float:
    """About how many pixels a label is wide."""
    return _LETTER * len(text)


def place(
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    frame: Box,
    first: Sequence[str] | None = None,
) -> list[Spot]:
    """A spot for every label.

    Args:
        points: pixels of the points.
        texts: their labels, of one line each.
        frame: what the labels must stay within.
        first: the side that each is tried on before the others; bottom right by default.

    Returns:
        In the order of the points. Where no place is free at all, labels cover each other as little as
        possible.
    """
    marks = [Box(x - _MARK, y - _MARK, x + _MARK, y + _MARK) for x, y in points]
    spots: dict[int, Spot] = {}

    def cost(index: int, spot: Spot) -> float:
        """What a label there would cover, and how much of it would be outside."""
        others = [s.box for s in spots.values()]
        covered = sum(spot.box.shared(box) for box in (*marks, *others))
        whole = (spot.box.right - spot.box.left) * (spot.box.bottom - spot.box.top)
        return covered + 2 * (whole - spot.box.shared(frame))

    def crowded(index: int) -> int:
        x, y = points[index]
        return -sum(abs(a - x) + abs(b - y) < _NEAR for a, b in points)

    for index in sorted(range(len(points)), key=crowded):
        side = first[index] if first else "bottom right"
        options = list(_options(points[index], width_of(texts[index]), side))
        spots[index] = min(options, key=lambda spot: cost(index, spot))
    return [spots[i] for i in range(len(points))]


def _options(point: tuple[float, float], width: float, first: str) -> Iterator[Spot]:
    """Places for one label, the best first: beside its point, then ever farther away."""
    x, y = point
    for side in dict.fromkeys((first, *_BESIDE)):
        right, down = _BESIDE[side]
        yield Spot(side, x, y, _box(x + _GAP * right, y + _GAP * down, width, right, down))
    for ring in _RINGS:
        for turn in range(_ANGLES):
            angle = 2 * math.pi * (turn + 0.5) / _ANGLES
            at = x + 1.4 * ring * math.cos(angle), y + ring * math.sin(angle)
            right = 1 if at[0] > x else -1
            yield Spot("middle right" if right > 0 else "middle left", *at, _box(*at, width, right, 0))


def _box(x: float, y: float, width: float, right: int, down: int) -> Box:
    """A label's box from the corner, or the middle of the side, that it is hung on."""
    left = x - width * (1 - right) / 2
    top = y - _HEIGHT * (1 - down) / 2
    return Box(left, top, left + width, top + _HEIGHT)
