"""Which tokenizer goes into a bundle: named by the user, or found beside the checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from xexport.core.errors import InputError
from xexport.runtimes.tokenizers import Tokenizer, load_tokenizer

__all__ = ["Shipped", "find_tokenizer"]

_WORLD = "rwkv_vocab*.txt"
_HUGGING_FACE = "tokenizer.json"
#: kinds that need no file
_NO_FILE = ("bytes", "dna", "none")
#: what the file of a kind is called in a bundle
_NAMES = {"rwkv-world": "rwkv_vocab.txt", "huggingface": _HUGGING_FACE}


@dataclass(frozen=True)
class Shipped:
    """A tokenizer on its way into a bundle.

    Attributes:
        row: what the manifest says of it.
        path: its file, or None if it needs none.
        why: what the user should know about it.
    """

    row: Mapping[str, Any]
    path: Path | None = None
    why: str = ""
    _loaded: list[Tokenizer] = field(default_factory=list, repr=False, compare=False)

    def load(self) -> Tokenizer:
        """The tokenizer, from where its file is now; read once."""
        if not self._loaded:
            path = self.path
            here = self.row if path is None else {**self.row, "file": path.name}
            self._loaded.append(load_tokenizer(here, path.resolve().parent if path else Path()))
        return self._loaded[0]

    def copy_to(self, folder: Path) -> list[Path]:
        """Put its file into a bundle, and return where it is; empty if it needs none."""
        if self.path is None:
            return []
        there = folder / str(self.row["file"])
        shutil.copyfile(self.path, there)
        return [there]


def find_tokenizer(
    choice: str | Path | None, *, checkpoint: Path | None, kind: str | None, vocab: int | None
) -> Shipped:
    """The tokenizer to ship.

    Args:
        choice: ``bytes``, ``dna``, ``none``, ``rwkv-world`` (the vocabulary of the installed package
            ``rwkv``), or the path of a tokenizer.json, of a World vocabulary, or of a folder with one of
            them; None looks beside the checkpoint.
        checkpoint: its file or folder.
        kind: what the family says its tokens are (``bytes``, ``dna``, ``rwkv-world``), if it knows.
        vocab: V of the model; a tokenizer with more ids that was only found is not taken.

    Raises:
        InputError: the choice is none of these, can't be read, or has more ids than the model.
    """
    if choice in _NO_FILE:
        return Shipped({"kind": str(choice)})
    if choice == "rwkv-world":
        return _checked(_installed_world(), vocab)
    if choice is not None:
        return _checked(_at(Path(choice)), vocab)
    found = _beside(checkpoint, kind) if checkpoint is not None else None
    if found is not None and _fits(found, vocab):
        return found
    if kind == "rwkv-world":
        why = f"this model reads RWKV World ids, but no {_WORLD} lies beside it: name it with --tokenizer"
        return Shipped({"kind": "none"}, why=why)
    return Shipped({"kind": kind or "none"})


def _beside(checkpoint: Path, kind: str | None) -> Shipped | None:
    """What a folder holds; beside a file only what the family says its tokens are."""
    if checkpoint.is_dir():
        return _inside(checkpoint)
    return _last_world(checkpoint.resolve().parent) if kind == "rwkv-world" else None


def _inside(folder: Path) -> Shipped | None:
    """A folder's tokenizer.json, or its World vocabulary."""
    if (folder / _HUGGING_FACE).is_file():
        return _hugging_face(folder / _HUGGING_FACE)
    return _last_world(folder)


def _last_world(folder: Path) -> Shipped | None:
    found = sorted(folder.glob(_WORLD))
    return _world(found[-1]) if found else None


def _at(path: Path) -> Shipped:
    """The tokenizer that a user named."""
    if path.is_dir():
        found = _inside(path)
        if found is None:
            raise InputError(
                "the folder holds no tokenizer", got=path, allowed=f"{_HUGGING_FACE} or {_WORLD}"
            )
        return found
    if not path.is_file():
        raise InputError(
            "there is no such tokenizer",
            got=path,
            allowed="bytes, dna, none, rwkv-world, "
            f"or the path of a {_HUGGING_FACE} or a World vocabulary (.txt)",
        )
    if path.suffix == ".json":
        return _hugging_face(path)
    if path.suffix == ".txt":
        return _world(path)
    raise InputError(
        "unknown tokenizer", got=path.name, allowed=f"a {_HUGGING_FACE}, or a World vocabulary (.txt)"
    )


def _world(path: Path) -> Shipped:
    return Shipped({"kind": "rwkv-world", "file": _NAMES["rwkv-world"]}, path)


def _installed_world() -> Shipped:
    spec = find_spec("rwkv")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        found = _last_world(Path(place))
        if found is not None:
            return found
    raise InputError(
        "the package rwkv, which ships the World vocabulary, is not installed",
        fix="pip install rwkv, or name the file: --tokenizer rwkv_vocab_v20230424.txt",
    )


def _hugging_face(path: Path) -> Shipped:
    row: dict[str, Any] = {"kind": "huggingface", "file": _NAMES["huggingface"]}
    end = _end_ids(path.parent)
    return Shipped({**row, "end": end} if end else row, path)


def _end_ids(folder: Path) -> list[int]:
    """``eos_token_id`` of generation_config.json or config.json: an id, or several."""
    for name in ("generation_config.json", "config.json"):
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))["eos_token_id"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        rows = found if isinstance(found, list) else [found]
        if rows and all(type(i) is int for i in rows):
            return rows
    return []


def _fits(found: Shipped, vocab: int | None) -> bool:
    size = found.load().vocab_size
    return vocab is None or size is None or size <= vocab


def _checked(found: Shipped, vocab: int | None) -> Shipped:
    if not _fits(found, vocab):
        raise InputError(
            "the tokenizer has more ids than the model",
            got=f"{found.load().vocab_size} ids in {found.path}",
            allowed=f"at most {vocab}",
            fix="name the tokenizer that this model was trained with",
        )
    return found
