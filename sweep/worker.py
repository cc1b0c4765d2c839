"""``xexport worker``: this machine works for a sweep until the scheduler ends."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from xexport.core.extras import require
from xexport.sweep.machine import announcement, unreachable

__all__ = ["offer", "serve"]

_PATIENCE = 15.0


def offer(*, profile: bool = True) -> dict[str, float]:
    """What this machine announces; see :func:`xexport.sweep.machine.announcement`.

    Raises:
        MissingDependencyError: Dask is not installed (the extra ``sweep``).
    """
    require("distributed", extra="sweep", why="to work for a sweep")
    return announcement(profile=profile)


def serve(scheduler: str, resources: Mapping[str, float], *, name: str | None = None) -> None:
    """Work until the scheduler ends, or an interruption; the process that works is started again if it dies.

    Args:
        scheduler: address, such as ``tcp://192.168.1.5:8786``. Whoever controls the scheduler can run any
            code here: docs/sweep.md says how to protect it.
        resources: what is announced (:func:`offer`).
        name: of the worker; its address by default.

    Raises:
        RuntimeFailure: the scheduler can't be reached.
    """
    try:
        asyncio.run(_serve(scheduler, dict(resources), name))
    except (OSError, ValueError, TimeoutError) as error:
        raise unreachable(scheduler, error) from error


async def _serve(scheduler: str, resources: dict[str, Any], name: str | None) -> None:
    from distributed import Nanny, rpc

    async with asyncio.timeout(_PATIENCE):  # the nanny itself would wait for ever
        link = rpc(scheduler)
        try:
            await link.identity()
        finally:
            await link.close_rpc()
    options = {"name": name} if name else {}
    async with Nanny(scheduler, nthreads=1, memory_limit=0, resources=resources, **options) as nanny:
        await nanny.finished()
