"""What a whole-form model of tokens says of a text: the most likely tokens at every position."""

from __future__ import annotations

from typing import Any

import numpy as np

from xexport.core.errors import FormError
from xexport.runtimes.stream import Stream

__all__ = ["predict"]


def predict(stream: Stream, ids: list[int], top: int = 5) -> list[dict[str, Any]]:
    """One whole sequence through the model: for every position its token and the likeliest outputs.

    What the outputs mean is the model's affair: a masked-language model's are the tokens that it would
    put there. A text that is longer than a fixed length is cut to it.

    Returns:
        Rows ``{position, token, text, predictions: [{token, text, probability}]}``, likeliest first.

    Raises:
        FormError: the model doesn't read tokens.
        InputError: a bad id, or a text shorter than a fixed length.
    """
    contract = stream.contract
    if contract.inputs.kind != "tokens":
        raise FormError(
            "this model doesn't read text",
            got=f"it reads {contract.inputs.kind} [B, T, {contract.inputs.width}]",
            fix="a recording with --audio, or in Python: xexport.load(BUNDLE).stream().feed(features)",
        )
    ids = ids[: contract.fixed_length] if contract.fixed_length else ids
    logits = np.asarray(stream.feed(ids)[0], np.float64)
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    odds /= odds.sum(-1, keepdims=True)
    decode = stream.tokenizer.decode
    known = min(stream.vocab_size, stream.tokenizer.vocab_size or stream.vocab_size)
    rows = []
    for position, (token, row) in enumerate(zip(ids, odds, strict=True)):
        best = [int(i) for i in np.argsort(-row[:known], kind="stable")[:top]]
        found = [{"token": i, "text": decode([i]), "probability": float(row[i])} for i in best]
        rows.append({"position": position, "token": token, "text": decode([token]), "predictions": found})
    return rows
