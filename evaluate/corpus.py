"""What models are judged on: the built-in held-out text, the user's own text, or clips of features."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xexport.core.contract import TOKENS, InputSpec
from xexport.core.errors import InputError
from xexport.runtimes.tokenizers import Tokenizer, parse_ids

__all__ = ["Corpus", "read_corpus"]

BUILT_IN = "moby_dick.txt"
#: the built-in text of a kind of tokens that is no prose
_OTHER = {"dna": "lambda_phage.txt"}


@dataclass(frozen=True)
class Corpus:
    """A text as token ids, or recordings as features.

    Attributes:
        name, sha256: what was read, for the records.
        tokens: int64 [n]; of features float32 [n,F], clip behind clip.
        bytes: size of the text that the tokens stand for; 0 of features.
        clips: lengths of the clips; empty for one text.
    """

    name: str
    sha256: str
    tokens: NDArray[Any]
    bytes: int
    clips: tuple[int, ...] = ()

    def head(self, count: int) -> Corpus:
        """The first ``count`` tokens or frames, with the bytes they stand for in proportion."""
        if count >= len(self.tokens):
            return self
        share = max(1, round(self.bytes * count / len(self.tokens))) if self.bytes else 0
        ends = [min(int(end), count) for end in np.cumsum(self.clips)]
        lengths = tuple(int(n) for n in np.diff([0, *ends]) if n)
        return Corpus(self.name, self.sha256, self.tokens[:count], share, lengths)


def read_corpus(
    tokenizer: Tokenizer,
    vocab_size: int,
    path: str | Path | None = None,
    *,
    count: int = 1 << 17,
    inputs: InputSpec = TOKENS,
) -> Corpus:
    """The first ``count`` bytes of a text, encoded; for a model of features, clips (features.py).

    A model without a tokenizer reads a file of ids between spaces; without a file it is fed random
    ids: that shows what quantization changes, not what the model knows, and the name of the corpus
    says so. Its "bytes" are its tokens.

    Raises:
        InputError: the file is missing, empty, or holds ids the model does not have.
    """
    if inputs.width:
        from xexport.evaluate.features import read_clips

        return read_clips(inputs, path)
    if tokenizer.vocab_size is None and path is None:
        return _random_ids(vocab_size, min(count, 4096))
    name, data = _read(path, _OTHER.get(tokenizer.kind, BUILT_IN))
    # cut at a byte, then drop the broken character at the end, if any
    text = data[:count].decode("utf-8", errors="ignore")
    has_text = tokenizer.vocab_size is not None
    if not has_text and len(data) > count:
        text = text.rpartition(" ")[0]  # the last number may be cut
    rows = tokenizer.encode(text) if has_text else parse_ids(text)
    if len(rows) < 2:
        raise InputError(
            "the evaluation text is too short", got=f"{name}: {len(rows)} tokens", allowed="2 or more"
        )
    if max(rows) >= vocab_size:
        raise InputError(
            "the evaluation text holds ids the model does not have",
            got=f"{name}: id {max(rows)}",
            allowed=f"0..{vocab_size - 1}",
            fix="this model reads another alphabet: give it a text of its own with --eval-text",
        )
    ids = np.asarray(rows, dtype=np.int64)
    return Corpus(name, hashlib.sha256(data).hexdigest(), ids, len(text.encode()) if has_text else len(ids))


def _read(path: str | Path | None, built_in: str) -> tuple[str, bytes]:
    if path is None:
        return built_in, (files("xexport.evaluate") / "text" / built_in).read_bytes()
    where = Path(path)
    try:
        data = where.read_bytes()
    except OSError as error:
        raise InputError("the evaluation text can't be read", got=f"{where}: {error.strerror}") from error
    return where.name, data


def _random_ids(vocab_size: int, count: int) -> Corpus:
    ids = np.random.default_rng(0).integers(0, vocab_size, count, dtype=np.int64)
    digest = hashlib.sha256(ids.tobytes()).hexdigest()
    return Corpus("random ids (the model has no tokenizer)", digest, ids, count)
