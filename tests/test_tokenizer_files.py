"""Tokenizers that need a file: RWKV World and Hugging Face, against their own implementations."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_json import ODD, moby_dick, write_tokenizer

import xexport
from xexport.core.errors import BundleError, InputError
from xexport.runtimes.huggingface import HuggingFaceTokenizer
from xexport.runtimes.shipped import find_tokenizer
from xexport.runtimes.tokenizers import Tokenizer, load_tokenizer
from xexport.runtimes.world import WorldTokenizer, read_vocabulary


@cache
def world_file() -> Path:
    spec = importlib.util.find_spec("rwkv")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package rwkv is not installed")
    return Path(spec.submodule_search_locations[0]) / "rwkv_vocab_v20230424.txt"


@cache
def world() -> WorldTokenizer:
    return WorldTokenizer(world_file())


@cache
def rwkv_own() -> Any:
    """The package's own tokenizer class, from its file."""
    path = world_file().with_name("rwkv_tokenizer.py")
    spec = importlib.util.spec_from_file_location("rwkv_own_tokenizer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TRIE_TOKENIZER(str(world_file()))


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 400 tokens."""
    return write_tokenizer(tmp_path_factory.mktemp("bpe"))


# RWKV World


@pytest.mark.oracle
@pytest.mark.parametrize("text", [moby_dick(), *ODD], ids=lambda t: repr(t[:12]))
def test_world_ids_are_those_of_the_package(text: str) -> None:
    ids = world().encode(text)
    assert ids == rwkv_own().encode(text)
    assert world().decode(ids) == text


@pytest.mark.oracle
@settings(max_examples=150, deadline=None)
@given(st.text())
def test_world_round_trip_of_any_text(text: str) -> None:
    ids = world().encode(text)
    assert ids == rwkv_own().encode(text)
    assert world().decode(ids) == text


@pytest.mark.oracle
def test_world_vocabulary_is_that_of_the_package() -> None:
    assert read_vocabulary(world_file()) == rwkv_own().idx2token
    assert world().vocab_size == 65530
    assert world().end_ids == {0}
    assert world().decode([0]) == ""


def split_anywhere(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The pieces one id at a time; each must be text that can be written."""
    decoder = tokenizer.decoder()
    pieces = [decoder.push(i) for i in ids] + [decoder.flush()]
    for piece in pieces:
        piece.encode("utf-8")
    return "".join(pieces)


@settings(max_examples=100, deadline=None)
@given(st.text(), st.data())
def test_world_streams_any_split_of_any_text(text: str, data: st.DataObject) -> None:
    """Also where a text is split inside a character, which no encoder does but any model may."""
    whole = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    table = {piece: token for token, piece in read_cached().items()}
    ids: list[int] = []
    for start, stop in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        try:
            ids += world().encode(whole[start:stop].decode())
        except UnicodeDecodeError:
            ids += [table[whole[i : i + 1]] for i in range(start, stop)]
    assert split_anywhere(world(), ids) == text


@cache
def read_cached() -> dict[int, bytes]:
    return read_vocabulary(world_file())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 65529), max_size=12))
def test_world_streams_what_no_text_gives(ids: list[int]) -> None:
    assert split_anywhere(world(), ids) == world().decode(ids)


def small_vocabulary(folder: Path, *extra: str) -> Path:
    lines = [f"{i + 1} {bytes([i])!r} 1" for i in range(256)]
    lines += ["257 'ab' 2", "258 'abc d' 5", '259 "it\'s" 4', "260 'é' 2", "261 b'\\xe6\\x97' 2", *extra]
    path = folder / "rwkv_vocab_small.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_the_longest_entry_wins(tmp_path: Path) -> None:
    tokenizer = WorldTokenizer(small_vocabulary(tmp_path))
    assert tokenizer.encode("abc d") == [258]
    assert tokenizer.encode("abc") == [257, ord("c") + 1]
    assert tokenizer.encode("it's é") == [259, ord(" ") + 1, 260]
    assert tokenizer.encode("日")[0] == 261
    assert tokenizer.decode(tokenizer.encode("日")) == "日"


@pytest.mark.parametrize(
    "line",
    [
        "300 __import__('os').getcwd() 1",
        "300 'ab' 3",
        "300 123 3",
        "300 'ab",
        "-3 'q' 1",
        "x 'q' 1",
        "257 'q' 1",
        "300 '' 0",
        "300 " + "(" * 5000 + " 1",
        "300 '" + "\\x41" * 5000 + "' 5000",
    ],
    ids=["code", "length", "number", "unfinished", "negative", "no id", "twice", "empty", "deep", "long"],
)
def test_lines_that_are_no_entry_are_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(InputError) as caught:
        read_vocabulary(small_vocabulary(tmp_path, line))
    assert "line 262" in str(caught.value)


def test_a_byte_that_the_vocabulary_lacks(tmp_path: Path) -> None:
    path = tmp_path / "rwkv_vocab_a.txt"
    path.write_text("1 'a' 1\n", encoding="utf-8")
    with pytest.raises(InputError, match="no entry"):
        WorldTokenizer(path).encode("ab")
    with pytest.raises(InputError, match="not in the vocabulary"):
        WorldTokenizer(path).decode([7])


# Hugging Face


@pytest.mark.oracle
@pytest.mark.parametrize("text", [moby_dick(5_000), *ODD], ids=lambda t: repr(t[:12]))
def test_ids_are_those_of_the_library(bpe: Path, text: str) -> None:
    from tokenizers import Tokenizer as Library

    tokenizer = HuggingFaceTokenizer(bpe)
    ids = tokenizer.encode(text)
    assert ids == Library.from_file(str(bpe)).encode(text).ids
    assert tokenizer.decode(ids) == text
    assert split_anywhere(tokenizer, ids) == text


@settings(max_examples=100, deadline=None)
@given(text=st.text(), cut=st.integers(0, 40))
def test_hugging_face_streams_any_split_of_any_text(bpe: Path, text: str, cut: int) -> None:
    tokenizer = HuggingFaceTokenizer(bpe)
    ids = [*tokenizer.encode(text[:cut]), *tokenizer.encode(text[cut:])]
    assert split_anywhere(tokenizer, ids) == text


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 399), max_size=12))
def test_hugging_face_pieces_join_to_the_whole(bpe: Path, ids: list[int]) -> None:
    tokenizer = HuggingFaceTokenizer(bpe)
    assert split_anywhere(tokenizer, ids) == tokenizer.decode(ids)


def test_spaces_of_words_are_kept_and_specials_are_no_text(tmp_path: Path) -> None:
    """A decoder like Llama's drops the first space only; an id alone would lose every one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words = {"<s>": 0, "▁to": 1, "▁sea": 2, "<unk>": 3}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens([AddedToken("<s>", special=True)])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = HuggingFaceTokenizer(tmp_path / "tokenizer.json", [0])
    decoder = tokenizer.decoder()
    assert [decoder.push(i) for i in (1, 2, 0, 1)] == ["to", " sea", "", " to"]
    assert tokenizer.end_ids == {0}


def test_a_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match=r"tokenizer\.json can't be read"):
        HuggingFaceTokenizer(tmp_path / "tokenizer.json").encode("a")


# which one goes into a bundle


def find(choice: str | Path | None, **given: Any) -> Any:
    return find_tokenizer(choice, **{"checkpoint": None, "kind": None, "vocab": None, **given})


def test_what_is_found_beside_a_checkpoint(tmp_path: Path, bpe: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(bpe.read_bytes())
    (folder / "config.json").write_text('{"eos_token_id": 0}', encoding="utf-8")
    small_vocabulary(folder)
    assert dict(find(None, checkpoint=folder, vocab=400).row) == {
        "kind": "huggingface",
        "file": "tokenizer.json",
        "end": [0],
    }
    weights = folder / "RWKV-x070.pth"
    weights.write_bytes(b"")
    assert find(None, checkpoint=weights, kind="rwkv-world").row["kind"] == "rwkv-world"
    assert find(None, checkpoint=weights).row["kind"] == "none"
    assert find(None, checkpoint=weights, kind="bytes").row["kind"] == "bytes"
    # too large for this model: not its tokenizer
    assert find(None, checkpoint=folder, kind="bytes", vocab=256).row["kind"] == "bytes"
    alone = tmp_path / "RWKV-x070.pth"
    alone.write_bytes(b"")
    missing = find(None, checkpoint=alone, kind="rwkv-world")
    assert missing.row["kind"] == "none"
    assert "--tokenizer" in missing.why


def test_what_a_user_names(tmp_path: Path, bpe: Path) -> None:
    assert find("bytes").load().encode("é") == [195, 169]
    assert find("none").row == {"kind": "none"}
    assert find(small_vocabulary(tmp_path)).load().encode("abc d") == [258]
    assert find(bpe.parent).row["kind"] == "huggingface"
    assert find("rwkv-world").load().encode("Hello")[0] == world().encode("Hello")[0]
    for wrong, what in (("nowhere.json", "no such tokenizer"), (tmp_path / "sub", "holds no tokenizer")):
        (tmp_path / "sub").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=what):
            find(wrong)
    with pytest.raises(InputError, match="more ids than the model"):
        find(bpe, vocab=300)


def test_a_bundle_carries_its_tokenizer(exporter: Any, tmp_path: Path) -> None:
    """Exported with a World vocabulary, moved, streamed as text; a changed file is noticed."""
    out = tmp_path / "b"
    path = small_vocabulary(tmp_path, "262 'q q' 3")
    text = tmp_path / "text.txt"
    text.write_text("abc d it's é " * 60, encoding="utf-8")
    with exporter.traced_once():
        exporter.export(wide(), "cpu-fp32", out, tokenizer=path, eval_text=text, name="wide")
    path.unlink()
    bundle = xexport.load(out)
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["tokenizer"] == {"kind": "rwkv-world", "file": "rwkv_vocab.txt"}
    entry = next(f for f in manifest["files"] if f["path"] == "rwkv_vocab.txt")
    assert entry["sha256"] == hashlib.sha256((out / "rwkv_vocab.txt").read_bytes()).hexdigest()
    stream = bundle.stream(threads=1)
    generation = stream.generate("abc d", max_tokens=24, seed=0)
    pieces = list(generation)
    assert "".join(pieces) == bundle.tokenizer().decode(generation.ids)
    stream.reset()
    assert list(stream.generate("abc d", max_tokens=24, seed=0)) == pieces
    (out / "rwkv_vocab.txt").write_text("1 'a' 1\n", encoding="utf-8")
    with pytest.raises(BundleError, match=r"rwkv_vocab\.txt"):
        xexport.load(out)


def wide() -> Any:
    """A running sum over a vocabulary of 300."""
    import torch

    from xexport.core.state import StateSpec

    class Wide(torch.nn.Module):
        vocab_size, max_tokens = 300, None

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = torch.nn.Embedding(300, 8), torch.nn.Linear(8, 300)

        def state_spec(self) -> list[StateSpec]:
            return [StateSpec("s", ("B", 8))]

        def forward(self, tokens: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, ...]:
            h = torch.cumsum(self.embed(tokens), 1) + s[:, None]
            return self.head(torch.tanh(h)), h[:, -1]

    return Wide()


@pytest.mark.parametrize("row", [{"kind": "rwkv-world"}, {"kind": "huggingface", "file": "../x.json"}])
def test_a_manifest_that_names_no_file_of_its_own(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(BundleError):
        load_tokenizer(row, tmp_path)


def test_generation_ends_at_the_end_of_a_text() -> None:
    from test_stream import _Script

    from xexport.runtimes.generate import Generation
    from xexport.runtimes.sampling import Sampler
    from xexport.runtimes.tokenizers import BytesTokenizer

    class Ending(BytesTokenizer):
        end_ids = frozenset((10,))

    made = Generation(_Script(list(b"ab\ncd")), Ending(), [1], max_tokens=5, sampler=Sampler(0))
    assert "".join(made) == "ab"
