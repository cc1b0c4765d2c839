"""Which nodes a provider has kernels for, read from a table: for providers that this machine can't run.

The table is of one provider (kernels_cuda.toml). What ONNX Runtime does besides (it keeps arithmetic on
shapes on the CPU on purpose) shows only where the provider runs (runtimes/placement.py).
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import onnx

__all__ = ["Placement", "placement_of", "tables"]

_FILES = {"CUDAExecutionProvider": "kernels_cuda.toml"}
#: the input whose type the table is about, where it is not the first
_DATA_INPUT = {"Where": 1}


class Placement(NamedTuple):
    """What a table says of a graph.

    Attributes:
        nodes: nodes in all, those of branches and loop bodies too, without those that ONNX Runtime folds.
        left: (operator, element type) -> how many nodes the provider has no kernel for.
    """

    nodes: int
    left: dict[tuple[str, str], int]

    def row(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "how": "read from the provider's table of kernels, not run",
            "nodes": self.nodes,
            "without_kernel": [
                {"op": op, "type": kind, "nodes": count} for (op, kind), count in self.left.items()
            ],
        }

    def warning(self, provider: str) -> str | None:
        """One sentence, if some nodes stay behind."""
        if not self.left:
            return None
        named = ", ".join(f"{op} of {kind} ({count})" for (op, kind), count in self.left.items())
        count = f"{sum(self.left.values())} of {self.nodes} nodes"
        return f"{count} have no kernel in {provider} and run on the CPU: {named}"


def tables() -> tuple[str, ...]:
    """Providers that have a table."""
    return tuple(_FILES)


def placement_of(graph: Path, provider: str) -> Placement:
    """Look up every node of a graph.

    Args:
        graph: an ONNX file without local functions; its weights are not read.
        provider: one of :func:`tables`.
    """
    kernels = _kernels(_FILES[provider])
    model = onnx.shape_inference.infer_shapes(onnx.load(graph, load_external_data=False))
    left: Counter[tuple[str, str]] = Counter()
    nodes = 0
    for node, types in _walk(model.graph, {}):
        nodes += 1
        name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        index = _DATA_INPUT.get(name, 0)
        kind = types.get(node.input[index], "") if len(node.input) > index else ""
        allowed = kernels.get(name)
        if allowed is None or (kind and kind not in allowed):
            left[name, kind or "any type"] += 1
    return Placement(nodes, dict(left.most_common()))


@cache
def _kernels(name: str) -> Mapping[str, frozenset[str]]:
    table = tomllib.loads((files("xexport.exporter") / name).read_text(encoding="utf-8"))
    groups = table["types"]
    return {
        op: frozenset(groups[kinds] if isinstance(kinds, str) else kinds)
        for op, kinds in table["ops"].items()
    }


def _walk(
    graph: onnx.GraphProto, outer: Mapping[str, str]
) -> Iterator[tuple[onnx.NodeProto, Mapping[str, str]]]:
    """Every node that is computed at a run, with the element types of the names it can see."""
    types = dict(outer)
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.HasField("tensor_type") and value.type.tensor_type.elem_type:
            types[value.name] = _type_name(value.type.tensor_type.elem_type)
    types |= {tensor.name: _type_name(tensor.data_type) for tensor in graph.initializer}
    fed = {value.name for value in graph.input}
    constant = {tensor.name for tensor in graph.initializer} - fed
    for node in graph.node:
        if constant.issuperset(node.input):
            constant.update(node.output)  # computed once, when the session opens
            continue
        yield node, types
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _walk(attribute.g, types)


def _type_name(kind: int) -> str:
    """``float32`` and so on, as numpy says it."""
    name = str(onnx.TensorProto.DataType.Name(kind)).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)
