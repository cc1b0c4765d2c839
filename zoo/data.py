"""Reading English text for training: files and folders in, one stream of bytes out.

The vocabulary is the 256 bytes of UTF-8. Normalisation is small and the same for every source, and
brings it to the form the held-out book has (which itself is not touched):

1. what belongs to the file format goes: Markdown marks (``.md``), JSON keys (``.json``), R's
   serialisation (``.rdb``), verse references such as ``Ge1:1`` at a line's start;
2. a paragraph is one line (newlines inside it collapse to a space), a blank line parts two
   paragraphs, runs of spaces become one;
3. one spelling of punctuation: straight quotes, ``—`` for ``--`` and ``–``, no ``_`` of emphasis.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xexport.core.errors import InputError

__all__ = ["Corpus", "Windows", "normalise", "read_corpus"]

_PUNCTUATION = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "—", "\u00a0": " ", "\t": " "})
_VERSE = re.compile(r"^\d?[A-Z][A-Za-z]{1,4}(\d+):\d+ ", re.MULTILINE)
_EMPHASIS = re.compile(r"(?<!\w)_|_(?!\w)")
_SPEAKER = re.compile(r"^\*\*(.+?)\*\* *$", re.MULTILINE)
#: Validation takes every 64th block of this many bytes (about 1.6% of the text).
_BLOCK, _EVERY = 8192, 64


def normalise(text: str) -> str:
    """Paragraphs on one line each, parted by one blank line; one spelling of punctuation."""
    text = text.replace("\r\n", "\n").translate(_PUNCTUATION).replace("---", "—").replace("--", "—")
    text = _EMPHASIS.sub("", text)
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return "\n\n".join(part for part in paragraphs if part)


def _verses(text: str) -> str:
    """Drop the references of a verse-per-line Bible; a new chapter begins a new paragraph."""
    chapter = ""

    def replace(match: re.Match[str]) -> str:
        nonlocal chapter
        new, chapter = match.group(1) != chapter, match.group(1)
        return "\n" if new else ""

    return _VERSE.sub(replace, text)


def _plain(data: bytes) -> list[str]:
    return [_verses(data.decode("utf-8"))]


def _markdown(data: bytes) -> list[str]:
    """A play: ``**NAME**`` lines become ``NAME. speech``; headings and emphasis lose their marks."""
    text = _SPEAKER.sub(r"\1.", data.decode("utf-8"))
    text = re.sub(r"^#+ ", "", text, flags=re.MULTILINE)
    return [re.sub(r"\\([^\w\s])", r"\1", text)]


def _json(data: bytes) -> list[str]:
    """Every string under a key ``text``, in order."""
    found: list[str] = []

    def walk(node: object) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                if key == "text" and isinstance(value, str):
                    found.append(value)
                else:
                    walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(json.loads(data))
    return found


def _r_database(data: bytes) -> list[str]:
    """An R package's lazy-load database: records of a big-endian length and a zlib stream, each a
    serialised object (XDR, version 3); of those, every character vector is a text of its lines."""
    texts: list[str] = []
    at = 0
    while at + 4 < len(data):
        stream = zlib.decompressobj()
        raw = stream.decompress(data[at + 4 :])
        at = len(data) - len(stream.unused_data)
        text = _r_lines(raw)
        if text:
            texts.append(text)
    return texts


def _r_lines(raw: bytes) -> str:
    """The lines of one serialised character vector, else an empty string."""
    head, version = raw[:2], struct.unpack_from(">i", raw, 2)[0]
    if head != b"X\n" or version not in (2, 3):
        return ""
    at = 14
    if version == 3:
        at += 4 + struct.unpack_from(">i", raw, at)[0]
    flags, count = struct.unpack_from(">ii", raw, at)
    at += 8
    if flags & 0xFF != 16:  # STRSXP
        return ""
    lines = []
    for _ in range(count):
        length = struct.unpack_from(">i", raw, at + 4)[0]
        at += 8
        lines.append(raw[at : at + max(length, 0)].decode("utf-8"))
        at += max(length, 0)
    return "\n".join(lines)


_READERS: dict[str, Callable[[bytes], list[str]]] = {
    ".txt": _plain,
    ".md": _markdown,
    ".json": _json,
    ".rdb": _r_database,
}


@dataclass(frozen=True)
class Corpus:
    """Training text as bytes.

    Attributes:
        train: uint8 [N], what is trained on.
        validation: uint8 [M], blocks of the same texts that are not trained on, in an order in which
            any beginning of it has some of every source.
        sources: path argument -> (bytes after normalisation, their sha256), for the record.
    """

    train: NDArray[np.uint8]
    validation: NDArray[np.uint8]
    sources: dict[str, tuple[int, str]]


def read_corpus(paths: Sequence[Path]) -> Corpus:
    """Read files (.txt, .md, .json, .rdb) and folders of them, normalise, and split.

    Raises:
        InputError: no path, a missing one, one with no readable text, or text that is not UTF-8.
    """
    if not paths:
        raise InputError("no training text was named", fix="give --text FILE_OR_FOLDER (see zoo/README.md)")
    parts: list[bytes] = []
    sources: dict[str, tuple[int, str]] = {}
    for path in paths:
        part = "\n\n".join(_read(path)).encode("utf-8")
        if not part:
            raise InputError("the training text is empty", got=path)
        parts.append(part)
        sources[path.name] = (len(part), hashlib.sha256(part).hexdigest())
    stream = np.frombuffer(b"\n\n".join(parts), dtype=np.uint8)
    blocks = [stream[i : i + _BLOCK] for i in range(0, len(stream), _BLOCK)]
    held = blocks[_EVERY - 1 :: _EVERY] or [stream[-max(len(stream) // 50, 1) :]]
    order = np.random.default_rng(0).permutation(len(held))
    kept = [b for i, b in enumerate(blocks) if i % _EVERY != _EVERY - 1]
    return Corpus(np.concatenate(kept), np.concatenate([held[i] for i in order]), sources)


def _read(path: Path) -> Iterator[str]:
    for file in _files(path):
        try:
            for text in _READERS[file.suffix](file.read_bytes()):
                yield normalise(text)
        except (UnicodeDecodeError, json.JSONDecodeError, zlib.error, struct.error) as error:
            raise InputError("a training text can't be read", got=f"{file}: {error}") from error


def _files(path: Path) -> Iterable[Path]:
    """The readable files of ``path``, in name order; a .json beside its own .txt is left out."""
    if not path.exists():
        raise InputError("the training text does not exist", got=path, fix="see zoo/README.md for packages")
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in _READERS)
    found = [p for p in found if p.suffix in _READERS]
    found = [p for p in found if p.suffix != ".json" or not p.with_suffix(".txt").exists()]
    if not found:
        raise InputError("no training text found", got=path, allowed=f"files {', '.join(_READERS)}")
    return found


class Windows:
    """Windows of ``length`` + 1 bytes, each epoch covering the text once in a new order and phase.

    Which windows make step ``n`` depends on (seed, position) alone, so a resumed run goes on exactly
    where it stopped.

    Args:
        text: uint8 [N].
        length: tokens per window.
        seed: of the shuffling.
        position: windows already taken.

    Raises:
        InputError: the text is shorter than two windows.
    """

    def __init__(self, text: NDArray[np.uint8], length: int, seed: int, position: int = 0) -> None:
        if len(text) < 2 * (length + 1):
            raise InputError(
                "the training text is too short", got=f"{len(text)} bytes", allowed=f">= {2 * (length + 1)}"
            )
        self._text, self._length, self._seed = text, length, seed
        self.position = position
        self._count = (len(text) - 1) // length - 1
        self._epoch = -1
        self._starts = np.zeros(0, dtype=np.int64)

    def take(self, batch: int) -> NDArray[np.int64]:
        """The next ``batch`` windows: int64 [batch, length + 1]."""
        rows = []
        for _ in range(batch):
            epoch, index = divmod(self.position, self._count)
            if epoch != self._epoch:
                rng = np.random.default_rng((self._seed, epoch))
                phase = int(rng.integers(self._length))
                self._starts = rng.permutation(self._count) * self._length + phase
                self._epoch = epoch
            start = self._starts[index]
            rows.append(self._text[start : start + self._length + 1])
            self.position += 1
        return np.stack(rows).astype(np.int64)
