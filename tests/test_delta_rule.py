"""The gated delta rule: the plain loop, ONNX Runtime's own kernel, and the local fallback."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from local_function import under_own_domain
from onnx.reference import ReferenceEvaluator
from tolerances import TOLERANCES

from xexport.core.errors import ExportError
from xexport.core.registry import get_op
from xexport.exporter.functions import attach_functions
from xexport.ops.delta_rule.reference import delta_rule
from xexport.ops.run import op_model, run_body

SPEC = get_op("delta_rule")
SCALE = 0.37


WAYS = {"kernel": SPEC, "fallback": under_own_domain(SPEC)}


def inputs(B: int, T: int, H: int, K: int, V: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    k = rng.standard_normal((B, T, H, K))
    x = {
        "q": rng.standard_normal((B, T, H * K)),
        "k": (k / np.linalg.norm(k, axis=-1, keepdims=True)).reshape(B, T, H * K),
        "v": rng.standard_normal((B, T, H * V)),
        "state": rng.standard_normal((B, H, K, V)),
        "decay": -np.abs(rng.standard_normal((B, T, H))) * 0.3,
        "beta": rng.uniform(0, 1, (B, T, H)),
    }
    return {n: a.astype(np.float32) for n, a in x.items()}


def attributes(heads: int) -> dict[str, object]:
    return {"q_num_heads": heads, "kv_num_heads": heads, "scale": SCALE, "update_rule": "gated_delta"}


def wanted(x: dict[str, np.ndarray], heads: int) -> list[np.ndarray]:
    tensors = (torch.from_numpy(x[n]).double() for n in SPEC.inputs)
    return [t.numpy() for t in delta_rule(*tensors, heads, heads, SCALE, "gated_delta")]


def error(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / max(1.0, np.abs(want).max()))


def test_reference_is_equation_10() -> None:
    """S_t = S_{t-1} (a (I - b k k^T)) + b v k^T, with matrices, for one head."""
    x = {n: torch.from_numpy(a).double() for n, a in inputs(1, 7, 1, 4, 3).items()}
    S, rows = x["state"][0, 0].T, []
    for t in range(7):
        k, v, b = x["k"][0, t], x["v"][0, t], x["beta"][0, t]
        erase = torch.eye(4, dtype=torch.float64) - b * torch.outer(k, k)
        S = x["decay"][0, t].exp() * (S @ erase) + b * torch.outer(v, k)
        rows.append(S @ x["q"][0, t] * SCALE)
    out, state = wanted({n: a.numpy() for n, a in x.items()}, 1)
    assert error(out[0], torch.stack(rows).numpy()) <= TOLERANCES["op_fp64"]
    assert error(state[0, 0], S.T.numpy()) <= TOLERANCES["op_fp64"]


def test_reference_refuses_another_rule() -> None:
    x = [torch.from_numpy(a) for a in inputs(1, 2, 1, 2, 2).values()]
    with pytest.raises(ValueError, match="gated"):
        delta_rule(*x, 1, 1, 1.0, "gated")


def test_torch_op_is_well_formed() -> None:
    x = tuple(torch.from_numpy(a) for a in inputs(2, 3, 2, 4, 3).values())
    torch.library.opcheck(delta_rule, (*x, 2, 2, SCALE, "gated_delta"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("B", "T", "H", "K", "V"),
    [(2, 1, 3, 4, 5), (1, 2, 2, 4, 6), (2, 63, 2, 8, 4), (1, 131, 1, 3, 2)],
    ids=lambda n: str(n),
)
def test_parity(way: str, B: int, T: int, H: int, K: int, V: int) -> None:
    x = inputs(B, T, H, K, V, seed=T)
    got = run_body(WAYS[way], x, "scan", attributes=attributes(H))
    for a, b in zip(got, wanted(x, H), strict=True):
        assert error(a, b) <= TOLERANCES["op_fp32"]


@settings(max_examples=8, deadline=None)
@given(T=st.integers(2, 20), cut=st.integers(1, 19), way=st.sampled_from([*WAYS]))
def test_chunk_law(T: int, cut: int, way: str) -> None:
    x = inputs(2, T, 2, 4, 3, seed=T * 31 + cut)
    want_out, want_state = wanted(x, 2)
    outs, state = [], x["state"]
    for part in (slice(0, min(cut, T)), slice(min(cut, T), T)):
        piece = {n: a[:, part] for n, a in x.items() if n != "state"} | {"state": state}
        if piece["q"].shape[1]:
            feed = {n: piece[n] for n in SPEC.inputs}
            out, state = run_body(WAYS[way], feed, "scan", attributes=attributes(2))
            outs.append(out)
    assert error(np.concatenate(outs, 1), want_out) <= TOLERANCES["op_fp32"]
    assert error(state, want_state) <= TOLERANCES["op_fp32"]


def test_onnx_reference_runs_the_body() -> None:
    x = inputs(2, 3, 2, 3, 4)
    model = op_model(under_own_domain(SPEC), x, "scan", 23, attributes(2))
    for a, b in zip(ReferenceEvaluator(model).run(None, x), wanted(x, 2), strict=True):
        assert error(a, b) <= TOLERANCES["op_fp32"]


def graph_of(*counts: int) -> ir.Model:
    """LinearAttention nodes with these numbers of inputs."""
    nodes = []
    for n in counts:
        values = [ir.Value(name=f"v{n}_{i}") for i in range(n)]
        nodes.append(ir.Node("com.microsoft", "LinearAttention", values, num_outputs=2))
    graph = ir.Graph([], [], nodes=nodes, opset_imports={"": 23, "com.microsoft": 1})
    return ir.Model(graph, ir_version=10)


def test_a_node_gets_the_body_with_its_number_of_inputs() -> None:
    for count, variant in ((5, "chunked"), (6, "scan")):
        model = graph_of(count, count)
        (lowering,) = attach_functions(model, {}, {})
        assert (lowering.variant, lowering.nodes) == (variant, 2)
        (function,) = model.functions.values()
        assert len(function.inputs) == count


def test_two_operators_of_one_name_are_refused() -> None:
    with pytest.raises(ExportError, match="different numbers of inputs"):
        attach_functions(graph_of(5, 6), {}, {})
