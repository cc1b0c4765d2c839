"""Text to token ids and back, read from a bundle; one row a kind, nothing is executed.

``manifest.tokenizer`` is ``{"kind": NAME, "file": FILE, "end": [ID, ...]}``; a new kind is a class and a
row in ``_KINDS``. The file lies in the bundle's folder and is opened through ``core.manifest.safe_path``.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from xexport.core.errors import BundleError, InputError
from xexport.core.manifest import safe_path

__all__ = [
    "ByteDecoder",
    "BytesTokenizer",
    "Decoder",
    "NoTokenizer",
    "Tokenizer",
    "load_tokenizer",
    "parse_ids",
    "utf8",
]


class Decoder(Protocol):
    """Turns a stream of ids into text that is valid Unicode at every border."""

    def push(self, token: int) -> str:
        """The text that became certain with this id; may be empty inside a character."""

    def flush(self) -> str:
        """What is left at the end; an unfinished character becomes U+FFFD."""


class Tokenizer(Protocol):
    """Text <-> ids.

    Attributes:
        kind: the name in the manifest.
        vocab_size: how many ids it knows, or None if it doesn't say.
        end_ids: ids that end a text: generation stops there.
    """

    kind: str
    end_ids: frozenset[int]

    @property
    def vocab_size(self) -> int | None: ...

    def encode(self, text: str) -> list[int]:
        """Text to ids."""

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text; bytes that are no valid UTF-8 become U+FFFD."""

    def decoder(self) -> Decoder:
        """A new incremental decoder."""


class BytesTokenizer:
    """One token a byte of UTF-8; ids 0 to 255."""

    kind = "bytes"
    vocab_size: int | None = 256
    end_ids: frozenset[int] = frozenset()

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of ``text``.

        Raises:
            InputError: the text has lone surrogates, which UTF-8 can't hold.
        """
        return list(utf8(text))

    def decode(self, ids: Iterable[int]) -> str:
        decoder = self.decoder()
        return "".join([*(decoder.push(i) for i in ids), decoder.flush()])

    def decoder(self) -> Decoder:
        return ByteDecoder(_one_byte)


class NoTokenizer:
    """For models whose tokens are no text: ids in, ids out."""

    kind = "none"
    vocab_size: int | None = None
    end_ids: frozenset[int] = frozenset()

    def encode(self, text: str) -> list[int]:
        raise InputError(
            "this bundle has no tokenizer, so it can't read text",
            got=f"text of {len(text)} characters",
            allowed="token ids",
            fix="pass a list of ids (Python), or --ids with ids between spaces (command line)",
        )

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(str(i) for i in ids)

    def decoder(self) -> Decoder:
        return _NumberDecoder()


class ByteDecoder:
    """Joins the bytes of ids to characters; ``bytes_of`` gives an id's."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that became certain with this id."""
        return self._utf8.decode(self._bytes_of(token))

    def flush(self) -> str:
        """What is left; an unfinished character becomes U+FFFD."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class _NumberDecoder:
    def push(self, token: int) -> str:
        return f"{token} "

    def flush(self) -> str:
        return ""


def utf8(text: str) -> bytes:
    """The bytes of a text.

    Raises:
        InputError: it has lone surrogates, which UTF-8 can't hold.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError("the text can't be written as UTF-8", got=error) from error


def _one_byte(token: int) -> bytes:
    if not 0 <= token < 256:
        raise InputError("a token id is no byte", got=token, allowed="0 .. 255")
    return bytes((token,))


def _bytes_kind(row: Mapping[str, Any], folder: Path) -> Tokenizer:
    return BytesTokenizer()


def _none_kind(row: Mapping[str, Any], folder: Path) -> Tokenizer:
    return NoTokenizer()


def _dna_kind(row: Mapping[str, Any], folder: Path) -> Tokenizer:
    from xexport.runtimes.dna import DnaTokenizer

    return DnaTokenizer()


def _world_kind(row: Mapping[str, Any], folder: Path) -> Tokenizer:
    from xexport.runtimes.world import WorldTokenizer

    return WorldTokenizer(_file(row, folder))


def _hugging_face_kind(row: Mapping[str, Any], folder: Path) -> Tokenizer:
    from xexport.runtimes.huggingface import HuggingFaceTokenizer

    return HuggingFaceTokenizer(_file(row, folder), [int(i) for i in row.get("end", ())])


def _file(row: Mapping[str, Any], folder: Path) -> Path:
    path = safe_path(folder, str(row.get("file", "")))
    if not path.is_file():
        raise BundleError("the bundle lacks its tokenizer", got=path, fix="copy the whole folder again")
    return path


_KINDS: dict[str, Callable[[Mapping[str, Any], Path], Tokenizer]] = {
    "bytes": _bytes_kind,
    "dna": _dna_kind,
    "huggingface": _hugging_face_kind,
    "none": _none_kind,
    "rwkv-world": _world_kind,
}


def parse_ids(text: str) -> list[int]:
    """Ids written as numbers between spaces or commas.

    Raises:
        InputError: something else is among them.
    """
    words = text.replace(",", " ").split()
    odd = [w for w in words if not (w.isascii() and w.isdigit())]
    if odd:
        raise InputError("not a token id", got=odd[0], allowed="whole numbers between spaces or commas")
    return [int(w) for w in words]


def load_tokenizer(row: Mapping[str, Any], folder: Path) -> Tokenizer:
    """The tokenizer a manifest names; an empty row means none.

    Raises:
        BundleError: a kind this xexport doesn't know, or its file is missing.
    """
    kind = row.get("kind", "none")
    if kind not in _KINDS:
        raise BundleError(
            "the bundle names a tokenizer this xexport doesn't know",
            got=kind,
            allowed=", ".join(sorted(_KINDS)),
            fix="upgrade xexport, or feed token ids",
        )
    return _KINDS[kind](row, folder)
