"""JSON: the one-line summary of a bundle, and the whole report as data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xexport.core.manifest import Manifest
from xexport.core.records import ChunkLaw, Fidelity, Latency, Memory, PairedLatency, Passes, Record
from xexport.core.stats import finite_or_none as number
from xexport.report.entries import Entry, all_of, fidelity_of, last_of

__all__ = ["report_json", "summary", "warnings_of"]


def summary(manifest: Manifest, records: Sequence[Record], bundle: str | None = None) -> dict[str, Any]:
    """What ``xexport ... --json`` prints: plain data, None where nothing was measured.

    Keys: model, target, precision, bundle, input_unit (token or frame: what "tokens" in other keys counts),
    bytes{weights,state}, bits_per_byte{torch,onnx,bundle}, bits_per_byte_se, bits_lost{value,se,percent},
    kl{mean,median,p99,max}, same_top1, same_top1_se, max_error, tokens, chunk_error,
    latency{step_ms{p50,p90,p99}, decode_tokens_per_s, prefill_tokens_per_s, step_inputs, load_ms,
    first_token_ms, step_ms_at{position: median}}, speedup{torch,onnx}, peak_rss, native_kernels (None where
    they have no part), warnings[]. In the whole-sequence form also form, fixed_length, passes{length: {ms,
    per_s}}.

    Args:
        bundle: path to print; None: the name in the newest record.
    """
    fidelity = fidelity_of(records)
    latency = last_of(records, Latency)
    law = last_of(records, ChunkLaw)
    memory = last_of(records, Memory)
    return {
        "model": manifest.model.family,
        "target": manifest.target,
        "precision": manifest.precision,
        "bundle": bundle if bundle is not None else (records[-1].setup.bundle if records else ""),
        "input_unit": manifest.model.input.unit,
        "bytes": {"weights": weights_bytes(manifest), "state": state_bytes(manifest)},
        **_fidelity(records, fidelity),
        "chunk_error": number(law.error) if law else None,
        "latency": _latency(latency),
        **_whole(manifest, records),
        "speedup": _speedups(records),
        "peak_rss": memory.peak_rss if memory else None,
        "native_kernels": _kernels(manifest),
        "warnings": warnings_of(manifest, records),
    }


def report_json(entries: Sequence[tuple[Manifest, Sequence[Record]]]) -> dict[str, Any]:
    """The whole report as plain data: per bundle its summary, manifest and every record with raw samples."""
    import msgspec

    return {
        "bundles": [
            {
                "summary": summary(manifest, records),
                "manifest": msgspec.to_builtins(manifest),
                "records": [msgspec.to_builtins(r) for r in records],
            }
            for manifest, records in (Entry(*e) for e in entries)
        ],
        "comparison": _comparison(entries),
    }


def _comparison(entries: Sequence[tuple[Manifest, Sequence[Record]]]) -> dict[str, Any] | None:
    """What several bundles say together; None for one."""
    if len(entries) < 2:
        return None
    from xexport.report.compared import comparison

    return comparison(entries)


def weights_bytes(manifest: Manifest) -> int:
    """Bytes of the graph and its external data: what a device must keep."""
    return sum(f.bytes for f in manifest.graph_files)


def state_bytes(manifest: Manifest, batch: int = 1) -> int:
    """Bytes of one stream's state."""
    sizes = {"float16": 2, "float32": 4, "int64": 8, "int32": 4, "int8": 1, "bool": 1}
    total = 0
    for tensor in manifest.state:
        count = sizes.get(tensor.dtype, 4)
        for dim in tensor.shape:
            count *= dim if isinstance(dim, int) else batch
        total += count
    return total


def warnings_of(manifest: Manifest, records: Sequence[Record]) -> list[str]:
    """The manifest's warnings and the records', each once, in order."""
    found = [*manifest.warnings]
    for record in records:
        found += getattr(record, "warnings", ())
    return list(dict.fromkeys(found))


def _fidelity(records: Sequence[Record], bundle: Fidelity | None) -> dict[str, Any]:
    onnx = fidelity_of(records, "onnx")
    either = bundle or onnx
    columns: dict[str, tuple[float, float]] = {}
    if either:
        columns["torch"] = either.bits_per_byte("reference")
    if onnx:
        columns["onnx"] = onnx.bits_per_byte("candidate")
    if bundle:
        columns["bundle"] = bundle.bits_per_byte("candidate")
    names = ("torch", "onnx", "bundle")
    row: dict[str, Any] = {
        "bits_per_byte": {n: number(columns[n][0]) if n in columns else None for n in names},
        "bits_per_byte_se": {n: number(columns[n][1]) if n in columns else None for n in names},
        "bits_lost": None,
        "kl": None,
        "same_top1": None,
        "same_top1_se": None,
        "max_error": None,
        "tokens": None,
    }
    distilled = fidelity_of(records, "distilled")
    if distilled:
        row["distilled"] = {
            "bits_per_byte": {
                "exact": number(distilled.bits_per_byte("reference")[0]),
                "distilled": number(distilled.bits_per_byte("candidate")[0]),
            },
            "kl_mean": number(distilled.kl_mean),
            "same_top1": number(distilled.agreement),
            "tokens": distilled.tokens,
        }
    if bundle:
        lost, error = bundle.bits_lost
        base = columns["torch"][0]
        cost = {
            "value": number(lost),
            "se": number(error),
            "percent": number(100 * lost / base) if base else None,
        }
        row |= {
            "bits_lost": cost if bundle.scored else None,
            "kl": {
                "mean": number(bundle.kl_mean),
                "median": number(bundle.kl_percentile(50)),
                "p99": number(bundle.kl_percentile(99)),
                "max": number(bundle.kl_percentile(100)),
            },
            "same_top1": number(bundle.agreement),
            "same_top1_se": number(bundle.agreement_se),
            "max_error": number(bundle.max_error),
            "tokens": bundle.tokens,
        }
    return row


def _kernels(manifest: Manifest) -> bool | None:
    """Whether our kernels were there at export; None of a bundle in which they have no part."""
    on_cpu = (manifest.runtime, manifest.provider) == ("onnxruntime", "CPUExecutionProvider")
    takes_part = on_cpu and manifest.target_row.get("format", "onnx") == "onnx"
    found: bool | None = manifest.environment.get("native_kernels") if takes_part else None
    return found


def _latency(latency: Latency | None) -> dict[str, Any]:
    def get(value: float) -> float | None:
        return number(value)

    return {
        "step_ms": {f"p{q}": get(latency.step_ms(q)) if latency else None for q in (50, 90, 99)},
        "decode_tokens_per_s": get(latency.decode_tokens_per_s) if latency else None,
        "prefill_tokens_per_s": get(latency.prefill_tokens_per_s) if latency else None,
        "step_inputs": latency.unit if latency else None,
        "load_ms": get(latency.load_ms) if latency else None,
        "first_token_ms": get(latency.first_token_ms) if latency else None,
        "step_ms_at": {str(p.position): get(p.median_ms) for p in latency.positions} if latency else {},
    }


def _whole(manifest: Manifest, records: Sequence[Record]) -> dict[str, Any]:
    """What only a model in the whole-sequence form has."""
    model = manifest.model
    if model.contract.streams:
        return {}
    row = last_of(records, Passes)
    passes = row.passes if row else ()
    return {
        "form": model.form,
        "fixed_length": model.fixed_length,
        "passes": {
            str(p.length): {"ms": number(p.median_ms), "per_s": number(p.tokens_per_s)} for p in passes
        },
    }


def _speedups(records: Sequence[Record]) -> dict[str, Any]:
    """Who the bundle was timed against, in alternate rounds -> ratio with its 95% interval."""
    table = {}
    for pair in all_of(records, PairedLatency, "bundle"):
        ratio, low, high = pair.speedup
        table[pair.other] = {"ratio": number(ratio), "low": number(low), "high": number(high)}
    return table
