"""An operator of the ``xexport`` domain, as data: its signature and its ONNX function bodies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from xexport.core.manifest import Ring

if TYPE_CHECKING:
    import onnx

__all__ = ["DOMAIN", "Append", "Body", "OpSpec"]

DOMAIN = "xexport"


@dataclass(frozen=True)
class Body:
    """One way to write an operator in standard ONNX.

    Attributes:
        build: opset -> FunctionProto; the proto's domain, name, inputs, outputs and attribute
            names equal the operator's.
        why: one sentence, shown in the manifest, that says when this body is the right one.
    """

    build: Callable[[int], onnx.FunctionProto]
    why: str


@dataclass(frozen=True)
class Append:
    """What an output is to an input that holds a stream so far: the same, with this call's values in it.

    A kernel may write it over the input: should the run fail later on, what the stream holds, up to its
    position, is as before. Of an input in which later tokens overwrite older ones, ``rings`` says which rows.

    Attributes:
        source: name of that input.
        position: name of the input, [1] int64, that says where the call's values begin.
        axis: of the stream.
        rings: (attributes and constant inputs by name, length of the axis) -> the rows that tokens overwrite,
            None if those don't say.
    """

    source: str
    position: str
    axis: int
    rings: Callable[[Mapping[str, Any], int], tuple[Ring, ...] | None] | None = None


@dataclass(frozen=True)
class OpSpec:
    """One operator; arity is fixed and every attribute is always written.

    Attributes:
        name: op_type in the graph, and the torch op ``torch.ops.xexport.<name>``.
        inputs, outputs: formal names, in order. Tensor inputs come first in the torch schema.
        attributes: attribute name -> "int", "float" or "string"; in the torch schema they follow the tensors.
        input_types: formal input name -> type constraint, "T" (any float) unless listed; the names are
            those of exporter/translate.py.
        bodies: variant name -> Body; the first is the default.
        domain: graph domain; ``com.microsoft`` where an ORT contrib operator does the job, in
            which case the body is the same-named local fallback.
        op_type: name in the graph where it differs from ``name``.
        depends: names of other operators that bodies call.
        appends: outputs that are an input with something written behind it.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    bodies: Mapping[str, Body]
    attributes: Mapping[str, str] = field(default_factory=dict)
    input_types: Mapping[str, str] = field(default_factory=dict)
    domain: str = DOMAIN
    op_type: str | None = None
    depends: tuple[str, ...] = ()
    appends: Mapping[str, Append] = field(default_factory=dict)

    @property
    def graph_name(self) -> str:
        return self.op_type or self.name
