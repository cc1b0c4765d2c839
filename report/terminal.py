"""What the command line shows to people: tables of the records that ``--json`` prints as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    known = set(_KNOWN)
    rest = {k: v for k, v in data.items() if k not in known}
    yield from _tree(rest)
    yield from _warnings(data)
    folder = data.get("bundle")
    if folder is not None:
        yield f"[bold]bundle[/] {_plain(folder)}"
        if (Path(str(folder)) / "report.html").is_file():
            yield f"[bold]report[/] {_plain(Path(str(folder)) / 'report.html')}"


_KNOWN = (
    "model",
    "target",
    "bundle",
    "bytes",
    "bits_per_byte",
    "kl",
    "same_top1",
    "chunk_error",
    "latency",
    "native_kernels",
    "warnings",
)


def _accuracy(data: Record) -> list[tuple[str, str]]:
    rows = []
    bits = data.get("bits_per_byte") or {}
    if bits:
        rows.append(("bits per byte", "  ".join(f"{k} {_number(v)}" for k, v in bits.items())))
        rows += _loss(bits)
    kl = data.get("kl") or {}
    if kl:
        rows.append(("KL from PyTorch (nats)", "  ".join(f"{k} {_number(v)}" for k, v in kl.items())))
    if data.get("same_top1") is not None:
        rows.append(("same most likely token", _share(data["same_top1"])))
    if data.get("chunk_error") is not None:
        rows.append(("chunks against whole", f"{_number(data['chunk_error'])} (largest logit difference)"))
    return rows


def _loss(bits: Record) -> list[tuple[str, str]]:
    before, after = bits.get("torch"), bits.get("bundle")
    if not (_is_number(before) and _is_number(after) and before):
        return []
    return [("paid in accuracy", f"{100 * (after / before - 1):+.3f}% bits per byte against PyTorch")]


def _speed(data: Record) -> list[tuple[str, str]]:
    latency = data.get("latency") or {}
    rows = []
    step = latency.get("step_ms") or {}
    if step:
        rows.append(("one token (ms)", "  ".join(f"{k} {_number(v)}" for k, v in step.items())))
    for key, label in (("decode_tokens_per_s", "decode"), ("prefill_tokens_per_s", "prefill")):
        if _is_number(latency.get(key)):
            rows.append((label, f"{latency[key]:,.0f} tokens/s"))
    if _is_number(latency.get("load_ms")):
        rows.append(("loading", f"{latency['load_ms']:.0f} ms"))
    if "native_kernels" in data:
        rows.append(("native kernels", _value(data["native_kernels"])))
    return rows


def _sizes(data: Record) -> list[tuple[str, str]]:
    return [(k, size(v)) for k, v in (data.get("bytes") or {}).items() if _is_number(v)]


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
            ("longest stream", _value(model.get("max_tokens") or "no limit")),
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
    yield from _tree({k: data[k] for k in ("checks", "figures") if data.get(k)})
    yield from _warnings(data)


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


def _models(data: Record) -> Iterable[RenderableType]:
    yield _rows("models", data["models"])


def _warnings(data: Record) -> Iterable[RenderableType]:
    for warning in data.get("warnings") or ():
        yield f"[yellow]warning[/] {_plain(warning)}"


def _tree(data: Record) -> Iterable[RenderableType]:
    """Any record: nested keys joined with dots."""
    rows = list(_leaves(data, ""))
    if rows:
        yield _pairs("", rows)


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
    return table


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


def _share(value: Any) -> str:
    return f"{100 * value:.2f}%" if _is_number(value) else _value(value)


def _is_number(value: Any) -> bool:
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
    "doctor": _doctor,
    "targets": _targets,
    "models": _models,
}
