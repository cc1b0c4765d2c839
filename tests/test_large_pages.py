"""Weights in large pages: the same numbers, the file's pages given back, and a switch that turns it off."""
# ruff: noqa: F811, F401  (fixtures that another file has)

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_native import _options, library

from xexport.core.op import DOMAIN
from xexport.exporter.functions import attach_functions
from xexport.exporter.passes.sequence import rewrite

Array = np.ndarray[Any, Any]
WIDTH, LAYERS = 512, 6  # 6 MB of weights
ALLOWED = Path("/sys/kernel/mm/transparent_hugepage/enabled")

pytestmark = pytest.mark.skipif(
    not ALLOWED.is_file() or "[never]" in ALLOWED.read_text(),
    reason="this system has no large pages to ask for",
)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Products in a row, x [T,512] -> y, whose weights lie in a file; another node reads one of them too."""
    rng = np.random.default_rng(0)
    names = [f"w{i}" for i in range(LAYERS)]
    weights = [
        numpy_helper.from_array((rng.standard_normal((WIDTH, WIDTH)) / 23).astype(np.float32), name)
        for name in names
    ]
    values = ["x", *(f"y{i}" for i in range(LAYERS - 1)), "y"]
    nodes = [
        helper.make_node("linear", [a, n], [b], f"layers.0.{b}/linear", domain=DOMAIN)
        for a, n, b in zip(values, names, values[1:], strict=False)
    ]
    info = helper.make_tensor_value_info
    x = [info("x", TensorProto.FLOAT, ["T", WIDTH]), info("rows", TensorProto.INT64, ["R"])]
    y = [info(name, TensorProto.FLOAT, None) for name in ("y", "found")]
    gather = helper.make_node("Gather", ["w3", "rows"], ["found"])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    made = helper.make_graph([*nodes, gather], "g", x, y, weights)
    model = ir.from_proto(helper.make_model(made, opset_imports=opsets, ir_version=10))
    assert rewrite(model) == []
    attach_functions(model, {}, {})
    path = tmp_path_factory.mktemp("pages") / "model.onnx"
    proto = ir.to_proto(model)
    assert any(n.op_type.startswith("sequence") for n in proto.graph.node)
    onnx.save(proto, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


# What the memory of a process is: kilobytes of large pages, and of the file of weights.
_LOOK = """
import json, sys
import numpy as np, onnxruntime as ort

def kilobytes(of, key):
    total, inside = 0, False
    for line in open("/proc/self/smaps"):
        name, _, value = line.partition(":")
        if "-" in name.split(" ")[0]:
            inside = of in line
        elif inside and name == key:
            total += int(value.split()[0])
    return total

options = ort.SessionOptions()
options.register_custom_ops_library(sys.argv[2])
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
large, mapped = kilobytes("", "AnonHugePages"), kilobytes("weights.bin", "Rss")
x = np.random.default_rng(1).standard_normal((1, 512)).astype(np.float32)
y, found = session.run(None, {"x": x, "rows": np.array([0, 511], np.int64)})
print(json.dumps({"large": large, "mapped": mapped, "y": y.tolist(), "found": found.tolist()}))
"""


def look(graph: Path, library: Path, said: str) -> dict[str, Any]:
    """What a process of its own finds, with XEXPORT_LARGE_PAGES as said."""
    run = subprocess.run(
        [sys.executable, "-c", _LOOK, str(graph), str(library)],
        env={**os.environ, "XEXPORT_LARGE_PAGES": said},
        capture_output=True,
        text=True,
        check=True,
    )
    made: dict[str, Any] = json.loads(run.stdout)
    return made


def test_the_numbers_are_the_same_and_the_file_s_pages_are_given_back(graph: Path, library: Path) -> None:
    on, off = look(graph, library, "1"), look(graph, library, "0")
    assert on["y"] == off["y"]
    assert on["found"] == off["found"]  # a page that was given back is read again
    assert off["large"] < 1024
    if on["large"] == 0:
        pytest.skip("the system gave no large page (none free, or less than half of the memory)")
    assert on["large"] >= 2048
    assert on["mapped"] < 1024 < off["mapped"] or off["mapped"] == 0  # 0: this onnxruntime read the file


def test_weights_inside_the_graph_stay(graph: Path, library: Path) -> None:
    """Memory that is no file's would come back as zeros: it must not be given back."""
    inside = onnx.load(graph).SerializeToString()
    options = _options(library)
    from_file = ort.InferenceSession(str(graph), _options(library), providers=["CPUExecutionProvider"])
    from_memory = ort.InferenceSession(inside, options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(2).standard_normal((3, WIDTH)).astype(np.float32)
    given = {"x": x, "rows": np.arange(WIDTH)}
    for got, want in zip(from_memory.run(None, given), from_file.run(None, given), strict=True):
        np.testing.assert_array_equal(got, want)
        assert np.abs(want).max() > 0.1
