"""What a machine can do for a sweep, and its lock: exports share the machine, a profile has it alone."""

from __future__ import annotations

import os
import platform
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xexport.core.errors import RuntimeFailure

__all__ = ["EXPORT", "PROFILE", "announcement", "host", "machine_label", "resource_of", "unreachable", "use"]

#: resources of a Dask worker: it can export; it may time something
EXPORT = "xexport-export"
PROFILE = "profile"
_LABEL = "machine "


def host() -> str:
    """This machine's name."""
    return socket.gethostname() or platform.node() or "unknown"


def resource_of(group: str) -> str:
    """What a worker that can run a group of targets announces: ``xexport-cpu`` for ``cpu-*``."""
    return f"xexport-{group}"


def announcement(*, profile: bool = True) -> dict[str, float]:
    """The resources of a worker on this machine, from what ``xexport doctor`` finds.

    ``xexport-export`` if it can export, ``xexport-GROUP`` for every group of targets of which it can run at
    least one, ``profile`` if it may measure, and one that names the kind of machine, so that cells that
    are compared are measured on equal ones.
    """
    from xexport.runtimes.doctor import facts

    found = facts()
    names = {EXPORT} if found["can_export"]["yes"] else set()
    if profile:
        names |= {resource_of(row["name"].partition("-")[0]) for row in found["targets"] if row["runs_here"]}
        names |= {PROFILE, f"{_LABEL}{_kind(found)}"}
    return dict.fromkeys(sorted(names), 1.0)


def machine_label(resources: dict[str, Any]) -> str:
    """The resource that names the kind of machine; "" if the worker does not announce it."""
    return next((name for name in sorted(resources) if name.startswith(_LABEL)), "")


def _kind(found: dict[str, Any]) -> str:
    cpu = found["cpu"]
    return f"{cpu['name']} x{cpu['threads']}".replace("=", " ").replace(",", " ")


@contextmanager
def use(*, alone: bool) -> Iterator[None]:
    """Wait for this machine: ``alone`` while nothing else of any sweep runs on it, else beside other exports.

    Two locks on files, which the system lets go of when a process dies: who wants the machine alone first
    closes the gate, so that a stream of exports can't keep it waiting. Where the system has no such locks
    (Windows), the resource ``profile`` alone keeps profiles apart.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    how = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
    with _lock_file("gate").open("a") as gate, _lock_file("machine").open("a") as machine:
        fcntl.flock(gate, how)
        fcntl.flock(machine, how)
        if not alone:
            fcntl.flock(gate, fcntl.LOCK_UN)
        yield


def _lock_file(name: str) -> Path:
    """A file of this user: the folder may be everybody's."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    return Path(tempfile.gettempdir()) / f"xexport-sweep-{user}-{name}.lock"


def unreachable(scheduler: str, error: Exception) -> RuntimeFailure:
    """What to say if a Dask scheduler does not answer."""
    return RuntimeFailure(
        "the scheduler can't be reached",
        got=f"{scheduler}: {str(error) or type(error).__name__}",
        allowed="an address such as tcp://192.168.1.5:8786",
        fix="start one with `dask scheduler`, and check the address and the firewall",
    )
