"""The README's table: every family for every CPU target, from the records of real exports.

    python benchmarks/zoo_table.py --folder /tmp/bundles [--json table.json]

Bundles that are already in the folder are read, missing ones are exported. Every row is derived from
the bundle's own results.jsonl; nothing is typed by hand.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import xexport
from xexport import pipeline
from xexport.core.progress import for_terminal
from xexport.evaluate.suite import Sizes

FAMILIES = ("rwkv", "mamba", "retnet", "hyena")
TARGETS = ("cpu-fp32", "cpu-fp16", "cpu-int8", "cpu-int4")
HEADER = (
    "| model | target | weights | bits per byte | lost | KL mean | same top-1 | step | prefill 512 |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def figures(folder: Path, family: str, target: str) -> dict[str, Any]:
    """The summary of one bundle, exported now if it is not there."""
    out = folder / f"{family}-{target}"
    if out.is_dir():
        return pipeline.summary(xexport.load(out))
    bundle = xexport.export(family, target=target, out=out, sizes=Sizes(), progress=for_terminal())
    return pipeline.summary(bundle)


def row(figure: dict[str, Any]) -> str:
    """One line of Markdown."""
    bits, lost = figure["bits_per_byte"]["bundle"], figure["bits_lost"]["percent"]
    latency = figure["latency"]
    cells = (
        figure["model"],
        figure["target"],
        f"{figure['bytes']['weights'] / 1e6:.2f} MB",
        f"{bits:.3f}",
        f"{lost:+.2f} %",
        f"{figure['kl']['mean']:.1e}",
        f"{100 * figure['same_top1']:.1f} %",
        f"{latency['step_ms']['p50']:.2f} ms",
        f"{latency['prefill_tokens_per_s']:,.0f} tokens/s",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the bundles are, or will be")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    rows = [figures(options.folder, family, target) for family in FAMILIES for target in TARGETS]
    print(HEADER)
    for figure in rows:
        print(row(figure))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
