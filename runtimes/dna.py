"""HyenaDNA's tokens: one a letter of A, C, G, T and N (arXiv 2306.15794, and its published code)."""

from __future__ import annotations

from collections.abc import Iterable

from xexport.core.errors import InputError
from xexport.runtimes.tokenizers import Decoder

__all__ = ["DnaTokenizer"]

#: ids in order; any other letter, lower case too, is [UNK]
_WORDS = ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]", *"ACGTN")
_UNKNOWN, _SEPARATOR = 6, 1


class DnaTokenizer:
    """Letters to ids 7 to 11 and back; nothing is put before or behind a text. [SEP] ends one."""

    kind = "dna"
    vocab_size: int | None = len(_WORDS)
    end_ids: frozenset[int] = frozenset((_SEPARATOR,))

    def encode(self, text: str) -> list[int]:
        """One id a character.

        Raises:
            InputError: no letter of a text is one that the model knows (``ACGTN``, upper case).
        """
        ids = [_WORDS.index(c) if c in "ACGTN" else _UNKNOWN for c in text if not c.isspace()]
        if ids and set(ids) == {_UNKNOWN}:
            raise InputError("the text is no DNA", got=text[:20], allowed="the letters A, C, G, T and N")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Letters, and the names of special ids."""
        decoder = self.decoder()
        return "".join([*(decoder.push(i) for i in ids), decoder.flush()])

    def decoder(self) -> Decoder:
        """A new incremental decoder."""
        return _Letters()


class _Letters:
    def push(self, token: int) -> str:
        """The letter or name of an id; U+FFFD for one of those that only pad the table of embeddings."""
        return _WORDS[token] if 0 <= token < len(_WORDS) else "\ufffd"

    def flush(self) -> str:
        return ""
