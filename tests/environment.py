"""Tests that need an isolated environment: skipped where it is absent, failed where CI requires it."""

from __future__ import annotations

import os

import pytest

from xexport.runtimes import environments

__all__ = ["need", "need_environment"]


def need_environment(name: str) -> None:
    """Skip the test (or module, at import) unless the environment is installed.

    ``XEXPORT_REQUIRE_ENVIRONMENTS`` names those whose tests must run: there a missing one fails.
    """
    reason = environments.why_not(name)
    if reason is not None:
        need(name, reason)


def need(name: str, reason: str) -> None:
    """What the tests of an environment need is absent: skip, or fail where it is required."""
    if name in os.environ.get("XEXPORT_REQUIRE_ENVIRONMENTS", "").split():
        pytest.fail(f"XEXPORT_REQUIRE_ENVIRONMENTS names {name!r}: {reason}", pytrace=False)
    pytest.skip(reason, allow_module_level=True)
