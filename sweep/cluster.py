"""Where the cells are worked on: processes of this machine, or the workers of a Dask scheduler."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from xexport.core.errors import RuntimeFailure
from xexport.sweep.machine import EXPORT, announcement, unreachable

__all__ = ["connect", "embedded", "local_workers", "worker_resources"]

_PATIENCE = 15.0  # seconds for a scheduler to answer, and for its first worker to be there
_GIGABYTES_PER_EXPORT = 4


def local_workers() -> int:
    """How many processes this machine works with if nothing else is asked: every export takes memory."""
    import psutil

    cores, memory = os.cpu_count() or 1, psutil.virtual_memory().total / 1e9
    return max(1, min(4, cores // 2, int(memory / _GIGABYTES_PER_EXPORT)))


@contextmanager
def connect(scheduler: str | None, workers: int | None) -> Iterator[Any]:
    """A ``distributed.Client`` of a scheduler, or of processes of this machine that end with it.

    Raises:
        RuntimeFailure: the scheduler does not answer, or has no worker.
    """
    from distributed import Client

    if scheduler is None:
        first = announcement()
        others = {EXPORT: 1.0} if EXPORT in first else {}
        count = workers or local_workers()
        with embedded([first, *[others] * (count - 1)]) as client:
            yield client
        return
    try:
        client = Client(scheduler, timeout=_PATIENCE, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise unreachable(scheduler, error) from error
    with client:
        _require_workers(client, scheduler)
        yield client


@contextmanager
def embedded(resources: Sequence[Mapping[str, float]]) -> Iterator[Any]:
    """A client of as many worker processes of this machine as there are rows of resources.

    A process that dies is started again. Nothing listens on another address than the machine's own.
    """
    import dask
    from distributed import Client, Nanny, Scheduler, SpecCluster

    shared = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
    options = {**shared, "nthreads": 1, "memory_limit": 0, "silence_logs": logging.ERROR}
    spec = {
        index: {"cls": Nanny, "options": {**options, "resources": dict(row)}}
        for index, row in enumerate(resources)
    }
    settings = {
        "distributed.scheduler.allowed-failures": 1,
        # the cluster would give a slow machine's process up before it is started again
        "distributed.deploy.lost-worker-timeout": "1 hour",
    }
    with (
        dask.config.set(settings),
        SpecCluster(
            workers=spec,
            scheduler={"cls": Scheduler, "options": {**shared, "port": 0, "dashboard": False}},
            silence_logs=logging.ERROR,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def worker_resources(client: Any) -> dict[str, dict[str, float]]:
    """Address -> resources of every worker that is there now.

    Raises:
        RuntimeFailure: the scheduler is gone.
    """
    fix = "what is finished is kept: start the scheduler and the workers, and run the same command again"
    link = client.scheduler
    if link is None:  # the client waited for it in vain and closed
        raise RuntimeFailure("the scheduler is gone", got="the connection was lost", fix=fix)
    try:
        # not client.scheduler_info(): a task of the client overwrites its answer with one without workers
        found = client.sync(link.identity, n_workers=-1)["workers"]
    except OSError as error:
        raise RuntimeFailure("the scheduler is gone", got=error, fix=fix) from error
    return {address: dict(row.get("resources") or {}) for address, row in found.items()}


def _require_workers(client: Any, scheduler: str) -> None:
    end = time.monotonic() + _PATIENCE
    while not worker_resources(client):
        if time.monotonic() > end:
            raise RuntimeFailure(
                "no worker is connected to the scheduler",
                got=scheduler,
                fix=f"run `xexport worker {scheduler}` on every machine that is to work",
            )
        time.sleep(0.2)
