"""The arm64 targets under emulation: a file gives on ARM, with our NEON kernels, what it gives here."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from environment import need_environment
from exported import Exporter
from tolerances import TOLERANCES

import xexport
from xexport.core.errors import RuntimeFailure
from xexport.core.registry import get_family
from xexport.core.results import read_records
from xexport.core.target import get_target
from xexport.evaluate.agree import require_agreement
from xexport.models.rwkv import RwkvConfig
from xexport.runtimes import environment_qemu, environments
from xexport.runtimes.bundle import Bundle
from xexport.runtimes.native import find_native
from xexport.runtimes.opening import CPU, why_not

SEEN_ON_ARM = "arm64 CPU"  # what the manifest's checks call it


@pytest.fixture(scope="module")
def emulated() -> None:
    need_environment("arm64")
    if find_native().path is None:
        pytest.skip("without native kernels here the two would compute int8 products in different ways")


@pytest.fixture(scope="module")
def bundle(emulated: None, exporter: Exporter) -> Bundle:
    return xexport.load(exporter("rwkv", "arm64-int8"))


def test_an_export_runs_on_arm_and_says_what_its_times_are(bundle: Bundle) -> None:
    """With 16-bit activations both kernels round alike; other products (MatMulNBits) are off by 1e-2."""
    manifest = bundle.manifest
    assert manifest.checks[SEEN_ON_ARM]["error"] < 1e-4
    assert manifest.checks[SEEN_ON_ARM]["tokens"] == 36
    assert any("emulated" in warning for warning in manifest.warnings)
    assert not any("not run" in warning for warning in manifest.warnings)
    rows = read_records(bundle.path / "results.jsonl")
    assert not [row for row in rows if type(row).__name__ == "Latency"]


def test_any_cut_gives_the_same_there_and_here(bundle: Bundle) -> None:
    tokens = np.random.default_rng(2).integers(0, bundle.manifest.model.vocab_size, (2, 39))
    here, there = bundle.stream(batch=2, runtime=CPU), bundle.stream(batch=2, threads=1)
    want = here.feed(tokens)
    got = np.concatenate([there.feed(part) for part in np.split(tokens, [1, 18, 19, 38], axis=1)], axis=1)
    assert np.abs(got - want).max() < TOLERANCES["linear_int8_cut"] * max(1.0, np.abs(want).max())


def test_four_bit_weights_and_a_head_of_six(emulated: None, exporter: Exporter, tmp_path: Path) -> None:
    """The file of cpu-int4 is that of arm64-int4, only where it is run differs; large enough for its kernels.

    Without ours the body (MatMulNBits) rounds activations to 8 bits, and is off by 1e-2.
    """
    target = get_target("arm64-int4")
    assert replace(target, name="", description="", environment="") == replace(
        get_target("cpu-int4"), name="", description=""
    )
    family = get_family("rwkv")
    module = family.build(RwkvConfig(1, 384, vocab_size=512)).eval().requires_grad_(False)
    family.init(module, 0)
    made = xexport.load(exporter.export(module, "cpu-int4", tmp_path / "made"))
    assert {"int4 block 32", "int6 block 32"} <= {d.format for d in made.manifest.decisions}
    manifest = msgspec.structs.replace(made.manifest, target_row=target.row())
    assert require_agreement(Bundle(made.path, manifest), target)["error"] < 1e-4


def test_kernels_of_other_sources_are_refused(emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment_qemu, "_digest", lambda: "of another day")
    with pytest.raises(RuntimeFailure, match="not made of this xexport's sources"):
        environments.worker_command("arm64")


def test_where_it_is_absent_the_export_says_so(
    exporter: Exporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XEXPORT_ENVIRONMENTS", str(tmp_path / "none"))
    made = xexport.load(exporter.export("rwkv", "arm64-fp32", tmp_path / "made", preset="tiny"))
    (warning,) = [w for w in made.manifest.warnings if "not run" in w]
    assert "not run by arm64 CPU" in warning
    assert "environments install arm64" in warning
    assert SEEN_ON_ARM not in made.manifest.checks
    assert made.stream(runtime=CPU).feed([[1, 2, 3]]).shape == (1, 3, made.manifest.model.vocab_size)
    with pytest.raises(RuntimeFailure, match="environment of its own"):
        made.stream()
    # on a device of that processor nothing is emulated
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert environments.needed("arm64") == ""
    assert why_not("onnxruntime", "CPUExecutionProvider", "arm64") is None
    assert made.stream().feed([[1, 2, 3]]).shape == (1, 3, made.manifest.model.vocab_size)


def test_only_the_needed_programs_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found: Any = environments.shutil.which
    monkeypatch.setattr(environments.shutil, "which", lambda p: None if p.startswith("qemu") else found(p))
    with pytest.raises(RuntimeFailure, match="qemu-aarch64-static") as caught:
        environments.install("arm64")
    assert "qemu-user-static" in str(caught.value.fix) or "apt-get" in str(caught.value)
