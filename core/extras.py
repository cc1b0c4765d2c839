"""Optional packages: a clear sentence instead of a traceback when one is missing."""

from __future__ import annotations

from importlib.util import find_spec

from xexport.core.errors import MissingDependencyError

__all__ = ["require"]


def require(package: str, *, extra: str, why: str) -> None:
    """Raise MissingDependencyError unless ``package`` can be imported."""
    if find_spec(package) is None:
        raise MissingDependencyError(
            f"the package {package!r} is needed {why}", fix=f"pip install 'xexport[{extra}]'"
        )
