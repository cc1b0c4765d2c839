"""What the command line shows to people: tables of the records that ``--json`` prints as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from xexport.report.format import step_text

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["show", "size"]

Record = Mapping[str, Any]


def show(kind: str, data: Record, console: Console) -> None:
    """Print a record; kinds without a table of their own are printed as a tree of their keys.

    Args:
        kind: the command it came from, for example ``export`` or ``doctor``.
        data: the object that ``--json`` would print.
        console: where to.
    """
    for part in _TABLES.get(kind, _tree)(data):
        if part != "":
            console.print(part, soft_wrap=isinstance(part, str))


def size(count: float) -> str:
    """Bytes for people: ``1.5 MB`` (powers of 1000, as disks and networks count)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def _measured(data: Record) -> Iterable[RenderableType]:
    """The summary of an export, a validation or a profile: accuracy, speed, sizes, warnings."""
    head = [str(data[k]) for k in ("model", "target") if k in data]
    yield _pairs(" on ".join(head) or "bundle", _accuracy(data) + _speed(data) + _sizes(data))
    title = "time by operator, one pass" if data.get("form") == "whole" else "time by operator, one step"
    yield _rows(title, (data.get("operators") or ())[:12])
    yield _rows("placement", [_placed(row) for row in data.get("placement") or ()])
    yield _rows("fallen back to another provider", [_fallen(row) for row in data.get("fallbacks") or ()])
    yield _pairs("", _leaves({k: v for k, v in data.items() if k not in _SHOWN}, ""))
    yield from _warnings(data)
    for problem in data.get("problems") or ():
        yield f"[red]problem[/] {_plain(problem)}"
    folder = data.get("bundle")
    if folder is not None:
        yield f"[bold]bundle[/] {_plain(folder)}"
        if (Path(str(folder)) / "report.html").is_file():
            yield f"[bold]report[/] {_plain(Path(str(folder)) / 'report.html')}"


def _placed(row: Record) -> Record:
    """A provider's row, its share in percent."""
    return {**row, "share": _share(row.get("share"))}


def _fallen(row: Record) -> Record:
    """Nodes that fell back, the first of them by name."""
    nodes = row["nodes"]
    return {**row, "nodes": len(nodes), "the first": nodes[0] if nodes else ""}


#: Keys that the rows below say in words; any other key is printed as it is.
_SHOWN = frozenset(
    [
        "model",
        "target",
        "precision",
        "bundle",
        "bytes",
        "bits_per_byte",
        "bits_per_byte_se",
        "bits_lost",
        "distilled",
        "kl",
        "same_top1",
        "same_top1_se",
        "max_error",
        "tokens",
        "text",
        "chunk_error",
        "latency",
        "form",
        "fixed_length",
        "input_unit",
        "passes",
        "speedup",
        "peak_rss",
        "native_kernels",
        "operators",
        "placement",
        "fallbacks",
        "bandwidth",
        "environment",
        "warnings",
        "problems",
        "ok",
        "recorded",
    ]
)


def _accuracy(data: Record) -> list[tuple[str, str]]:
    bits, errors = data.get("bits_per_byte") or {}, data.get("bits_per_byte_se") or {}
    known = bits if any(v is not None for v in bits.values()) else {}
    rows = [("bits per byte", "  ".join(f"{k} {_with_error(v, errors.get(k))}" for k, v in known.items()))]
    if data.get("distilled"):
        rows.append(("of the distilled filters", _named(data["distilled"]["bits_per_byte"], "bits per byte")))
    rows.append(("paid in accuracy", _loss(bits, data.get("bits_lost"))))
    rows.append(("KL from PyTorch", _named(data.get("kl"), "nats")))
    if data.get("same_top1") is not None:
        rows.append(("same most likely token", _share(data["same_top1"], data.get("same_top1_se"))))
    rows.append(("largest logit error", _value(data.get("max_error"))))
    rows.append(("chunks against whole", _value(data.get("chunk_error"))))
    text = (
        f"{data.get('text', '')} {_number(data['tokens'])} {_scored(data)}".strip()
        if data.get("tokens")
        else data.get("text")
    )
    return [*rows, ("measured on", _value(text))]


def _scored(data: Record) -> str:
    """What the accuracy was measured at: of frames, several may make one position."""
    return "tokens" if (data.get("input_unit") or "token") == "token" else "positions"


def _loss(bits: Record, lost: Record | None) -> str:
    """What the bundle loses against PyTorch, in percent of the bits per byte."""
    before, after = bits.get("torch"), bits.get("bundle")
    if not (_is_number(before) and _is_number(after) and before):
        return ""
    percent = 100 * (after / before - 1)
    error = (lost or {}).get("se")
    within = f" ± {100 * error / before:.3f}" if _is_number(error) else ""
    return f"{percent:+.3f}{within} % bits per byte against PyTorch"


def _speed(data: Record) -> list[tuple[str, str]]:
    latency = data.get("latency") or {}
    whole = data.get("form") == "whole"
    rows = [("form", "whole sequences only: it can't stream")] if whole else []
    unit = data.get("input_unit") or "token"
    step = step_text(unit, latency.get("step_inputs") or 1)
    timed = any(_is_number(ms) for ms in (latency.get("step_ms") or {}).values())
    rows += [(step, _named(latency["step_ms"], "ms"))] if timed and not whole else []
    if latency.get("step_ms_at") and "operators" in data:  # of a profile: an export's summary is long enough
        medians = (f"{int(place):,}: {_number(ms)}" for place, ms in latency["step_ms_at"].items())
        rows.append((f"{step} after", f"{'  '.join(medians)} ms"))
    for length, row in (data.get("passes") or {}).items():
        rows.append((f"a sequence of {length}", f"{_number(row['ms'])} ms, {row['per_s']:,.0f} a second"))
    for key, label in (("decode_tokens_per_s", "decode"), ("prefill_tokens_per_s", "prefill")):
        if _is_number(latency.get(key)):
            rows.append((label, f"{latency[key]:,.0f} {unit}s/s"))
    first = "first token" if unit == "token" else "first call"
    for key, label in (("load_ms", "loading"), ("first_token_ms", f"{first} after loading")):
        if _is_number(latency.get(key)):
            rows.append((label, f"{latency[key]:.4g} ms"))
    for other, ratio in (data.get("speedup") or {}).items():
        if isinstance(ratio, Mapping) and _is_number(ratio.get("ratio")):
            between = f"{_number(ratio.get('low'))} to {_number(ratio.get('high'))}"
            rows.append(
                (
                    f"{'pass' if whole else 'step'} speed against {other}",
                    f"{_number(ratio['ratio'])} x ({between})",
                )
            )
    bandwidth = data.get("bandwidth") or {}
    if _is_number(bandwidth.get("fraction_of_floor")):
        share = f"{100 * bandwidth['fraction_of_floor']:.0f} % of a step"
        rows.append(("reading the weights takes", f"{_number(bandwidth.get('floor_ms'))} ms, {share}"))
    if data.get("native_kernels") is not None:
        rows.append(("native kernels", _value(data["native_kernels"])))
    return rows


def _sizes(data: Record) -> list[tuple[str, str]]:
    rows = [(k, size(v)) for k, v in (data.get("bytes") or {}).items() if _is_number(v)]
    if _is_number(data.get("peak_rss")):
        rows.append(("peak memory", size(data["peak_rss"])))
    return rows


def _named(values: Record | None, unit: str = "") -> str:
    return f"{'  '.join(f'{k} {_number(v)}' for k, v in values.items())} {unit}".strip() if values else ""


def _with_error(value: Any, error: Any) -> str:
    return f"{_number(value)} ± {_number(error)}" if _is_number(error) else _number(value)


def _inspect(data: Record) -> Iterable[RenderableType]:
    model = data.get("model") or {}
    config = "  ".join(f"{k}={v}" for k, v in (model.get("config") or {}).items())
    yield _pairs(
        f"{model.get('title') or model.get('family')} for {data.get('target')}",
        [
            ("family", _value(model.get("family"))),
            ("config", config),
            ("parameters", f"{model.get('parameters', 0):,}"),
            ("vocabulary", _value(model.get("vocab_size"))),
            *_lengths(model),
            ("weights from", _value(model.get("source"))),
            ("precision", _value(data.get("precision"))),
            ("runs on", f"{data.get('runtime')}, {data.get('provider')}, opset {data.get('opset')}"),
            ("tokenizer", _value((data.get("tokenizer") or {}).get("kind", "none"))),
            *_sizes(data),
            *((f"stored as {k}", f"{v['tensors']} tensors, {size(v['bytes'])}") for k, v in _formats(data)),
            ("exported", f"{data.get('created')} by xexport {data.get('xexport_version')}"),
        ],
    )
    yield _rows("inputs and outputs", [*data.get("inputs", ()), *data.get("outputs", ())])
    yield _rows("state", data.get("state", ()), limit=24)
    yield _rows("operators", data.get("lowerings", ()))
    yield _pairs("checks at export", _leaves(data.get("checks") or {}, ""))
    figures = data.get("figures") or {}
    yield _pairs("figures at export", _accuracy(figures) + _speed(figures))
    yield from _warnings(data)


def _lengths(model: Record) -> list[tuple[str, str]]:
    """How long its input may be, and what the input is if not tokens."""
    spec = model.get("input") or {}
    rows = [("reads", f"{spec['kind']} [B, T, {spec['width']}]")] if spec.get("width") else []
    if model.get("form") == "whole":
        rows.append(("form", "whole sequences only: it can't stream"))
        if model.get("fixed_length"):
            return [*rows, ("length", f"exactly {model['fixed_length']}")]
    name = "longest" if model.get("form") == "whole" else "longest stream"
    return [*rows, (name, _value(model.get("max_tokens") or "no limit"))]


def _formats(data: Record) -> Iterable[tuple[str, Record]]:
    formats: Mapping[str, Record] = data.get("formats") or {}
    return formats.items()


def _doctor(data: Record) -> Iterable[RenderableType]:
    cpu, memory = data["cpu"], data["memory_bytes"]
    packages = {k: v or "[red]missing[/]" for k, v in data["packages"].items()}
    exporting = data["can_export"]
    yield _pairs(
        "this machine",
        [
            ("xexport", data["xexport"]),
            ("python", f"{data['python']} on {data['platform']}"),
            ("processor", f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads"),
            ("instructions", " ".join(cpu["isa"])),
            ("memory", f"{size(memory['available'])} free of {size(memory['total'])}"),
            ("disk", f"{size(data['disk_free_bytes'])} free here"),
            ("providers", ", ".join(data["providers"])),
            ("native kernels", _value(data["native_kernels"]["reason"])),
            ("exporting", "possible" if exporting["yes"] else _plain(exporting["reason"])),
            ("packages", "  ".join(f"{k} {v}" for k, v in packages.items())),
        ],
    )
    yield from _targets(data)


def _targets(data: Record) -> Iterable[RenderableType]:
    keys = ("name", "description", "precision", "runtime", "runs_here", "why_not")
    rows = [{k: row[k] for k in keys if k in row} for row in data["targets"]]
    yield _rows("targets", rows)


def _compare(data: Record) -> Iterable[RenderableType]:
    """Sizes, times along the stream, and the findings."""
    models = data["models"]
    rows = [
        {
            "model": m["label"],
            "parameters": m["parameters"],
            "weights": size(m["weights"]),
            "bits per byte": m["bits_per_byte"],
            "state": size(m["state"]["fixed"]),
            f"added a {m.get('input_unit') or 'token'}": size(m["state"]["per_token"])
            if m["state"]["per_token"]
            else "",
        }
        for m in models
    ]
    yield _rows("compared", rows)
    steps = [{f"ms at {m.get('input_unit') or 'token'}": m["label"], **m["step_ms"]} for m in models]
    streams = any(m["step_ms"] for m in models)
    yield _rows("one step", steps) if streams else ""
    rates = [{n: round(r) for n, r in m["prefill_tokens_per_s"].items()} for m in models]
    yield _rows(
        "prefill" if streams else "whole sequences",
        [
            {f"{m.get('input_unit') or 'token'}s/s of": m["label"], **r}
            for m, r in zip(models, rates, strict=True)
        ],
    )
    for text in data["findings"]:
        yield f"- {_plain(text)}"
    if not data["recorded"]:
        yield "[yellow]warning[/] a bundle can't be written: its new measurements are in the report alone"
    yield f"[bold]report[/] {_plain(data['report'])}"


def _sweep(data: Record) -> Iterable[RenderableType]:
    """The grid, what failed and why, and where the report is."""
    rows = []
    for cell in data["cells"]:
        figures = cell["figures"] or {}
        latency = figures.get("latency") or {}
        rows.append(
            {
                "cell": cell["id"],
                "status": cell["status"],
                "bits per byte": (figures.get("bits_per_byte") or {}).get("bundle"),
                "lost %": (figures.get("bits_lost") or {}).get("percent"),
                "step ms": (latency.get("step_ms") or {}).get("p50"),
                "prefill /s": latency.get("prefill_tokens_per_s"),
                "weights": size((figures.get("bytes") or {}).get("weights") or 0) if figures else "",
                "machine": cell["machine"] or "",
                "front": "*" if cell["front"] else "",
            }
        )
    yield _rows("sweep", rows)
    for cell in data["cells"]:
        if cell["error"]:
            said = [str(cell["error"][k]) for k in ("what", "got", "fix") if cell["error"].get(k)]
            colour = "red" if cell["status"] == "failed" else "yellow"
            yield f"[{colour}]{_plain(cell['status'])}[/] {_plain(cell['id'])}: {_plain('; '.join(said))}"
    yield from _warnings(data)
    yield "  ".join(f"{count} {name}" for name, count in data["counts"].items())
    if data["front"]:
        yield f"[bold]front[/] {_plain(', '.join(data['front']))}"
    yield f"[bold]store[/] {_plain(data['store'])}"
    if data["report"]:
        yield f"[bold]report[/] {_plain(data['report'])}"


def _predict(data: Record) -> Iterable[RenderableType]:
    """The likeliest tokens at every position of a text."""
    rows = [
        {
            "position": row["position"],
            "token": repr(row["text"]),
            "likeliest": "  ".join(
                f"{p['text']!r} {100 * p['probability']:.1f}%" for p in row["predictions"]
            ),
        }
        for row in data["positions"]
    ]
    yield _rows("", rows)


def _models(data: Record) -> Iterable[RenderableType]:
    yield _rows("models", [{k: row[k] for k in ("name", "title", "zoo")} for row in data["models"]])
    measured = [(row["name"], row["measured"]) for row in data["models"] if row.get("measured")]
    rows = [
        {
            "name": name,
            "state": size(row["state"]["bytes"]) if row["state"]["bytes"] else "whole only",
            "in bytes": row["state"]["formula"],
            "operators": [op.partition("::")[2] for op in row.get("operators") or ()],
            "largest error": max((row.get("oracles") or {}).values(), default=None),
            "bits per byte": row.get("zoo_bits_per_byte"),
        }
        for name, row in measured
    ]
    yield _rows("measured of their zoo presets", rows)


def _warnings(data: Record) -> Iterable[RenderableType]:
    for warning in data.get("warnings") or ():
        yield f"[bold yellow]warning[/] {_plain(warning)}"


def _tree(data: Record) -> Iterable[RenderableType]:
    """Any record: nested keys joined with dots."""
    yield _pairs("", _leaves(data, ""))


def _leaves(data: Record, prefix: str) -> Iterable[tuple[str, str]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple) and len(value) > 12:
            yield f"{prefix}{key}", f"{len(value)} rows (--json shows them)"
        else:
            yield f"{prefix}{key}", _value(value)


def _pairs(title: str, rows: Iterable[tuple[str, str]]) -> RenderableType:
    from rich.table import Table

    table = Table(title=_title(title), title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        if value not in ("", "None"):
            table.add_row(label, value)
    return table if table.row_count else ""


def _rows(title: str, records: Sequence[Record], limit: int = 200) -> RenderableType:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    keys = [k for k in dict.fromkeys(k for r in records for k in r) if any(_value(r.get(k)) for r in records)]
    table = Table(title=_title(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for key in keys:
        table.add_column(key.replace("_", " "), overflow="fold")
    for record in records[:limit]:
        table.add_row(*(_value(record.get(k)) for k in keys))
    if len(records) > limit:
        table.caption = f"and {len(records) - limit} more"
    return table if records else ""


def _title(text: str) -> str | None:
    return f"[bold not italic]{_plain(text)}" if text else None


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return ""
    if isinstance(value, int | float):
        return _number(value)
    if isinstance(value, Mapping):
        return _plain("  ".join(f"{k}={_value(v)}" for k, v in value.items()))
    if isinstance(value, list | tuple):
        return _plain(", ".join(str(v) for v in value))
    return _plain(value)


def _number(value: Any) -> str:
    if not _is_number(value):
        return "-" if value is None else _plain(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _share(value: Any, error: Any = None) -> str:
    if not _is_number(value):
        return _value(value)
    within = f" ± {100 * error:.2f}" if _is_number(error) else ""
    return f"{100 * value:.2f}{within} %"


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(value: Any) -> str:
    """Text in which rich sees no markup."""
    from rich.markup import escape

    return escape(str(value))


_TABLES: dict[str, Callable[[Record], Iterable[RenderableType]]] = {
    "export": _measured,
    "validate": _measured,
    "profile": _measured,
    "inspect": _inspect,
    "compare": _compare,
    "sweep": _sweep,
    "doctor": _doctor,
    "targets": _targets,
    "models": _models,
    "predict": _predict,
}
