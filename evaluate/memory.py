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

import numpy, onnxruntime
import xexport
folder, count = sys.argv[1], int(sys.argv[2])
load = xexport.load
process = psutil.Process()
start = process.memory_info().rss
stream = load(folder).stream(batch=1)
loaded = process.memory_info().rss
limit = stream.max_tokens
fed = 0
tokens = [i % stream.vocab_size for i in range(count if limit is None else min(count, limit))]
half = len(tokens) // 2
if half:
    stream.feed(tokens[:half], keep=1)
for token in tokens[half:]:
    stream.feed([token])
print(json.dumps({
    "start_rss": start, "loaded_rss": loaded, "end_rss": process.memory_info().rss,
    "peak_rss": peak(process), "tokens": len(tokens),
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
) -> Memory:
    """Load a bundle in a fresh interpreter, feed ``tokens`` (half in one call, half one by one).

    Args:
        weights_bytes, state_bytes: sizes from the manifest, repeated in the row.

    Raises:
        RuntimeFailure: the process failed or did not finish in time.
    """
    command = [sys.executable, "-c", _CHILD, str(bundle), str(tokens)]
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
