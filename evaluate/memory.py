"""Resident memory of a bundle, measured in a process of its own that has loaded nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from xexport.core.errors import RuntimeFailure
from xexport.core.records import Memory, Setup

__all__ = ["measure_memory"]

# VmHWM, not getrusage: on Linux ru_maxrss of a child begins at its parent's peak.
_CHILD = """
import json, sys
import psutil

def peak(process):
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    info = process.memory_info()
    return int(getattr(info, "peak_wset", info.rss))

import importlib, importlib.util, numpy
import xexport
folder, count = sys.argv[1], int(sys.argv[2])
bundle = xexport.load(folder)
if importlib.util.find_spec(bundle.manifest.runtime):
    importlib.import_module(bundle.manifest.runtime)
process = psutil.Process()
start = process.memory_info().rss
engine = bundle.engine(runtime=sys.argv[3] or None)
if hasattr(engine, "memory"):  # it is another process, whose memory counts
    start, now = engine.rss_before, lambda: engine.memory()["rss"]
    most = lambda: engine.memory()["peak_bytes"]
else:
    now, most = lambda: process.memory_info().rss, lambda: peak(process)
stream = bundle.stream(batch=1, runtime=sys.argv[3] or None)
loaded = now()
contract = stream.contract
length, unit = contract.nearest(count), contract.inputs.multiple
values = contract.inputs.random(numpy.random.default_rng(0), 1, length, stream.vocab_size)
if contract.streams:
    half = length // 2 // unit * unit
    if half:
        stream.feed(values[:, :half], keep=1)
    for at in range(half, length, unit):
        stream.feed(values[:, at : at + unit])
else:
    for _ in range(3):
        stream.feed(values)
print(json.dumps({
    "start_rss": start, "loaded_rss": loaded, "end_rss": now(),
    "peak_rss": most(), "tokens": length,
}))
"""


def measure_memory(
    bundle: Path,
    *,
    setup: Setup,
    weights_bytes: int,
    state_bytes: int,
    tokens: int = 128,
    timeout_s: float = 600.0,
    runtime: str | None = None,
) -> Memory:
    """Load a bundle in a fresh interpreter, feed ``tokens`` (half in one call, half one by one).

    In the whole form every call is one sequence of that many, or of the nearest length allowed.

    Args:
        weights_bytes, state_bytes: sizes from the manifest, repeated in the row.
        runtime: what runs it; the bundle's own by default.

    Raises:
        RuntimeFailure: the process failed or did not finish in time.
    """
    command = [sys.executable, "-c", _CHILD, str(bundle), str(tokens), runtime or ""]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise RuntimeFailure("measuring memory took too long", got=f"over {timeout_s:.0f} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RuntimeFailure(
            "the process that measures memory failed",
            got=f"exit code {done.returncode}: {lines[-1] if lines else 'no message'}",
        )
    row = json.loads(done.stdout.strip().splitlines()[-1])
    return Memory(setup=setup, weights_bytes=weights_bytes, state_bytes=state_bytes, **row)
