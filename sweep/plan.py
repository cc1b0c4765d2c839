"""The grid: which models on which targets, every cell with all that makes its figures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import xexport
from xexport.core.errors import CheckpointError, InputError, UnknownNameError, unknown_name
from xexport.core.registry import family_aliases, family_names
from xexport.core.target import get_target, target_names

__all__ = ["Cell", "make_plan", "match_targets"]


@dataclass(frozen=True)
class Cell:
    """One model on one target.

    Attributes:
        model: a family, or the absolute path of a checkpoint.
        target: where it is to run.
        preset, seed: random weights of a named size instead of the checkpoint that ships with xexport.
        eval_text: absolute path of the text to judge on; None is the built-in one.
        steps, prefill, threads: what is timed; None and () are the defaults of ``xexport profile``.
        digest: of all that the figures depend on. A cell whose digest changed is made anew.
    """

    model: str
    target: str
    preset: str | None = None
    seed: int = 0
    eval_text: str | None = None
    steps: int | None = None
    prefill: tuple[int, ...] = ()
    threads: int | None = None
    digest: str = ""

    @property
    def id(self) -> str:
        """Its name, and that of its bundle's folder: ``rwkv-cpu-int8``, ``rwkv-tiny-cpu-int8``."""
        middle = f"-{self.preset}" if self.preset else ""
        return f"{_label(self.model)}{middle}-{self.target}"

    @property
    def group(self) -> str:
        """What a worker must be able to run: the target's name up to the first hyphen."""
        return self.target.partition("-")[0]


def make_plan(
    models: Sequence[str],
    targets: Iterable[str],
    *,
    preset: str | None = None,
    seed: int = 0,
    eval_text: str | Path | None = None,
    steps: int | None = None,
    prefill: Sequence[int] = (),
    threads: int | None = None,
) -> list[Cell]:
    """Every model on every target, all of it checked before the first export begins.

    Args:
        models: families, or paths of checkpoints.
        targets: names or patterns (``cpu-*``).
        preset, seed, eval_text, steps, prefill, threads: for every cell; see :class:`Cell`.

    Raises:
        UnknownNameError: a model or a target that does not exist, or a pattern that no target matches.
        CheckpointError: a path that does not exist.
        InputError: nothing to do, two models of one name, or a text that is not there.
    """
    names = match_targets(targets)
    found = [_model(m, preset) for m in dict.fromkeys(models)]
    if not found:
        raise InputError("a sweep needs at least one model", fix="name some; `xexport models` lists them")
    labels = [_label(m) for m in found]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise InputError("two models would have the same name", got=twice, fix="rename one of the files")
    text = _text(eval_text)
    cells = [
        Cell(model, target, preset, seed, text, steps, tuple(prefill), threads)
        for model in found
        for target in names
    ]
    return [replace(cell, digest=_digest(cell)) for cell in cells]


def match_targets(patterns: Iterable[str]) -> list[str]:
    """Targets that the patterns name, each once, in the order of the patterns.

    Raises:
        UnknownNameError: a pattern that no target matches.
        InputError: no pattern.
    """
    found: dict[str, None] = {}
    wanted = [p.strip() for p in patterns if p.strip()]
    if not wanted:
        raise InputError("a sweep needs at least one target", allowed=", ".join(target_names()))
    for pattern in wanted:
        matched = [name for name in target_names() if fnmatchcase(name, pattern)]
        if not matched:
            raise unknown_name("target", pattern, target_names())
        found |= dict.fromkeys(matched)
    return list(found)


def _model(name: str, preset: str | None) -> str:
    aliases = family_aliases()
    if name in family_names() or name in aliases:
        family = aliases.get(name, name)
        if preset is None:
            _require_weights(family)
        return family
    path = Path(name)
    if path.exists():
        if preset is not None:
            raise InputError("--preset is for families, not for a checkpoint", got=name)
        return str(path.resolve())
    if any(mark in name for mark in "/\\."):
        raise CheckpointError("the checkpoint does not exist", got=name, fix="check the path")
    error: UnknownNameError = unknown_name("model", name, {*family_names(), *aliases})
    raise error


def _require_weights(family: str) -> None:
    from xexport.zoo import checkpoint_path, shipped

    if checkpoint_path(family) is None:
        raise InputError(
            f"xexport ships no trained checkpoint of {family}",
            allowed=f"trained ones: {', '.join(shipped())}",
            fix="sweep random weights of one size with --preset zoo, or name your checkpoint's path",
        )


def _text(path: str | Path | None) -> str | None:
    if path is None:
        return None
    if not Path(path).is_file():
        raise InputError("the text to judge on is not there", got=path)
    return str(Path(path).resolve())


def _label(model: str) -> str:
    path = Path(model)
    return (path.name if path.is_dir() else path.stem) if path.is_absolute() else model


def _digest(cell: Cell) -> str:
    """Hash of the options, the target's row, the weights' and the text's files, and xexport's version."""
    row: dict[str, Any] = asdict(cell)
    row["row"] = get_target(cell.target).row()
    row["version"] = xexport.__version__
    row["files"] = [_file_facts(p) for p in (cell.model, cell.eval_text) if p and Path(p).is_absolute()]
    if not Path(cell.model).is_absolute() and cell.preset is None:
        from xexport.zoo import checkpoint_path

        row["files"].append(_file_facts(str(checkpoint_path(cell.model))))
    return hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _file_facts(path: str) -> list[Any]:
    """Name, size and time of a file, or of the files of a folder: what changes if the weights do."""
    root = Path(path)
    files = sorted(root.iterdir()) if root.is_dir() else [root]
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files if p.is_file()]
