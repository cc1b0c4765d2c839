"""Matrix products with constant weights: kernels against their bodies, at one token and at many.

    python benchmarks/products.py [--quick] [--threads 1 2] [--json F]

At one token what counts is how fast weights come from memory. So a graph has as many products of one
shape, each with weights of its own, as no cache can hold, and its time is told as bytes of weights a second,
beside what as many threads read from memory with one sequential stream each (a product reads four, which
memory may give faster). At many tokens it is multiply-adds a second. Weights are random; a body is what ONNX
Runtime runs where no kernel is.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from common import header, interleaved, options, save, table
from onnx import TensorProto, helper, numpy_helper

from xexport.core.op import DOMAIN
from xexport.core.registry import get_op
from xexport.evaluate.bandwidth import measure_bandwidth
from xexport.evaluate.environment import make_setup
from xexport.runtimes.native import find_native

Arrays = dict[str, np.ndarray]
Row = dict[str, Any]
#: [N,K] of RWKV-7 12x768: attention, feed-forward network, both directions of a low-rank adapter.
_SHAPES = ((768, 768), (3072, 768), (768, 3072), (64, 768), (768, 64))
_FORMATS = ("fp32", "fp16", "int8", "int6", "int4")
#: 32-bit words of a block of the interleaved formats
_WORDS = {"int6": 6, "int4": 4}


def weights(form: str, n: int, k: int, rng: np.random.Generator) -> tuple[str, Arrays, dict[str, int]]:
    """Operator, its constant inputs and its attributes."""
    if form in ("fp32", "fp16"):
        return (
            "linear",
            {"weight": rng.standard_normal((n, k)).astype(np.float32 if form == "fp32" else "f2")},
            {},
        )
    if form == "int8":
        block = 128 if k % 128 == 0 else 64
        codes = rng.integers(0, 256, (n, k // block, block), dtype=np.uint8)
        scales = rng.uniform(0.001, 0.01, (n, k // block)).astype(np.float32)
        return "linear_int8", {"weight": codes, "scales": scales}, {"K": k, "N": n, "block_size": block}
    codes = rng.integers(0, 256, (n // 8, k // 32, _WORDS[form], 8, 4), dtype=np.uint8)
    scales = rng.uniform(0.001, 0.01, (n // 8, k // 32, 8)).astype("f2")
    return f"linear_{form}x8", {"weight": codes, "scales": scales}, {"K": k, "N": n}


def graph(form: str, n: int, k: int, tokens: int, total: int) -> tuple[bytes, int, int]:
    """A model of products with a common input; also its number of nodes and its bytes of weights."""
    rng = np.random.default_rng(0)
    nodes, stored, outputs, size = [], [], [], 0
    while size < total:
        op, made, attributes = weights(form, n, k, rng)
        mark = len(nodes)
        stored += [numpy_helper.from_array(a, f"{name}{mark}") for name, a in made.items()]
        size += sum(a.nbytes for a in made.values())
        inputs = ["x", *(f"{name}{mark}" for name in made)]
        nodes.append(helper.make_node(op, inputs, [f"y{mark}"], domain=DOMAIN, **attributes))
        outputs.append(helper.make_tensor_value_info(f"y{mark}", TensorProto.FLOAT, [tokens, n]))
    spec = get_op(op)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [tokens, k])
    model = helper.make_model(
        helper.make_graph(nodes, form, [x], outputs, stored),
        functions=[next(iter(spec.bodies.values())).build(23)],
        opset_imports=[helper.make_opsetid(d, v) for d, v in (("", 23), (DOMAIN, 1), ("com.microsoft", 1))],
        ir_version=10,
    )
    return model.SerializeToString(), len(nodes), size


def opened(model: bytes, tokens: int, k: int, threads: int, library: str) -> Callable[[], Any]:
    """A run of the model through a persistent binding."""
    given = ort.SessionOptions()
    given.intra_op_num_threads = threads
    given.log_severity_level = 3
    if library:
        given.register_custom_ops_library(library)
    session = ort.InferenceSession(model, given, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    x = np.random.default_rng(1).standard_normal((tokens, k)).astype(np.float32)
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x))
    for node in session.get_outputs():
        binding.bind_ortvalue_output(
            node.name, ort.OrtValue.ortvalue_from_numpy(np.zeros(node.shape, np.float32))
        )
    return lambda: session.run_with_iobinding(binding)


def measure(
    form: str, shape: tuple[int, int], tokens: int, threads: int, total: int, rounds: int, library: str
) -> Row:
    """One row: the kernel and the body of a format in turns."""
    n, k = shape
    model, count, size = graph(form, n, k, tokens, total)
    calls = {"body": opened(model, tokens, k, threads, "")}
    if library:
        calls = {"kernel": opened(model, tokens, k, threads, library), **calls}
    samples = interleaved(calls, rounds=rounds)
    row: Row = {"format": form, "N": n, "K": k, "tokens": tokens, "threads": threads, "nodes": count}
    row |= {"weight_bytes": size, "samples": samples}
    for name, seconds in samples.items():
        middle = statistics.median(seconds)
        row[f"{name}_gb_per_s"] = size / middle / 1e9
        row[f"{name}_gmac_per_s"] = count * tokens * n * k / middle / 1e9
    if library:
        row["ratio"] = statistics.median(
            b / a for a, b in zip(samples["kernel"], samples["body"], strict=True)
        )
    return row


def read_speed(threads: int, size: int) -> float:
    """Bytes/s that the threads read from memory, one sequential stream each: the fastest pass."""
    setup = make_setup(model="", target="", bundle="", threads=threads)
    return float(measure_bandwidth(0, setup=setup, buffer_bytes=size).bytes_per_s)


def show(rows: Sequence[Row]) -> None:
    """Two tables: one token and many."""
    for title, unit, chosen in (
        ("one token, GB/s of weights", "gb_per_s", [r for r in rows if r["tokens"] == 1]),
        ("many tokens, G multiply-adds/s", "gmac_per_s", [r for r in rows if r["tokens"] > 1]),
    ):
        lines = []
        for r in chosen:
            line = [
                r["format"],
                f"{r['N']}x{r['K']}",
                r["tokens"],
                r["threads"],
                r.get(f"kernel_{unit}", "-"),
            ]
            line += [r[f"body_{unit}"], r.get("ratio", "-")]
            lines.append([*line, r["read_gb_per_s"]] if unit == "gb_per_s" else line)
        columns = ["format", "N x K", "tokens", "threads", "kernel", "body", "kernel : body"]
        table(title, [*columns, "read"] if unit == "gb_per_s" else columns, lines)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--formats", nargs="+", choices=_FORMATS, default=list(_FORMATS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 512])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    shapes, megabytes = _SHAPES, 128
    if args.quick:
        shapes, megabytes, args.rounds, args.tokens = ((64, 128),), 1, 2, [1, 16]
    library = str(find_native().path or "")
    about = header(
        "Matrix products",
        formats=" ".join(args.formats),
        threads=args.threads,
        tokens=args.tokens,
        rounds=args.rounds,
        megabytes=megabytes,
        native_kernels=find_native().reason,
    )
    rows = []
    for threads in args.threads:
        read = read_speed(threads, megabytes << 20) / 1e9
        for form in args.formats:
            for shape in shapes:
                for tokens in args.tokens:
                    total = (megabytes << 20) if tokens == 1 else 1
                    row = measure(form, shape, tokens, threads, total, args.rounds, library)
                    rows.append({**row, "read_gb_per_s": read})
    show(rows)
    save(args.json, about, rows)


if __name__ == "__main__":
    main()
