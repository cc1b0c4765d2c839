"""Quantization schemes as rows of data (schemes.toml): role of a parameter -> format, with the reason."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from xexport.core.errors import QuantError, unknown_name
from xexport.core.family import ROLES
from xexport.quant.ranges import METHODS

__all__ = ["FORMATS", "Activations", "Scheme", "get_scheme", "scheme_names"]

FORMATS = (
    "float32",
    "float16",
    "float16-product",
    "int8-rows",
    "int8-block",
    "int8-channel",
    "int8-dequantize",
    "int8-qdq",
    "int8-or-float16",
    "int8-or-float32",
    "int6-block",
    "int4-block",
)


@dataclass(frozen=True)
class Activations:
    """Fixed ranges around the products with int8-qdq weights: 8 or 16 bits, by one of ranges.METHODS.

    ``coarse``: where rounding would put a value off by more than this share of its RMS, what enters the
    product and what leaves it has 16 bits. None: all have ``bits``.
    """

    bits: int
    method: str
    coarse: float | None = None


@dataclass(frozen=True)
class Scheme:
    """One scheme.

    Attributes:
        name: the word that targets use as their ``precision``.
        description: one line for the report.
        formats: role -> format, complete over :data:`xexport.core.family.ROLES`.
        why: role -> reason.
        activations: how values between products are rounded; None leaves them as they are.
    """

    name: str
    description: str
    formats: Mapping[str, str]
    why: Mapping[str, str]
    activations: Activations | None = None


@cache
def _schemes() -> dict[str, Scheme]:
    rows = tomllib.loads((files("xexport.quant") / "schemes.toml").read_text(encoding="utf-8"))
    return {name: _parse(name, dict(row)) for name, row in rows.items()}


def _parse(name: str, row: dict[str, object]) -> Scheme:
    why = row.pop("why")
    description = str(row.pop("description"))
    default = str(row.pop("default"))
    activations = _activations(name, row.pop("activations", None))
    for role, fmt in row.items():
        if role not in ROLES:
            raise unknown_name(f"role in scheme {name!r}", role, ROLES)
        if fmt not in FORMATS:
            raise unknown_name(f"format in scheme {name!r}", str(fmt), FORMATS)
    if not isinstance(why, dict) or "default" not in why:
        raise QuantError(f"scheme {name!r} lacks its reasons", fix="give it a [NAME.why] table")
    formats = {role: str(row.get(role, default)) for role in ROLES}
    return Scheme(
        name, description, formats, {role: str(why.get(role, why["default"])) for role in ROLES}, activations
    )


def _activations(name: str, row: object) -> Activations | None:
    if row is None:
        return None
    found = dict(row) if isinstance(row, dict) else {}
    coarse = found.get("coarse")
    made = Activations(
        int(found.get("bits", 0)), str(found.get("method", "")), None if coarse is None else float(coarse)
    )
    if made.bits not in (8, 16) or made.method not in METHODS:
        raise QuantError(
            f"scheme {name!r} has bad activations",
            got=f"{made.bits} bits, {made.method!r}",
            allowed=f"8 or 16 bits, {', '.join(METHODS)}",
        )
    return made


def scheme_names() -> tuple[str, ...]:
    """The names of all schemes."""
    return tuple(sorted(_schemes()))


def get_scheme(name: str) -> Scheme:
    """The scheme of that name.

    Raises:
        UnknownNameError: with the nearest names.
    """
    if name not in _schemes():
        raise unknown_name("scheme", name, _schemes())
    return _schemes()[name]
