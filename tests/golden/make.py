"""Make the golden bundle again: ``python tests/golden/make.py``, from the project's root.

Only when the schema version was raised on purpose: as long as it stands, every xexport must read the
bundle that an older one wrote, and get the same logits from it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

import xexport
from xexport.evaluate.suite import Sizes

__all__ = ["TOKENS", "make"]

HERE = Path(__file__).parent
#: two streams of nine tokens
TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2, 6, 5], [60, 0, 33, 8, 8, 8, 8, 17, 2]])


def make(folder: Path) -> None:
    """A tiny RWKV-7 with random weights in 8 bits, and what it gives for TOKENS."""
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "ids.txt"
        text.write_text(" ".join(str(i * i % 61) for i in range(48)), encoding="utf-8")
        sizes = Sizes(48, 48, chunk_tokens=12, timed=False)
        bundle = xexport.export(
            "rwkv",
            target="cpu-int8",
            preset="tiny",
            out=folder / "bundle",
            eval_text=text,
            sizes=sizes,
            force=True,
        )
    (bundle.path / "report.html").unlink()
    for name in ("manifest.json", "results.jsonl"):  # which kernel this machine runs is nobody's business
        path = bundle.path / name
        path.write_text(path.read_text("utf-8").replace(bundle.manifest.environment["os"], "Linux"), "utf-8")
    stream = bundle.stream(batch=2)
    logits = stream.feed(TOKENS)
    state = {f"state {name}": value for name, value in stream.state().items()}
    np.savez_compressed(folder / "expected.npz", logits=logits, **state)


if __name__ == "__main__":
    make(HERE)
