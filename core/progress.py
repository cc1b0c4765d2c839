"""Telling the user how long work is going: bars on a terminal, plain lines otherwise, on stderr."""

from __future__ import annotations

import sys
import time
from typing import Protocol, TextIO

__all__ = ["KeptOpen", "PlainProgress", "Progress", "RichProgress", "Silent", "for_terminal"]


class Progress(Protocol):
    """A listener that long work reports to, one stage at a time."""

    def stage(self, title: str, total: int | None = None) -> None:
        """Begin a stage; the one before it is over. ``total`` is its number of steps, if known."""

    def advance(self, steps: int = 1) -> None:
        """``steps`` more of the present stage are done."""

    def note(self, text: str) -> None:
        """Say what was just done, in a line; the stage goes on."""

    def close(self) -> None:
        """All is done, or given up."""


class Silent:
    """Reports nothing: the default of the Python API."""

    def stage(self, title: str, total: int | None = None) -> None:
        pass

    def advance(self, steps: int = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class KeptOpen:
    """Hands everything on but the end: for one part of longer work, which closes its own."""

    def __init__(self, whole: Progress) -> None:
        self._whole = whole

    def stage(self, title: str, total: int | None = None) -> None:
        self._whole.stage(title, total)

    def advance(self, steps: int = 1) -> None:
        self._whole.advance(steps)

    def note(self, text: str) -> None:
        self._whole.note(text)

    def close(self) -> None:
        pass


class PlainProgress:
    """One line a stage with the time it took; for logs and pipes."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stderr
        self._title: str | None = None
        self._began = 0.0

    def stage(self, title: str, total: int | None = None) -> None:
        self.close()
        self._title, self._began = title, time.perf_counter()

    def advance(self, steps: int = 1) -> None:
        pass

    def note(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def close(self) -> None:
        if self._title is not None:
            print(f"{self._title}: {time.perf_counter() - self._began:.1f} s", file=self._out, flush=True)
        self._title = None


class RichProgress:
    """Bars that stay on the terminal, one a stage."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            SpinnerColumn,
            TaskID,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
        )
        from rich.progress import Progress as RichBar

        self._bar = RichBar(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._bar.start()
        self._task: TaskID | None = None

    def stage(self, title: str, total: int | None = None) -> None:
        self._finish()
        self._task = self._bar.add_task(title, total=total)

    def advance(self, steps: int = 1) -> None:
        if self._task is not None:
            self._bar.advance(self._task, steps)

    def note(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._finish()
        self._bar.stop()

    def _finish(self) -> None:
        if self._task is not None:
            task = next(t for t in self._bar.tasks if t.id == self._task)
            total = task.total or max(task.completed, 1)
            self._bar.update(self._task, total=total, completed=total)
        self._task = None


def for_terminal() -> Progress:
    """A bar if stderr is a terminal, else plain lines."""
    return RichProgress() if sys.stderr.isatty() else PlainProgress()
