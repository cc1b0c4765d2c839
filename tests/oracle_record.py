"""Keeps what the oracle tests measured, for the table of models.

With XEXPORT_RECORD_ORACLES=FILE every passed test marked ``oracle`` adds, under its family, the
largest error that it held against ``oracle_fp32``. Nothing is typed: the number is the one that the
test compared. A marker may name the two, ``@pytest.mark.oracle("transformers", family="rwkv4")``;
without, the family is the test file's and the oracle is the package that the test's code names.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tolerances import TOLERANCES

__all__ = ["Watched", "keep", "oracle_of"]

ROOT = Path(__file__).resolve().parents[1]
#: how a test's code names an oracle, where that is not the package's own name
_WORDS = {"fla": "fla-core", "rwkv_package": "rwkv", "published_test_model": "rwkv.cpp's test data"}


class Watched(float):
    """A tolerance that remembers the largest error, relative to it, that was found to be below it."""

    found: list[float]
    scale: float

    def __new__(cls, value: float, found: list[float] | None = None, scale: float = 1.0) -> Watched:
        made = super().__new__(cls, value)
        made.found = [] if found is None else found
        made.scale = scale
        return made

    def __mul__(self, factor: float) -> Watched:  # ``error <= tolerance * size of what was expected``
        return Watched(float(self) * factor, self.found, self.scale * factor)

    __rmul__ = __mul__

    # a plain float that is compared with a subclass asks the subclass first: error < tolerance
    def __gt__(self, other: Any) -> bool:
        return self._keep(other, float(self) > other)

    def __ge__(self, other: Any) -> bool:
        return self._keep(other, float(self) >= other)

    def _keep(self, other: Any, held: bool) -> bool:
        if held:
            self.found.append(float(other) / self.scale)
        return bool(held)


def watch(patch: pytest.MonkeyPatch) -> Watched:
    """Put a watched tolerance in the place of ``oracle_fp32``."""
    watched = Watched(TOLERANCES["oracle_fp32"])
    patch.setitem(TOLERANCES, "oracle_fp32", watched)
    return watched


def oracle_of(item: Any) -> tuple[str, str]:
    """(family, oracle) of a test."""
    marker = item.get_closest_marker("oracle")
    family = marker.kwargs.get("family") or _family(item)
    if marker.args:
        return family, marker.args[0]
    names = {line.partition("==")[0] for line in _lines() if "==" in line} | {"transformers"}
    words = {n.replace("-", "_").lower(): n for n in names} | _WORDS
    # the test itself first, then the helpers of its file that it calls
    own = inspect.getsource(item.function)
    helpers = [f for n, f in vars(item.module).items() if inspect.isfunction(f) and f"{n}(" in own]
    for text in (f"{item.name}\n{own}", *(inspect.getsource(f) for f in helpers)):
        found = [o for word, o in words.items() if re.search(rf"(?<![a-z]){word}(?![a-z])", text.lower())]
        if found:
            return family, max(found, key=len)
    return family, "its formulas"


def keep(path: Path, item: Any, largest: float) -> None:
    """Add a test's figure to the file."""
    family, oracle = oracle_of(item)
    rows: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    row = {"test": item.nodeid.rpartition("/")[2], "oracle": oracle, "error": largest}
    others = [r for r in rows.get(family, []) if r["test"] != row["test"]]
    rows[family] = sorted([*others, row], key=lambda r: str(r["test"]))
    path.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + "\n", encoding="utf-8")


def _family(item: Any) -> str:
    """The family whose test file this is; of several in one file, the one that the test's id names."""
    families = {p.stem for p in (ROOT / "models").glob("[a-z]*.py")}
    stem = Path(str(item.path)).stem.removeprefix("test_").removesuffix("_models")
    if stem in families:
        return stem
    text = re.sub(r"(\d)\.\d", r"\1", item.name)
    named = [
        f for f in families if f in text or (f[:-1] == stem.rstrip("0123456789") and f"[{f[-1]}" in text)
    ]
    return max(named, key=len, default=stem)


def _lines() -> list[str]:
    return (ROOT / "tests" / "oracles.txt").read_text("utf-8").splitlines()
