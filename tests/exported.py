"""Small exports that several test files share: every family and target once a session.

torch's trace is most of the time of a tiny export and does not depend on the target, so it is kept:
a family is traced once, every target starts from a copy of that graph. Everything after the trace
(weights, passes, verification, quantization, writing, measuring) runs in full.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

__all__ = ["BOUNDED", "FAMILIES", "IDS", "TARGETS", "TIMED", "Exporter", "sizes"]

FAMILIES = ("hyena", "linear_attention", "mamba", "retnet", "rwkv", "transformer")
#: those whose stream has a maximum
BOUNDED = ("hyena", "transformer")
TARGETS = ("cpu-fp16", "cpu-fp32", "cpu-int4", "cpu-int8")
TIMED = ("hyena", "rwkv")
#: tokens that every tiny preset knows, as the text to evaluate on
IDS = " ".join(str((7 * i + i * i // 5) % 29) for i in range(300))


def sizes(timed: bool = False) -> Any:
    """Measurements that take a second, and a few more with timing."""
    from xexport.evaluate.suite import Sizes

    return Sizes(256, 256, chunk_tokens=24, steps=10, prefill=(16,), positions=(), timed=timed)


class Exporter:
    """``exporter(family, target) -> the bundle's folder``, made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._traces: dict[Any, Any] = {}
        self.ids = root / "ids.txt"
        with FileLock(root / "ids.lock"):
            if not self.ids.exists():
                self.ids.write_text(IDS, encoding="utf-8")

    def __call__(self, family: str, target: str) -> Path:
        out = self._root / f"{family}-{target}"
        # another worker of this run may be at it; a bundle appears whole or not at all
        with FileLock(self._root / f"{family}-{target}.lock"):
            if not out.exists():
                # timing costs more than all the rest: once with a limit on the stream, once without
                timed = target == "cpu-int8" and family in TIMED
                self.export(family, target, out, preset="tiny", sizes=sizes(timed))
        return out

    def export(self, model: Any, target: str, out: Path, **options: Any) -> Path:
        """Any export, with the kept traces and small measurements."""
        import xexport

        options.setdefault("eval_text", self.ids)
        options.setdefault("sizes", sizes())
        with self.traced_once():
            return xexport.export(model, target=target, out=out, **options).path

    @contextmanager
    def traced_once(self) -> Iterator[None]:
        """Let the exporter start from a copy of an earlier trace of the same module."""
        from xexport.exporter import graph

        real = graph.trace

        def trace(module: Any, specs: Any, *, opset: int, contract: Any = None) -> Any:
            key = type(module), repr(getattr(module, "config", id(module))), tuple(specs), opset, contract
            if key not in self._traces:
                self._traces[key] = real(module, specs, opset=opset, contract=contract)
            return self._traces[key].clone()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(graph, "trace", trace)
            yield
