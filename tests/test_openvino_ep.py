"""ONNX Runtime's OpenVINO provider, in its own environment: equal numbers, the whole graph, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from environment import need_environment
from tolerances import TOLERANCES

import xexport
from xexport.core.errors import XexportError
from xexport.core.records import Setup
from xexport.evaluate.optimes import profile_ops
from xexport.runtimes.bundle import Bundle

TARGET, EP = "openvino-ep-fp32", "OpenVINOExecutionProvider"


@pytest.fixture(scope="module", autouse=True)
def _environment() -> None:
    need_environment("openvino-ep")


@pytest.fixture(scope="module")
def retnet(exporter: Any) -> Bundle:
    return xexport.load(exporter("retnet", TARGET))


def test_any_cut_is_the_cpus(retnet: Bundle) -> None:
    x = np.random.default_rng(5).integers(0, 29, (1, 60))
    want = retnet.stream(runtime="cpu").feed(x)
    stream = retnet.stream()
    got = np.concatenate([stream.feed(part) for part in np.split(x, [1, 2, 31], axis=1)], axis=1)
    assert np.abs(got - want).max() < TOLERANCES["model_fp32"] * np.abs(want).max()
    assert retnet.manifest.checks["OpenVINO"]["error"] < TOLERANCES["model_fp32"]


def test_the_provider_runs_all_of_the_graph(retnet: Bundle, setup: Setup) -> None:
    """It compiles the nodes into one; none is the CPU provider's."""
    times = profile_ops(retnet.path, range(20), setup=setup, steps=3, warmup=1)
    assert set(times.placement) == {EP}
    assert set(times.assigned) <= {EP}
    assert not times.warnings


def test_what_it_can_not_place_is_refused(exporter: Any, tmp_path: Path) -> None:
    """Version 1.24.1 does not take the body of a Scan."""
    with pytest.raises(XexportError) as caught:
        exporter.export("mamba", TARGET, tmp_path / "out", preset="tiny")
    assert caught.value.got
    assert not (tmp_path / "out").exists()
