"""Small exports that several test files share: every family and target once a session.

torch's trace is most of the time of a tiny export and does not depend on the target, so it is kept
(traces.py): a family is traced once, every target starts from that graph. Everything after it
(weights, passes, verification, quantization, writing, measuring) runs in full. ``XEXPORT_TEST_TRACES`` is a
folder that several runs of the same sources share; it has to be deleted before the first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from traces import Traces

from xexport.core.progress import Silent

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


class Told(Silent):
    """Keeps the titles of the stages."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def stage(self, title: str, total: int | None = None) -> None:
        self.stages.append(title)


class Exporter:
    """``exporter(family, target) -> the bundle's folder``, made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._traces = Traces(Path(os.environ.get("XEXPORT_TEST_TRACES") or root / "traces"))
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
                told = Told()
                self.export(family, target, out, preset="tiny", sizes=sizes(timed), progress=told)
                self._stages(out).write_text("\n".join(told.stages), encoding="utf-8")
        return out

    def stages(self, family: str, target: str) -> list[str]:
        """What the export of that bundle said that it was doing, in order."""
        return self._stages(self(family, target)).read_text(encoding="utf-8").splitlines()

    @staticmethod
    def _stages(out: Path) -> Path:
        return out.with_name(f"{out.name}.stages")

    def export(self, model: Any, target: str, out: Path, **options: Any) -> Path:
        """Any export, with the kept traces and small measurements."""
        import xexport

        options.setdefault("eval_text", self.ids)
        options.setdefault("sizes", sizes())
        with self.traced_once():
            return xexport.export(model, target=target, out=out, **options).path

    @contextmanager
    def traced_once(self) -> Iterator[None]:
        """Let the exporter read the trace that an earlier export of the same module left."""
        from xexport.exporter import graph

        real = graph.trace

        def trace(module: Any, specs: Any, *, opset: int, contract: Any = None) -> Any:
            def made() -> Any:
                return real(module, specs, opset=opset, contract=contract)

            return self._traces.get(module, (tuple(specs), opset, contract), made)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(graph, "trace", trace)
            yield
