"""xexport: non-Transformer sequence models from PyTorch to a device.

``import xexport`` is cheap on purpose: it loads neither torch nor onnxruntime. The
public names are resolved on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Bundle", "InputSpec", "StateSpec", "Stream", "XexportError", "__version__", "export", "load"]

if TYPE_CHECKING:
    from xexport.core.contract import InputSpec
    from xexport.core.errors import XexportError
    from xexport.core.state import StateSpec
    from xexport.pipeline import export
    from xexport.runtimes.bundle import Bundle, load
    from xexport.runtimes.stream import Stream

_HOME = {
    "Bundle": "xexport.runtimes.bundle",
    "InputSpec": "xexport.core.contract",
    "StateSpec": "xexport.core.state",
    "Stream": "xexport.runtimes.stream",
    "XexportError": "xexport.core.errors",
    "export": "xexport.pipeline",
    "load": "xexport.runtimes.bundle",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'xexport' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
