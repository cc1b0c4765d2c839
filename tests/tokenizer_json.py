"""Small tokenizer.json files of the kinds that published models have; and odd texts."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

__all__ = ["KINDS", "ODD", "moby_dick", "write_tokenizer"]

ODD = (
    "naïve café — “quotes” … \u00a0\u200b\u200d\ufeff",
    "日本語のテキスト、中文，한국어",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 é (combining) \U0001f9d1\U0001f3fd",
    "\x00\x01\x7f\t\r\n\r\n   \u2028",
    "العربية עברית हिन्दी ไทย",
    "\ufffd \ufffe \U0010ffff",
    "def f(x):\n\treturn  x ** 2  # 12345678901234567890",
    "",
)
_SIZE = 400


def moby_dick(count: int = 60_000) -> str:
    """The beginning of the text that models are judged by."""
    text = (files("xexport.evaluate") / "text" / "moby_dick.txt").read_text(encoding="utf-8")
    return text[:count]


def _byte_level() -> tuple[Any, Any]:
    """GPT-NeoX's (Mamba, Pythia, RWKV-4): bytes as characters, merged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made, trainers.BpeTrainer(
        vocab_size=_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )


def _split() -> tuple[Any, Any]:
    """Llama 3's and Qwen's: a regular expression cuts the text, then bytes; the text is normalized."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    made, trainer = _byte_level()
    made.normalizer = normalizers.NFC()
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    return made, trainer


def _sentencepiece() -> tuple[Any, Any]:
    """Llama 2's and Mistral's (GLA): SentencePiece's merges, bytes where no token fits, and a beginning."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    special = ["<unk>", "<s>", "</s>"]
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return made, trainers.BpeTrainer(
        vocab_size=_SIZE + 256,
        special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))],
        max_token_length=12,
        show_progress=False,
    )


def _unigram() -> tuple[Any, Any]:
    """T5's: the likeliest pieces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return made, trainers.UnigramTrainer(
        vocab_size=_SIZE, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )


def _word_piece() -> tuple[Any, Any]:
    """BERT's (Linformer, M2-BERT)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(prefix="##")
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made, trainers.WordPieceTrainer(vocab_size=_SIZE, special_tokens=special, show_progress=False)


#: kind -> an untrained tokenizer and its trainer
KINDS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "byte-level": _byte_level,
    "split": _split,
    "sentencepiece": _sentencepiece,
    "unigram": _unigram,
    "word-piece": _word_piece,
}


def write_tokenizer(folder: Path, kind: str = "byte-level") -> Path:
    """``folder``/tokenizer.json of that kind."""
    made, trainer = KINDS[kind]()
    text = moby_dick(20_000)
    made.train_from_iterator(text.split("\n\n") if kind == "sentencepiece" else [text], trainer)
    path = folder / "tokenizer.json"
    made.save(str(path))
    return path
