"""What this machine has: versions, processor, memory, native kernels, and which targets run here."""

from __future__ import annotations

import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from xexport.core.errors import XexportError
from xexport.core.target import get_target, target_names
from xexport.runtimes.native import find_native
from xexport.runtimes.opening import why_not

__all__ = ["facts"]

_EXPORT_PACKAGES = ("torch", "onnx", "onnxscript", "onnx-ir", "safetensors", "optimum", "plotly")
_ISA = (
    "sse4_2",
    "avx",
    "f16c",
    "fma",
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_fp16",
    "amx_int8",
)
_ARM_ISA = ("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2")


def facts() -> dict[str, Any]:
    """Everything ``xexport doctor`` prints, as plain data (imports onnxruntime, never torch)."""
    import xexport

    native = find_native()
    packages = {name: _version(name) for name in ("onnxruntime", "openvino", "numpy", *_EXPORT_PACKAGES)}
    missing = [
        name for name in ("torch", "onnx", "onnxscript", "onnx-ir", "safetensors") if not packages[name]
    ]
    return {
        "xexport": xexport.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "providers": _providers(),
        "cpu": _cpu(),
        "memory_bytes": _memory(),
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "native_kernels": {
            "available": native.available,
            "path": str(native.path) if native.path else None,
            "reason": native.reason,
        },
        "can_export": {
            "yes": not missing,
            "reason": f"missing: {', '.join(missing)}; pip install 'xexport[export]'" if missing else None,
        },
        "targets": [_target(name) for name in target_names()],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _providers() -> list[str]:
    if find_spec("onnxruntime") is None:
        return []
    import onnxruntime as ort

    return list(ort.get_available_providers())


def _cpu() -> dict[str, Any]:
    import psutil

    name, flags = _cpuinfo()
    return {
        "name": name or platform.processor() or platform.machine(),
        "machine": platform.machine(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        "threads": psutil.cpu_count() or 1,
        "isa": [flag for flag in (*_ISA, *_ARM_ISA) if flag in flags],
    }


def _cpuinfo() -> tuple[str, set[str]]:
    """Model name and feature flags from the kernel; empty where it doesn't say."""
    path = Path("/proc/cpuinfo")
    if not (sys.platform == "linux" and path.is_file()):
        return "", set()
    rows: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        rows.setdefault(key.strip().lower(), value.strip())
    return rows.get("model name", ""), set((rows.get("flags") or rows.get("features") or "").split())


def _memory() -> dict[str, int]:
    import psutil

    memory = psutil.virtual_memory()
    return {"total": int(memory.total), "available": int(memory.available)}


def _target(name: str) -> dict[str, Any]:
    """Whether a target runs here, and why not."""
    try:
        target = get_target(name)
    except XexportError as error:
        return {"name": name, "runs_here": False, "why_not": error.what, "description": ""}
    return {
        "name": name,
        "description": target.description,
        "runs_here": (why := why_not(target.runtime, target.provider, target.environment)) is None,
        "why_not": why,
    }
