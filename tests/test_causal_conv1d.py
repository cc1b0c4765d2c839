"""xexport::causal_conv1d: the definition against torch's conv1d, its gradients, the bodies against it, cuts.

The kernel is compared with both in test_native.py.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import TOLERANCES
from torch import Tensor

from xexport.core.registry import get_op
from xexport.ops.causal_conv1d.reference import causal_conv1d
from xexport.ops.run import op_model, run_body

SPEC = get_op("causal_conv1d")


def make_inputs(
    B: int, T: int, D: int, K: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((B, T, D), (K, D), (D,), (B, K - 1, D))
    return [torch.randn(s, generator=g, dtype=dtype) for s in shapes]


def by_torch(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """The same through torch's own grouped convolution, channels first."""
    past = torch.cat((state, x), 1)
    y = F.conv1d(past.mT, weight.T[:, None], bias, groups=weight.shape[1]).mT
    return (y * torch.sigmoid(y) if silu else y), past[:, past.shape[1] - state.shape[1] :]


def arrays(x: list[Tensor]) -> dict[str, np.ndarray]:
    return dict(zip(SPEC.inputs, (t.numpy() for t in x), strict=True))


def attributes(x: list[Tensor], silu: bool) -> dict[str, int]:
    return {"channels": x[0].shape[2], "silu": int(silu)}


def error(got: object, want: Tensor) -> float:
    array = np.asarray(got.detach() if isinstance(got, Tensor) else got)
    expected = want.detach().numpy()
    assert array.shape == expected.shape
    return float(np.abs(array - expected).max(initial=0) / max(1.0, np.abs(expected).max(initial=0)))


@pytest.mark.parametrize("silu", [False, True], ids=["plain", "silu"])
@pytest.mark.parametrize(("B", "T", "D", "K"), [(1, 1, 4, 4), (2, 2, 3, 5), (2, 7, 5, 3), (1, 9, 2, 1)])
def test_definition_is_torchs_convolution(B: int, T: int, D: int, K: int, silu: bool) -> None:
    x = make_inputs(B, T, D, K, dtype=torch.float64)
    got, want = causal_conv1d(*x, silu=silu), by_torch(*x, silu)
    assert error(got[0], want[0]) < TOLERANCES["op_fp64"]
    assert torch.equal(got[1], want[1])


def test_gradients_are_those_of_torchs_convolution() -> None:
    x = [p.requires_grad_() for p in make_inputs(2, 6, 3, 4, dtype=torch.float64)]
    weights = [torch.randn_like(o) for o in by_torch(*x, True)]
    want = torch.autograd.grad(by_torch(*x, True), x, weights)
    got = torch.autograd.grad(causal_conv1d(*x, silu=True), x, weights)
    for name, a, b in zip(SPEC.inputs, got, want, strict=True):
        assert error(a, b) < TOLERANCES["op_fp64"], name


def test_without_gradients_the_custom_op_is_called() -> None:
    x = [p.requires_grad_() for p in make_inputs(1, 2, 3, 2)]
    with torch.no_grad():
        assert causal_conv1d(*x)[0].grad_fn is None
    assert causal_conv1d(*x)[0].grad_fn is not None


def test_custom_op_passes_torchs_own_checks() -> None:
    torch.library.opcheck(torch.ops.xexport.causal_conv1d.default, (*make_inputs(2, 3, 4, 3), 4, 1))


@pytest.mark.parametrize(("channels", "silu"), [(5, 0), (4, 2)])
def test_definition_refuses_other_attributes(channels: int, silu: int) -> None:
    with pytest.raises(ValueError, match="channels for an input of 4"):
        torch.ops.xexport.causal_conv1d(*make_inputs(1, 2, 4, 3), channels, silu)


@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 40),
    D=st.integers(1, 6),
    K=st.integers(1, 6),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_any_cut_gives_the_same(B: int, T: int, D: int, K: int, seed: int, data: st.DataObject) -> None:
    """In PyTorch and in ONNX Runtime, pieces shorter than the state among them."""
    x, weight, bias, state = make_inputs(B, T, D, K, seed=seed)
    whole, last = causal_conv1d(x, weight, bias, state, silu=True)
    cuts = sorted(data.draw(st.sets(st.integers(1, T), max_size=4)) - {T})
    here, there, pieces, twins = state, state, [], []
    for part in torch.tensor_split(x, cuts, 1):
        y, here = causal_conv1d(part, weight, bias, here, silu=True)
        given = [part.contiguous(), weight, bias, there]
        z, new = run_body(SPEC, arrays(given), "auto", attributes=attributes(given, True))
        there = torch.from_numpy(new)
        pieces.append(y)
        twins.append(z)
    assert error(torch.cat(pieces, 1), whole) < TOLERANCES["op_fp32"]
    assert error(np.concatenate(twins, 1), whole) < TOLERANCES["op_fp32"]
    assert torch.equal(here, last)
    assert torch.equal(there, last)


@pytest.mark.parametrize("silu", [False, True], ids=["plain", "silu"])
@pytest.mark.parametrize(
    ("variant", "B", "T", "D", "K"),
    [
        (variant, *shape)
        for variant in SPEC.bodies
        for shape in [(1, 1, 8, 4), (3, 1, 5, 1), (2, 3, 8, 6), (2, 32, 6, 3), (2, 33, 6, 3), (1, 80, 3, 1)]
        if variant != "step" or shape[1] == 1
    ],
)
def test_body_matches_the_definition(variant: str, B: int, T: int, D: int, K: int, silu: bool) -> None:
    x = make_inputs(B, T, D, K, seed=T)
    got = run_body(SPEC, arrays(x), variant, attributes=attributes(x, silu))
    want = causal_conv1d(*x, silu=silu)
    assert error(got[0], want[0]) < TOLERANCES["op_fp32"]
    np.testing.assert_array_equal(got[1], want[1].numpy())


@pytest.mark.parametrize("T", [1, 7, 40])
def test_body_runs_in_the_onnx_reference_evaluator(T: int) -> None:
    from onnx.reference import ReferenceEvaluator

    x = make_inputs(2, T, 6, 4)
    model = op_model(SPEC, arrays(x), "auto", 23, attributes(x, True))
    got = ReferenceEvaluator(model).run(None, arrays(x))
    for a, b in zip(got, causal_conv1d(*x, silu=True), strict=True):
        assert error(a, b) < TOLERANCES["op_fp32"]


@pytest.mark.parametrize("silu", [False, True], ids=["plain", "silu"])
def test_the_activation_costs_no_branch_when_it_runs(tmp_path: object, silu: bool) -> None:
    """ONNX Runtime decides the If of a constant attribute when it loads the graph."""
    x = make_inputs(1, 1, 4, 3)
    model = op_model(SPEC, arrays(x), "step", 23, attributes(x, silu), constant=("weight", "bias"))
    options = ort.SessionOptions()
    options.optimized_model_filepath = f"{tmp_path}/optimized.onnx"
    options.log_severity_level = 3
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    left = [n.op_type for n in onnx.load(f"{tmp_path}/optimized.onnx").graph.node]
    assert "If" not in left
    assert bool({"Sigmoid", "QuickGelu"} & set(left)) == silu


@pytest.mark.parametrize("variant", list(SPEC.bodies))
def test_body_has_the_operators_signature(variant: str) -> None:
    body = SPEC.bodies[variant]
    proto = body.build(23)
    assert (proto.domain, proto.name) == (SPEC.domain, SPEC.graph_name)
    assert tuple(proto.input) == SPEC.inputs
    assert tuple(proto.output) == SPEC.outputs
    assert body.why
