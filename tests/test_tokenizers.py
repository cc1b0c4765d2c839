"""Tokenizers: bytes and none, whole and incremental."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xexport.core.errors import BundleError, InputError
from xexport.runtimes.tokenizers import BytesTokenizer, NoTokenizer, load_tokenizer, parse_ids


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    tokenizer = BytesTokenizer()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


@given(st.lists(st.integers(0, 255)))
def test_incremental_decoding_equals_whole_decoding(ids: list[int]) -> None:
    decoder = BytesTokenizer().decoder()
    pieces = [decoder.push(i) for i in ids]
    assert "".join(pieces) + decoder.flush() == bytes(ids).decode("utf-8", errors="replace")
    for piece in pieces:
        piece.encode("utf-8")  # a lone surrogate would raise


def test_text_is_held_until_its_character_is_whole() -> None:
    decoder = BytesTokenizer().decoder()
    assert [decoder.push(b) for b in "é!".encode()] == ["", "é", "!"]


@pytest.mark.parametrize("token", [-1, 256])
def test_ids_that_are_no_byte_are_refused(token: int) -> None:
    with pytest.raises(InputError, match="no byte"):
        BytesTokenizer().decode([token])


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(InputError, match="UTF-8"):
        BytesTokenizer().encode("\ud800")


def test_none_reads_no_text_and_says_how_to_feed() -> None:
    with pytest.raises(InputError) as caught:
        NoTokenizer().encode("abc")
    assert "--ids" in str(caught.value)
    assert NoTokenizer().decode([3, 4]) == "3 4"


def test_kinds_come_from_the_manifest(tmp_path: Path) -> None:
    assert load_tokenizer({"kind": "bytes"}, tmp_path).kind == "bytes"
    assert load_tokenizer({"kind": "none"}, tmp_path).kind == "none"
    assert load_tokenizer({}, tmp_path).kind == "none"
    with pytest.raises(BundleError) as caught:
        load_tokenizer({"kind": "sentencepiece"}, tmp_path)
    assert "bytes, dna, huggingface, none, rwkv-world" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "ids"), [("1 2 3", [1, 2, 3]), ("4,5", [4, 5]), (" 6,\n7 ", [6, 7]), ("", [])]
)
def test_ids_are_read_from_the_command_line(text: str, ids: list[int]) -> None:
    assert parse_ids(text) == ids


@pytest.mark.parametrize("text", ["1 two", "-3", "1.5", "²"])
def test_words_among_ids_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="not a token id"):
        parse_ids(text)
