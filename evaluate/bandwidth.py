"""Memory bandwidth of this machine, and the time a step needs just to read its weights."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from xexport.core.records import Bandwidth, Setup

__all__ = ["measure_bandwidth"]


def measure_bandwidth(
    bytes_per_token: int, *, setup: Setup, buffer_bytes: int = 256 << 20, repeats: int = 7
) -> Bandwidth:
    """Time reading a buffer far larger than any cache with as many threads as the runtime uses.

    Each thread reduces its own part with numpy's ``max`` over int64, which releases the lock, is
    vectorised, and writes nothing, so that the time is the reading's.

    Args:
        bytes_per_token: bytes of weights that one step reads (all stored weights but the embedding
            table, of which a step reads one row).
        buffer_bytes: size of the buffer (allocated for the time of the call).
    """
    threads = max(1, setup.environment.threads)
    size = buffer_bytes // 8 // threads
    parts = [np.ones(size, dtype=np.int64) for _ in range(threads)]
    samples = []
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(np.max, parts))
        for _ in range(repeats):
            begin = time.perf_counter_ns()
            list(pool.map(np.max, parts))
            samples.append(time.perf_counter_ns() - begin)
    return Bandwidth(
        setup=setup,
        threads=threads,
        buffer_bytes=size * 8 * threads,
        read_ns=tuple(samples),
        bytes_per_token=bytes_per_token,
    )
