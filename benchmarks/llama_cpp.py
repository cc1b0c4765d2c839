"""RWKV-7 and Mamba bundles against llama.cpp on the same random weights, in alternating runs.

llama.cpp is built from the source archive of llama-cpp-python (pip, cmake and a C++ compiler are
needed), the weights of a preset become GGUF files through its own converter and quantizer, and its
float32 logits are compared with PyTorch's before anything is timed. All of this is made once and kept
in --cache. Then, round by round, llama-bench (a process of its own) and a bundle's Stream.feed take
turns on the same work: single steps from a warm state, and one prompt.

    python benchmarks/llama_cpp.py [--quick] [--shape rwkv-12x768] [--formats int8 int4] [--threads 1 2]
        [--rounds 9] [--clock cpu] [--json F]
    python benchmarks/llama_cpp.py --show A.json B.json     # joins the samples of earlier runs
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from common import header, options, save, table
from llamacpp.build import BenchmarkError, Tools, cache_folder, get_tools
from llamacpp.files import FORMATS, SHAPES, gguf_file
from llamacpp.ours import bundle, stored_bytes_per_token
from llamacpp.rounds import alternate, pooled
from llamacpp.same import likeness, llama_logits, require_same

Row = dict[str, Any]
#: What issue 3 asks for: (family, format, threads) -> decode; (family, format) -> prefill.
_DECODE = {
    ("rwkv", "int8", 2): 2.2,
    ("rwkv", "int4", 2): 2.8,
    ("rwkv", "fp32", 2): 1.1,
    ("rwkv", "int8", 1): 1.6,
    ("rwkv", "int4", 1): 1.8,
    ("rwkv", "fp32", 1): 1.0,
}
_PREFILL = {("rwkv", "int8"): 3.0, ("rwkv", "fp32"): 2.0}


def wanted(shape: str, form: str, threads: int, work: str) -> float | None:
    """The ratio to reach, or None where nothing was promised."""
    family, form = shape.split("-")[0], form.removesuffix("-pure")
    if family == "mamba":
        return 1.3 if work == "decode" else 2.0
    return _DECODE.get((family, form, threads)) if work == "decode" else _PREFILL.get((family, form))


def check(shape: str, cache: Path, tools: Tools) -> Row:
    """Compare the float32 logits with PyTorch's; keeps what the formats are compared with."""
    from xexport.models._resolve import resolve
    from xexport.runtimes.torch_eager import TorchStream

    family, preset = SHAPES[shape]
    reference = TorchStream(resolve(family, preset=preset).eager())
    exact = gguf_file(shape, "fp32", cache, tools, log)
    tokens, logits, figures = require_same(exact.path, reference, tools)
    for how, row in figures.items():
        log(
            f"{shape}: llama.cpp F32 against PyTorch, {how}: largest difference {row['max']:.1e} of the "
            f"logits' deviation, same top token in {row['top1']:.0%} of {row['tokens']}"
        )
    return {"tokens": tokens, "logits": logits, "figures": figures}


def measure(shape: str, form: str, same: Row, args: Namespace, cache: Path, tools: Tools) -> list[Row]:
    """Rows of one shape in one format."""
    file = gguf_file(shape, form, cache, tools, log)
    made = bundle(shape, FORMATS[form].target, cache, log)
    theirs = likeness(llama_logits(file.path, tools)[1], same["logits"])
    mine = likeness(made.stream(threads=1).feed(same["tokens"][None])[0].astype(np.float64), same["logits"])
    log(f"{shape} {form}: KL to PyTorch {theirs.kl:.1e} (llama.cpp), {mine.kl:.1e} (xexport)")
    about = {
        "shape": shape,
        "format": form,
        "llama_format": FORMATS[form].label,
        "target": FORMATS[form].target,
        "llama_cpp": tools.version,
        "llama_types": file.types,
        "llama_exceptions": file.exceptions,
        "llama_bytes_per_token": file.bytes_per_token,
        "ours_bytes_per_token": stored_bytes_per_token(made.manifest),
        "fp32_against_torch": same["figures"],
        "llama_likeness": asdict(theirs),
        "ours_likeness": asdict(mine),
        "prompt": args.prompt,
        "steps": args.steps,
    }
    rows = []
    for threads in args.threads:
        timed = alternate(
            file.path,
            made.stream(threads=threads),
            tools,
            threads=threads,
            prompt=args.prompt,
            steps=args.steps,
            rounds=args.rounds,
            clock=args.clock,
            log=log,
        )
        for work, samples in timed.items():
            reach = wanted(shape, form, threads, work)
            rows.append({**about, "threads": threads, "work": work, "reach": reach, **samples})
    return pooled(rows)


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """One table a shape."""
    columns = ["work", "format", "threads", "llama.cpp t/s", "xexport t/s", "ratio", "25-75%", "reach"]
    columns += ["read GB/s", "llama of it", "xexport of it", "rounds"]
    for shape in dict.fromkeys(r["shape"] for r in rows):
        lines = []
        for r in sorted((r for r in rows if r["shape"] == shape), key=lambda r: (r["work"], r["format"])):
            low, _, high = r["ratio_quartiles"]
            shares = [r.get(f"{side}_of_bandwidth", "") for side in ("llama", "ours")]
            line = [r["work"], f"{r['llama_format']} : {r['target']}", r["threads"], r["llama"], r["ours"]]
            line += [f"{r['ratio']:.2f}", f"{low:.2f}-{high:.2f}", r["reach"] or "-", r["read_gb_per_s"]]
            line += [*(f"{s:.2f}" if s != "" else "" for s in shares), r["rounds"]]
            lines.append(line)
        clocks = " and ".join(sorted({r["clock"] for r in rows if r["shape"] == shape}))
        table(f"{shape}, {clocks} time", columns, lines)
    if any(r["work"] == "prefill" and not r["last_logits_only"] for r in rows):
        log("prefill: xexport computed the logits of every token, llama.cpp those of the last one only")


def log(text: str) -> None:
    """Progress goes to stderr, so that stdout is the result."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), help="all three by default")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=["fp32", "int8", "int4"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prefill")
    parser.add_argument("--steps", type=int, default=64, help="single steps of a decode")
    parser.add_argument("--cache", type=Path, help="folder for everything large (several GB)")
    parser.add_argument("--llama-cpp", type=Path, metavar="DIR", help="build this source tree instead")
    parser.add_argument("--prepare", action="store_true", help="build, convert and check only")
    parser.add_argument("--show", nargs="+", type=Path, metavar="F", help="print the rows of these files")
    args = parser.parse_args()
    if args.show:
        show(pooled(row for file in args.show for row in json.loads(file.read_text())["rows"]))
        return
    if args.quick:
        args.shape, args.formats, args.threads = ["quick"], ["fp32", "int8"], [1]
        args.rounds, args.prompt, args.steps = 2, 16, 4
    if args.clock == "cpu" and args.threads != [1]:
        parser.error("--clock cpu is for one thread: add --threads 1")
    try:
        compare(args)
    except BenchmarkError as error:
        sys.exit(f"error: {error}")


def compare(args: Namespace) -> None:
    """Everything asked for; saves after every shape and format."""
    shapes = args.shape or [s for s in SHAPES if s != "quick"]
    cache = cache_folder(args.cache)
    tools = get_tools(cache, log, args.llama_cpp)
    from xexport.runtimes.native import find_native

    about = header(
        "RWKV-7 and Mamba against llama.cpp",
        llama_cpp=tools.version,
        shapes=" ".join(shapes),
        formats=" ".join(args.formats),
        threads=args.threads,
        prompt=args.prompt,
        steps=args.steps,
        rounds=args.rounds,
        clock=args.clock,
        batch=1,
        native_kernels=find_native().available,
    )
    rows: list[Row] = []
    for shape in shapes:
        same = check(shape, cache, tools)
        for form in args.formats:
            if args.prepare:
                gguf_file(shape, form, cache, tools, log)
                bundle(shape, FORMATS[form].target, cache, log)
                continue
            rows += measure(shape, form, same, args, cache, tools)
            save(args.json, about, rows)
        show([r for r in rows if r["shape"] == shape])


if __name__ == "__main__":
    main()
