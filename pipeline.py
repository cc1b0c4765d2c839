"""The way of the data on one page: resolve, trace, verify, quantize, write, measure, report.

Every public function here is what one command of the CLI calls; none of them prints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import msgspec

from xexport.core.errors import InputError, OutputError
from xexport.core.manifest import (
    KEEP_INPUT,
    MANIFEST_NAME,
    Activation,
    Manifest,
    ModelInfo,
    Refusal,
    TensorDecision,
    encode_manifest,
)
from xexport.core.progress import KeptOpen, Progress, Silent
from xexport.core.records import Record
from xexport.core.registry import family_aliases, family_names, family_title
from xexport.core.results import RESULTS_NAME, append_records, read_records
from xexport.core.target import Target, get_target, target_names
from xexport.runtimes.bundle import Bundle, load

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from xexport.core.contract import Contract
    from xexport.core.family import ChunkModule
    from xexport.core.runner import Runner
    from xexport.evaluate.corpus import Corpus
    from xexport.evaluate.suite import Sizes
    from xexport.exporter.graph import Written
    from xexport.exporter.output import Output
    from xexport.models._resolve import Source
    from xexport.runtimes.torch_eager import TorchStream

__all__ = [
    "compare",
    "doctor",
    "export",
    "inspect",
    "models",
    "profile",
    "report",
    "summary",
    "targets",
    "validate",
]

REPORT_NAME = "report.html"
_CALIBRATION = 4096  # tokens that ranges of activations are taken from
_LARGE = 1 << 28  # parameters: a float32 copy of more is not made where it can be avoided
_OFFSET_BYTES = 1.1  # what is written besides the weights themselves


def export(
    model: str | torch.nn.Module,
    *,
    target: str,
    out: str | Path | None = None,
    weights: str | Path | None = None,
    preset: str | None = None,
    distill: int | None = None,
    tokenizer: str | Path | None = None,
    eval_text: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
    seed: int = 0,
    name: str | None = None,
    sizes: Sizes | None = None,
    timed: bool = True,
) -> Bundle:
    """Export a model for a target: trace, verify, quantize, write, measure, report.

    Args:
        model: a family (``rwkv``), the path of a checkpoint whose family is recognised, or an nn.Module
            in the chunk form or the whole form (core/family.py ChunkModule).
        target: a target (``cpu-int8``).
        out: the bundle's folder; ``MODEL-TARGET`` in the current folder by default.
        weights: a checkpoint of that family; the zoo's trained one by default.
        preset: a size of that family with random weights, instead of ``weights``.
        distill: approximate long filters by so many modes each, for a state of constant size (Hyena); what
            that costs is measured against the exact filters.
        tokenizer: ``bytes``, ``dna``, ``none``, ``rwkv-world``, or the path of a tokenizer.json or of a World
            vocabulary; by default what lies beside the checkpoint.
        eval_text: held-out text to judge on; the built-in one by default. For a model of features a .npz
            of clips.
        force: replace an existing bundle.
        progress: told what is going on; silent by default.
        seed: for the random weights of ``preset``.
        name: what a module of your own is called in the bundle.
        sizes: how much is measured (evaluate/suite.py); from the model's size and speed by default.
        timed: False leaves speed and memory to a later :func:`profile`.

    Returns:
        The bundle, opened.

    Raises:
        XexportError: with what, got, allowed and how to mend; nothing is left half written.
    """
    from xexport.core.extras import require

    for package in ("torch", "onnx", "onnxscript", "onnx_ir"):
        require(package, extra="export", why="to export a model")
    require("plotly", extra="report", why="to write the report")
    from xexport.exporter.output import output_folder

    goal = get_target(target)
    progress = progress or Silent()
    try:
        label = name or (_label(model) if isinstance(model, str) else type(model).__name__)
        final = Path(out) if out is not None else Path(f"{label}-{target}")
        with _modes_kept(model), output_folder(final, force=force) as output:
            progress.stage("read the checkpoint")
            source = _resolve(model, weights, preset, seed, name, progress)
            if distill is not None:
                source = _distilled(source, distill, progress)
            _export_into(output, source, goal, tokenizer, eval_text, sizes, timed, progress)
            output.commit()
    finally:
        progress.close()
    return load(final, verify=False)


def _label(model: str) -> str:
    """A short name of a family, or of a checkpoint by its file or folder."""
    path = Path(model)
    return path.stem if path.is_file() else path.resolve().name if path.is_dir() else path.name


@contextmanager
def _modes_kept(model: object) -> Iterator[None]:
    """A user's own module leaves in the training or evaluation mode that each part of it came in."""
    modules = getattr(model, "modules", None)
    before = [(m, m.training) for m in modules()] if callable(modules) else []
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _resolve(
    model: str | torch.nn.Module,
    weights: str | Path | None,
    preset: str | None,
    seed: int,
    name: str | None,
    progress: Progress,
) -> Source:
    from xexport.models._resolve import from_module, resolve

    if isinstance(model, str):
        source = resolve(model, weights=weights, preset=preset, seed=seed)
        if source.recognised:
            progress.stage(f"this is {source.family}: {source.recognised}")
        return source
    if weights is not None or preset is not None:
        raise InputError("a module brings its own weights", fix="leave out weights and preset")
    return from_module(model, name)


def _distilled(source: Source, order: int, progress: Progress) -> Source:
    from xexport.models._resolve import distilled

    return distilled(source, order, progress)


def _export_into(
    output: Output,
    source: Source,
    target: Target,
    tokenizer: str | Path | None,
    eval_text: str | Path | None,
    sizes: Sizes | None,
    timed: bool,
    progress: Progress,
) -> None:
    """Make the whole bundle in ``output.bundle``."""
    from xexport.evaluate.corpus import read_corpus
    from xexport.evaluate.recorded import REFERENCE_NAME, write_reference
    from xexport.evaluate.suite import sizes_for
    from xexport.exporter.graph import build_graph, write_graph
    from xexport.exporter.output import require_space
    from xexport.exporter.pages import release_pages
    from xexport.exporter.passes import keep
    from xexport.exporter.verify import verify
    from xexport.exporter.writer import file_entry
    from xexport.runtimes.opening import CPU, simulated
    from xexport.runtimes.shipped import find_tokenizer
    from xexport.runtimes.torch_eager import TorchStream

    static = target.graph_form == "static"
    exact = target.precision == "fp32" and not static  # the graph that is verified is the bundle's
    known: int | None = getattr(source.skeleton, "vocab_size", None)
    shipped = find_tokenizer(tokenizer, checkpoint=source.path, kind=source.tokenizer, vocab=known)
    # a bad text is refused before the work
    contract = source.contract
    corpus = read_corpus(shipped.load(), known, eval_text, inputs=contract.inputs) if known else None
    require_space(output.final.parent, int(4 * source.parameters * (1 if exact else 2) * _OFFSET_BYTES))
    graph = build_graph(
        source.skeleton,
        source.tensors,
        source.specs,
        opset=target.opset,
        source=source.origin,
        contract=contract,
        progress=progress,
    )
    fp32 = output.bundle if exact else output.scratch
    # what comes after a prompt is of use only to who can go on from it; a graph of fixed shape can't choose
    refusals = keep.rewrite(graph) if contract.generates and not static else []
    decisions: list[TensorDecision] = []
    if exact:
        decisions, _ = _lower(graph, source, target, output.scratch, refusals, progress, None)
    inline = exact and target.inline
    title = "write weights" if exact else "write exact weights to compare with"
    written = write_graph(graph, fp32, target.bodies, target.why, progress, inline=inline, title=title)

    progress.stage("verify against PyTorch")
    module = source.eager(lean=True)
    vocab = _vocab_size(graph)
    checks = verify(
        module,
        source.specs,
        fp32 / "model.onnx",
        vocab_size=vocab,
        contract=contract,
        release=lambda: release_pages(source.path) if source.path else None,
    )
    can_time = _has_room(source)
    info = _info(source, vocab)
    facts: dict[str, Any] = {
        "tokenizer": {"kind": "none"},  # of the exact graph, which nobody keeps
        "checks": msgspec.to_builtins(checks.row()),
        "environment": _environment(),
        "warnings": [*_warnings(source, timed=can_time), *([shipped.why] if shipped.why else [])],
    }
    exact_manifest = _describe(graph, written, info, get_target("cpu-fp32"), source, (), facts)
    if not exact:
        _write_manifest(output.scratch, exact_manifest)

    corpus = corpus or read_corpus(shipped.load(), vocab, eval_text, inputs=contract.inputs)
    if not exact:
        # the second half: the first is what accuracy is measured on
        text = corpus.tokens[len(corpus.tokens) // 2 :][:_CALIBRATION]
        decisions, facts["activations"] = _lower(
            graph, source, target, output.scratch, refusals, progress, text
        )
        written = _write(graph, output.bundle, target, contract, progress)
    # large weights stay in the checkpoint's file until PyTorch is timed, where that would be unfair
    reference = module if source.parameters > _LARGE else source.eager()
    head = source.head if any(v.name == KEEP_INPUT for v in graph.graph.inputs) else None
    torch_stream = TorchStream(cast("ChunkModule", reference), head=head, contract=contract)
    write_reference(output.bundle / REFERENCE_NAME, torch_stream, corpus.tokens)
    facts["refusals"] = refusals
    facts["tokenizer"] = dict(shipped.row)
    extra = [output.bundle / REFERENCE_NAME, *shipped.copy_to(output.bundle)]
    facts["extra_files"] = [file_entry(path) for path in extra]
    _look_up_placement(output.bundle, target, facts)
    manifest = _describe(graph, written, info, target, source, decisions, facts)
    _write_manifest(output.bundle, manifest)
    del graph

    bundle = Bundle(output.bundle, manifest)
    if target.format == "ort":
        bundle = _converted(bundle, target, progress)
    absent = _runtime_absent(target)
    if absent:
        bundle = _unrun(bundle, target, absent)
    elif target.context:
        bundle = _compiled(bundle, target, progress)
    if not absent and not target.on_cpu:
        bundle = _agreed(bundle, target, progress)
    manifest = bundle.manifest
    fp32_bundle = bundle if exact else Bundle(output.scratch, exact_manifest)
    runtime = CPU if absent else None
    if sizes is None:
        sizes = sizes_for(source.parameters, torch_stream, bundle.stream(runtime=runtime))
    timed = timed and sizes.timed and not absent and not simulated(target.provider, target.environment)
    _measure(
        bundle,
        runtime,
        fp32_bundle,
        torch_stream,
        source if can_time else None,
        source.exact,
        corpus,
        output.final.name,
        replace(sizes, timed=timed),
        progress,
    )
    _finish(output.bundle, manifest, progress)


def _look_up_placement(bundle: Path, target: Target, facts: dict[str, Any]) -> None:
    """What the provider's table of kernels says of the graph, where there is such a table."""
    from xexport.exporter.static_placement import placement_of, tables
    from xexport.exporter.writer import GRAPH_NAME

    if target.provider in tables():
        found = placement_of(bundle / GRAPH_NAME, target.provider)
        said = found.warning(target.provider)
        facts["checks"] = {**facts["checks"], "placement": found.row()}
        facts["warnings"] = [*facts["warnings"], *([said] if said else [])]


def _write(graph: ir.Model, folder: Path, target: Target, contract: Contract, progress: Progress) -> Written:
    """The bundle's graph, or its graphs of fixed shape."""
    from xexport.exporter.graph import write_graph, write_static

    if target.graph_form == "static":
        return write_static(graph, folder, target, contract, progress)
    return write_graph(graph, folder, target.bodies, target.why, progress, inline=target.inline)


def _runtime_absent(target: Target) -> str | None:
    """Why the target's runtime can't run here, or None."""
    from xexport.runtimes.opening import why_not

    return None if target.on_cpu else why_not(target.runtime, target.provider, target.environment)


def _unrun(bundle: Bundle, target: Target, why: str) -> Bundle:
    """The bundle with a warning that its own runtime has not run it."""
    said = (
        f"not run by {target.where}: {why}. Accuracy is that of ONNX Runtime on the CPU with the same graph; "
        f"where {target.where} is installed, `xexport validate` and `xexport profile` run it"
    )
    return _described(bundle, warnings=(*bundle.manifest.warnings, said))


def _compiled(bundle: Bundle, target: Target, progress: Progress) -> Bundle:
    """The bundle with what its provider compiled of every graph."""
    from xexport.exporter.writer import file_entry
    from xexport.runtimes.onnxruntime import compile_contexts

    progress.stage(f"compile for {target.where}")
    contexts = compile_contexts(bundle.path, bundle.manifest)
    files = [file_entry(bundle.path / name) for name in contexts.values()]
    return _described(bundle, contexts=contexts, files=(*bundle.manifest.files, *files))


def _agreed(bundle: Bundle, target: Target, progress: Progress) -> Bundle:
    """The bundle, which its own runtime computes as ONNX Runtime does on the CPU."""
    from xexport.evaluate.agree import require_agreement
    from xexport.runtimes.opening import simulated

    progress.stage(f"run it with {target.where}")
    found = bundle.manifest
    checks = {**found.checks, target.where: require_agreement(bundle, target)}
    reason = simulated(target.provider, target.environment)
    said = (f"times say nothing about the device: {reason}",) if reason else ()
    return _described(bundle, checks=checks, warnings=(*found.warnings, *said))


def _converted(bundle: Bundle, target: Target, progress: Progress) -> Bundle:
    """The bundle with its graph in ORT format, which computes what the ONNX graph did."""
    from xexport.evaluate.agree import require_agreement
    from xexport.exporter.ort_format import convert
    from xexport.exporter.writer import DATA_NAME, GRAPH_NAME

    progress.stage("convert to ORT format")
    made, found, old = convert(bundle.path), bundle.manifest, (GRAPH_NAME, DATA_NAME)
    files = (*made.files, *(entry for entry in found.files if entry.path not in old))
    converted = _described(bundle, graph=made.files[0].path, files=files)
    agreement = require_agreement(converted, target, before=bundle)
    for name in old:
        (bundle.path / name).unlink(missing_ok=True)
    checks = {**found.checks, target.where: agreement, "usability": made.usability}
    return _described(converted, checks=checks, refusals=(*found.refusals, *made.refusals))


def _described(bundle: Bundle, **changes: Any) -> Bundle:
    """The bundle with other entries in its manifest, not opened yet."""
    manifest = msgspec.structs.replace(bundle.manifest, **changes)
    _write_manifest(bundle.path, manifest)
    return replace(bundle, manifest=manifest)


def _lower(
    graph: ir.Model,
    source: Source,
    target: Target,
    scratch: Path,
    refusals: list[Refusal],
    progress: Progress,
    text: Any,
) -> tuple[list[TensorDecision], list[Activation]]:
    """Decide and store every weight, then fuse: roles are guessed from standard nodes, so fusion is last.

    A scheme with fixed activations is calibrated on ``text`` by the exact graph, which lies in ``scratch``.
    """
    from xexport.exporter.passes import fuse
    from xexport.quant import qdq
    from xexport.quant.apply import quantize, unread
    from xexport.quant.scheme import get_scheme

    scheme, names = get_scheme(target.precision), set(source.tensors)
    decisions = quantize(graph, scheme, source.roles, scratch, names=names, progress=progress)
    decisions += unread(source.tensors, decisions, source.roles)
    activations: list[Activation] = []
    if scheme.activations is not None:
        from xexport.quant.calibrate import calibrate

        values = qdq.places(graph)
        tapped = [str(v.name) for v in values]
        seen = calibrate(scratch / "model.onnx", tapped, text, source.specs, source.contract, progress)
        activations = qdq.insert(graph, values, seen, scheme.activations)
    refusals += fuse(graph, target.fuse)
    return decisions, activations


def _measure(
    bundle: Bundle,
    runtime: str | None,
    fp32: Bundle,
    torch_stream: TorchStream,
    to_time: Source | None,
    exact: Source | None,
    corpus: Corpus,
    name: str,
    sizes: Sizes,
    progress: Progress,
) -> None:
    """Accuracy of ONNX and of the bundle against PyTorch, then speed, into results.jsonl.

    ``runtime`` runs the bundle (None: its own). ``to_time`` is the source if PyTorch is to be timed too,
    ``exact`` what it was distilled from, if it was.
    """
    from xexport.evaluate import suite
    from xexport.runtimes.opening import CPU
    from xexport.runtimes.torch_eager import TorchStream

    setup = suite.setup_for(bundle.manifest, name, corpus)
    candidates = {"onnx": fp32.stream(runtime=CPU), "bundle": bundle.stream(runtime=runtime)}
    rows: list[Record] = suite.accuracy(torch_stream, candidates, corpus, setup, sizes, progress)
    if exact is not None:
        before = cast("ChunkModule", exact.eager(lean=exact.parameters > _LARGE))
        whole, beside = TorchStream(before, contract=exact.contract), {"distilled": torch_stream}
        rows += suite.accuracy(whole, beside, corpus, setup, sizes, progress, reference_name="exact")
    if torch_stream.contract.streams:
        rows.append(suite.law(bundle.stream(runtime=runtime), corpus, setup, sizes, progress))
    if sizes.timed:
        others: dict[str, Runner] = {}
        if to_time is not None:
            large = to_time.parameters > _LARGE
            head = to_time.head if torch_stream.keeps else None
            module = cast("ChunkModule", to_time.eager()) if large else None
            others["torch"] = (
                TorchStream(module, head=head, contract=to_time.contract) if module else torch_stream
            )
        if fp32 is not bundle:
            others["onnx"] = fp32.stream()
        rows += suite.speed(bundle, others, corpus, setup, sizes, progress)
    append_records(bundle.path / RESULTS_NAME, rows)


def _finish(folder: Path, manifest: Manifest, progress: Progress) -> None:
    """Figures into the manifest, and the report beside it."""
    from xexport.report.html import write_html

    progress.stage("report")
    records = read_records(folder / RESULTS_NAME)
    manifest = _with_figures(manifest, records)
    _write_manifest(folder, manifest)
    write_html(folder / REPORT_NAME, [(manifest, records)])


def _with_figures(manifest: Manifest, records: Sequence[Record]) -> Manifest:
    from xexport.report.jsonout import summary as summarise

    figures = summarise(manifest, records)
    return msgspec.structs.replace(manifest, figures=figures)


def _describe(
    graph: ir.Model,
    written: Any,
    info: ModelInfo,
    target: Target,
    source: Source,
    decisions: Sequence[Any],
    facts: Mapping[str, Any],
) -> Manifest:
    from xexport.exporter.describe import describe

    return describe(graph, written, info, target, source.specs, decisions=decisions, **facts)


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST_NAME).write_bytes(encode_manifest(manifest))


def _vocab_size(graph: ir.Model) -> int:
    shape = graph.graph.outputs[0].shape
    assert shape is not None
    return int(shape.numpy()[-1]) if shape.is_static() else int(str(shape[-1]))


def _info(source: Source, vocab: int) -> ModelInfo:
    return ModelInfo(
        family=source.family,
        title=source.title,
        config=source.config,
        parameters=source.parameters,
        vocab_size=vocab,
        max_tokens=source.contract.max_tokens,
        source=source.origin,
        notes=source.notes,
        form=source.contract.form,
        fixed_length=source.contract.fixed_length,
        input=source.contract.inputs,
        predicts_next=source.contract.predicts_next,
    )


def _warnings(source: Source, *, timed: bool) -> list[str]:
    found = []
    if source.random:
        found.append("the weights are random: accuracy figures show what quantization changes, nothing else")
    if not timed:
        found.append("PyTorch was not timed: its float32 weights do not fit in the memory that was free")
    return found


def _has_room(source: Source) -> bool:
    """Whether PyTorch's float32 weights, and ONNX Runtime's, fit in memory for timing."""
    import psutil

    return bool(psutil.virtual_memory().available > 3 * 4 * source.parameters)


def _environment() -> dict[str, Any]:
    from xexport.evaluate.environment import environment
    from xexport.runtimes.native import find_native

    native = find_native()
    facts: dict[str, Any] = msgspec.to_builtins(environment())
    return {**facts, "native_kernels": native.available, "native_reason": native.reason}


def summary(bundle: Bundle) -> dict[str, Any]:
    """The figures of a bundle as one plain object: what ``--json`` prints."""
    from xexport.report.jsonout import summary as summarise

    records = read_records(bundle.path / RESULTS_NAME)
    return summarise(bundle.manifest, records, str(bundle.path))


def validate(
    bundle_path: str | Path,
    *,
    eval_text: str | Path | None = None,
    runtime: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Check a bundle where it is now, without PyTorch.

    The files are hashed, the chunk law is checked, the logits are compared with those that PyTorch
    gave at export (they travel with the bundle), and a text is scored. Adds to results.jsonl if the
    folder can be written. ``runtime`` (runtimes/opening.py) runs it instead of the bundle's own.

    Raises:
        BundleError: the bundle is incomplete or was changed.
        RuntimeFailure: it can't run here.
    """
    from xexport.evaluate.validate import validate_bundle

    progress = progress or Silent()
    try:
        progress.stage("hash the files")
        bundle = load(bundle_path)
        result, rows = validate_bundle(bundle, eval_text, progress, runtime)
    finally:
        progress.close()
    return {**result, "recorded": _record(bundle, rows)}


def profile(
    bundle_path: str | Path,
    *,
    threads: int | None = None,
    steps: int | None = None,
    prefill: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    runtime: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time a bundle on this machine: steps, prefill, load, memory, operators, placement, bandwidth.

    Args:
        threads: 0 takes every core.
        steps: how many single tokens are timed.
        prefill: lengths of prompts.
        positions: where in the stream steps are timed again, the way there fed in chunks.
        runtime: what runs it instead of the bundle's own (runtimes/opening.py); its rows are kept apart.
        progress: told what is going on.

    Raises:
        BundleError, RuntimeFailure: it can't be opened or run.
        InputError: numbers that are too small, or a position that its stream does not reach.
        FormError: positions of a model in the whole-sequence form.
    """
    from xexport.evaluate import suite
    from xexport.evaluate.corpus import read_corpus
    from xexport.report.profile import profile_summary

    progress = progress or Silent()
    try:
        bundle = load(bundle_path, verify=False)
        sizes = suite.sizes_for(bundle.manifest.model.parameters)
        model = bundle.manifest.model
        sizes = suite.sizes_asked(sizes, model.contract, steps=steps, prefill=prefill, positions=positions)
        corpus = read_corpus(bundle.tokenizer(), model.vocab_size, count=1 << 13, inputs=model.input)
        setup = suite.setup_for(bundle.manifest, bundle.path.name, corpus, threads, runtime)
        rows = suite.speed(bundle, {}, corpus, setup, sizes, progress, threads=threads or 0, runtime=runtime)
    finally:
        progress.close()
    figures = profile_summary(bundle.manifest, [_as_own(row) for row in rows], str(bundle.path))
    reason = "" if runtime else _simulated(bundle)
    said = [f"times say nothing about the device: {reason}"] if reason else []
    figures["warnings"] = [*figures["warnings"], *said]
    shown: dict[str, Any] = msgspec.to_builtins(figures)
    return {**shown, "runtime": runtime or bundle.manifest.runtime, "recorded": _record(bundle, rows)}


def _as_own(row: Record) -> Record:
    """A row of another runtime as if it were the bundle's own: a summary knows that runner only."""
    return msgspec.structs.replace(row, setup=msgspec.structs.replace(row.setup, runner="bundle"))


def _simulated(bundle: Bundle) -> str:
    """Why the bundle's own runtime gives times that say nothing about the device; "" if they do."""
    from xexport.runtimes.opening import environment_of, simulated

    return simulated(bundle.manifest.provider, environment_of(bundle.manifest))


def _record(bundle: Bundle, rows: Sequence[Record]) -> bool:
    """Keep new measurements in the bundle; a read-only device keeps none, which is no failure."""
    try:
        append_records(bundle.path / RESULTS_NAME, rows)
    except (OSError, OutputError):
        return False
    return True


def report(bundle_paths: Sequence[str | Path], out: str | Path, *, progress: Progress | None = None) -> Path:
    """One report over several bundles; the suffix of ``out`` picks HTML, Markdown or JSON.

    Raises:
        InputError: another suffix, or no bundle.
        BundleError: a bundle can't be read.
        OutputError: the file can't be written.
    """
    from xexport.report.entries import read_entry
    from xexport.report.write import write_report

    progress = progress or Silent()
    progress.stage("report")
    try:
        return write_report(Path(out), [read_entry(Path(p)) for p in bundle_paths])
    finally:
        progress.close()


def compare(
    names: Sequence[str | Path],
    *,
    target: str = "cpu-fp32",
    preset: str | None = None,
    parameters: int | None = None,
    out: str | Path = ".",
    report_path: str | Path | None = None,
    positions: Sequence[int] | None = None,
    prefill: Sequence[int] | None = None,
    rounds: int = 12,
    threads: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure several bundles in turns and write one report about them.

    Args:
        names: bundles (folders), or families, which are exported first: the trained checkpoint that
            ships with xexport, or a preset with random weights.
        target: what families are exported for.
        preset: a size that every named family has; else the zoo's checkpoint.
        parameters: instead of ``preset``, each family's preset nearest to that many parameters.
        out: the folder of new bundles and of the report. A bundle that is there and is of the same
            family, target and weights is taken as it is.
        report_path: the report, ``OUT/compare.html`` by default; the suffix picks the form.
        positions: where in the stream steps are timed; as far as the bounded models go by default.
        prefill: lengths of prefills; 128 and 512 by default.
        rounds: rounds at each position; every bundle makes four steps in each.
        threads: 0 takes every core.
        force: export again what is there.

    Returns:
        What ``--json`` prints: report/compared.py, with ``report`` and ``bundles``.

    Raises:
        InputError, UnknownNameError: a name that is neither a bundle nor a family, fewer than two of
            them, an unknown suffix, no preset of about that size, or a position that none can reach.
        XexportError: an export failed; what was exported before stays.
    """
    from xexport.evaluate.rivals import measure_bundles
    from xexport.report.compared import comparison
    from xexport.report.entries import read_entry
    from xexport.report.write import check_suffix, write_report

    progress = progress or Silent()
    written = Path(report_path) if report_path is not None else Path(out) / "compare.html"
    check_suffix(written)
    try:
        plans = _plans(names, target, preset, parameters, Path(out))
        bundles = [_made(plan, force, progress) for plan in plans]
        rows = measure_bundles(
            bundles, positions=positions, prefill=prefill, rounds=rounds, threads=threads, progress=progress
        )
        written_rows = [_record(bundle, [row]) for bundle, row in zip(bundles, rows, strict=True)]
        kept = all(written_rows)
        progress.stage("report")
        entries = [read_entry(bundle.path) for bundle in bundles]
        for index, done in enumerate(written_rows):
            if not done:  # a read-only bundle: the report has its new row all the same
                entries[index] = entries[index]._replace(records=[*entries[index].records, rows[index]])
        written.parent.mkdir(parents=True, exist_ok=True)
        write_report(written, entries)
    except OSError as error:
        raise OutputError("the report can't be written", got=f"{written}: {error.strerror}") from error
    finally:
        progress.close()
    return {
        **comparison(entries),
        "report": str(written),
        "bundles": [str(b.path) for b in bundles],
        "recorded": kept,
    }


class _Plan(NamedTuple):
    """A bundle of a comparison: where it is or will be, and what to export if it is not there."""

    path: Path
    family: str | None
    target: str
    preset: str | None


def _plans(
    names: Sequence[str | Path], target: str, preset: str | None, parameters: int | None, out: Path
) -> list[_Plan]:
    """What to measure, all of it checked before the first export begins."""
    if len(names) < 2:
        raise InputError(
            "a comparison needs at least two bundles or families",
            got=", ".join(map(str, names)) or "none",
            fix="name another; `xexport models` lists the families",
        )
    if preset is not None and parameters is not None:
        raise InputError("--preset and --parameters exclude each other")
    get_target(target)
    plans = [_plan(str(name), target, preset, parameters, out) for name in names]
    paths = [p.path.resolve() for p in plans]
    twice = next((p for p in paths if paths.count(p) > 1), None)
    if twice is not None:
        raise InputError("a bundle is named twice", got=twice)
    return plans


def _plan(name: str, target: str, preset: str | None, parameters: int | None, out: Path) -> _Plan:
    if (Path(name) / MANIFEST_NAME).is_file():
        return _Plan(Path(name), None, target, None)
    aliases = family_aliases()
    if name not in family_names() and name not in aliases:
        raise InputError(
            f"{name!r} is neither a bundle nor a model",
            got=f"{name}: a folder without {MANIFEST_NAME}" if Path(name).is_dir() else name,
            allowed=f"folders that xexport wrote, or {', '.join(family_names())}",
            fix="`xexport models` lists the models",
        )
    family = aliases.get(name, name)
    if parameters is not None:
        from xexport.models._sizes import nearest_preset

        preset = nearest_preset(family, parameters)
    elif preset is None:
        _require_zoo(family)
    middle = f"-{preset}" if preset else ""
    return _Plan(out / f"{family}{middle}-{target}", family, target, preset)


def _require_zoo(family: str) -> None:
    from xexport.zoo import checkpoint_path, shipped

    if checkpoint_path(family) is None:
        raise InputError(
            f"xexport ships no trained checkpoint of {family}",
            allowed=f"trained ones: {', '.join(shipped())}",
            fix="compare random weights of one size with --preset zoo (speed and state are the same, "
            "accuracy says nothing), or export your checkpoint and name its folder",
        )


def _made(plan: _Plan, force: bool, progress: Progress) -> Bundle:
    """The bundle of a plan, exported now unless it is there already."""
    if plan.family is None:
        return load(plan.path, verify=False)
    if (plan.path / MANIFEST_NAME).is_file() and not force:
        bundle = load(plan.path, verify=False)
        found = bundle.manifest
        wanted = f"preset {plan.preset}" if plan.preset else f"{plan.family}.safetensors"
        source = found.model.source.split(",", 1)[0]
        if (found.model.family, found.target, source) == (plan.family, plan.target, wanted):
            return bundle
        raise OutputError(
            f"{plan.path} is another bundle",
            got=f"{found.model.family} for {found.target}, from {found.model.source}",
            allowed=f"{plan.family} for {plan.target}, from {wanted}",
            fix="name another folder with --out, or replace it with --force",
        )
    plan.path.parent.mkdir(parents=True, exist_ok=True)
    progress.stage(f"export {plan.family}")
    return export(
        plan.family,
        target=plan.target,
        out=plan.path,
        preset=plan.preset,
        force=force,
        progress=KeptOpen(progress),
    )


def inspect(bundle_path: str | Path) -> dict[str, Any]:
    """What is known about a bundle without running it."""
    return load(bundle_path, verify=False).inspect()


def doctor() -> dict[str, Any]:
    """What this machine and installation can do."""
    from xexport.runtimes.doctor import facts

    return facts()


def models() -> list[dict[str, Any]]:
    """The families: name, title, whether a trained checkpoint is shipped, and what was measured of them.

    The measured part (form, state, operators, targets, oracles, bits per byte) is what
    benchmarks/models_table.py collected; a family that it has not seen has none. Imports no torch.
    """
    from importlib.resources import files

    from xexport.zoo import checkpoint_path

    table = files("xexport.models") / "_table.json"
    known = msgspec.json.decode(table.read_bytes())["families"] if table.is_file() else {}
    return [
        {
            "name": name,
            "title": family_title(name),
            "zoo": checkpoint_path(name) is not None,
            "measured": known.get(name),
        }
        for name in family_names()
    ]


def targets() -> list[dict[str, Any]]:
    """The targets as rows."""
    return [get_target(n).row() for n in target_names()]
