"""Products of one weight in WebAssembly: float32, blocks (MatMulNBits), one scale a call, one scale a row.

    python benchmarks/web_products.py --sizes 256 512 768

Needs the environment "web" (python -m xexport.runtimes.environments install web). Prints one JSON object: per
size and number of tokens the least microseconds of one product, of a chain of COUNT square ones in one graph.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from xexport.quant.blocks import quantize_rows
from xexport.quant.formats import Context
from xexport.quant.formats.block import apply_int8 as by_block
from xexport.quant.formats.channel import apply as by_channel
from xexport.quant.spool import Spool
from xexport.runtimes.environments import get_environment

_COUNT = 12


def chain(size: int) -> ir.Model:
    """COUNT float products behind one another, [1,T,size] to [1,T,size]."""
    rng = np.random.default_rng(size)
    kind = ir.TensorType(ir.DataType.FLOAT)
    x = value = ir.Value(name="x", type=kind, shape=ir.Shape([1, "T", size]))
    nodes, weights = [], []
    for i in range(_COUNT):
        array = (rng.standard_normal((size, size)) / np.sqrt(size)).astype(np.float32)
        weight = ir.Value(
            name=f"w{i}", type=kind, shape=ir.Shape(array.shape), const_value=ir.Tensor(array, name=f"w{i}")
        )
        node = ir.Node("", "MatMul", [value, weight], name=f"{i}/MatMul")
        value = node.outputs[0]
        value.name, value.type, value.shape = f"y{i}", kind, x.shape
        nodes.append(node)
        weights.append(weight)
    graph = ir.Graph([x], [value], nodes=nodes, initializers=weights, opset_imports={"": 23})
    return ir.Model(graph, ir_version=10)


def by_call(context: Context, value: ir.Value) -> None:
    """com.microsoft DynamicQuantizeMatMul: one scale for all tokens of a call."""
    ((node, _),) = value.uses()
    assert value.const_value is not None
    codes, scales = quantize_rows(np.ascontiguousarray(value.const_value.numpy().T))
    w = context.initializer(f"{value.name}.int8", ir.Tensor(np.ascontiguousarray(codes.T)))
    s = context.initializer(f"{value.name}.scale", ir.Tensor(scales[:, 0]))
    made = ir.Node("com.microsoft", "DynamicQuantizeMatMul", [node.inputs[0], w, s], name=node.name)
    old, new = node.outputs[0], made.outputs[0]
    new.name, new.type, new.shape = old.name, old.type, old.shape
    context.model.graph.insert_before(node, made)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    context.model.graph.remove(node, safe=True)
    del context.model.graph.initializers[value.name or ""]
    context.model.opset_imports["com.microsoft"] = 1


_KINDS: dict[str, Any] = {
    "float32": None,
    "blocks": by_block,
    "one scale a call": by_call,
    "one scale a row": by_channel,
}


def write(folder: Path, size: int) -> None:
    """One graph a kind."""
    for name, rewrite in _KINDS.items():
        model = chain(size)
        with tempfile.TemporaryDirectory() as scratch:
            context = Context(model, Spool(Path(scratch)))
            for weight in list(model.graph.initializers.values()):
                if rewrite is not None:
                    rewrite(context, weight)
            for value in model.graph.initializers.values():  # into the file: Node gets no other
                assert value.const_value is not None
                value.const_value = ir.Tensor(np.array(value.const_value.numpy()), name=value.name)
            ir.save(model, folder / f"{name}@{size}.onnx")


def main() -> None:
    """Write the graphs, run them in Node, print what it measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 768])
    parser.add_argument("--threads", type=int, default=1, help="of WebAssembly")
    given = parser.parse_args()
    sizes, threads = given.sizes, given.threads
    script = Path(__file__).with_suffix(".mjs")
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            write(Path(folder), size)
        packages = str(get_environment("web").folder)
        numbers = [",".join(map(str, sizes)), str(_COUNT), str(threads)]
        subprocess.run(["node", str(script), packages, folder, *numbers], check=True)


if __name__ == "__main__":
    main()
