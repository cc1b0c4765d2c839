"""Text to token ids and back, read from a bundle; one row a kind, nothing is executed.

``manifest.tokenizer`` is ``{"kind": NAME, ...}``; a new kind is a class and a row in ``_KINDS``.
Files a kind needs lie in the bundle's folder and are opened through ``core.manifest.safe_path``.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from xexport.core.errors import BundleError, InputError

__all__ = ["BytesTokenizer", "Decoder", "NoTokenizer", "Tokenizer", "load_tokenizer", "parse_ids"]


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
    """

    kind: str
    vocab_size: int | None

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

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of ``text``.

        Raises:
            InputError: the text has lone surrogates, which UTF-8 can't hold.
        """
        try:
            return list(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise InputError("the text can't be written as UTF-8", got=error) from error

    def decode(self, ids: Iterable[int]) -> str:
        decoder = self.decoder()
        return "".join([*(decoder.push(i) for i in ids), decoder.flush()])

    def decoder(self) -> Decoder:
        return _ByteDecoder(_one_byte)


class NoTokenizer:
    """For models whose tokens are no text: ids in, ids out."""

    kind = "none"
    vocab_size: int | None = None

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


class _ByteDecoder:
    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._utf8.decode(self._bytes_of(token))

    def flush(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class _NumberDecoder:
    def push(self, token: int) -> str:
        return f"{token} "

    def flush(self) -> str:
        return ""


def _one_byte(token: int) -> bytes:
    if not 0 <= token < 256:
        raise InputError("a token id is no byte", got=token, allowed="0 .. 255")
    return bytes((token,))


def _bytes_kind(row: Mapping[str, Any], folder: Path) -> Tokenizer:
    return BytesTokenizer()


def _none_kind(row: Mapping[str, Any], folder: Path) -> Tokenizer:
    return NoTokenizer()


_KINDS: dict[str, Callable[[Mapping[str, Any], Path], Tokenizer]] = {
    "bytes": _bytes_kind,
    "none": _none_kind,
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
        BundleError: a kind this xexport doesn't know.
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
