"""Formats of an 8- or 4-bit matrix product: time, error, chunk law, saturation.

Every product y = x W ([M,K] x [K,N]) is timed in one process, in turns, at decode (M = 1, 8) and
prefill (M = 128). Beside the time:

error        RMS of y against the fp32 product, over its RMS; x has outlier channels, as real
             activations have.
chunk error  the first row computed alone against the same row computed among M others, one of them
             large: 0 means that a token's result does not depend on its neighbours (the chunk law).
saturation   error on x and W that make every pair of 8-bit products as large as it can be; without
             VNNI, u8 x s8 kernels add two products in 16 bits, which overflows.

    python benchmarks/int8_formats.py [--quick] [--threads 1] [--json F]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from common import header, interleaved, median_ratio, microseconds, options, save, table
from onnx import TensorProto, helper, numpy_helper

from xexport.quant.blocks import quantize_blocks

Array = np.ndarray[Any, Any]
_OPSET = 23
_SIZES = ((768, 768), (768, 3072), (3072, 768))
_ROWS = (1, 8, 128)


def build(nodes: Sequence[onnx.NodeProto], tensors: Mapping[str, Array], shape: tuple[int, int]) -> bytes:
    """A model ``x [M,K] -> y [M,N]``."""
    depth, columns = shape
    graph = helper.make_graph(
        list(nodes),
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", depth])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", columns])],
        [numpy_helper.from_array(np.ascontiguousarray(a), n) for n, a in tensors.items()],
    )
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", 1)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return model


def fp32(weight: Array) -> bytes:
    """The exact product."""
    return build([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weight}, weight.shape)


def block(weight: Array, bits: int, size: int) -> bytes:
    """com.microsoft MatMulNBits, activations quantized per row and block (accuracy_level 4)."""
    depth, columns = weight.shape
    blocks = quantize_blocks(np.ascontiguousarray(weight.T), bits, size)
    codes = blocks.codes if bits == 8 else blocks.codes[..., 0::2] | (blocks.codes[..., 1::2] << 4)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain="com.microsoft",
        K=depth,
        N=columns,
        bits=bits,
        block_size=size,
        accuracy_level=4,
    )
    return build([node], {"codes": codes, "scales": blocks.scales}, weight.shape)


def _columns(weight: Array, levels: int = 127) -> tuple[Array, Array]:
    scales = (np.abs(weight).max(0) / levels).astype(np.float32)
    return np.rint(weight / scales).astype(np.int8), scales


def per_tensor(weight: Array, signed: bool, levels: int = 127) -> bytes:
    """com.microsoft DynamicQuantizeMatMul: one activation scale for the whole chunk."""
    codes, scales = _columns(weight, levels)
    zero = np.zeros(len(scales), np.int8)
    if not signed:
        codes, zero = (codes.astype(np.int16) + 128).astype(np.uint8), np.full(len(scales), 128, np.uint8)
    node = helper.make_node(
        "DynamicQuantizeMatMul", ["x", "codes", "scales", "zero"], ["y"], domain="com.microsoft"
    )
    return build([node], {"codes": codes, "scales": scales, "zero": zero}, weight.shape)


def per_row(weight: Array, signed: bool = True, levels: int = 127) -> bytes:
    """Standard operators: every row of x in u8 around 128 with a scale of its own, then MatMulInteger."""
    codes, scales = _columns(weight, levels)
    tensors: dict[str, Array] = {
        "codes": codes,
        "scales": scales,
        "zero": np.array(128, np.uint8),
        "axis": np.array([-1], np.int64),
        "levels": np.array(127, np.float32),
        "tiny": np.array(1e-30, np.float32),
        "middle": np.array(128, np.float32),
    }
    weight_zero = []
    if not signed:
        tensors["codes"] = (codes.astype(np.int16) + 128).astype(np.uint8)
        tensors["weight_zero"] = np.array(128, np.uint8)
        weight_zero = ["weight_zero"]
    node = helper.make_node
    nodes = [
        node("Abs", ["x"], ["abs"]),
        node("ReduceMax", ["abs", "axis"], ["largest"], keepdims=1),
        node("Max", ["largest", "tiny"], ["safe"]),
        node("Div", ["safe", "levels"], ["row_scale"]),
        node("Div", ["x", "row_scale"], ["scaled"]),
        node("Round", ["scaled"], ["rounded"]),
        node("Add", ["rounded", "middle"], ["shifted"]),
        node("Cast", ["shifted"], ["q"], to=TensorProto.UINT8),
        node("MatMulInteger", ["q", "codes", "zero", *weight_zero], ["sums"]),
        node("Cast", ["sums"], ["float_sums"], to=TensorProto.FLOAT),
        node("Mul", ["float_sums", "row_scale"], ["by_row"]),
        node("Mul", ["by_row", "scales"], ["y"]),
    ]
    return build(nodes, tensors, weight.shape)


FORMATS: dict[str, Callable[[Array], bytes]] = {
    "fp32": fp32,
    "8 bit block 128": lambda w: block(w, 8, 128),
    "8 bit block 64": lambda w: block(w, 8, 64),
    "8 bit block 32": lambda w: block(w, 8, 32),
    "4 bit block 128": lambda w: block(w, 4, 128),
    "4 bit block 32": lambda w: block(w, 4, 32),
    "per tensor s8": lambda w: per_tensor(w, True),
    "per tensor u8": lambda w: per_tensor(w, False),
    "per row s8": lambda w: per_row(w),
    "per row s7": lambda w: per_row(w, levels=63),
    "per row u8": lambda w: per_row(w, signed=False),
}


def open_session(model: bytes, threads: int) -> ort.InferenceSession:
    """A session of one product."""
    opts = ort.SessionOptions()
    opts.intra_op_num_threads = threads
    opts.log_severity_level = 3
    return ort.InferenceSession(model, opts, providers=["CPUExecutionProvider"])


def run(session: ort.InferenceSession, x: Array) -> Array:
    y: Array = session.run(None, {"x": x})[0]
    return y


def relative(got: Array, want: Array) -> float:
    """RMS of the difference over RMS."""
    return float(np.sqrt(np.mean(np.square(got - want)) / np.mean(np.square(want))))


def activations(rows: int, depth: int, rng: np.random.Generator) -> Array:
    """Normal, with 1 channel in 100 eight times as large."""
    x = rng.standard_normal((rows, depth)).astype(np.float32)
    x[:, :: depth // max(1, depth // 100)] *= 8
    return x


def chunk_error(session: ort.InferenceSession, depth: int, rng: np.random.Generator) -> float:
    """A row alone against the same row with seven others, one of them 20 times as large."""
    x = activations(8, depth, rng)
    x[5] *= 20
    alone = run(session, x[:1])
    return relative(run(session, x)[:1], alone)


def saturation(make: Callable[[Array], bytes], depth: int) -> float:
    """Error where every product is as large as it can be: constant x and W."""
    weight = np.full((depth, 64), 0.5, np.float32)
    x = np.full((8, depth), 3.0, np.float32)
    x[:, 0] = -3.0
    return relative(run(open_session(make(weight), 1), x), x @ weight)


def measure(size: tuple[int, int], threads: int, rounds: int, clock: str) -> list[dict[str, Any]]:
    """Rows of one matrix: every format at every number of rows."""
    rng = np.random.default_rng(0)
    depth, columns = size
    weight = (rng.standard_normal(size) * 0.05).astype(np.float32)
    sessions = {name: open_session(make(weight), threads) for name, make in FORMATS.items()}
    law = {name: chunk_error(s, depth, np.random.default_rng(1)) for name, s in sessions.items()}
    full = {name: saturation(make, depth) for name, make in FORMATS.items()}
    out = []
    for count in _ROWS:
        x = activations(count, depth, rng)
        want = x @ weight
        calls = {name: partial(run, s, x) for name, s in sessions.items()}
        samples = interleaved(calls, rounds=rounds, repeat=10 if count < 128 else 1, warmup=3, clock=clock)
        out += [
            {
                "depth": depth,
                "columns": columns,
                "rows": count,
                "threads": threads,
                "format": name,
                "us": microseconds(s),
                "speedup": median_ratio(s, samples["fp32"]),
                "error": relative(calls[name](), want),
                "chunk_error": law[name],
                "saturation_error": full[name],
                "seconds": s,
            }
            for name, s in samples.items()
        ]
    return out


def verdict(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the figures say about the format of the scheme ``int8``."""

    def mean_speedup(name: str, count: int) -> float:
        values = [r["speedup"] for r in rows if r["format"] == name and r["rows"] == count]
        return float(np.exp(np.mean(np.log(values))))

    def worst(name: str, key: str) -> float:
        return max(float(r[key]) for r in rows if r["format"] == name)

    lines = [
        f"{name}: {mean_speedup(name, 1):.2f}x fp32 at decode, {mean_speedup(name, 128):.2f}x at prefill, "
        f"error {worst(name, 'error'):.4f}, chunk error {worst(name, 'chunk_error'):.1e}, "
        f"saturation error {worst(name, 'saturation_error'):.3f}"
        for name in FORMATS
        if name != "fp32"
    ]
    usable = [
        name
        for name in FORMATS
        if name != "fp32" and worst(name, "chunk_error") < 1e-4 and worst(name, "saturation_error") < 0.02
    ]
    eight = [name for name in usable if not name.startswith("4 bit")]
    lines.append(f"keep the chunk law and do not saturate here: {', '.join(usable)}")
    for what, count in (("decode", 1), ("prefill", 128)):
        best = max(eight, key=lambda name: mean_speedup(name, count))
        lines.append(f"fastest of these in 8 bits at {what}: {best}, {mean_speedup(best, count):.2f}x fp32")
    block_wise = "8 bit block 128"
    for name in ("per row u8", "per row s7"):
        prefill, decode = (mean_speedup(name, n) / mean_speedup(block_wise, n) for n in (128, 1))
        error = worst(name, "error") / worst(block_wise, "error")
        lines.append(
            f"{name} against {block_wise}: {prefill:.2f}x as fast at prefill, {decode:.2f}x at decode, "
            f"{error:.1f}x the error"
        )
    exact = min(eight, key=lambda name: worst(name, "error"))
    lines.append(f"smallest error of these in 8 bits: {exact}, {worst(exact, 'error'):.4f}")
    return lines


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int)
    args = parser.parse_args()
    rounds = args.rounds or (3 if args.quick else 30)
    sizes = ((128, 64),) if args.quick else _SIZES
    about = header(
        "formats of 8- and 4-bit products",
        threads=args.threads,
        rounds=rounds,
        clock=args.clock,
        instructions=_instructions(),
    )
    rows: list[dict[str, Any]] = []
    for size in sizes:
        rows += measure(size, args.threads, rounds, args.clock)
    columns = ["format", "us", "speedup", "error", "chunk_error", "saturation_error"]
    for depth, width in sizes:
        for count in _ROWS:
            part = [r for r in rows if (r["depth"], r["columns"], r["rows"]) == (depth, width, count)]
            title = f"[{count},{depth}] x [{depth},{width}]"
            table(title, columns, [[r[c] for c in columns] for r in part])
    lines = verdict(rows)
    print("\n".join(lines))
    save(args.json, {**about, "verdict": lines}, rows)


def _instructions() -> str:
    """Which of the instruction sets that matter to 8-bit products this processor has (Linux)."""
    from pathlib import Path

    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return "unknown"
    flags = info.read_text(encoding="utf-8", errors="replace")
    found = [f for f in ("avx2", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp") if f" {f}" in flags]
    return " ".join(found) or "none"


if __name__ == "__main__":
    main()
