"""ONNX body of the gated delta rule, for runtimes without the contrib operator: a Scan over the tokens."""

from __future__ import annotations

import onnx

from xexport.core.op import Body, OpSpec
from xexport.ops.builder import BodyBuilder

__all__ = ["SPEC"]

_INPUTS = ("q", "k", "v", "state", "decay", "beta")
_OUTPUTS = ("out", "new_state")
_ATTRIBUTES = {"q_num_heads": "int", "kv_num_heads": "int", "scale": "float", "update_rule": "string"}


def _token() -> onnx.GraphProto:
    """Scan body: ``S [B,H,K,V]`` and one token's rows ``[B,H,1,*]`` and columns ``[B,H,*,1]``."""
    b = BodyBuilder("token")
    shapes: dict[str, tuple[int | str, int | str]] = {
        "state": ("K", "V"),
        "q": (1, "K"),
        "k": (1, "K"),
        "k_column": ("K", 1),
        "v": (1, "V"),
        "keep": (1, 1),
        "beta": (1, 1),
    }
    names = {n: b.fresh(n) for n in shapes}
    state = b.op("Mul", names["keep"], names["state"])
    found = b.op("MatMul", names["k"], state)
    change = b.op("Mul", b.op("Sub", names["v"], found), names["beta"])
    new = b.op("Add", state, b.op("Mul", names["k_column"], change))
    out = b.op("MatMul", names["q"], new)
    real = onnx.TensorProto.FLOAT
    infos = [
        onnx.helper.make_tensor_value_info(names[n], real, ["B", "H", *dims]) for n, dims in shapes.items()
    ]
    outs = [
        onnx.helper.make_tensor_value_info(n, real, ["B", "H", *dims])
        for n, dims in ((new, shapes["state"]), (out, shapes["v"]))
    ]
    return b.graph("token", infos, outs)


def _scan(opset: int) -> onnx.FunctionProto:
    b = BodyBuilder("delta")
    heads = b.op("Unsqueeze", b.attribute("q_num_heads", "int"), b.ints(0))
    split = b.op("Concat", b.ints(0, 0), heads, b.ints(-1), axis=0)

    def by_time(x: str, axis: int) -> str:
        """``x [B,T,H*X]`` as ``[T,B,H,X]`` with an axis of one."""
        turned = b.op("Transpose", b.op("Reshape", x, split), perm=[1, 0, 2, 3])
        return b.op("Unsqueeze", turned, b.ints(axis))

    q = b.op("Mul", by_time("q", 3), b.attribute("scale", "float"))
    keep = b.op("Exp", by_time("decay", 3))
    rows = [q, by_time("k", 3), by_time("k", 4), by_time("v", 3), keep, by_time("beta", 3)]
    _, outs = b.multi(
        "Scan", "state", *rows, outs=["new_state", b.fresh("outs")], body=_token(), num_scan_inputs=6
    )
    flat = b.op("Transpose", b.op("Squeeze", outs, b.ints(3)), perm=[1, 0, 2, 3])
    b.op("Reshape", flat, b.ints(0, 0, -1), out="out")
    return b.function(
        "LinearAttention", _INPUTS, _OUTPUTS, opset, attributes=tuple(_ATTRIBUTES), domain="com.microsoft"
    )


SPEC = OpSpec(
    name="delta_rule",
    inputs=_INPUTS,
    outputs=_OUTPUTS,
    attributes=_ATTRIBUTES,
    domain="com.microsoft",
    op_type="LinearAttention",
    bodies={
        "scan": Body(
            _scan,
            "ONNX Runtime's own LinearAttention runs where it exists (1.31 on); elsewhere a Scan, one token "
            "at a time",
        ),
    },
)
