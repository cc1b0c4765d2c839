"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["bytes_text", "count", "figure", "ms", "percent", "plus_minus", "shape", "times"]

MISSING = "–"


def figure(value: float | None, digits: int = 3) -> str:
    """``digits`` significant digits; exponents only for the very small; a dash for no number."""
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "infinite"
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.{max(digits - 2, 0)}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    places = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    return f"{value:,.{places}f}"


def plus_minus(value: float, error: float, places: int | None = None) -> str:
    """``value ± error``, both to the first two digits of the error."""
    if math.isnan(value):
        return MISSING
    if math.isnan(error) or error <= 0:
        return figure(value, 4) if places is None else f"{value:.{places}f}"
    if abs(value) < error / 100:
        value = 0.0  # the digits of a difference that is nothing but rounding
    if places is None and error < 1e-5 and abs(value) < 1e-3:
        return f"{figure(value)} ± {figure(error)}"
    if places is None:
        places = min(max(1 - math.floor(math.log10(error)), 0), 8)
    return f"{value:.{places}f} ± {error:.{places}f}"


def step_text(unit: str, count: int) -> str:
    """What one step of a stream feeds: ``one token``, ``one call of 4 frames``."""
    return f"one {unit}" if count == 1 else f"one call of {count} {unit}s"


def bytes_text(value: float | None) -> str:
    """Decimal units: 2,900,000 is 2.9 MB."""
    if value is None:
        return MISSING
    size = float(value)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.3g} {unit}"


def ms(value: float) -> str:
    """Milliseconds with a unit; microseconds where that reads better."""
    if math.isnan(value):
        return MISSING
    return f"{figure(value * 1000)} µs" if value < 0.1 else f"{figure(value)} ms"


def percent(fraction: float, places: int = 1) -> str:
    """A fraction as a percentage."""
    return MISSING if math.isnan(fraction) else f"{100 * fraction:.{places}f}%"


def times(ratio: float) -> str:
    """A ratio as in "3.1x"."""
    return MISSING if math.isnan(ratio) else f"{figure(ratio, 3 if ratio >= 1 else 2)}×"


def count(value: float) -> str:
    """A whole number with separators."""
    return MISSING if math.isnan(value) else f"{value:,.0f}"


def shape(dims: Sequence[int | str]) -> str:
    """``2 × 64``; a scalar is said so."""
    return "\u00a0×\u00a0".join(str(d) for d in dims) if dims else "scalar"
