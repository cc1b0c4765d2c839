"""The table of CUDA's kernels, against graphs whose nodes it must and must not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, helper, save

from xexport.core.manifest import read_manifest
from xexport.exporter.static_placement import placement_of

_CUDA = "CUDAExecutionProvider"


def _graph(tmp_path: Path, nodes: list[Any], kind: int = TensorProto.FLOAT) -> Path:
    """A file with those nodes over one input ``x`` [2,3] and the int64 vector ``pads``."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, [2, 3])],
        [helper.make_tensor_value_info(nodes[-1].output[0], kind, None)],
        [helper.make_tensor("pads", TensorProto.INT64, [4], [0, 0, 0, 1])],
    )
    path = tmp_path / "g.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), path)
    return path


def test_float_arithmetic_is_on_the_device(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["x", "x"], ["y"]), helper.make_node("Pad", ["y", "pads"], ["z"])]
    found = placement_of(_graph(tmp_path, nodes), _CUDA)
    assert (found.nodes, found.left) == (2, {})
    assert found.warning(_CUDA) is None


def test_a_type_without_a_kernel_is_left(tmp_path: Path) -> None:
    """CUDA pads floats only; the type comes from shape inference, not from the graph's inputs."""
    nodes = [helper.make_node("Neg", ["x"], ["y"]), helper.make_node("Pad", ["y", "pads"], ["z"])]
    found = placement_of(_graph(tmp_path, nodes, TensorProto.INT64), _CUDA)
    assert found.left == {("Pad", "int64"): 1}
    assert "1 of 2 nodes have no kernel" in (found.warning(_CUDA) or "")


def test_an_operator_without_a_kernel_is_left_in_a_branch_too(tmp_path: Path) -> None:
    inner = helper.make_graph(
        [helper.make_node("Det", ["x"], ["d"])],
        "branch",
        [],
        [helper.make_tensor_value_info("d", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
        helper.make_node("Cast", ["m"], ["c"], to=TensorProto.BOOL),
        helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner),
    ]
    assert placement_of(_graph(tmp_path, nodes), _CUDA).left == {("Det", "float32"): 2}


def test_what_is_folded_when_the_session_opens_is_not_counted(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["pads"], ["c"], to=TensorProto.UINT4),
        helper.make_node("Cast", ["c"], ["d"], to=TensorProto.INT64),
        helper.make_node("Pad", ["x", "d"], ["z"]),
    ]
    found = placement_of(_graph(tmp_path, nodes), _CUDA)
    assert (found.nodes, found.left) == (1, {})


def test_a_where_is_judged_by_what_it_chooses(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Greater", ["x", "x"], ["c"]),
        helper.make_node("Where", ["c", "x", "x"], ["z"]),
    ]
    assert placement_of(_graph(tmp_path, nodes), _CUDA).left == {}


@pytest.mark.parametrize("target", ["cuda-fp16", "cuda-int4"])
def test_a_bundle_for_cuda_says_what_was_looked_up_and_that_it_was_not_run(
    exporter: Any, tmp_path: Path, target: str
) -> None:
    manifest = read_manifest(exporter.export("mamba", target, tmp_path / "out", preset="tiny"))
    row = manifest.checks["placement"]
    assert row["nodes"] > 50
    assert row["without_kernel"] == []
    assert any("not run by CUDA" in warning for warning in manifest.warnings)
    if target == "cuda-fp16":
        formats = {d.format for d in manifest.decisions}
        assert "float16 product" in formats
        assert {d.format for d in manifest.decisions if d.role in ("decay", "norm", "gate")} <= {"float32"}
