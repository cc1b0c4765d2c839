"""Native kernels against the ONNX bodies of the same operators and torch.fft: ratios of one run, one thread.

    python benchmarks/native.py [--quick] [--json F]

All candidates of a row take turns. Times are of the thread that works: on a machine that others use as
well, it doesn't count while it waits for a core.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from common import header, microseconds, options, save, table
from onnx import helper, numpy_helper

from xexport.core.registry import get_op
from xexport.ops.fft_conv.reference import causal_conv, fft_sizes
from xexport.ops.run import op_model
from xexport.runtimes.native import find_native

Arrays = dict[str, np.ndarray]
Row = dict[str, Any]
_SAMPLE_SECONDS = 0.03


def bound(
    name: str, x: Arrays, variant: str, *, library: str = "", constant: Sequence[str] = (), **attributes: Any
) -> Callable[[], Any]:
    """A call of one operator through a persistent IO binding, by its kernel or by one of its bodies."""
    model = op_model(get_op(name), x, variant, 23, attributes, constant=constant)
    return open_bound(model.SerializeToString(), {n: a for n, a in x.items() if n not in constant}, library)


def open_bound(model: bytes, feed: Arrays, library: str = "") -> Callable[[], Any]:
    given = ort.SessionOptions()
    given.intra_op_num_threads = 1
    given.log_severity_level = 3
    if library:
        given.register_custom_ops_library(library)
    session = ort.InferenceSession(model, given, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for input_name, array in feed.items():
        binding.bind_ortvalue_input(input_name, ort.OrtValue.ortvalue_from_numpy(array))
    for node, array in zip(session.get_outputs(), session.run(None, feed), strict=True):
        binding.bind_ortvalue_output(node.name, ort.OrtValue.ortvalue_from_numpy(array))
    return lambda: session.run_with_iobinding(binding)


def timed(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of CPU a call, one sample a round and candidate; the order turns from round to round."""
    repeats = {}
    for name, call in calls.items():
        call()
        began = time.thread_time()
        call()
        repeats[name] = max(1, int(_SAMPLE_SECONDS / max(time.thread_time() - began, 1e-6)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            began = time.thread_time()
            for _ in range(repeats[name]):
                calls[name]()
            samples[name].append((time.thread_time() - began) / repeats[name])
    return samples


def row(work: str, calls: dict[str, Callable[[], Any]], rounds: int, **more: Any) -> Row:
    """Time the candidates; the first one is the kernel."""
    samples = timed(calls, rounds)
    kernel, *others = samples
    ratios = {
        name: statistics.median(b / k for k, b in zip(samples[kernel], samples[name], strict=True))
        for name in others
    }
    return {"work": work, "samples": samples, "ratios": ratios, **more}


def recurrence(name: str, x: Arrays, bodies: Sequence[str], library: str, work: str, rounds: int) -> Row:
    calls = {"kernel": bound(name, x, bodies[0], library=library)}
    calls |= {body: bound(name, x, body) for body in bodies}
    return row(work, calls, rounds)


def wkv7_inputs(T: int, H: int = 12, N: int = 64) -> Arrays:
    rng = np.random.default_rng(0)
    r, k, v, w, g = (rng.standard_normal((1, T, H, N)) for _ in range(5))
    kk = k / np.linalg.norm(k, axis=-1, keepdims=True)
    x = {"r": r, "w": np.exp(-np.exp(-0.5) / (1 + np.exp(-w))), "k": k, "v": v}
    x |= {"a": -kk, "b": kk / (1 + np.exp(-g)), "state": rng.standard_normal((1, H, N, N))}
    return {n: a.astype(np.float32) for n, a in x.items()}


def scan_inputs(T: int, D: int = 1536, N: int = 16) -> Arrays:
    rng = np.random.default_rng(0)
    x = {"u": rng.standard_normal((1, T, D)), "dt": np.log1p(np.exp(rng.standard_normal((1, T, D)) - 2))}
    x |= {"A": -np.exp(rng.standard_normal((D, N)))}
    x |= {n: rng.standard_normal((1, T, N)) for n in ("B", "C")}
    x |= {"D": rng.standard_normal(D), "state": rng.standard_normal((1, D, N))}
    return {n: a.astype(np.float32) for n, a in x.items()}


def short_inputs(T: int, D: int, K: int) -> Arrays:
    rng = np.random.default_rng(0)
    shapes = {"x": (1, T, D), "weight": (K, D), "bias": (D,), "state": (1, K - 1, D)}
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def contrib_conv(x: Arrays, silu: bool) -> Callable[[], Any]:
    """onnxruntime's own com.microsoft::CausalConvWithState, from 1.31 on."""
    weight = np.ascontiguousarray(x["weight"].T[:, None])
    inits = [numpy_helper.from_array(a, n) for n, a in (("weight", weight), ("bias", x["bias"]))]
    node = helper.make_node(
        "CausalConvWithState",
        ["x", "weight", "bias", "state"],
        ["y", "new_state"],
        domain="com.microsoft",
        channels_last=1,
        activation="silu" if silu else "none",
    )
    given = [helper.make_tensor_value_info(n, 1, x[n].shape) for n in ("x", "state")]
    outs = [helper.make_tensor_value_info(n, 1, None) for n in ("y", "new_state")]
    graph = helper.make_graph([node], "contrib", given, outs, inits)
    opsets = [helper.make_opsetid(d, v) for d, v in (("", 23), ("com.microsoft", 1))]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return open_bound(model.SerializeToString(), {n: x[n] for n in ("x", "state")})


def short_convolution(T: int, D: int, K: int, silu: bool, library: str, rounds: int) -> Row:
    x, constant = short_inputs(T, D, K), ["weight", "bias"]
    calls = {}
    for label, variant, where in (("kernel", "auto", library), ("body", "step" if T == 1 else "conv", "")):
        calls[label] = bound(
            "causal_conv1d", x, variant, library=where, constant=constant, channels=D, silu=int(silu)
        )
    with suppress(Exception):  # an older onnxruntime lacks the operator
        calls["contrib"] = contrib_conv(x, silu)
    return row(f"causal_conv1d D={D} K={K}{' silu' if silu else ''}, T={T}", calls, rounds)


def attention_inputs(T: int, H: int = 12, N: int = 64, *, a_key: bool = False) -> Arrays:
    rng = np.random.default_rng(0)
    x = {n: rng.standard_normal((1, T, H * N)) for n in ("q", "k", "v")}
    x |= {"state": rng.standard_normal((1, H, N, N))}
    x |= {"decay": -0.3 * np.abs(rng.standard_normal((1, T, H * N if a_key else H)))}
    return {n: a.astype(np.float32) for n, a in x.items()}


def against_attention(T: int, library: str, rounds: int) -> list[Row]:
    """wkv7 and linear_recurrence beside ONNX Runtime's LinearAttention, "gated", of the same size."""
    x, attributes = attention_inputs(T), {"scale": 0.125, "heads": 12}
    theirs = {"q_num_heads": 12, "kv_num_heads": 12, "scale": 0.125, "update_rule": "gated"}
    attention = bound("linear_attention", x, "chunked", **theirs)
    wkv7 = bound("wkv7", wkv7_inputs(T), "scan", library=library)
    rows = [row(f"wkv7 12x64, T={T}", {"kernel": wkv7, "LinearAttention": attention}, rounds)]
    for a_key in (False, True):
        x = attention_inputs(T, a_key=a_key)
        calls = {
            "kernel": bound("linear_recurrence", x, "contrib", library=library, **attributes),
            "LinearAttention": bound("linear_attention", x, "chunked", **theirs),
        }
        kind = "key" if a_key else "head"
        rows.append(row(f"linear_recurrence 12x64, a decay a {kind}, T={T}", calls, rounds))
    return rows


def convolution(L: int, library: str, rounds: int, *, body: bool, D: int = 256) -> Row:
    """Against torch.fft with the filter's spectrum computed beforehand, as the kernel keeps it too."""
    rng = np.random.default_rng(0)
    h = rng.standard_normal((D, L)) * np.exp(-4 * np.arange(L) / L)
    x = {"u": rng.standard_normal((1, D, L)).astype(np.float32), "h": h.astype(np.float32)}
    n1, n2 = fft_sizes(L)
    calls = {"kernel": bound("fft_conv", x, "monarch", library=library, constant=["h"], n1=n1, n2=n2)}
    u, taps = torch.from_numpy(x["u"]), torch.from_numpy(x["h"])
    spectrum = torch.fft.rfft(taps, n=2 * L)

    def by_torch() -> torch.Tensor:
        y: torch.Tensor = torch.fft.irfft(torch.fft.rfft(u, n=2 * L) * spectrum, n=2 * L)[
            ..., :L
        ].contiguous()
        return y

    calls["torch.fft"] = by_torch
    if body:
        calls["monarch"] = bound("fft_conv", x, "monarch", constant=["h"], n1=n1, n2=n2)
    want = causal_conv(u.double(), taps.double()).numpy()
    given = ort.SessionOptions()
    given.register_custom_ops_library(library)
    model = op_model(get_op("fft_conv"), x, "monarch", 23, {"n1": n1, "n2": n2})
    (got,) = ort.InferenceSession(model.SerializeToString(), given).run(None, x)
    scale = np.abs(want).max()
    return row(
        f"fft_conv {D} channels, L={L}",
        calls,
        rounds,
        error=float(np.abs(got - want).max() / scale),
        torch_error=float(np.abs(by_torch().numpy() - want).max() / scale),
    )


def odd_length(L: int, library: str, rounds: int, D: int = 256) -> Row:
    """A length that is no power of two against the next one that is."""
    calls = {}
    for label, size in (("kernel", L), ("next power of two", 1 << (L - 1).bit_length())):
        rng = np.random.default_rng(0)
        x = {"u": rng.standard_normal((1, D, size)), "h": rng.standard_normal((D, size))}
        x = {n: a.astype(np.float32) for n, a in x.items()}
        n1, n2 = fft_sizes(size)
        calls[label] = bound("fft_conv", x, "monarch", library=library, constant=["h"], n1=n1, n2=n2)
    return row(f"fft_conv {D} channels, L={L}", calls, rounds)


def main() -> None:
    arguments = options(__doc__).parse_args()
    native = find_native()
    if native.path is None:
        raise SystemExit(native.reason)
    torch.set_num_threads(1)
    library, rounds = str(native.path), 3 if arguments.quick else 21
    about = header("Native kernels", library=native.reason, threads=1, clock="CPU time of the thread")
    rows = []
    for T in (1, 64 if arguments.quick else 512):
        bodies = ["step" if T == 1 else "chunked", "scan"]
        rows.append(recurrence("wkv7", wkv7_inputs(T), bodies, library, f"wkv7 12x64, T={T}", rounds))
    for T in (1, 64 if arguments.quick else 512):
        bodies = ["step", "scan"] if T == 1 else ["scan"]
        work = f"selective_scan D=1536 N=16, T={T}"
        rows.append(recurrence("selective_scan", scan_inputs(T), bodies, library, work, rounds))
    for D, K, silu in ((1536, 4, True), (2304, 3, False)):
        for T in (1, 64 if arguments.quick else 512):
            rows.append(short_convolution(T, D, K, silu, library, rounds))
    for T in (1, 64 if arguments.quick else 512):
        rows += against_attention(T, library, rounds)
    for L in (1000, 1024) if arguments.quick else (1000, 1024, 1100, 2048, 8192, 65536):
        rows.append(convolution(L, library, rounds if L < 10000 else 5, body=L <= 1024))
    for L in (1000,) if arguments.quick else (1000, 1100, 5000, 7777):
        rows.append(odd_length(L, library, rounds))
    table(
        "one thread; times as fast as ...",
        ("work", "kernel us", "against", "error", "torch's"),
        [
            (
                r["work"],
                microseconds(r["samples"]["kernel"]),
                ", ".join(f"{name} {ratio:.1f}" for name, ratio in r["ratios"].items()),
                r.get("error", ""),
                r.get("torch_error", ""),
            )
            for r in rows
        ],
    )
    save(arguments.json, about, rows)


if __name__ == "__main__":
    main()
