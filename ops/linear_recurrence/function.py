"""ONNX body of ``xexport::linear_recurrence``: one node of com.microsoft LinearAttention.

That operator is ONNX Runtime's own from 1.31 on and a local function elsewhere (ops/linear_attention). It is
not emitted alone, as no library can put a faster kernel in the place of one that ONNX Runtime has.
"""

from __future__ import annotations

import onnx
from onnx import helper

from xexport.core.op import Body, OpSpec
from xexport.ops.builder import BodyBuilder

__all__ = ["SPEC"]

_INPUTS = ("q", "k", "v", "state", "decay")
_OUTPUTS = ("out", "new_state")
_ATTRIBUTES = {"heads": "int", "scale": "float"}


def _reference(name: str, source: str, kind: onnx.AttributeProto.AttributeType) -> onnx.AttributeProto:
    """The node's attribute ``name`` is the function's attribute ``source``."""
    attribute = onnx.AttributeProto()
    attribute.name, attribute.ref_attr_name, attribute.type = name, source, kind
    return attribute


def _contrib(opset: int) -> onnx.FunctionProto:
    node = helper.make_node("LinearAttention", _INPUTS, _OUTPUTS, domain="com.microsoft", update_rule="gated")
    kinds = {"q_num_heads": "heads", "kv_num_heads": "heads"}
    node.attribute.extend(_reference(n, s, onnx.AttributeProto.INT) for n, s in kinds.items())
    node.attribute.append(_reference("scale", "scale", onnx.AttributeProto.FLOAT))
    b = BodyBuilder("linrec")
    b.nodes.append(node)
    return b.function(
        "linear_recurrence",
        _INPUTS,
        _OUTPUTS,
        opset,
        attributes=tuple(_ATTRIBUTES),
        imports=[("com.microsoft", 1)],
    )


SPEC = OpSpec(
    name="linear_recurrence",
    inputs=_INPUTS,
    outputs=_OUTPUTS,
    attributes=_ATTRIBUTES,
    depends=("linear_attention",),
    bodies={
        "contrib": Body(
            _contrib,
            "one LinearAttention: ONNX Runtime's own from 1.31 on, a local function elsewhere",
        ),
    },
)
