"""ONNX body of ``xexport::hyena_conv``: the gates around fft_conv_cached, which has a body of its own."""

from __future__ import annotations

import onnx

from xexport.core.op import DOMAIN, Append, Body, OpSpec
from xexport.ops.builder import BodyBuilder

__all__ = ["SPEC"]

_INPUTS = ("packed", "h", "skip", "cache", "pos")
_OUTPUTS = ("y", "new_cache")
_ATTRIBUTES = {"n1": "int", "n2": "int"}


def _gated(opset: int) -> onnx.FunctionProto:
    g = BodyBuilder("hyena")
    x0, x1, v = g.multi("Split", "packed", outs=3, axis=2, num_outputs=3)
    z = g.op("Mul", x1, v)
    rows = g.op("Transpose", z, perm=[0, 2, 1])
    y, _ = g.multi(
        "fft_conv_cached", rows, "h", "cache", "pos", outs=[g.fresh("y"), "new_cache"], domain=DOMAIN
    )
    for name in _ATTRIBUTES:
        handed = g.nodes[-1].attribute.add()
        handed.name, handed.ref_attr_name, handed.type = name, name, onnx.AttributeProto.INT
    convolved = g.op("Add", g.op("Transpose", y, perm=[0, 2, 1]), g.op("Mul", z, "skip"))
    g.op("Mul", x0, convolved, out="y")
    return g.function(
        "hyena_conv", _INPUTS, _OUTPUTS, opset, attributes=list(_ATTRIBUTES), imports=[(DOMAIN, 1)]
    )


SPEC = OpSpec(
    name="hyena_conv",
    inputs=_INPUTS,
    outputs=_OUTPUTS,
    attributes=_ATTRIBUTES,
    input_types={"pos": "I"},
    appends={"new_cache": Append("cache", "pos", axis=2)},
    depends=("fft_conv_cached",),
    bodies={"gated": Body(_gated, "gates and transposes around fft_conv_cached, which carries its own body")},
)
