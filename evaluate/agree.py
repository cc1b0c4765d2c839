"""Does another runtime, or provider, compute what ONNX Runtime's CPU computes of the same file?

A graph may be valid, load and run, and yet give other numbers in another runtime (seen with OpenVINO: a
branch on the length, integers of 64 bits). An export for such a runtime is refused when it does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from xexport.core.errors import ExportError
from xexport.core.manifest import StateTensor
from xexport.core.target import Target
from xexport.runtimes.bundle import Bundle
from xexport.runtimes.opening import CPU

__all__ = ["furthest", "require_agreement"]

_STEPS = 12
_AT_ONCE = 24  # inputs of the first call, of a target that prepares no lengths
_SEED = 3


def require_agreement(bundle: Bundle, target: Target, before: Bundle | None = None) -> dict[str, Any]:
    """Run one random sequence, at once and then by single steps, in the bundle's runtime and on the CPU.

    The first part is long enough to use every length that the target prepares. Compared is the largest
    difference of logits and state, relative to their RMS (at least 1e-3). Two runtimes that compute in
    float32 sum in different orders, which a recurrence of a hundred steps carries along: 1e-3 allows for
    that, and wrong numbers are of order 1. A target that computes in less says what it may lose.

    Args:
        before: the bundle before a conversion of its graph, to compare with; by default ``bundle`` itself.

    Returns:
        For the manifest: against what, how far apart at most, how many tokens.

    Raises:
        ExportError: they differ by more than the target's ``agreement``, naming where.
        RuntimeFailure: the runtime can't run the graph.
    """
    manifest = bundle.manifest
    contract = manifest.model.contract
    longest = sum(target.lengths) or _AT_ONCE
    if contract.streams and contract.max_tokens is not None:
        longest = min(longest, contract.max_tokens - _STEPS * contract.inputs.multiple)
    rng = np.random.default_rng(_SEED)
    here, there = (before or bundle).stream(runtime=CPU), bundle.stream()
    worst, unit, fed = 0.0, contract.inputs.multiple, 0
    lengths = [contract.nearest(longest)] + ([unit] * _STEPS if contract.streams else [])
    for length in lengths:
        values = contract.inputs.random(rng, 1, length, manifest.model.vocab_size)
        fed += length
        want, got = ({"logits": r.feed(values), **r.state()} for r in (here, there))
        name, error = furthest(want, got, manifest.state)
        worst = max(worst, error)
        if not error <= target.agreement:
            raise ExportError(
                f"{target.where} computes something else than ONNX Runtime from the same graph",
                got=f"{name} differs by {error:.2g} of its RMS after {fed} {contract.inputs.unit}s",
                allowed=f"{target.agreement:g}",
                fix="export for a cpu-* target: the runtime has a fault, or can't compute one of the bodies "
                "that this target picks",
            )
    return {"against": "ONNX Runtime on the CPU", "error": worst, f"{contract.inputs.unit}s": fed}


def furthest(
    want: Mapping[str, npt.NDArray[Any]], got: Mapping[str, npt.NDArray[Any]], state: Sequence[StateTensor]
) -> tuple[str, float]:
    """The tensor that differs most, and by how much of its RMS; nan counts as infinitely far.

    Args:
        want, got: logits and state by name, of one shape each.
        state: what is known of the state: of a cache, the RMS is that of the rows in use. Most of a cache is
            empty at first, and would make of a rounding error a large one.
    """
    errors: dict[str, float] = {}
    caches = {s.name: s.appended for s in state if s.appended is not None}
    for name, w in want.items():
        wide, other = w.astype(np.float64), got[name].astype(np.float64)
        cache, used = caches.get(name), wide
        if cache is not None:
            rows = min(int(want[cache.position][0]), wide.shape[cache.axis])
            used = wide.take(range(max(rows, 1)), axis=cache.axis)
        scale = max(float(np.sqrt(np.mean(used**2))), 1e-3)
        errors[name] = float(np.nan_to_num(np.abs(wide - other).max() / scale, nan=np.inf))
    name = max(errors, key=errors.__getitem__)
    return name, errors[name]
