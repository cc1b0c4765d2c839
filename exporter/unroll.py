"""Scans of a known number of steps, written out: for runtimes without loops.

The sequences are split into their steps once, and the body is copied for each. Source: ONNX operator Scan,
version 9 and later (num_scan_inputs; axes and directions 0).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import LiftSubgraphInitializersToMainGraphPass

from xexport.core.errors import ExportError
from xexport.exporter.constants import initializer

__all__ = ["unroll_scans"]

_UNIQUE = itertools.count()


def unroll_scans(model: ir.Model) -> int:
    """Replace every Scan of the main graph whose number of steps is known; returns how many.

    Raises:
        ExportError: a Scan runs backwards or along another axis than 0, which nothing here emits.
    """
    LiftSubgraphInitializersToMainGraphPass()(model)  # a copy must not bring them along
    count = 0
    for node in list(model.graph):
        if node.op_type != "Scan" or node.domain:
            continue
        steps = _steps(node)
        if steps is None:
            continue
        _unroll(model.graph, node, steps)
        count += 1
    return count


def _steps(node: ir.Node) -> int | None:
    """How often the body runs, or None if the sequences' length is not known."""
    for name in ("scan_input_axes", "scan_output_axes", "scan_input_directions", "scan_output_directions"):
        if any(node.attributes.get_ints(name, ())):
            raise ExportError(f"a Scan with {name} can't be written out", got=node.name, allowed="0")
    sequence = node.inputs[-1]
    if sequence is None or sequence.shape is None or not isinstance(sequence.shape[0], int):
        return None
    return sequence.shape[0]


def _unroll(graph: ir.Graph, node: ir.Node, steps: int) -> None:
    body = node.attributes["body"].as_graph()
    sequences = node.attributes["num_scan_inputs"].as_int()
    states = len(node.inputs) - sequences
    made: list[ir.Node] = []
    axis = _axis(graph)
    inputs = [v for v in node.inputs if v is not None]
    parts = [_split(graph, made, value, steps, axis) for value in inputs[states:]]
    carried, rows = inputs[:states], []
    for step in range(steps):
        outputs = _copy(body, [*carried, *(part[step] for part in parts)], made)
        carried = outputs[:states]
        rows.append(outputs[states:])
    results = [*carried, *(_join(made, list(column), axis) for column in zip(*rows, strict=True))]
    _rename(node.outputs, results, made)
    ir.convenience.replace_nodes_and_values(graph, node, [node], made, node.outputs, results)


def _axis(graph: ir.Graph) -> ir.Value:
    """The constant [0]."""
    return initializer(graph, f"unroll/axis_{next(_UNIQUE)}", np.zeros(1, np.int64))


def _split(
    graph: ir.Graph, made: list[ir.Node], value: ir.Value, steps: int, axis: ir.Value
) -> list[ir.Value]:
    """The steps of a sequence ``[steps, ...]``, without their first axis."""
    pieces: Sequence[ir.Value] = [value]
    if steps > 1:
        split = ir.node("Split", [value], {"axis": 0, "num_outputs": steps}, num_outputs=steps)
        pieces = _added(made, split)
    return [_added(made, ir.node("Squeeze", [piece, axis]))[0] for piece in pieces]


def _join(made: list[ir.Node], values: list[ir.Value], axis: ir.Value) -> ir.Value:
    """``[steps, ...]`` of the steps' results."""
    rows = [_added(made, ir.node("Unsqueeze", [v, axis]))[0] for v in values]
    if len(rows) == 1:
        return rows[0]
    return _added(made, ir.node("Concat", rows, {"axis": 0}))[0]


def _added(made: list[ir.Node], node: ir.Node) -> Sequence[ir.Value]:
    node.name = f"unroll/{node.op_type}_{next(_UNIQUE)}"
    for at, value in enumerate(node.outputs):
        value.name = f"{node.name}:{at}"
    made.append(node)
    return node.outputs


def _copy(body: ir.Graph, inputs: Sequence[ir.Value], made: list[ir.Node]) -> list[ir.Value]:
    """The body's nodes once more, reading ``inputs``; returns its results."""
    copy = body.clone(allow_outer_scope_values=True)
    given = dict(zip(copy.inputs, inputs, strict=True))
    nodes, outputs = list(copy), list(copy.outputs)
    copy.outputs.clear()
    for formal, actual in given.items():
        formal.replace_all_uses_with(actual)
    copy.remove(nodes)
    tag = next(_UNIQUE)
    for node in nodes:
        node.name = f"{node.name}_{tag}"
        for value in node.outputs:
            value.name = f"{value.name}_{tag}"
            value.shape = None  # of the loop's body: inferred anew
    made += nodes
    return [given.get(value, value) for value in outputs]


def _rename(outputs: Sequence[ir.Value], results: list[ir.Value], made: list[ir.Node]) -> None:
    """Results that were made here take over type and shape; what was only passed on goes through Identity."""
    own = {value for node in made for value in node.outputs}
    for at, (output, value) in enumerate(zip(outputs, results, strict=True)):
        if value not in own or value in results[:at]:
            results[at] = value = _added(made, ir.node("Identity", [value]))[0]
        value.type, value.shape = output.type, output.shape
