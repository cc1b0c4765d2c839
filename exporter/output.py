"""The folder a bundle is written to: all or nothing.

Everything is made in a hidden folder beside the final one and renamed at the end. A failed,
interrupted or killed export leaves the final name as it was; what a killed one left behind is
swept by the next export to the same name.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from xexport.core.errors import OutputError
from xexport.exporter.writer import disk_error

__all__ = ["Output", "output_folder", "require_space"]


class Output:
    """A bundle folder under construction.

    Attributes:
        final: where the bundle will be.
        scratch: for intermediate files, removed at the end.
        bundle: becomes ``final`` on commit.
    """

    def __init__(self, final: Path, work: Path) -> None:
        self.final = final
        self._work = work
        self.bundle = work / "bundle"
        self.scratch = work / "scratch"
        self.bundle.mkdir()
        self.scratch.mkdir()

    def commit(self) -> None:
        """Put the finished bundle in place, replacing an old one if there is one."""
        old = self._work / "old"
        try:
            _sync(self.bundle)
            if self.final.exists():
                self.final.rename(old)
            self.bundle.rename(self.final)
        except BaseException as error:
            if old.exists() and not self.final.exists():
                old.rename(self.final)
            if isinstance(error, OSError):
                raise disk_error(error, self.final) from error
            raise


@contextmanager
def output_folder(out: Path, *, force: bool) -> Iterator[Output]:
    """Check the place first, then yield the folders to write to; clean up whatever happens.

    Raises:
        OutputError: the folder exists (without ``force``), is no bundle (with it), or can't be
            written.
    """
    final = Path(os.path.abspath(out))  # noqa: PTH100 (resolve() would follow a link at the end)
    with _terminate_politely():
        try:
            _check(final, force)
        except OSError as error:
            raise disk_error(error, final) from error
        with _work_folder(final) as work:
            try:
                yield Output(final, work)
            except OSError as error:
                raise disk_error(error, final) from error


def require_space(folder: Path, needed: int) -> None:
    """Raise OutputError unless ``folder``'s disk has ``needed`` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            "the disk has too little room for this export",
            got=f"{free / 1e9:.1f} GB free in {folder}",
            allowed=f"{needed / 1e9:.1f} GB",
            fix="free some space, or name another --out",
        )


def _check(final: Path, force: bool) -> None:
    if final.is_symlink() or (final.exists() and not final.is_dir()):
        raise OutputError("the output is in the way: it is not a folder", got=final, fix="name another --out")
    if not final.exists():
        return
    if not force:
        raise OutputError(
            "the output folder exists", got=final, fix="name another --out, or replace it with --force"
        )
    if any(final.iterdir()) and not (final / "manifest.json").is_file():
        raise OutputError(
            "the output folder exists and is not a bundle: --force replaces bundles only",
            got=final,
            fix="name another --out",
        )


@contextmanager
def _work_folder(final: Path) -> Iterator[Path]:
    """A hidden folder beside ``final``; it goes at the end, and so do parents made for nothing."""
    made = [p for p in (final.parent, *final.parent.parents) if not p.exists()]
    work: Path | None = None
    try:
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            _sweep(final)
            work = Path(tempfile.mkdtemp(prefix=f".{final.name}.partial-{os.getpid()}-", dir=final.parent))
        except OSError as error:
            raise disk_error(error, final.parent) from error
        yield work
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # it holds the bundle, or was never made
                parent.rmdir()


def _sweep(final: Path) -> None:
    """Remove what exports to this name left behind when they were killed."""
    for path in final.parent.glob(f".{final.name}.partial-*"):
        owner = path.name.removeprefix(f".{final.name}.partial-").split("-", 1)[0]
        if owner.isdigit() and not _alive(int(owner)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    import psutil

    return bool(psutil.pid_exists(process))


def _sync(folder: Path) -> None:
    """Ask the disk to keep the files before the rename makes them official."""
    for path in folder.iterdir():
        with path.open("rb") as handle:
            os.fsync(handle.fileno())


@contextmanager
def _terminate_politely() -> Iterator[None]:
    """SIGTERM raises SystemExit, so that the clean-up runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
