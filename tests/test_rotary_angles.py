"""xexport::rotary_angles: both bodies and the definition against exact arithmetic, at any distance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tolerances import TOLERANCES

from xexport.core.errors import InputError
from xexport.core.registry import get_op
from xexport.models._rotary import rope_angles, turns_of
from xexport.ops.run import run_body

SPEC = get_op("rotary_angles")
#: the frequencies of a head of 64 channels, and the largest angle there is
TURNS = [*turns_of([10000.0 ** (-i / 32) for i in range(32)]), *turns_of([math.pi / 2]), 0]
#: either side of every carry, and far away
POSITIONS = [0, 1, 2, 32767, 32768, 65535, 65536, 98304, 999_999, 1_000_000, 123_456_789, 2**31 - 2**15 - 1]


def exact() -> tuple[np.ndarray, np.ndarray]:
    """cos and sin in double precision of the angle modulo a turn, from Python's integers."""
    angle = np.array([[p * t % 2**32 for t in TURNS] for p in POSITIONS]) * (2 * math.pi / 2**32)
    return np.cos(angle)[:, None], np.sin(angle)[:, None]


@pytest.mark.parametrize("variant", SPEC.bodies)
def test_bodies_are_exact(variant: str) -> None:
    inputs = {"positions": np.array(POSITIONS), "turns": np.array(TURNS)}
    for got, want in zip(run_body(SPEC, inputs, variant), exact(), strict=True):
        assert got.shape == want.shape
        assert got.dtype == np.float32
        assert np.abs(got - want).max() < TOLERANCES["rotary_angles"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_definition_is_exact(dtype: torch.dtype) -> None:
    allowed = TOLERANCES["rotary_angles" if dtype == torch.float32 else "op_fp64"]
    for got, want in zip(
        rope_angles(torch.tensor(TURNS), torch.tensor(POSITIONS), dtype), exact(), strict=True
    ):
        assert got.dtype == dtype
        assert np.abs(got.numpy() - want).max() < allowed


def test_openvino_computes_it_in_32_bits() -> None:
    """Its CPU plugin turns int64 into int32: the one body survives that, the other does not."""
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    from onnx import inliner

    from xexport.ops.run import op_model

    inputs = {"positions": np.array(POSITIONS[:-2]), "turns": np.array(TURNS)}
    errors = {}
    for variant in SPEC.bodies:
        model = inliner.inline_local_functions(op_model(SPEC, inputs, variant, 23, {}, constant=["turns"]))
        core = openvino.Core()
        compiled = core.compile_model(
            core.read_model(model.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        got = compiled({"positions": inputs["positions"]})["cos"]
        errors[variant] = np.abs(got - exact()[0][:-2]).max()
    assert errors["int32"] < TOLERANCES["rotary_angles"]
    assert errors["int64"] > 0.1


@pytest.mark.parametrize("rate", [-1e-3, 1.6])
def test_rates_that_do_not_fit(rate: float) -> None:
    with pytest.raises(InputError, match="angle a token"):
        turns_of([0.5, rate])
