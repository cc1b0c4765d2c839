"""ONNX Runtime's own format: one file that its small mobile builds load, and what those builds must contain.

A mobile build of ONNX Runtime has no parser of ONNX and only the operators that its models need, for the
element types they need them for. The .ort file is the graph after ONNX Runtime's optimisation, with the
weights inside; ``required_operators_and_types.config`` is what ``build.py --include_ops_by_config`` takes.

Whether Apple's CoreML and Android's NNAPI would run the graph can't be tried here, but ONNX Runtime's tools
know which operators those providers have, and into how many pieces the others would cut the graph.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from xexport.core.errors import ExportError, first_line
from xexport.core.manifest import FileEntry, Refusal
from xexport.exporter.writer import DATA_NAME, GRAPH_NAME, file_entry

__all__ = ["CONFIG_NAME", "ORT_NAME", "OrtFormat", "convert", "usability"]

ORT_NAME = "model.ort"
CONFIG_NAME = "required_operators_and_types.config"
LIMIT = 2**31 - 2**20  # bytes: a FlatBuffer's offsets have 32 bits with a sign
_Info = Any  # onnxruntime's PartitioningInfo


@dataclass(frozen=True)
class OrtFormat:
    """What a conversion gave.

    Attributes:
        files: ``model.ort`` first.
        usability: provider -> figures, for the manifest's checks.
        refusals: a row for every node whose operator a provider lacks, and one for the whole graph.
    """

    files: tuple[FileEntry, ...]
    usability: dict[str, Any]
    refusals: tuple[Refusal, ...]


def convert(folder: Path) -> OrtFormat:
    """Write ``model.ort`` and its configuration beside ``model.onnx``, which stays.

    Raises:
        ExportError: more bytes than the format holds, or ONNX Runtime can't write it.
    """
    bytes_of_graph = sum(
        (folder / n).stat().st_size for n in (GRAPH_NAME, DATA_NAME) if (folder / n).exists()
    )
    if bytes_of_graph > LIMIT:
        raise ExportError(
            "the model is too large for the ORT format, which is one file",
            got=f"{bytes_of_graph} bytes",
            allowed=f"{LIMIT} bytes",
            fix="export for a target with smaller weights (mobile-int8), or for cpu-* or arm64-*",
        )
    _write_ort(folder / GRAPH_NAME, folder / ORT_NAME)
    _write_config(folder / ORT_NAME, folder / CONFIG_NAME)
    found, refusals = usability(folder / GRAPH_NAME)
    return OrtFormat((file_entry(folder / ORT_NAME), file_entry(folder / CONFIG_NAME)), found, refusals)


def _write_ort(graph: Path, out: Path) -> None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(out)
    options.add_session_config_entry("session.save_model_format", "ORT")
    try:
        # NCHWc is a layout of x86 processors
        ort.InferenceSession(
            str(graph),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["NchwcTransformer"],
            enable_fallback=0,
        )
    except Exception as error:  # ORT's exception classes share no public base
        raise ExportError(
            "ONNX Runtime can't write the graph in its own format",
            got=first_line(error),
            fix="export for a cpu-* or arm64-* target",
        ) from error


def _write_config(model: Path, out: Path) -> None:
    """Operators and their types; the comment that names the model's folder goes."""
    root, quiet = logging.getLogger(), logging.NullHandler()
    root.addHandler(quiet)  # or else the import sets logging up for the whole process
    from onnxruntime.tools.ort_format_model import create_config_from_models

    root.removeHandler(quiet)
    logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves the model's file open
        create_config_from_models([model], out, True)
    lines = out.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not line.startswith("#")]
    out.write_text("\n".join([f"# Generated from {model.name}", *kept]) + "\n", encoding="utf-8")


def usability(graph: Path) -> tuple[dict[str, Any], tuple[Refusal, ...]]:
    """Of CoreML and NNAPI: how much of a graph each would run, in how many pieces, and which nodes it lacks.

    Static, of the graph after ONNX Runtime's basic optimisations, from its lists of supported operators:
    nothing is run, and limits that the lists state in words are not checked. ``suits`` is ONNX Runtime's
    rule: one piece with over three quarters of the nodes is ``yes``; two with as many, or one with over
    half, ``maybe``.
    """
    from onnxruntime.tools.onnx_model_utils import optimize_model

    with tempfile.TemporaryDirectory(dir=graph.parent) as scratch:
        basic = Path(scratch) / GRAPH_NAME
        optimize_model(graph, basic, use_external_initializers=True)
        shaped = onnx.shape_inference.infer_shapes(onnx.load(basic, load_external_data=False))
    found: dict[str, Any] = {}
    refusals: list[Refusal] = []
    for provider, check in _providers().items():
        as_is, fixed = check(shaped, True), check(shaped, False)
        found[provider] = {"suits": _suits(as_is), "as it is": _row(as_is), "with fixed shapes": _row(fixed)}
        said = (
            f"{_suits(as_is)}: {_pieces(as_is)} as it is; with fixed shapes {_suits(fixed)}: {_pieces(fixed)}"
        )
        refusals.append(Refusal(provider, "the whole graph", said))
        for node in _nodes(shaped.graph):
            if _operator(node) in fixed.unsupported_ops:
                refusals.append(Refusal(provider, node.name, f"it has no {_operator(node)}"))
        if fixed.num_unsupported_nodes_due_to_rank:
            ranks = ", ".join(sorted(fixed.ops_with_unsupported_rank))
            refusals.append(Refusal(provider, ranks, "tensors of more dimensions than it takes"))
    return found, tuple(refusals)


def _providers() -> dict[str, Callable[[onnx.ModelProto, bool], _Info]]:
    from onnxruntime.tools.mobile_helpers import usability_checker as checker

    def coreml(table: str) -> Callable[[onnx.ModelProto, bool], _Info]:
        return lambda model, fixed: checker.check_coreml_partitions(model, fixed, table)

    return {
        "NNAPI": checker.check_nnapi_partitions,
        "CoreML (NeuralNetwork)": coreml("coreml_supported_neuralnetwork_ops.md"),
        "CoreML (ML Program)": coreml("coreml_supported_mlprogram_ops.md"),
    }


def _row(info: _Info) -> dict[str, int]:
    return {
        "nodes": info.num_nodes,
        "supported": info.num_supported_nodes,
        "partitions": info.num_partitions,
        "dynamic": info.nodes_unsupported_due_to_dynamic_input,
    }


def _suits(info: _Info) -> str:
    return str(info.suitability().name).lower()


def _pieces(info: _Info) -> str:
    some = f"{info.num_supported_nodes} of {info.num_nodes} nodes in {info.num_partitions} pieces"
    moving = info.nodes_unsupported_due_to_dynamic_input
    return f"{some}, {moving} nodes have inputs of no fixed shape" if moving else some


def _operator(node: onnx.NodeProto) -> str:
    return f"{node.domain or 'ai.onnx'}:{node.op_type}"


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of its branches and loops."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)
