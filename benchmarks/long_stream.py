"""One-token steps far along a stream against steps near its beginning, and the memory at both places.

A recurrent model's state has a constant size, so token 100 000 must cost what token 100 costs. Two
streams of one session take turns, round by round: one at token 100, one that was fed the whole way in
chunks. Both are put back to their place before every sample, so that places do not creep. Resident
memory is read on the way, in a process that holds nothing but the bundle.

    python benchmarks/long_stream.py [--quick] [--models rwkv mamba retnet] [--targets cpu-int8] [--json F]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import header, interleaved, median_ratio, microseconds, options, save, table

_MODELS = ("rwkv", "mamba", "retnet")
_NEAR = 100
_CHUNK = 512
_READINGS = 10
_MiB = 1 << 20


def far_along(path: Path, far: int, rounds: int, repeat: int, threads: int, clock: str) -> dict[str, Any]:
    """Times and memory of one bundle; runs in a process of its own.

    Args:
        path: the bundle.
        far: tokens of the long stream.
        repeat: steps a sample.
    """
    import psutil

    import xexport

    bundle = xexport.load(path, verify=False)
    young, old = bundle.stream(threads=threads), bundle.stream(threads=threads)
    if old.max_tokens is not None:
        raise SystemExit(f"{path.name} has a stream limit of {old.max_tokens} tokens: not recurrent")
    text = np.random.default_rng(0).integers(0, old.vocab_size, (1, _CHUNK), dtype=np.int64)
    young.feed(text)  # what a chunk and a step allocate once is there before the first reading
    young.reset()
    for runner in (young, old):
        for at in range(_NEAR):
            runner.feed(text[:, at : at + 1])
    process = psutil.Process()
    memory = [(old.position, process.memory_info().rss)]
    began = time.perf_counter()
    for place in np.linspace(_NEAR, far, _READINGS + 1, dtype=int)[1:]:
        while old.position < place:
            old.feed(text[:, : min(_CHUNK, int(place) - old.position)])
        memory.append((old.position, process.memory_info().rss))
    seconds = time.perf_counter() - began
    state = {n: float(np.abs(a).max()) for n, a in old.state().items() if a.dtype.kind == "f"}
    samples = _steps({"near": young, "far": old}, text, rounds, repeat, clock)
    return {
        "walk_s": seconds,
        "rss": memory,
        "state_max": max(state.values()),
        "seconds": samples,
    }


def _steps(
    runners: dict[str, Any], text: Any, rounds: int, repeat: int, clock: str
) -> dict[str, list[float]]:
    """Seconds a step at either place."""
    places = {name: runner.save() for name, runner in runners.items()}
    pieces = [np.ascontiguousarray(text[:, i : i + 1]) for i in range(repeat)]
    samples: dict[str, list[float]] = {name: [] for name in runners}

    def sample(name: str) -> None:
        runner = runners[name]
        runner.restore(places[name])
        runner.feed(pieces[0])
        runner.restore(places[name])
        now = time.perf_counter if clock == "wall" else time.thread_time
        begun = now()
        for piece in pieces:
            runner.feed(piece)
        samples[name].append((now() - begun) / repeat)

    calls = {name: lambda name=name: sample(name) for name in runners}
    interleaved(calls, rounds=rounds, warmup=0)  # for its order of turns; the times are taken inside
    return samples


def measure(model: str, target: str, args: Any) -> dict[str, Any]:
    """Export one zoo model, walk along it in a fresh process, and say what was found."""
    import xexport
    from xexport.evaluate.suite import Sizes
    from xexport.zoo import checkpoint_path

    brief = Sizes(16, 16, chunk_tokens=8, steps=2, prefill=(4,), positions=(), timed=False)
    with tempfile.TemporaryDirectory(prefix="xexport-bench-") as folder:
        out = Path(folder) / f"{model}-{target}"
        preset = None if checkpoint_path(model) and not args.quick else "tiny"
        xexport.export(model, target=target, preset=preset, out=out, sizes=brief)
        work = [out, args.far, args.rounds, args.repeat, args.threads, args.clock]
        command = [sys.executable, str(Path(__file__).resolve()), "--child", *map(str, work)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    near, far = found["seconds"]["near"], found["seconds"]["far"]
    ratios = sorted(f / n for f, n in zip(far, near, strict=True))
    rss = [size for _, size in found["rss"]]
    half = len(rss) // 2
    return {
        "model": model,
        "target": target,
        "threads": args.threads,
        "near": _NEAR,
        "far": args.far,
        "near_us": microseconds(near),
        "far_us": microseconds(far),
        "ratio": 1 / median_ratio(far, near),
        "ratio_of_medians": statistics.median(far) / statistics.median(near),
        "ratio_5_95": (ratios[len(ratios) // 20], ratios[-1 - len(ratios) // 20]),
        "rss_near": rss[0],
        "rss_far": rss[-1],
        "rss_growth": max(rss) - rss[0],
        "rss_late_growth": max(rss[half:]) - rss[half],
        **found,
    }


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        path, far, rounds, repeat, threads, clock = sys.argv[2:]
        found = far_along(Path(path), int(far), int(rounds), int(repeat), int(threads), clock)
        print(json.dumps(found))
        return
    parser = options(__doc__)
    parser.add_argument("--models", nargs="+", default=list(_MODELS))
    parser.add_argument("--targets", nargs="+", default=["cpu-fp32", "cpu-int8"])
    parser.add_argument("--far", type=int, default=100_000, help="tokens of the long stream")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--repeat", type=int, default=20, help="steps a sample")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.quick:
        args.models, args.targets, args.far, args.rounds, args.repeat = ["rwkv"], ["cpu-int8"], 2000, 5, 4
    about = header(
        "steps far along a stream against steps near its beginning",
        models=" ".join(args.models),
        targets=" ".join(args.targets),
        near=_NEAR,
        far=args.far,
        chunk=_CHUNK,
        rounds=args.rounds,
        repeat=args.repeat,
        threads=args.threads,
        clock=args.clock,
    )
    rows = []
    for model in args.models:
        for target in args.targets:
            rows.append(measure(model, target, args))
            save(args.json, about, rows)
    # allocators settle in the first chunks; what still grows in the second half of the way is a leak
    columns = [
        "model",
        "target",
        f"us at {_NEAR}",
        f"us at {args.far}",
        "ratio",
        "5-95%",
        "RSS MiB",
        "growth MiB",
        "in the 2nd half",
    ]
    lines = []
    for r in rows:
        spread = "{:.3f}-{:.3f}".format(*r["ratio_5_95"])
        sizes = [f"{r['rss_near'] / _MiB:.1f}", f"{r['rss_growth'] / _MiB:.1f}"]
        sizes.append(f"{r['rss_late_growth'] / _MiB:.1f}")
        lines.append(
            [r["model"], r["target"], r["near_us"], r["far_us"], f"{r['ratio']:.3f}", spread, *sizes]
        )
    table("near and far", columns, lines)


if __name__ == "__main__":
    main()
