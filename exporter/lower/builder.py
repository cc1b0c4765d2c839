"""Writing the nodes that take another's place."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx_ir as ir

from xexport.exporter.constants import initializer

__all__ = ["Builder", "constant_of"]

_UNIQUE = itertools.count()


class Builder:
    """New nodes in front of one node, which they replace at the end.

    Args:
        graph: a static graph.
        node: what is replaced; new names begin with its own.
    """

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self._graph, self._node = graph, node
        self._made: list[ir.Node] = []

    def op(self, kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """One more node with one result, of the type of its first input; shapes are inferred later."""
        name = f"{self._node.name}/{kind}_{next(_UNIQUE)}"
        made = ir.node(kind, list(inputs), attributes, name=name)
        result = made.outputs[0]
        result.name = name
        result.type = ir.TensorType(ir.DataType(attributes["to"])) if kind == "Cast" else inputs[0].type
        self._made.append(made)
        return result

    def scalar(self, value: float) -> ir.Value:
        """A float32 constant."""
        return self.constant(np.array(value, np.float32))

    def constant(self, array: np.ndarray[Any, Any]) -> ir.Value:
        """A constant as an initializer of the graph."""
        name = f"{self._node.name}/constant_{next(_UNIQUE)}"
        return initializer(self._graph, name, array)

    def replace(self, *results: ir.Value) -> None:
        """Put what was made in the place of the node, whose results are ``results`` now."""
        for old, result in zip(self._node.outputs, results, strict=True):
            result.type, result.shape = old.type, old.shape
        ir.convenience.replace_nodes_and_values(
            self._graph, self._node, [self._node], self._made, self._node.outputs, list(results)
        )


def constant_of(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """The array of a small constant."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()
