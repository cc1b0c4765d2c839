"""Bits per byte of a trained module on a text, and the table of what the shipped checkpoints reach.

    python -m xexport.zoo.score [FAMILY...] [--book FILE] [--write]

Two ways of reading a text that is longer than a training window: ``stream`` runs the chunk form over
the text with its state carried on, as a device does (a model with a maximum starts anew when it reaches
it); ``windows`` gives the training form overlapping windows and counts only the part that has at least
``overlap`` bytes before it. The first byte of a stream has no context and is counted at 8 bits.

``--write`` puts the figures of the shipped checkpoints into ``zoo/results.json``: on the first 4096
bytes and the whole of the built-in held-out text, each one stream, and on a longer text (``--book``),
which is cut into 32 streams that run together.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from xexport.core.checkpoint import open_checkpoint
from xexport.core.contract import contract_of
from xexport.core.errors import InputError, XexportError
from xexport.core.registry import get_family
from xexport.core.state import zero_state
from xexport.zoo import checkpoint_path, shipped
from xexport.zoo.native import native_recurrences

__all__ = ["bits_of_stream", "bits_of_windows", "built_in_text", "main", "score_checkpoint"]

#: The first bytes, which the tests score again.
HEAD = 4096


@torch.no_grad()
def bits_of_windows(
    module: nn.Module, text: NDArray[np.uint8], *, window: int = 512, overlap: int = 256, batch: int = 8
) -> float:
    """Bits per byte of the training form over overlapping windows.

    Args:
        module: tokens int64 [B,T] -> logits [B,T,256].
        text: uint8 [N], N >= 2.
        window: bytes of input per window.
        overlap: bytes of a window that are context alone.
        batch: windows run together.

    Raises:
        InputError: fewer than two bytes.
    """
    _check(text)
    device = next(module.parameters()).device
    stride = window - overlap
    tokens = torch.from_numpy(text.astype(np.int64))
    starts = list(range(0, max(len(text) - 1 - overlap, 1), stride))
    total = 8.0
    for at in range(0, len(starts), batch):
        rows = [tokens[s : s + window + 1] for s in starts[at : at + batch]]
        for same in _by_length(rows):
            block = torch.stack([r for _, r in same]).to(device)
            loss = _nats(module(block[:, :-1]), block[:, 1:])
            for (index, _), row in zip(same, loss, strict=True):
                first = at + index == 0
                total += float(row[0 if first else overlap :].sum()) / math.log(2)
    return total / len(text)


@torch.no_grad()
def bits_of_stream(
    module: Any, text: NDArray[np.uint8], *, chunk: int = 256, rows: int = 1, limit: int | None = None
) -> float:
    """Bits per byte of the chunk form, its state carried from chunk to chunk.

    Args:
        module: the chunk form, (tokens [B,T], *state) -> (logits, *state), or a causal whole form.
        text: uint8 [N], N >= 2.
        chunk: bytes per call.
        rows: the text is cut into this many streams that run together, each from the initial state.
        limit: the longest stream; the state starts anew after it (models with a maximum).

    Raises:
        InputError: fewer than two bytes.
    """
    _check(text)
    length = math.ceil(len(text) / rows)
    if limit is not None:
        length = min(length, limit)
    specs = module.state_spec() if contract_of(module).streams else ()
    chunk = chunk if specs else length  # a whole form has no state to go on from
    total, parts = 0.0, [text[i : i + length] for i in range(0, len(text), length)]
    for same in _by_length([torch.from_numpy(p.astype(np.int64)) for p in parts]):
        for at in range(0, len(same), max(rows, 1)):
            block = torch.stack([r for _, r in same[at : at + max(rows, 1)]])
            total += 8.0 * len(block)
            state = [torch.from_numpy(s) for s in zero_state(specs, len(block))]
            for start in range(0, block.shape[1] - 1, chunk):
                inputs = block[:, start : min(start + chunk, block.shape[1] - 1)]
                logits, *state = module(inputs, *state)
                wanted = block[:, start + 1 : start + 1 + inputs.shape[1]]
                total += float(_nats(logits, wanted).sum()) / math.log(2)
    return total / len(text)


def _nats(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The loss of every position, float64 [B,T]."""
    return F.cross_entropy(logits.float().transpose(1, 2), wanted, reduction="none").double()


def _by_length(rows: list[torch.Tensor]) -> list[list[tuple[int, torch.Tensor]]]:
    groups: dict[int, list[tuple[int, torch.Tensor]]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(len(row), []).append((index, row))
    return list(groups.values())


def _check(text: NDArray[np.uint8]) -> None:
    if len(text) < 2:
        raise InputError("the text is too short to score", got=f"{len(text)} bytes", allowed=">= 2 bytes")


def built_in_text() -> NDArray[np.uint8]:
    """The held-out text that the package ships: uint8 [N]."""
    return np.frombuffer((files("xexport.evaluate") / "text" / "moby_dick.txt").read_bytes(), np.uint8)


def score_checkpoint(name: str, path: Path, book: NDArray[np.uint8] | None = None) -> dict[str, Any]:
    """What one checkpoint reaches, as a row of ``results.json``: the recipe's figures and the held-out ones.

    Raises:
        CheckpointError: the file can't be read by its family.
    """
    raw = open_checkpoint(path)
    family = get_family(name)
    loaded = family.load(raw)
    module = family.build(loaded.config)
    module.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in loaded.tensors.items()})
    recipe = json.loads(raw.metadata["xexport.recipe"])
    limit = getattr(module, "max_tokens", None)
    text = built_in_text()
    row: dict[str, Any] = {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "parameters": recipe["parameters"],
        "steps": recipe["steps"],
        "tokens": recipe["tokens"],
        "minutes": recipe["minutes"],
        "core_minutes": recipe["core_minutes"],
        "validation": recipe["validation_bits_per_byte"],
    }
    chunk = limit or 512
    with native_recurrences():
        row["head"] = round(bits_of_stream(module, text[:HEAD], chunk=chunk, limit=limit), 4)
        row["slice"] = round(bits_of_stream(module, text, chunk=chunk, limit=limit), 4)
        if book is not None:
            row["book"] = round(bits_of_stream(module, book, chunk=chunk, rows=32, limit=limit), 4)
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m xexport.zoo.score", description="Score the checkpoints.")
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="default: all that are shipped")
    parser.add_argument("--checkpoint", type=Path, help="another file of the one FAMILY")
    parser.add_argument("--book", type=Path, help="a longer held-out text")
    parser.add_argument("--write", action="store_true", help="put the figures into zoo/results.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = Path(__file__).with_name("results.json")
    try:
        rows = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
        book = np.frombuffer(options.book.read_bytes(), np.uint8) if options.book else None
        for name in options.families or shipped():
            path = options.checkpoint or checkpoint_path(name)
            if path is None:
                raise InputError("no checkpoint is shipped for this family", got=name, allowed=shipped())
            rows[name] = score_checkpoint(name, path, book)
            print(f"{name}: {json.dumps(rows[name])}", flush=True)
            if options.write:
                results.write_text(json.dumps(rows, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except (OSError, XexportError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
