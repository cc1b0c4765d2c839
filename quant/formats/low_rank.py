"""8 bits for the matrices that steer a recurrence: low-rank projections, gates, decays, where that is faster.

They are a fifth of what a layer of RWKV-7 reads at every step once its large projections have 4 bits.
Products have activations of 16 bits where our kernels run (ops/linear_int8), and their result meets a
bias and a tanh, a sigmoid or a softplus before it touches the state: on the zoo's RWKV-7 and Mamba they
cost a mean KL of 4e-6 and 1e-6, where the large projections in 8 bits cost 5e-5 and 3e-5
(docs/performance.md). A parameter that is read as it is, like a decay's base or A_log, multiplies
itself at every token: it is no product's matrix and keeps its float32.
"""

from __future__ import annotations

import onnx_ir as ir

from xexport.quant.formats import Context, Refusal, Stored, half
from xexport.quant.formats.block import blocks_of, products_of

__all__ = ["ENOUGH", "apply", "apply_small_float32"]

#: elements from which a product reads 8 bits faster than 16 out of memory (24 KB in 8 bits)
ENOUGH = 3 << 13

_DEPTH = 32  # the kernel's smallest block


def apply(context: Context, value: ir.Value) -> Stored | Refusal:
    """8 bits, or float16 where the matrix is too small to gain."""
    return _eight(context, value) or half.apply(context, value)


def apply_small_float32(context: Context, value: ir.Value) -> Stored | Refusal:
    """8 bits, or float32 where it is no product's matrix, or too small to gain."""
    return _eight(context, value) or Refusal("")


def _eight(context: Context, value: ir.Value) -> Stored | None:
    products, matrix = products_of(value)
    if matrix is None or matrix.size < ENOUGH or matrix.shape[1] % _DEPTH:
        return None
    return blocks_of(context, value, products, matrix, 8)
