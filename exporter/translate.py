"""Custom torch ops become single ONNX nodes of their own domain.

torch inlines every onnxscript *function* in its translation table, so each entry here returns one
bare node instead; the function body is attached after the export (functions.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import onnx
import torch
from onnxscript import opset23, values

from xexport.core.op import OpSpec
from xexport.core.registry import get_op, op_names

__all__ = ["translation_table"]

_KINDS: dict[str, tuple[type, onnx.defs.OpSchema.AttrType]] = {
    "int": (int, onnx.defs.OpSchema.AttrType.INT),
    "float": (float, onnx.defs.OpSchema.AttrType.FLOAT),
    "string": (str, onnx.defs.OpSchema.AttrType.STRING),
}
_TYPES = {
    "T": ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"],
    "I": ["tensor(int64)"],
    "U8": ["tensor(uint8)"],
    "F16": ["tensor(float16)"],
    "W": ["tensor(float)", "tensor(float16)"],
}


@cache
def translation_table() -> dict[Any, Callable[..., Any]]:
    """torch operator overload -> function that emits its bare node, for every operator folder."""
    specs = [get_op(name) for name in op_names()]
    table = {getattr(torch.ops.xexport, spec.name).default: _bare_node(spec) for spec in specs}
    aten = torch.ops.aten
    table[aten.softplus.default] = _softplus
    table[aten.item.default] = _item
    table[aten.to.dtype] = _to_dtype
    table[aten.floor_divide.default] = _floor_divide
    table[aten.index_select.default] = _index_select
    return table


def _softplus(x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    """One Softplus node instead of torch's seven: ONNX's own is stable for large inputs.

    torch returns x itself beyond the threshold; there softplus(x) - x < exp(-20), under fp32 rounding.
    """
    if beta == 1.0:
        return opset23.Softplus(x)
    return opset23.Div(opset23.Softplus(opset23.Mul(x, beta)), beta)


def _item(x: Any) -> Any:
    """A size that is data: the one element of x as a scalar."""
    return opset23.Squeeze(x)


def _to_dtype(
    x: Any, dtype: int, non_blocking: bool = False, copy: bool = False, memory_format: int = 0
) -> Any:
    """A cast. torch.onnx knows it only after a decomposition, which traces the whole model again."""
    return opset23.Cast(x, to=dtype)


def _floor_divide(x: Any, y: Any) -> Any:
    """Integers: three nodes instead of torch's ten, the same for every sign, for Mod has the divisor's."""
    if x.dtype is not None and x.dtype.is_integer():
        return opset23.Div(opset23.Sub(x, opset23.Mod(x, y)), y)
    return opset23.Floor(opset23.Div(x, y))


def _index_select(x: Any, dim: int, index: Any) -> Any:
    """One Gather: torch.onnx puts a Reshape and a Cast before it, once for every use of an index."""
    if not len(index.shape):
        index = opset23.Reshape(index, opset23.Constant(value_ints=[1]))  # type: ignore[arg-type]
    return opset23.Gather(x, index, axis=dim)


def _bare_node(spec: OpSpec) -> Callable[..., Any]:
    op = values.Op(values.Opset(spec.domain, 1), spec.graph_name, _schema(spec))
    names = list(spec.attributes)

    def emit(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        tensors = [bound[name] for name in spec.inputs]
        return op(*tensors, **{name: bound[name] for name in names})

    parameter = inspect.Parameter
    kind = parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature(
        [parameter(name, kind) for name in spec.inputs]
        + [parameter(name, kind, annotation=_KINDS[k][0]) for name, k in spec.attributes.items()]
    )
    # torch reads the signature and the type hints to tell inputs from attributes
    emit.__signature__ = signature  # type: ignore[attr-defined]
    emit.__annotations__ = {name: _KINDS[k][0] for name, k in spec.attributes.items()}
    emit.__name__ = spec.name
    return emit


def _schema(spec: OpSpec) -> onnx.defs.OpSchema:
    formal = onnx.defs.OpSchema.FormalParameter
    kinds = {name: spec.input_types.get(name, "T") for name in spec.inputs}
    return onnx.defs.OpSchema(
        spec.graph_name,
        spec.domain,
        1,
        inputs=[formal(name, kinds[name]) for name in spec.inputs],
        outputs=[formal(name, "T") for name in spec.outputs],
        type_constraints=[(t, _TYPES[t], "") for t in sorted({"T", *kinds.values()})],
        attributes=[
            onnx.defs.OpSchema.Attribute(name, _KINDS[k][1], "") for name, k in spec.attributes.items()
        ],
    )
