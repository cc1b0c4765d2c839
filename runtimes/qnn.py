"""ONNX Runtime's QNN provider: Qualcomm's Hexagon NPU (HTP), and its simulator where there is none.

The package onnxruntime-qnn is a plugin beside onnxruntime. Sources: ONNX Runtime documentation, "Plugin
Execution Provider Libraries" (registration, devices) and "QNN Execution Provider" (options, contexts). On
x86-64 Qualcomm's library simulates the NPU's arithmetic; its times say nothing about the device.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["PROVIDER", "add_provider", "quiet_stdout", "simulated", "unavailable", "write_context"]

PROVIDER = "QNNExecutionProvider"
_PACKAGE = "onnxruntime_qnn"


def unavailable() -> str | None:
    """Why this machine can't run the provider, or None if it can."""
    if find_spec(_PACKAGE) is None:
        return "the package onnxruntime-qnn is not installed (pip install 'xexport[qnn]')"
    try:
        found = _devices()
    except Exception as error:  # ORT's exception classes share no public base
        return f"onnxruntime-qnn can't be loaded: {str(error).splitlines()[0][:200]}"
    return None if found else "onnxruntime-qnn finds no device"


def simulated() -> str:
    """Why times measured here say nothing about the device; empty where there is an NPU."""
    import onnxruntime as ort

    if unavailable() is not None or any(d.device.type == ort.OrtHardwareDeviceType.NPU for d in _devices()):
        return ""
    return "Qualcomm's HTP simulator ran it on this CPU"


def add_provider(options: Any, settings: Mapping[str, str]) -> None:
    """Make the provider the first of a session's.

    Args:
        options: ``onnxruntime.SessionOptions``.
        settings: provider options of the target; where its library lies is added here.
    """
    import onnxruntime as ort
    import onnxruntime_qnn

    found = _devices()
    npu = [d for d in found if d.device.type == ort.OrtHardwareDeviceType.NPU]
    given = {**settings, "backend_path": onnxruntime_qnn.get_qnn_htp_path()}
    options.add_provider_for_devices((npu or found)[:1], given)


def write_context(graph: Path, options: Any, context: Path) -> None:
    """Compile a graph and write what the device runs, its weights included, as a model of one node.

    Args:
        graph: a graph of fixed shape.
        options: session options with the provider.
        context: the file to write; ONNX Runtime opens it like any model.
    """
    import onnxruntime as ort

    options.add_session_config_entry("ep.context_enable", "1")
    options.add_session_config_entry("ep.context_embed_mode", "1")
    options.add_session_config_entry("ep.context_file_path", str(context))
    with quiet_stdout():
        ort.InferenceSession(str(graph), options)


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """What native libraries print goes to stderr: Qualcomm's say something when they are loaded."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # no standard output
        yield
        return
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@cache
def _devices() -> tuple[Any, ...]:
    """The provider's devices; registers its library once a process."""
    import onnxruntime as ort
    import onnxruntime_qnn

    if PROVIDER not in ort.get_available_providers():
        with quiet_stdout():
            ort.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    return tuple(d for d in ort.get_ep_devices() if d.ep_name == PROVIDER)
