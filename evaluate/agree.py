"""Does another runtime compute what ONNX Runtime computes of the same file?

A graph may be valid, load and run, and yet give other numbers in another runtime (seen with OpenVINO: a
branch on the length, integers of 64 bits). An export for such a runtime is refused when it does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from xexport.core.errors import ExportError
from xexport.runtimes.bundle import Bundle

__all__ = ["AGREEMENT", "require_agreement"]

#: largest difference of logits and state, relative to their RMS (at least 1e-3): both compute in float32 and
#: sum in different orders, which a recurrence of a hundred steps carries along; other numbers are of order 1
AGREEMENT = 1e-3
_STEPS = 12
_SEED = 3


def require_agreement(bundle: Bundle) -> dict[str, Any]:
    """Run one random sequence, at once and then by single steps, in the bundle's runtime and in ONNX Runtime.

    The first part is long enough to use every length that the target prepares.

    Returns:
        For the manifest: against what, how far apart at most, how many tokens.

    Raises:
        ExportError: they differ by more than :data:`AGREEMENT`, naming where.
        RuntimeFailure: the runtime can't run the graph.
    """
    manifest = bundle.manifest
    contract = manifest.model.contract
    longest = sum(manifest.target_row.get("lengths") or [1])
    rng = np.random.default_rng(_SEED)
    runners = {"onnxruntime": bundle.stream(runtime="onnxruntime"), manifest.runtime: bundle.stream()}
    worst, unit, fed = 0.0, contract.inputs.multiple, 0
    lengths = [contract.nearest(longest)] + ([unit] * _STEPS if contract.streams else [])
    for length in lengths:
        values = contract.inputs.random(rng, 1, length, manifest.model.vocab_size)
        fed += length
        found = {name: {"logits": r.feed(values), **r.state()} for name, r in runners.items()}
        want, got = found["onnxruntime"], found[manifest.runtime]
        name, error = _furthest(want, got)
        worst = max(worst, error)
        if not error <= AGREEMENT:
            raise ExportError(
                f"{manifest.runtime} computes something else than ONNX Runtime from the same graph",
                got=f"{name} differs by {error:.2g} of its RMS after {fed} {contract.inputs.unit}s",
                allowed=f"{AGREEMENT:g}",
                fix="export for a cpu-* target: the runtime has a fault, or can't compute one of the bodies "
                "that this target picks",
            )
    return {"against": "onnxruntime", "error": worst, f"{contract.inputs.unit}s": fed}


def _furthest(want: Mapping[str, npt.NDArray[Any]], got: Mapping[str, npt.NDArray[Any]]) -> tuple[str, float]:
    """The tensor that differs most, and by how much; nan counts as infinitely far."""
    errors: dict[str, float] = {}
    for name, w in want.items():
        wide, other = w.astype(np.float64), got[name].astype(np.float64)
        scale = max(float(np.sqrt(np.mean(wide**2))), 1e-3)
        errors[name] = float(np.nan_to_num(np.abs(wide - other).max() / scale, nan=np.inf))
    name = max(errors, key=errors.__getitem__)
    return name, errors[name]
