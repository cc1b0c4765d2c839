"""Steps (T = 1) and prefill of every target's bundle against PyTorch eager, in one run.

Each model is exported for every target into a scratch folder (accuracy is not measured here). Then
PyTorch and all bundles take turns, round by round, on the same tokens, through the interfaces a user
would call: ``Stream.feed`` for a bundle, the module itself under torch.inference_mode for PyTorch. A
ratio is the median over rounds of PyTorch's time over the bundle's.

    python benchmarks/step.py [--quick] [--models rwkv mamba:130m] [--threads 1 2] [--json F]
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import header, interleaved, median_ratio, microseconds, options, save, table

_MODELS = ("rwkv", "mamba", "retnet", "hyena", "rwkv:0.1B", "mamba:130m")
_TARGETS = ("cpu-fp32", "cpu-fp16", "cpu-int8", "cpu-int4")
_TORCH = "torch eager"


def make_bundles(model: str, folder: Path, targets: Sequence[str]) -> tuple[Any, dict[str, Path]]:
    """Export ``family[:preset]`` for every target without measuring; returns (source, target -> bundle).

    Without a preset the family's zoo checkpoint is used, or its zoo size with random weights.
    """
    import xexport
    from xexport.core.registry import find_family
    from xexport.evaluate.suite import Sizes
    from xexport.models._resolve import resolve
    from xexport.zoo import checkpoint_path

    family, _, preset = model.partition(":")
    name = preset or (None if checkpoint_path(family) else _zoo_size(find_family(family).presets))
    brief = Sizes(16, 16, chunk_tokens=8, steps=2, prefill=(4,), positions=(), timed=False)
    made = {}
    for target in targets:
        out = folder / f"{model.replace(':', '-')}-{target}"
        made[target] = xexport.export(family, target=target, preset=name, out=out, sizes=brief).path
    return resolve(family, preset=name), made


def _zoo_size(presets: Mapping[str, Any]) -> str:
    return "zoo" if "zoo" in presets else "tiny"


def open_runners(source: Any, bundles: Mapping[str, Path], threads: int) -> dict[str, Any]:
    """PyTorch and a stream of every bundle."""
    import xexport
    from xexport.runtimes.torch_eager import TorchStream

    runners: dict[str, Any] = {_TORCH: TorchStream(source.eager(), head=source.head)}
    for target, path in bundles.items():
        runners[target] = xexport.load(path, verify=False).stream(threads=threads)
    return runners


def step_calls(runners: Mapping[str, Any], tokens: Any) -> dict[str, Callable[[], Any]]:
    """One token each; every runner walks its own stream and starts again at its limit."""

    def step(runner: Any) -> None:
        if runner.max_tokens is not None and runner.position >= runner.max_tokens:
            runner.reset()
        runner.feed(tokens[:, runner.position % tokens.shape[1]][:, None])

    return {name: partial(step, r) for name, r in runners.items()}


def prefill_calls(runners: Mapping[str, Any], tokens: Any, length: int) -> dict[str, Callable[[], Any]]:
    """A whole prompt on an empty state."""

    def prefill(runner: Any) -> None:
        runner.reset()
        runner.feed(tokens[:, :length], keep=1)

    return {name: partial(prefill, r) for name, r in runners.items()}


def measure(
    model: str,
    source: Any,
    bundles: Mapping[str, Path],
    threads: int,
    lengths: tuple[int, ...],
    rounds: int,
    clock: str,
) -> list[dict[str, Any]]:
    """Rows of one model at one number of threads."""
    import torch

    torch.set_num_threads(threads)
    runners = open_runners(source, bundles, threads)
    vocab = runners[_TORCH].vocab_size
    tokens = np.random.default_rng(0).integers(0, vocab, (1, max(lengths)), dtype=np.int64)
    rows = []
    for length in lengths:
        limits = [r.max_tokens for r in runners.values() if r.max_tokens is not None]
        if limits and length > min(limits):
            continue
        for runner in runners.values():
            runner.reset()
        if length == 1:
            calls = step_calls(runners, np.tile(tokens, (1, 64)))
            samples = interleaved(calls, rounds=rounds, repeat=10, warmup=5, clock=clock)
        else:
            samples = interleaved(
                prefill_calls(runners, tokens, length), rounds=max(3, rounds // 4), warmup=1, clock=clock
            )
        rows += [
            {
                "model": model,
                "parameters": source.parameters,
                "random_weights": source.random,
                "model_config": source.config,
                "threads": threads,
                "tokens": length,
                "runner": name,
                "us": microseconds(s),
                "us_per_token": microseconds(s) / length,
                "speedup": median_ratio(s, samples[_TORCH]),
                "seconds": s,
            }
            for name, s in samples.items()
        ]
    return rows


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--models", nargs="+", help="FAMILY or FAMILY:PRESET")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--targets", nargs="+")
    parser.add_argument("--lengths", nargs="+", type=int, default=[1, 128, 512])
    parser.add_argument("--rounds", type=int)
    args = parser.parse_args()
    models = args.models or (["rwkv:tiny"] if args.quick else list(_MODELS))
    lengths = (1, 8) if args.quick else tuple(args.lengths)
    threads = [1] if args.quick else args.threads
    rounds = args.rounds or (3 if args.quick else 20)
    targets = args.targets or (["cpu-int8"] if args.quick else list(_TARGETS))
    from xexport.runtimes.native import find_native

    about = header(
        "step and prefill against PyTorch eager",
        models=" ".join(models),
        targets=" ".join(targets),
        threads=threads,
        lengths=lengths,
        rounds=rounds,
        clock=args.clock,
        batch=1,
        native_kernels=find_native().available,
    )
    rows: list[dict[str, Any]] = []
    for model in models:
        with tempfile.TemporaryDirectory(prefix="xexport-bench-") as folder:
            source, bundles = make_bundles(model, Path(folder), targets)
            for count in threads:
                rows += measure(model, source, bundles, count, lengths, rounds, args.clock)
            del source
        part = [r for r in rows if r["model"] == model]
        title = f"{model}: {part[0]['parameters'] / 1e6:.1f} M parameters"
        columns = ["runner", "threads", "tokens", "us", "us_per_token", "speedup"]
        table(title, columns, [[r[c] for c in columns] for r in part])
        save(args.json, about, rows)


if __name__ == "__main__":
    main()
