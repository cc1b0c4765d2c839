"""The RWKV World tokenizer: a list of byte strings; from left to right the longest that fits is taken.

The vocabulary is a text file of lines ``ID LITERAL LENGTH``: the literal is a Python string (its UTF-8
counts) or bytes, the length is in bytes. Nothing in it is evaluated: a literal is parsed as one, on a line
of bounded length. Id 0 ends a document and stands for no text.

Source: github BlinkDL/ChatRWKV, the file rwkv_vocab_v20230424.txt (it ships in the PyPI package ``rwkv``).
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from xexport.core.errors import InputError
from xexport.runtimes.tokenizers import ByteDecoder, Decoder, utf8

__all__ = ["END", "WorldTokenizer", "read_vocabulary"]

END = 0
_MAX_BYTES = 1 << 25
_MAX_LINE = 4096
_MAX_ID = 1 << 24


class WorldTokenizer:
    """Text <-> ids of a World vocabulary; the file is read when it is first needed.

    Args:
        path: the vocabulary.
    """

    kind = "rwkv-world"
    end_ids = frozenset((END,))

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def vocab_size(self) -> int | None:
        """One more than the largest id."""
        return max(self._bytes_of) + 1

    def encode(self, text: str) -> list[int]:
        """Greedy longest matches.

        Raises:
            InputError: lone surrogates, or a byte that no entry of the vocabulary begins with.
        """
        data = utf8(text)
        ids, lengths = self._id_of, self._lengths
        found, at = [], 0
        while at < len(data):
            for size in lengths.get(data[at : at + 2], ()):
                token = ids.get(data[at : at + size])
                if token is not None:
                    break
            else:
                size, token = 1, ids.get(data[at : at + 1])
            if token is None:
                raise InputError("the vocabulary has no entry for a byte of the text", got=data[at])
            found.append(token)
            at += size
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text; bytes that are no valid UTF-8 become U+FFFD."""
        return b"".join(map(self._piece, ids)).decode("utf-8", errors="replace")

    def decoder(self) -> Decoder:
        """A new incremental decoder."""
        return ByteDecoder(self._piece)

    def _piece(self, token: int) -> bytes:
        if token == END:
            return b""
        if token not in self._bytes_of:
            raise InputError(
                "a token id is not in the vocabulary", got=token, allowed=f"of {self._path.name}"
            )
        return self._bytes_of[token]

    @cached_property
    def _bytes_of(self) -> dict[int, bytes]:
        return read_vocabulary(self._path)

    @cached_property
    def _id_of(self) -> dict[bytes, int]:
        return {piece: token for token, piece in self._bytes_of.items()}

    @cached_property
    def _lengths(self) -> dict[bytes, tuple[int, ...]]:
        """The first two bytes -> the lengths of the entries that begin so, longest first."""
        table: dict[bytes, set[int]] = {}
        for piece in self._id_of:
            if len(piece) > 1:
                table.setdefault(piece[:2], set()).add(len(piece))
        return {start: tuple(sorted(sizes, reverse=True)) for start, sizes in table.items()}


def read_vocabulary(path: Path) -> dict[int, bytes]:
    """Id -> bytes of a World vocabulary file.

    Raises:
        InputError: it can't be read, or a line is not of the format; names the line.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError("the vocabulary is too large", got=path, allowed=f"{_MAX_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("the vocabulary can't be read", got=f"{path}: {error}") from error
    table: dict[int, bytes] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            token, piece = _entry(line, f"{path.name}, line {number}")
            if token in table:
                raise InputError("the vocabulary has an id twice", got=f"{path.name}, line {number}: {token}")
            table[token] = piece
    if not table:
        raise InputError("the vocabulary is empty", got=path)
    return table


def _entry(line: str, where: str) -> tuple[int, bytes]:
    """One line: id, bytes."""
    try:
        first, last = line.index(" "), line.rindex(" ")
        token, size = int(line[:first]), int(line[last:])
        piece = _literal(line[first:last].strip(" "))
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise InputError(
            "not a line of a World vocabulary", got=f"{where}: {line[:60]!r}", allowed="ID 'TEXT' LENGTH"
        ) from error
    if not piece or len(piece) != size or not 0 < token < _MAX_ID:
        raise InputError("a line of the vocabulary contradicts itself", got=f"{where}: {line[:60]!r}")
    return token, piece


def _literal(text: str) -> bytes:
    """The bytes of a string or bytes literal."""
    quoted = len(text) > 2 and text[0] == text[-1] and text[0] in "'\""
    if quoted and "\\" not in text and text[0] not in text[1:-1]:
        return text[1:-1].encode()  # most lines; the parser takes a second for all of them
    if len(text) > _MAX_LINE:
        raise ValueError("the line is too long")
    value = ast.literal_eval(text)
    if not isinstance(value, str | bytes):
        raise ValueError("neither a string nor bytes")
    return value.encode() if isinstance(value, str) else value
