"""Which runtime opens a bundle's graph: the target's own, another by name, or this machine's CPU.

A runtime is a file of this folder with ``open_engine(folder, manifest, threads=0, ...)``. The bundle of a
target that names an isolated environment is opened by a worker process there.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from xexport.core.errors import RuntimeFailure
from xexport.core.manifest import Manifest

if TYPE_CHECKING:
    from xexport.runtimes.engine import Engine

__all__ = ["CPU", "environment_of", "open_engine", "runtime_names", "simulated", "why_not"]

#: the runtime name for ONNX Runtime's CPU provider in this process, whatever the bundle is for
CPU = "cpu"
_RUNTIMES = ("onnxruntime", "openvino")
#: runtimes of other languages, and the environment that each lives in: they have no file here, but a worker
_ELSEWHERE = {"onnxruntime-web": "web"}


def runtime_names() -> tuple[str, ...]:
    """What ``--runtime`` takes."""
    return (CPU, *_RUNTIMES, *_ELSEWHERE)


def environment_of(manifest: Manifest) -> str:
    """The isolated environment that the bundle's own runtime lives in; "" for this process.

    Raises:
        UnknownNameError: the manifest names an environment that this xexport doesn't have.
    """
    from xexport.runtimes.environments import needed

    return needed(str(manifest.target_row.get("environment") or ""))


def open_engine(
    folder: Path, manifest: Manifest, *, runtime: str | None = None, threads: int = 0, **options: Any
) -> Engine:
    """Open the graph of a bundle.

    Args:
        folder: the bundle.
        manifest: its manifest.
        runtime: one of :func:`runtime_names`; the bundle's own by default.
        threads: 0 takes every physical core.
        options: what that runtime's ``open_engine`` takes besides (``profile``, ``profile_prefix``).

    Raises:
        RuntimeFailure: the runtime is unknown, not available, or refused the graph.
        UnknownNameError: the manifest names an environment that this xexport doesn't have.
    """
    if runtime == CPU:
        manifest = _on_cpu(manifest)
    name = manifest.runtime if runtime in (None, CPU) else str(runtime)
    if name not in runtime_names():
        raise RuntimeFailure(
            "this xexport doesn't have that runtime",
            got=name,
            allowed=", ".join(runtime_names()),
            fix="upgrade xexport, or export for another target"
            if runtime is None
            else "name one of these; without --runtime the bundle's own runs it",
        )
    environment = environment_of(manifest) if name == manifest.runtime else _ELSEWHERE.get(name, "")
    engine: Engine
    if environment:
        from xexport.runtimes import remote

        engine = remote.open_engine(folder, manifest, environment, threads=threads, **options)
    else:
        module = import_module(f"xexport.runtimes.{name}")
        engine = module.open_engine(folder, manifest, threads=threads, **options)
    return engine


def why_not(runtime: str, provider: str, environment: str = "") -> str | None:
    """Why a runtime with one of its providers can't run here, or None if it can."""
    from xexport.runtimes import environments

    if environments.needed(environment):
        return environments.why_not(environment)
    if find_spec(f"xexport.runtimes.{runtime}") is None:
        return f"this xexport has no runtime {runtime!r}"
    if find_spec(runtime) is None:
        return f"the package {runtime!r} is not installed"
    reason: str | None = import_module(f"xexport.runtimes.{runtime}").unavailable(provider)
    return reason


def simulated(provider: str, environment: str = "") -> str:
    """Why times measured here say nothing about a target's device; "" if they do."""
    from xexport.runtimes import environments, qnn

    return environments.simulated(environment) or (qnn.simulated() if provider == qnn.PROVIDER else "")


def _on_cpu(manifest: Manifest) -> Manifest:
    """The manifest as if the bundle were for ONNX Runtime's CPU provider, which computes what is written.

    By default it makes MatMulNBits of a product whose weight alone is quantized, and rounds its activations
    to 8 bits as well: 2% of a product, in a graph that says float32.
    """
    row = {
        key: value
        for key, value in manifest.target_row.items()
        if key not in ("environment", "provider_options", "session_options")
    }
    row["session_options"] = {"session.disable_quant_qdq": "1"}
    return msgspec.structs.replace(
        manifest, runtime="onnxruntime", provider="CPUExecutionProvider", target_row=row
    )
