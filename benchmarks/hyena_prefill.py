"""Hyena's prefill of a long prompt, bundles against PyTorch eager, in one run.

    python benchmarks/hyena_prefill.py [--quick] [--layers 12] [--targets cpu-fp32 cpu-int8] [--threads 1 2]

Random weights; bytes as vocabulary, so that the head costs next to nothing. PyTorch eager is three things:

- `training form`: as its authors publish it, torch.fft in float32, filters made anew at every call;
- `filters kept`: the same with the filters made once, as the bundle has them; the strictest comparison;
- `chunk form`: the module that was exported, whose reference operators convolve in float64.

`products` is the time of the layers' matrix products alone in ONNX Runtime. A bundle of the same float32
weights doesn't get below it, so it bounds the ratios of cpu-fp32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import header, interleaved, median_ratio, options, save, table

_PRODUCTS = "products"


def random_model(config: Any) -> Any:
    """The chunk form with weights of a sensible size and filters that decay."""
    import torch

    from xexport.models.hyena import Hyena

    generator = torch.Generator().manual_seed(0)
    module = Hyena(config)
    decay = torch.exp(-8 * torch.arange(config.max_tokens) / config.max_tokens)
    with torch.no_grad():
        for name, p in module.named_parameters():
            value = torch.randn(p.shape, generator=generator)
            if ".filters." in name:
                value *= decay * (4 / config.max_tokens) ** 0.5
            elif p.ndim > 1:
                value *= p.shape[-1] ** -0.5
            p.copy_(value)
    return module.eval()


def training_forms(chunk: Any) -> dict[str, Callable[[Any], Any]]:
    """PyTorch eager in float32 with the chunk form's weights: filters made at every call, and once."""
    import torch

    from xexport.models.hyena import HyenaTrain

    class Kept(torch.nn.Module):
        def __init__(self, filters: Any) -> None:
            super().__init__()
            self.filters = torch.stack(list(filters))

        def forward(self, length: int) -> Any:
            return self.filters[..., :length]

    forms: dict[str, Callable[[Any], Any]] = {}
    for name in ("training form", "filters kept"):
        module = HyenaTrain(chunk.config).eval()
        module.load_state_dict(chunk.state_dict(), strict=False)
        if name == "filters kept":
            for layer, own in zip(module._blocks(), chunk._blocks(), strict=True):
                layer.filters = Kept(own.filters)
        forms[name] = module
    return forms


def products(config: Any, tokens: int, threads: int) -> Callable[[], Any]:
    """The layers' matrix products and nothing else, as a graph of one layer run once a layer."""
    import onnxruntime as ort
    from onnx import helper, numpy_helper

    d, ffn = config.width, config.ffn
    shapes = {"in": (d, (config.order + 1) * d), "out": (d, d), "fc1": (d, ffn), "fc2": (ffn, d)}
    rng = np.random.default_rng(0)
    given = {k: rng.standard_normal((tokens, k)).astype(np.float32) for k in {s[0] for s in shapes.values()}}
    nodes = [helper.make_node("MatMul", [f"x{s[0]}", n], [f"{n}.y"]) for n, s in shapes.items()]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "products",
        [info(f"x{k}", 1, a.shape) for k, a in given.items()],
        [info(f"{n}.y", 1, (tokens, s[1])) for n, s in shapes.items()],
        [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in shapes.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    session_options = ort.SessionOptions()
    session_options.intra_op_num_threads = threads
    session = ort.InferenceSession(
        model.SerializeToString(), session_options, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    for k, a in given.items():
        binding.bind_ortvalue_input(f"x{k}", ort.OrtValue.ortvalue_from_numpy(a))
    for n, s in shapes.items():
        out = np.empty((tokens, s[1]), np.float32)
        binding.bind_ortvalue_output(f"{n}.y", ort.OrtValue.ortvalue_from_numpy(out))

    def run() -> None:
        for _ in range(config.layers):
            session.run_with_iobinding(binding)

    return run


def measure(
    chunk: Any, bundles: Mapping[str, Path], threads: int, tokens: int, rounds: int, clock: str
) -> list[dict[str, Any]]:
    """Rows of all candidates at one number of threads; they take turns."""
    import torch

    import xexport
    from xexport.runtimes.torch_eager import TorchStream

    torch.set_num_threads(threads)
    ids = np.random.default_rng(0).integers(0, chunk.vocab_size, (1, tokens), dtype=np.int64)
    given = torch.from_numpy(ids)

    def prefill(stream: Any) -> Callable[[], Any]:
        def call() -> Any:
            stream.reset()
            return stream.feed(ids)

        return call

    def eager(form: Callable[[Any], Any]) -> Callable[[], Any]:
        def call() -> Any:
            with torch.inference_mode():
                return form(given)

        return call

    calls = {
        **{
            target: prefill(xexport.load(path, verify=False).stream(threads=threads))
            for target, path in bundles.items()
        },
        **{name: eager(form) for name, form in training_forms(chunk).items()},
        "chunk form": prefill(TorchStream(chunk)),
        _PRODUCTS: products(chunk.config, tokens, threads),
    }
    want = calls["filters kept"]().numpy()
    differences = {t: float(np.abs(calls[t]() - want).max() / np.abs(want).max()) for t in bundles}
    samples = interleaved(calls, rounds=rounds, warmup=0, clock=clock)
    return [
        {
            "threads": threads,
            "tokens": tokens,
            "candidate": name,
            "s": float(np.median(s)),
            **{f"{target}_is_faster": median_ratio(samples[target], s) for target in bundles},
            "difference": differences.get(name, ""),
            "seconds": s,
        }
        for name, s in samples.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--ffn", type=int, default=1536, help="the paper's twice the width")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--targets", nargs="+", default=["cpu-fp32", "cpu-int8"], help="bundles to measure")
    args = parser.parse_args(arguments)
    if args.quick:
        args.layers, args.width, args.ffn, args.tokens, args.threads = 1, 32, 64, 256, [1]
    import xexport
    from xexport.evaluate.suite import Sizes
    from xexport.models.hyena import HyenaConfig
    from xexport.runtimes.native import find_native

    config = HyenaConfig(width=args.width, layers=args.layers, ffn=args.ffn, max_tokens=args.tokens)
    about = header(
        "Hyena: prefill against PyTorch eager",
        layers=config.layers,
        width=config.width,
        ffn=config.ffn,
        tokens=args.tokens,
        rounds=args.rounds,
        clock=args.clock,
        native_kernels=find_native().available,
    )
    chunk = random_model(config)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="xexport-bench-") as folder:
        text = Path(folder) / "ids.txt"
        text.write_text(" ".join(str(i % 256) for i in range(300)), encoding="utf-8")
        sizes = Sizes(64, 64, chunk_tokens=24, steps=2, prefill=(16,), positions=(), timed=False)
        bundles = {target: Path(folder) / target for target in args.targets}
        for target, out in bundles.items():
            xexport.export(chunk, target=target, out=out, eval_text=text, sizes=sizes, name="hyena")
        for threads in args.threads:
            rows += measure(chunk, bundles, threads, args.tokens, args.rounds, args.clock)
    columns = ["candidate", "threads", "s", *(f"{t}_is_faster" for t in bundles), "difference"]
    table(
        "seconds a prompt; how many times as fast the bundle is",
        columns,
        [[r[c] for c in columns] for r in rows],
    )
    save(args.json, about, rows)


if __name__ == "__main__":
    main()
