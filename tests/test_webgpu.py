"""ONNX Runtime's WebGPU provider, for real: on SwiftShader where there is no GPU, in its own environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xexport.runtimes.bundle import Bundle, load
from xexport.runtimes.opening import CPU

from .environment import need_environment
from .tolerances import TOLERANCES


@pytest.fixture(scope="module")
def bundle(exporter: Any) -> Bundle:
    need_environment("webgpu")
    return load(exporter("rwkv", "webgpu-fp32"))


def test_the_export_was_compared_with_the_cpu(bundle: Bundle) -> None:
    checks = bundle.manifest.checks["WebGpu"]
    assert 0 < checks["error"] < TOLERANCES["model_fp32"]
    assert any("SwiftShader" in warning for warning in bundle.manifest.warnings)


def test_the_state_moves_on_and_comes_back(bundle: Bundle) -> None:
    here, there = bundle.stream(runtime=CPU), bundle.stream()
    tokens = np.random.default_rng(1).integers(0, here.vocab_size, 7)
    for part in (tokens[:3], tokens[3:4]):
        np.testing.assert_allclose(here.feed(part), there.feed(part), atol=TOLERANCES["model_fp32"])
    saved = there.save()
    once = there.feed(tokens[4:], keep=1)
    there.restore(saved)
    np.testing.assert_array_equal(there.feed(tokens[4:], keep=1), once)
    np.testing.assert_allclose(here.feed(tokens[4:], keep=1), once, atol=TOLERANCES["model_fp32"])


def test_int4_weights_on_the_device(exporter: Any, tmp_path: Path) -> None:
    need_environment("webgpu")
    bundle = load(exporter.export("mamba", "webgpu-int4", tmp_path / "out", preset="tiny"))
    assert bundle.manifest.checks["WebGpu"]["error"] < bundle.manifest.target_row["agreement"]
    assert any(name.startswith("int4 block") for name in bundle.inspect()["formats"])
