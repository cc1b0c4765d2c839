"""The table of models: family, form, state, operators, targets, oracle and its error, zoo bits per byte.

    XEXPORT_RECORD_ORACLES=oracles.json pytest -m oracle
    python benchmarks/models_table.py --folder /tmp/tables --oracles oracles.json

Families are found by looking in models/. Each one's tiny preset is exported for every target into the
folder (a bundle that is there is read; a target that refuses a family is not one of its), unless
--no-export; operators and targets are from the bundles' manifests, the state's formula from evaluating
state_spec() at several widths, depths and lengths, errors from what the oracle tests recorded, bits per
byte from zoo/results.json. Writes models/_table.json, which `xexport models` shows, and the README's
table. A family that was not measured again keeps its rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import xexport
from xexport.core.contract import Contract, contract_of
from xexport.core.errors import ExportError, RuntimeFailure, XexportError
from xexport.core.manifest import read_manifest
from xexport.core.progress import for_terminal
from xexport.core.registry import family_names, get_family
from xexport.core.state import state_shape
from xexport.core.target import target_names
from xexport.evaluate.environment import environment
from xexport.evaluate.suite import Sizes
from xexport.report.family_table import MARKS, render

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "models" / "_table.json"
_BYTES = {"float32": 4, "float16": 2, "int64": 8}
#: every model has these where a target asks for them: they say nothing of the model
_COMMON = ("xexport::linear", "xexport::linear_int8", "xexport::linear_int6x8", "xexport::linear_int4x8")
_FUSED = ("xexport::fused_rows", "xexport::linear_group")
_SIZES = Sizes(256, 256, chunk_tokens=24, steps=10, prefill=(16,), positions=(), timed=False)


def state_bytes(family: Any, config: Any) -> int:
    """Bytes of one stream's state."""
    with torch.device("meta"):
        module = family.build(config)
        specs = module.state_spec() if contract_of(module, family.form).streams else ()
    return sum(_BYTES[s.dtype] * torch.Size(state_shape(s, 1)).numel() for s in specs)


def formula(family: Any, config: Any) -> str | None:
    """Bytes as a polynomial in layers, width and length, None where the config can't be scaled so.

    Evaluated at two depths, three widths and two lengths, solved exactly, and checked at a point that
    was not used.
    """
    fields = {f.name for f in dataclasses.fields(config)}
    if not {"layers", "width"} <= fields:
        return None
    long = "max_tokens" in fields
    depth, width, length = config.layers, config.width, getattr(config, "max_tokens", 1)

    def size(a: int, b: int, c: int) -> int:
        changes = {"layers": a * depth, "width": b * width, **({"max_tokens": c * length} if long else {})}
        return state_bytes(family, dataclasses.replace(config, **changes))

    lengths = (0, 1) if long else (0,)
    powers = list(itertools.product((0, 1), (0, 1, 2), lengths))
    points = list(itertools.product((1, 2), (1, 2, 3), (1, 2) if long else (1,)))
    try:
        rows = [[float(a**i * b**j * c**k) for i, j, k in powers] for a, b, c in points]
        found = torch.linalg.solve(
            torch.tensor(rows, dtype=torch.float64),
            torch.tensor([float(size(*p)) for p in points], dtype=torch.float64),
        )
        check = (3, 4, 3 if long else 1)
        guess = sum(
            f * check[0] ** i * check[1] ** j * check[2] ** k
            for f, (i, j, k) in zip(found, powers, strict=True)
        )
        if abs(guess - size(*check)) > 0.5:
            return None
    except XexportError:
        return None
    scaled = [
        float(f) / (depth**i * width**j * length**k) for f, (i, j, k) in zip(found, powers, strict=True)
    ]
    terms = [(c, p) for c, p, f in zip(scaled, powers, found.tolist(), strict=True) if abs(f) > 0.5]
    terms.sort(key=lambda t: t[1], reverse=True)
    text = " + ".join(_term(c, *p) for c, p in terms)
    return text.replace("+ -", "- ") or "0"


def _term(factor: float, layers: int, width: int, length: int) -> str:
    names = [
        *["layers"] * layers,
        *["width" if width == 1 else "width²"] * (width > 0),
        *["length"] * length,
    ]
    whole = abs(factor - round(factor)) < 1e-6 * max(1.0, abs(factor))
    return " · ".join([f"{factor:,.0f}" if whole else f"{factor:,.4g}", *names])


def operators(folders: list[Path]) -> list[str]:
    """What the bundles need beyond standard ONNX."""
    rows = [low for folder in folders for low in read_manifest(folder).lowerings]
    names = {f"{r.domain}::{r.op}" for r in rows}
    return sorted(n for n in names if n not in _COMMON and not n.startswith(_FUSED))


def exported(family: str, folder: Path, make: bool) -> dict[str, Path]:
    """Target -> bundle of the tiny preset; made now if it is not there and may be."""
    found = {}
    for target in target_names():
        path = folder / f"{family}-tiny-{target}"
        if not path.is_dir() and make:
            try:
                xexport.export(
                    family, target=target, preset="tiny", out=path, sizes=_SIZES, progress=for_terminal()
                )
            except (ExportError, RuntimeFailure) as error:  # not a target of this family
                print(f"{family} for {target}: {error}")
        if path.is_dir():
            found[target] = path
    return found


def row(name: str, options: argparse.Namespace, before: Mapping[str, Any]) -> dict[str, Any]:
    """One family; what was not measured in this run is as it was before."""
    family = get_family(name)
    preset = "zoo" if "zoo" in family.presets else max(family.presets)
    config = family.presets[preset]
    with torch.device("meta"):
        module = family.build(config)
    bundles = exported(name, options.folder, options.export) if options.folder else {}
    made: dict[str, Any] = {
        "title": family.title,
        "form": _form(module, contract_of(module, family.form)),
        "state": {
            "note": family.state_note,
            "preset": preset,
            "bytes": state_bytes(family, config),
            "formula": formula(family, config),
            "layers": getattr(config, "layers", None),
            "width": getattr(config, "width", None),
            "length": getattr(module, "max_tokens", None),
        },
    }
    if bundles:
        made |= {"operators": operators(list(bundles.values())), "targets": sorted(bundles)}
        errors = [read_manifest(b).checks.get("chunk_error_onnx") for b in bundles.values()]
        made["chunk_error"] = max((e for e in errors if e is not None), default=None)
    rows = json.loads(options.oracles.read_text("utf-8")).get(name, []) if options.oracles else []
    if rows:
        made["oracles"] = {
            o: max(r["error"] for r in rows if r["oracle"] == o) for o in sorted({r["oracle"] for r in rows})
        }
    scores = json.loads((ROOT / "zoo" / "results.json").read_text("utf-8")).get(name)
    made["zoo_bits_per_byte"] = scores["slice"] if scores else None
    return {**before, **made}


def _form(module: Any, contract: Contract) -> str:
    if not contract.streams:
        return "whole sequence, fixed length" if contract.fixed_length else "whole sequence"
    return "stream, bounded" if getattr(module, "max_tokens", None) else "stream, constant state"


def write_readme(table: Mapping[str, Any]) -> None:
    """Put the table between its two marks."""
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    head, _, rest = text.partition(MARKS[0])
    _, _, tail = rest.partition(MARKS[1])
    path.write_text(f"{head}{MARKS[0]}\n{render(table)}\n{MARKS[1]}{tail}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, help="where the bundles are, or will be")
    parser.add_argument("--no-export", dest="export", action="store_false", help="only read what is there")
    parser.add_argument("--oracles", type=Path, help="what XEXPORT_RECORD_ORACLES wrote")
    options = parser.parse_args()
    before = json.loads(TABLE.read_text("utf-8"))["families"] if TABLE.is_file() else {}
    facts = environment()
    table = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": facts.cpu,
        "torch": facts.torch,
        "onnxruntime": facts.onnxruntime,
        "families": {name: row(name, options, before.get(name, {})) for name in family_names()},
    }
    TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    write_readme(table)
    print(render(table))


if __name__ == "__main__":
    main()
