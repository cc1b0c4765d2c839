"""The facts of the machine and of the software that every measurement row repeats."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from xexport.core.records import Environment, Setup

__all__ = ["environment", "make_setup"]


def environment(threads: int | None = None) -> Environment:
    """What this machine is, now.

    Args:
        threads: threads the runtime uses for one call; None: all the cores this process may use.
    """
    import numpy
    import psutil

    import xexport

    try:
        load = round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):  # not on Windows
        load = None
    cores = _usable_cores()
    return Environment(
        cpu=_cpu_model(),
        cores=cores,
        threads=threads or cores,
        memory_bytes=int(psutil.virtual_memory().total),
        os=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        numpy=numpy.__version__,
        onnxruntime=_version("onnxruntime"),
        torch=_version("torch"),
        xexport=xexport.__version__,
        load_average=load,
    )


def make_setup(
    *,
    model: str,
    target: str,
    bundle: str,
    runner: str = "bundle",
    text: str = "",
    text_sha256: str = "",
    threads: int | None = None,
    model_config: Mapping[str, Any] | None = None,
    target_row: Mapping[str, Any] | None = None,
) -> Setup:
    """The configuration of a measurement that is about to begin, with the machine and the date."""
    return Setup(
        model=model,
        target=target,
        bundle=bundle,
        runner=runner,
        text=text,
        text_sha256=text_sha256,
        environment=environment(threads),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        model_config=dict(model_config or {}),
        target_row=dict(target_row or {}),
    )


@cache
def _version(package: str) -> str | None:
    """An installed package's version, without importing it (torch takes seconds)."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine() or "unknown"
