"""One storage format a file: ``apply(context, value) -> Stored`` rewrites the graph around one weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from xexport.exporter.constants import initializer
from xexport.quant.spool import Spool

__all__ = ["Context", "Format", "Refusal", "Stored", "formats"]


@dataclass(frozen=True)
class Context:
    """What a format needs: the model it rewrites and the scratch file for its tensors."""

    model: ir.Model
    spool: Spool

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """Register a new initializer; a tied weight has two of one name, and the second is the head's."""
        if name in self.model.graph.initializers:
            name = f"head.{name}"
        return initializer(self.model.graph, name, tensor)


@dataclass(frozen=True)
class Stored:
    """How a weight ended up: the exact format with its parameters, its bytes and its error.

    ``reason`` is given where it is not the scheme's own.
    """

    format: str
    bytes: int
    error: float
    reason: str | None = None


@dataclass(frozen=True)
class Refusal:
    """Why a format can't be used for a weight, or "" if it need not be; it then stays in fp32."""

    reason: str


Format = Callable[[Context, ir.Value], Stored | Refusal]


def formats() -> dict[str, Format]:
    """Format name -> the function that applies it."""
    from xexport.quant.formats import block, channel, dequantize, half, half_product, low_rank, rows, six

    return {
        "float16": half.apply,
        "float16-product": half_product.apply,
        "int8-qdq": dequantize.apply_qdq,
        "int8-rows": rows.apply,
        "int8-block": block.apply_int8,
        "int8-channel": channel.apply,
        "int8-dequantize": dequantize.apply,
        "int8-or-float16": low_rank.apply,
        "int8-or-float32": low_rank.apply_small_float32,
        "int6-block": six.apply,
        "int4-block": block.apply_int4,
    }
