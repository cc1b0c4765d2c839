"""Export time and peak memory against model size: RWKV-7 presets with random weights, to the fp32 bundle.

For each preset a bf16 checkpoint in the published layout is written to a scratch folder (tensor by
tensor, through a shared mapping), a child process exports it, and this process samples the child's
memory every 50 ms: RssAnon is memory that must be had, RssFile is page cache of the mapped checkpoint,
of the written bundle and of libraries, which the system takes back when it needs it. The bundle is
then opened in ONNX Runtime and compared with PyTorch. Everything is deleted at the end.

    python benchmarks/export_size.py [--quick] [--presets 0.1B 0.4B 1.5B] [--whole] [--json F]

``--whole`` runs xexport.export with all its measurements instead of the exporter alone.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import header, options, save, table

_INTERVAL = 0.05
_FAMILY = "rwkv"


def make_checkpoint(family_name: str, preset: str, path: Path, seed: int = 0) -> int:
    """Write random bf16 weights of a preset as a .pth in the published layout; returns the parameters.

    torch.save lays the file out without data, then the family's own initial values are written into it
    through a shared mapping: one float32 tensor in memory at a time.
    """
    import mmap

    import torch

    from xexport.core.registry import find_family

    family = find_family(family_name)
    with torch.device("meta"):
        module = family.build(family.presets[preset]).eval().requires_grad_(False)
    empty = {k: torch.empty(v.shape, dtype=torch.bfloat16) for k, v in module.state_dict().items()}
    with torch.serialization.skip_data():
        torch.save(empty, path)
    del empty
    before = torch.serialization.get_default_mmap_options()
    torch.serialization.set_default_mmap_options(mmap.MAP_SHARED)
    try:
        shared = torch.load(path, mmap=True, weights_only=True)
    finally:
        torch.serialization.set_default_mmap_options(before)
    module.load_state_dict(shared, assign=True)
    family.init(module, seed)
    return sum(p.numel() for p in module.parameters())


class StageLog:
    """A Progress that prints when each stage began, as JSON lines with wall and processor clocks."""

    def stage(self, title: str, total: int | None = None) -> None:
        user, system = os.times()[:2]
        row = {"stage": title, "wall": time.time(), "user": user, "system": system}
        print(json.dumps(row), flush=True)

    def advance(self, steps: int = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def close(self) -> None:
        self.stage("end")


def child_export(weights: str, folder: str, whole: bool) -> None:
    """What the child process does: the exporter's stages, or the whole pipeline."""
    log = StageLog()
    log.stage("imports")
    if whole:
        import xexport

        xexport.export(_FAMILY, target="cpu-fp32", weights=weights, out=Path(folder) / "b", progress=log)
        return
    from xexport.exporter.graph import build_graph, write_graph
    from xexport.exporter.pages import release_pages
    from xexport.exporter.verify import verify
    from xexport.models._resolve import resolve

    log.stage("open the checkpoint")
    source = resolve(_FAMILY, weights=weights)
    graph = build_graph(
        source.skeleton, source.tensors, source.specs, opset=23, source=source.origin, progress=log
    )
    out = Path(folder) / "b"
    out.mkdir()
    write_graph(graph, out, {}, {}, log)
    vocab = int(source.config["vocab_size"])
    log.stage("verify")
    checks = verify(
        source.eager(lean=True),
        source.specs,
        out / "model.onnx",
        vocab_size=vocab,
        release=lambda: release_pages(Path(weights)),
    )
    log.close()
    print(json.dumps({"checks": checks.__dict__}), flush=True)


def compare(weights: str, folder: str) -> dict[str, float]:
    """Largest error over RMS of the bundle's logits in ONNX Runtime, against PyTorch, at T = 1 and T = 3."""
    import numpy as np
    import onnxruntime as ort
    import torch

    from xexport.core.state import zero_state
    from xexport.models._resolve import resolve

    source = resolve(_FAMILY, weights=weights)
    opts = ort.SessionOptions()
    opts.add_session_config_entry("session.disable_prepacking", "1")
    session = ort.InferenceSession(
        str(Path(folder) / "b" / "model.onnx"), opts, providers=["CPUExecutionProvider"]
    )
    module = source.eager(lean=True)
    rng = np.random.default_rng(1)
    state = zero_state(source.specs, 1)
    result = {}
    for length in (1, 3):
        tokens = rng.integers(0, int(source.config["vocab_size"]), (1, length), dtype=np.int64)
        feeds = dict(zip([i.name for i in session.get_inputs()], [tokens, *state], strict=True))
        got, *new = session.run(None, feeds)
        with torch.inference_mode():
            want = module(torch.from_numpy(tokens), *map(torch.from_numpy, state))[0].numpy()
        result[f"T={length}"] = float(np.abs(got - want).max() / np.sqrt(np.mean(want**2)))
        state = new
    return result


def measure(command: list[str]) -> tuple[list[dict[str, Any]], list[tuple[float, int, int]]]:
    """Run a child; returns the JSON lines it printed and (time, RssAnon, RssFile) samples in bytes."""
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    samples: list[tuple[float, int, int]] = []
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(_INTERVAL):
            memory = _rss(child.pid)
            if memory is not None:
                samples.append((time.time(), *memory))

    watcher = threading.Thread(target=sample)
    watcher.start()
    lines: list[dict[str, Any]] = []
    try:
        assert child.stdout is not None
        lines = [json.loads(line) for line in child.stdout if line.startswith("{")]
        if child.wait():
            raise SystemExit(f"the child failed with exit code {child.returncode}: {' '.join(command)}")
    finally:
        child.kill()
        stop.set()
        watcher.join()
        if child.stdout is not None:
            child.stdout.close()
    return lines, samples


def _rss(process: int) -> tuple[int, int] | None:
    try:
        text = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except OSError:
        return None
    rows = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    if "RssAnon" not in rows:
        return None
    anon, file, shared = (int(rows[k].split()[0]) * 1024 for k in ("RssAnon", "RssFile", "RssShmem"))
    return anon + shared, file


def stages(lines: list[dict[str, Any]], samples: list[tuple[float, int, int]]) -> Iterator[dict[str, Any]]:
    """One row a stage: wall, user and system seconds, peaks of anonymous and file-mapped memory."""
    marks = [line for line in lines if "stage" in line]
    for begin, end in itertools.pairwise(marks):
        inside = [s for s in samples if begin["wall"] <= s[0] <= end["wall"]]
        yield {
            "stage": begin["stage"],
            "wall_s": end["wall"] - begin["wall"],
            "user_s": end["user"] - begin["user"],
            "system_s": end["system"] - begin["system"],
            "anon_bytes": max((s[1] for s in inside), default=0),
            "file_bytes": max((s[2] for s in inside), default=0),
        }


@contextmanager
def scratch_folder(parent: Path | None) -> Iterator[Path]:
    """A folder that is gone afterwards, whatever happens."""
    with tempfile.TemporaryDirectory(prefix="xexport-bench-", dir=parent) as name:
        yield Path(name)


def run(preset: str, parent: Path | None, whole: bool) -> dict[str, Any]:
    """Make, export, compare and delete one preset."""
    this = [sys.executable, str(Path(__file__).resolve())]
    with scratch_folder(parent) as folder:
        weights = folder / f"rwkv7-{preset}.pth"
        parameters = make_checkpoint(_FAMILY, preset, weights)
        mode = "whole" if whole else "exporter"
        lines, samples = measure([*this, "--child", mode, str(weights), str(folder)])
        rows = list(stages(lines, samples))
        data = folder / "b" / "model.onnx.data"
        size, checkpoint = data.stat().st_size, weights.stat().st_size
        compared = compare(str(weights), str(folder))
    checks = next((line["checks"] for line in lines if "checks" in line), {})
    return {
        "preset": preset,
        "mode": mode,
        "parameters": parameters,
        "checkpoint_bytes": checkpoint,
        "data_bytes": size,
        "wall_s": sum(r["wall_s"] for r in rows),
        "user_s": sum(r["user_s"] for r in rows),
        "system_s": sum(r["system_s"] for r in rows),
        "peak_anon_bytes": max(s[1] for s in samples),
        "peak_rss_bytes": max(s[1] + s[2] for s in samples),
        "peak_above_bundle_bytes": max(s[1] + max(0, s[2] - size) for s in samples),
        "stages": rows,
        "checks": checks,
        "compared": compared,
    }


def show(row: dict[str, Any]) -> None:
    """One table a model size."""
    cells = [
        [r["stage"], r["wall_s"], r["user_s"], r["system_s"], r["anon_bytes"] / 1e6, r["file_bytes"] / 1e6]
        for r in row["stages"]
    ]
    cells.append(["total", row["wall_s"], row["user_s"], row["system_s"], row["peak_anon_bytes"] / 1e6, ""])
    table(
        f"RWKV-7 {row['preset']}: {row['parameters'] / 1e6:.0f} M parameters, checkpoint "
        f"{row['checkpoint_bytes'] / 1e9:.2f} GB bf16 -> bundle {row['data_bytes'] / 1e9:.2f} GB fp32",
        ["stage", "wall s", "user s", "system s", "peak anon MB", "peak file MB"],
        cells,
    )
    print(f"peak RSS above the bundle's own file: {row['peak_above_bundle_bytes'] / 1e6:.0f} MB")
    print("ONNX Runtime against PyTorch, largest error over RMS:", row["compared"])


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        mode, weights, folder = sys.argv[2:5]
        child_export(weights, folder, mode == "whole")
        return
    parser = options(__doc__)
    parser.add_argument("--presets", nargs="+", default=["0.1B", "0.4B", "1.5B"])
    parser.add_argument("--whole", action="store_true", help="xexport.export, measurements included")
    parser.add_argument("--scratch", type=Path, help="where the files go until they are deleted")
    args = parser.parse_args()
    presets = ["tiny"] if args.quick else args.presets
    about = header(
        "export time and memory against size",
        presets=" ".join(presets),
        target="fp32",
        whole_pipeline=args.whole,
        sampled_every_ms=int(_INTERVAL * 1000),
    )
    rows = []
    for preset in presets:
        rows.append(run(preset, args.scratch, args.whole))
        show(rows[-1])
        save(args.json, about, rows)


if __name__ == "__main__":
    main()
