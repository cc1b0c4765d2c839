"""xexport's side: bundles made once into the cache, and their streams timed as a user would call them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llamacpp.build import Log
from llamacpp.files import SHAPES

__all__ = [
    "bundle",
    "last_logits_only",
    "stored_bytes_per_token",
    "time_decode",
    "time_prefill",
]

#: What a bundle depends on; kernels and runtimes are used as they are now.
_EXPORT = ("core", "ops", "models", "exporter", "quant", "targets")


def bundle(shape: str, target: str, cache: Path, log: Log) -> Any:
    """The bundle of a shape for a target; exported again whenever the exporter's sources changed."""
    import xexport
    from xexport.evaluate.suite import Sizes

    folder = cache / "bundles"
    folder.mkdir(exist_ok=True)
    out = folder / f"{shape}-{target}-{_sources()}"
    if not out.is_dir():
        for old in folder.glob(f"{shape}-{target}-*"):
            shutil.rmtree(old)
        family, preset = SHAPES[shape]
        log(f"{shape}: exporting for {target}")
        brief = Sizes(16, 16, chunk_tokens=8, steps=2, prefill=(4,), positions=(), timed=False)
        xexport.export(family, target=target, preset=preset, out=out, sizes=brief)
    return xexport.load(out, verify=False)


def _sources() -> str:
    """A name for the present state of everything that decides what is in a bundle."""
    import xexport

    root = Path(str(xexport.__file__)).resolve().parent
    digest = hashlib.sha256()
    for name in _EXPORT:
        for file in sorted((root / name).rglob("*")):
            if file.suffix in (".py", ".toml"):
                digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    digest.update((root / "pipeline.py").read_bytes())
    return digest.hexdigest()[:10]


def stored_bytes_per_token(manifest: Any) -> int:
    """Bytes of weights one step reads: everything stored, but one row of the embedding table."""
    total = 0
    for d in manifest.decisions:
        total += d.bytes // d.shape[0] if d.role == "embedding" else d.bytes
    return int(total)


def time_decode(stream: Any, tokens: Any, steps: int, now: Callable[[], float]) -> float:
    """Seconds for ``steps`` tokens one by one from a warm state; each gives its logits."""
    pieces = [np.ascontiguousarray(tokens[:, i : i + 1]) for i in range(steps)]
    stream.feed(pieces[0])
    began = now()
    for piece in pieces:
        stream.feed(piece)
    return now() - began


def last_logits_only(stream: Any) -> bool:
    """Whether this bundle can leave out the logits that a prompt doesn't need, as llama.cpp does."""
    return bool(stream.keeps)


def time_prefill(stream: Any, tokens: Any, now: Callable[[], float], *, last: bool) -> float:
    """Seconds for one prompt on an empty state; ``last``: logits of its last token alone."""
    stream.reset()
    began = now()
    stream.feed(tokens, keep=1 if last else 0)
    return now() - began
