"""A small builder for ONNX function bodies: nodes with unique names, constants, Scan and If subgraphs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from xexport.core.op import DOMAIN

__all__ = ["BodyBuilder", "Nodes", "function_of", "tensor"]

_UNIQUE = itertools.count()


class BodyBuilder:
    """Collects the nodes of one function body, or of one subgraph in it.

    Every value gets a name that is unique in the process, so bodies may be nested and inlined freely.
    """

    def __init__(self, prefix: str = "") -> None:
        self._prefix = f"{prefix or 'b'}{next(_UNIQUE)}_"
        self._count = itertools.count()
        self.nodes: list[onnx.NodeProto] = []

    def fresh(self, hint: str) -> str:
        """A new value name."""
        return f"{self._prefix}{hint}_{next(self._count)}"

    def op(
        self,
        op_type: str,
        *inputs: str,
        out: str | None = None,
        domain: str = "",
        same: Mapping[str, str] | None = None,
        **attributes: Any,
    ) -> str:
        """Add a node with one output and return its name (``out`` or a fresh one).

        Args:
            same: attributes, with their kinds, that have the value of the function's attribute of that name.
        """
        name = out or self.fresh(op_type.lower())
        node = helper.make_node(op_type, list(inputs), [name], domain=domain, **attributes)
        node.attribute.extend(_reference(n, n, kind) for n, kind in (same or {}).items())
        self.nodes.append(node)
        return name

    def multi(
        self, op_type: str, *inputs: str, outs: int | Sequence[str], domain: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node with several outputs and return their names."""
        hint = op_type.lower()
        names = [self.fresh(hint) for _ in range(outs)] if isinstance(outs, int) else list(outs)
        self.nodes.append(helper.make_node(op_type, list(inputs), names, domain=domain, **attributes))
        return names

    def const(self, value: Any, dtype: Any = None, out: str | None = None) -> str:
        """Add a Constant tensor."""
        array = np.asarray(value, dtype=dtype)
        name = out or self.fresh("const")
        self.nodes.append(
            helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array, name))
        )
        return name

    def ints(self, *values: int) -> str:
        """An int64 vector, as axes and shapes want it."""
        return self.const(list(values), np.int64)

    def attribute(self, name: str, kind: str) -> str:
        """The function's attribute as a scalar value: ``kind`` is ``"int"`` or ``"float"``."""
        out = self.fresh(name)
        node = helper.make_node("Constant", [], [out])
        node.attribute.append(_reference(f"value_{kind}", name, kind))
        self.nodes.append(node)
        return out

    def choose(
        self,
        condition: str,
        ranks: Sequence[int],
        then: Nodes,
        otherwise: Nodes,
        names: tuple[str, str] = ("then_branch", "else_branch"),
    ) -> list[str]:
        """Add an If between two ways to make the same float32 values, of those ranks.

        Args:
            names: of the two branches.
        """
        branches = []
        for name, nodes in zip(names, (then, otherwise), strict=True):
            inner = BodyBuilder(name[:4])
            values = zip(nodes(inner), ranks, strict=True)
            branches.append(inner.graph(name, [], [tensor(n, rank) for n, rank in values]))
        return self.multi("If", condition, outs=len(ranks), then_branch=branches[0], else_branch=branches[1])

    def by_length(
        self,
        tokens: str,
        ranks: Sequence[int],
        step: Nodes,
        other: Nodes,
        names: tuple[str, str] = ("then_branch", "else_branch"),
        *,
        axis: int = 1,
    ) -> list[str]:
        """:meth:`choose` ``step`` where ``axis`` of ``tokens`` has the length 1, else ``other``."""
        length = self.op("Shape", tokens, start=axis, end=axis + 1)
        return self.choose(self.op("Equal", length, self.ints(1)), ranks, step, other, names)

    def graph(self, name: str, inputs: Iterable[Any], outputs: Iterable[Any]) -> onnx.GraphProto:
        """The nodes as a subgraph; inputs and outputs are names (untyped) or ValueInfoProtos."""
        return helper.make_graph(self.nodes, name, [_info(i) for i in inputs], [_info(o) for o in outputs])

    def function(
        self,
        name: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        opset: int,
        *,
        attributes: Sequence[str] = (),
        domain: str = DOMAIN,
        imports: Sequence[tuple[str, int]] = (),
    ) -> onnx.FunctionProto:
        """The nodes as a FunctionProto; ``imports`` adds domains that the body calls."""
        opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, v) for d, v in imports)]
        return helper.make_function(
            domain, name, list(inputs), list(outputs), self.nodes, opsets, attributes=list(attributes)
        )


#: writes one way to compute some values into a builder, and returns their names
Nodes = Callable[[BodyBuilder], Sequence[str]]


def function_of(
    name: str, inputs: Sequence[str], outputs: Sequence[str], nodes: Nodes
) -> Callable[[int], onnx.FunctionProto]:
    """opset -> the function of that name, whose outputs are what ``nodes`` computes."""

    def build(opset: int) -> onnx.FunctionProto:
        g = BodyBuilder(name)
        for value, out in zip(nodes(g), outputs, strict=True):
            g.op("Identity", value, out=out)
        return g.function(name, inputs, outputs, opset)

    return build


def tensor(name: str, rank: int) -> onnx.ValueInfoProto:
    """A float32 value, typed and ranked as OpenVINO wants the interface of a Scan body and of a branch."""
    return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * rank)


def _reference(attribute: str, name: str, kind: str) -> onnx.AttributeProto:
    """``attribute`` of a node as the function's attribute ``name``."""
    reference = onnx.AttributeProto()
    reference.name, reference.ref_attr_name = attribute, name
    reference.type = onnx.AttributeProto.INT if kind == "int" else onnx.AttributeProto.FLOAT
    return reference


def _info(value: Any) -> onnx.ValueInfoProto:
    if isinstance(value, str):
        return helper.make_value_info(value, onnx.TypeProto())
    assert isinstance(value, onnx.ValueInfoProto)
    return value
