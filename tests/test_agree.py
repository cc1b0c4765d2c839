"""How far apart two runtimes are: of a cache, the rows in use are the measure."""

from __future__ import annotations

import numpy as np
import pytest

from xexport.core.manifest import Appended, StateTensor
from xexport.evaluate.agree import furthest

CACHE = StateTensor(
    "keys", "keys.out", "float32", ("B", 1, 400, 4), 0.0, Appended("cached_attention", 2, "at")
)
PLAIN = StateTensor("sum", "sum.out", "float32", ("B", 4), 0.0)


def values(seed: int, rows: int) -> dict[str, np.ndarray]:
    """A cache of 400 rows with ``rows`` in use, and a state that is all in use."""
    rng = np.random.default_rng(seed)
    keys = np.zeros((1, 1, 400, 4), np.float32)
    keys[:, :, :rows] = rng.choice([-1.0, 1.0], (1, 1, rows, 4))
    return {"keys": keys, "sum": np.ones((1, 4), np.float32), "at": np.array([rows])}


def test_an_empty_part_of_a_cache_does_not_make_an_error_large() -> None:
    want, got = values(0, 4), values(0, 4)
    got["keys"] = want["keys"] * np.float32(1.01)
    assert furthest(want, got, [CACHE, PLAIN])[1] == pytest.approx(0.01, rel=1e-3)
    assert furthest(want, got, [PLAIN])[1] == pytest.approx(0.1, rel=1e-3)


def test_what_is_written_behind_the_rows_in_use_is_seen() -> None:
    want, got = values(0, 4), values(0, 4)
    got["keys"][0, 0, 300, 2] = 0.5
    assert furthest(want, got, [CACHE, PLAIN]) == ("keys", pytest.approx(0.5, rel=1e-3))


@pytest.mark.parametrize("rows", [0, 400, 401])
def test_a_cache_may_be_empty_or_full(rows: int) -> None:
    want, got = values(0, min(rows, 400)), values(0, min(rows, 400))
    want["at"][0] = got["at"][0] = rows
    got["sum"][0, 1] = np.nan
    assert furthest(want, got, [CACHE, PLAIN]) == ("sum", np.inf)
    assert furthest(want, want, [CACHE, PLAIN])[1] == 0
