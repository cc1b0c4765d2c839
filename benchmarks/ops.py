"""Every operator's ONNX bodies (and the native kernel, if it is built) against its PyTorch reference.

All implementations of a case run in one process, in turns, on the same inputs. "error" is the largest
difference from the reference over the largest value of the reference.

    python benchmarks/ops.py [--quick] [--threads 1] [--only wkv7] [--json F]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from common import header, interleaved, median_ratio, microseconds, options, save, table

from xexport.core.op import Body, OpSpec
from xexport.core.registry import get_op
from xexport.ops.run import op_model
from xexport.runtimes.native import find_native

Array = np.ndarray[Any, Any]
_OPSET = 23
_REFERENCE = "torch reference"


@dataclass(frozen=True)
class Case:
    """One operator at one size.

    Attributes:
        constant: inputs that are weights of the graph (a filter), known when the session opens.
        skip: bodies that can't run this size.
    """

    op: str
    size: str
    inputs: Mapping[str, Array]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    constant: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()


def wkv7_case(length: int, heads: int, size: int, rng: np.random.Generator) -> Case:
    """Normalised removal keys and decays in (0.55, 1), as RWKV-7 makes them."""
    shape = (1, length, heads, size)
    r, k, v, key = (rng.standard_normal(shape).astype(np.float32) for _ in range(4))
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    w = np.exp(-np.exp(-0.5) / (1 + np.exp(-rng.standard_normal(shape)))).astype(np.float32)
    rate = (1 / (1 + np.exp(-rng.standard_normal(shape)))).astype(np.float32)
    state = rng.standard_normal((1, heads, size, size)).astype(np.float32)
    names = ("r", "w", "k", "v", "a", "b", "state")
    inputs = dict(zip(names, (r, w, k, v, -key, key * rate, state), strict=True))
    return Case("wkv7", f"H={heads} N={size} T={length}", inputs, skip=() if length == 1 else ("step",))


def scan_case(length: int, width: int, states: int, rng: np.random.Generator) -> Case:
    """Step sizes around 0.05 and A = -1..-N, as Mamba starts with."""

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    inputs = {
        "u": normal(1, length, width),
        "dt": np.exp(normal(1, length, width) * 0.5 - 3).astype(np.float32),
        "A": -np.tile(np.arange(1, states + 1, dtype=np.float32), (width, 1)),
        "B": normal(1, length, states),
        "C": normal(1, length, states),
        "D": normal(width),
        "state": normal(1, width, states),
    }
    skip = () if length == 1 else ("step",)
    return Case("selective_scan", f"D={width} N={states} T={length}", inputs, constant=("A", "D"), skip=skip)


def conv_case(length: int, width: int, rng: np.random.Generator) -> Case:
    """A decaying filter as long as the sequence, a weight of the graph."""
    from xexport.ops.fft_conv.reference import fft_sizes

    decay = np.exp(-np.linspace(0, 5, length))
    inputs = {
        "u": rng.standard_normal((1, width, length)).astype(np.float32),
        "h": (rng.standard_normal((width, length)) * decay).astype(np.float32),
    }
    n1, n2 = fft_sizes(length)
    return Case("fft_conv", f"D={width} L={length}", inputs, {"n1": n1, "n2": n2}, constant=("h",))


def attention_case(length: int, heads: int, size: int, rng: np.random.Generator) -> Case:
    """RetNet's decays, 1 - 2^-5 and above."""

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    gamma = np.log(1 - 2.0 ** -np.linspace(5, 8, heads)).astype(np.float32)
    inputs = {
        "q": normal(1, length, heads * size),
        "k": normal(1, length, heads * size),
        "v": normal(1, length, heads * size),
        "state": normal(1, heads, size, size),
        "decay": np.ascontiguousarray(np.broadcast_to(gamma, (1, length, heads))),
    }
    attributes = {"q_num_heads": heads, "kv_num_heads": heads, "scale": size**-0.5, "update_rule": "gated"}
    return Case("linear_attention", f"H={heads} K=V={size} T={length}", inputs, attributes)


def cases(quick: bool) -> list[Case]:
    """The sizes of a 12x768 RWKV-7, of mamba-130m, of a small Hyena and of a 12-head RetNet."""
    rng = np.random.default_rng(0)
    if quick:
        return [
            wkv7_case(1, 2, 8, rng),
            wkv7_case(19, 2, 8, rng),
            scan_case(5, 8, 4, rng),
            conv_case(32, 4, rng),
            attention_case(5, 2, 8, rng),
        ]
    return [
        *(wkv7_case(t, 12, 64, rng) for t in (1, 512)),
        *(scan_case(t, 1536, 16, rng) for t in (1, 512)),
        *(conv_case(length, 256, rng) for length in (1024, 8192)),
        *(attention_case(t, 12, 64, rng) for t in (1, 512)),
    ]


def implementations(case: Case, threads: int) -> dict[str, Callable[[], Sequence[Array]]]:
    """Name -> a call that computes the case."""
    spec = get_op(case.op)
    calls: dict[str, Callable[[], Sequence[Array]]] = {_REFERENCE: _reference(case, spec)}
    for variant in spec.bodies:
        if variant not in case.skip:
            local = _local(spec) if spec.domain != "xexport" else spec
            calls[f"ONNX {variant}"] = _session(case, local, variant, threads, None)
    if spec.domain != "xexport":
        calls["ORT's own kernel"] = _session(case, spec, next(iter(spec.bodies)), threads, None)
    else:
        native = find_native()
        if native.path is not None:
            calls["native"] = _session(case, spec, next(iter(spec.bodies)), threads, str(native.path))
    return calls


def _reference(case: Case, spec: OpSpec) -> Callable[[], Sequence[Array]]:
    import torch

    op = getattr(torch.ops.xexport, spec.name)
    tensors = [torch.from_numpy(case.inputs[name].copy()) for name in spec.inputs]
    attributes = [case.attributes[name] for name in spec.attributes]

    def call() -> Sequence[Array]:
        with torch.inference_mode():
            out = op(*tensors, *attributes)
        return [t.numpy() for t in (out if isinstance(out, tuple) else (out,))]

    return call


def _local(spec: OpSpec) -> OpSpec:
    """The spec under a domain that no runtime has a kernel for, so that its body runs."""
    domain = "xexport.body"

    def build(body: Body, opset: int) -> onnx.FunctionProto:
        function = body.build(opset)
        function.domain = domain
        return function

    bodies = {n: Body(lambda opset, b=b: build(b, opset), b.why) for n, b in spec.bodies.items()}
    return replace(spec, bodies=bodies, domain=domain)


def _session(
    case: Case, spec: OpSpec, variant: str, threads: int, library: str | None
) -> Callable[[], Sequence[Array]]:
    import onnxruntime as ort

    opts = ort.SessionOptions()
    opts.intra_op_num_threads = threads
    opts.log_severity_level = 3
    if library is not None:
        opts.register_custom_ops_library(library)
    model = op_model(spec, case.inputs, variant, _OPSET, case.attributes, constant=case.constant)
    session = ort.InferenceSession(model.SerializeToString(), opts, providers=["CPUExecutionProvider"])
    feeds = {n: a for n, a in case.inputs.items() if n not in case.constant}
    return lambda: session.run(None, feeds)


def measure(case: Case, threads: int, rounds: int, clock: str) -> list[dict[str, Any]]:
    """Rows of one case: median, ratio against the reference, error."""
    calls = implementations(case, threads)
    want = calls[_REFERENCE]()
    errors = {name: _error(want, call()) for name, call in calls.items()}
    fast = min(_seconds(call) for call in calls.values()) < 1e-3
    samples = interleaved(calls, rounds=rounds, repeat=5 if fast else 1, warmup=2, clock=clock)
    return [
        {
            "op": case.op,
            "size": case.size,
            "implementation": name,
            "threads": threads,
            "us": microseconds(s),
            "speedup": median_ratio(s, samples[_REFERENCE]),
            "error": errors[name],
            "seconds": s,
        }
        for name, s in samples.items()
    ]


def _seconds(call: Callable[[], Any]) -> float:
    return min(interleaved({"": call}, rounds=2)[""])


def _error(want: Sequence[Array], got: Sequence[Array]) -> float:
    return max(
        float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30)) for a, b in zip(want, got, strict=True)
    )


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help="one operator")
    parser.add_argument("--rounds", type=int)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    rounds = args.rounds or (3 if args.quick else 15)
    native = find_native()
    about = header(
        "operators: ONNX bodies against the PyTorch reference",
        threads=args.threads,
        rounds=rounds,
        clock=args.clock,
        native=str(native.available),
    )
    rows: list[dict[str, Any]] = []
    for case in cases(args.quick):
        if args.only in (None, case.op):
            rows += measure(case, args.threads, rounds, args.clock)
    table(
        "medians; speedup against the PyTorch reference in the same rounds",
        ["operator", "size", "implementation", "us", "speedup", "error"],
        [[r[k] for k in ("op", "size", "implementation", "us", "speedup", "error")] for r in rows],
    )
    save(args.json, about, rows)


if __name__ == "__main__":
    main()
