"""A Hugging Face tokenizer.json, through the library ``tokenizers`` (an extra)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from xexport.core.errors import InputError
from xexport.core.extras import require
from xexport.runtimes.tokenizers import Decoder, utf8

__all__ = ["HuggingFaceTokenizer"]

_UNFINISHED = "\ufffd"
_LONGEST = 16  # ids held back at most: a character has four bytes, and a byte may be an id


class HuggingFaceTokenizer:
    """Text <-> ids of a tokenizer.json; the file is read when it is first needed.

    Special tokens are added where the file says so (a beginning of text, say), and are no text.

    Args:
        path: the tokenizer.json.
        end_ids: the ids that end a text.

    Raises:
        MissingDependencyError: when it is first used, if ``tokenizers`` is not installed.
        InputError: when it is first used, if the file is not what it should be.
    """

    kind = "huggingface"

    def __init__(self, path: Path, end_ids: Collection[int] = ()) -> None:
        self._path = path
        self.end_ids = frozenset(end_ids)

    @property
    def vocab_size(self) -> int | None:
        """One more than the largest id, added tokens among them."""
        ids: list[int] = list(self._tokenizer.get_vocab(with_added_tokens=True).values())
        return 1 + max(ids)

    def encode(self, text: str) -> list[int]:
        """Text to ids.

        Raises:
            InputError: the text has lone surrogates.
        """
        utf8(text)
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text, without special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def decoder(self) -> Decoder:
        """A new incremental decoder."""
        return _Incremental(self)

    @cached_property
    def _tokenizer(self) -> Any:
        require("tokenizers", extra="tokenizers", why="to read a tokenizer.json")
        from tokenizers import Tokenizer

        try:
            made = Tokenizer.from_file(str(self._path))
        except Exception as error:  # the library raises plain Exception
            raise InputError("tokenizer.json can't be read", got=f"{self._path}: {error}") from error
        made.no_truncation()
        made.no_padding()
        return made


class _Incremental:
    """Decodes a growing list of ids by the difference between two ends of it.

    What an id stands for can depend on the ids before it (a space that only the first word lacks) and,
    inside a character, on those after it. So the last piece is decoded together with the next, and text
    that ends in the sign of an unfinished character waits.
    """

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = 0  # ids of the list whose text was handed out

    def push(self, token: int) -> str:
        """The text that became certain with this id."""
        self._ids.append(token)
        whole = self._tokenizer.decode(self._ids)
        if whole.endswith(_UNFINISHED) and len(self._ids) - self._given < _LONGEST:
            return ""
        return self._hand_out(whole)

    def flush(self) -> str:
        """What is left at the end."""
        text = self._hand_out(self._tokenizer.decode(self._ids))
        self._ids, self._given = [], 0
        return text

    def _hand_out(self, whole: str) -> str:
        old = self._tokenizer.decode(self._ids[: self._given])
        text = whole[len(old) :]
        if text:  # an id without text (a special one) does not replace the piece before it
            self._ids = self._ids[self._given :]
        self._given = len(self._ids)
        return text
