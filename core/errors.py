"""Errors a user sees: what is wrong, what was got, what is allowed, how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BundleError",
    "CheckpointError",
    "ChunkLawError",
    "ExportError",
    "FormError",
    "InputError",
    "LimitError",
    "MissingDependencyError",
    "OutputError",
    "ParityError",
    "QuantError",
    "RuntimeFailure",
    "TargetError",
    "UnknownNameError",
    "XexportError",
    "first_line",
    "unknown_name",
]


class XexportError(Exception):
    """Base of every error xexport raises on purpose; the CLI prints it and exits with 1.

    Args:
        what: one sentence that says what is wrong.
        got: the offending value.
        allowed: what would have been accepted.
        fix: what the user can do about it.
    """

    def __init__(
        self, what: str, *, got: object = None, allowed: object = None, fix: str | None = None
    ) -> None:
        self.what = what
        self.got = got
        self.allowed = allowed
        self.fix = fix
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        for label, value in (("got", self.got), ("allowed", self.allowed), ("fix", self.fix)):
            if value is not None:
                lines.append(f"  {label}: {value}")
        return "\n".join(lines)


class UnknownNameError(XexportError):
    """A model, target, preset, scheme or option name that does not exist."""


class InputError(XexportError):
    """An argument (tokens, text, shape, number) that can't be used."""


class CheckpointError(XexportError):
    """A checkpoint that is missing, truncated, of a wrong layout or shape, or not finite."""


class ExportError(XexportError):
    """Tracing or lowering failed."""


class ParityError(ExportError):
    """ONNX Runtime and PyTorch disagree; names the layer where they first part."""


class ChunkLawError(ExportError):
    """Cutting the sequence differently changes the result: the model is not in the chunk form."""


class QuantError(XexportError):
    """A quantization scheme can't be applied."""


class TargetError(XexportError):
    """A target file is malformed, or its runtime can't run here."""


class OutputError(XexportError):
    """The output folder exists, can't be written, or the disk is full."""


class BundleError(XexportError):
    """A bundle is incomplete, was tampered with, or has an unknown schema version."""


class RuntimeFailure(XexportError):
    """The runtime refused or failed to run a bundle."""


class FormError(XexportError):
    """Something that only models of the other form, or with another kind of input, can do."""


class LimitError(XexportError):
    """A stream reached the model's maximum length."""


class MissingDependencyError(XexportError):
    """An optional package is needed for this command."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """An UnknownNameError that lists the known names and the nearest ones."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    fix = f"did you mean {' or '.join(near)}?" if near else f"choose one of: {', '.join(names)}"
    return UnknownNameError(f"unknown {kind} {name!r}", allowed=", ".join(names), fix=fix)


def first_line(error: Exception) -> str:
    """What a library's error says first, for the ``got`` of one of ours."""
    return str(error).strip().split("\n", 1)[0][:400]
