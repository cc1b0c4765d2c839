"""Applying a scheme to a graph: one decision with its reason for every weight."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from xexport.core.manifest import TensorDecision
from xexport.core.progress import Progress, Silent
from xexport.quant.formats import Context, Format, Refusal, Stored, formats
from xexport.quant.roles import roles_of
from xexport.quant.scheme import Scheme
from xexport.quant.spool import Spool

if TYPE_CHECKING:
    import torch

__all__ = ["quantize", "unread"]

#: what follows the name of a weight in the second decision, where it is both embedding and head
AS_HEAD = " (as head)"


def quantize(
    model: ir.Model,
    scheme: Scheme,
    globs: Iterable[tuple[str, str]],
    scratch: Path,
    *,
    names: Collection[str] | None = None,
    progress: Progress | None = None,
) -> list[TensorDecision]:
    """Rewrite the model in place and return what was decided for every weight.

    Args:
        model: an optimised graph; its weights may be lazy or external.
        scheme: role -> format.
        globs: (glob over parameter names, role) rows of the family.
        scratch: an existing folder for the spool file, which must live until the model is written.
        names: the initializers that are weights; the rest are constants of the graph. All, if None.

    Raises:
        OutputError: the disk is full.
    """
    progress = progress or Silent()
    roles = {n: r for n, r in roles_of(model, globs).items() if names is None or n in names}
    context = Context(model, Spool(scratch))
    table = formats()
    decisions: list[TensorDecision] = []
    progress.stage(f"quantize ({scheme.name})", total=len(roles))
    for name, role in roles.items():
        decisions += _decide(context, name, role, scheme, table)
        progress.advance()
    return decisions


def unread(
    tensors: Mapping[str, torch.Tensor], decisions: Iterable[TensorDecision], globs: Iterable[tuple[str, str]]
) -> list[TensorDecision]:
    """A decision for every tensor of the model that the graph does not read: it is not in the bundle.

    Two names of one tensor (tied weights) are one initializer; the other name is listed here.
    """
    stored = {d.tensor.removesuffix(AS_HEAD) for d in decisions}
    places = {tensors[name].data_ptr(): name for name in stored if name in tensors}
    rows = tuple(globs)
    made = []
    for name in sorted(set(tensors) - stored):
        tensor = tensors[name]
        twin = places.get(tensor.data_ptr())
        why = f"the same tensor as {twin}" if twin else "nothing in the graph reads it"
        role = next((r for pattern, r in rows if fnmatchcase(name, pattern)), "other")
        made.append(TensorDecision(name, role, tuple(tensor.shape), "not stored", 0, why, 0.0))
    return made


def _decide(
    context: Context, name: str, role: str, scheme: Scheme, table: dict[str, Format]
) -> list[TensorDecision]:
    """One weight: usually one decision, two for an embedding that is also the head."""
    value = context.model.graph.initializers[name]
    assert value.const_value is not None
    shape = tuple(int(d) for d in value.const_value.shape.numpy())
    exact = TensorDecision(name, role, shape, _plain(value), value.const_value.nbytes, scheme.why[role], 0.0)
    wanted = scheme.formats[role]
    if wanted not in table or value.dtype != ir.DataType.FLOAT:
        return [exact]
    made = [_stored(exact, table[wanted](context, value), wanted)]
    still_read = name in context.model.graph.initializers and bool(list(value.uses()))
    head = scheme.formats["head"]
    if role == "embedding" and still_read and head in table and made[0].format != exact.format:
        tied = TensorDecision(
            f"{name}{AS_HEAD}", "head", shape, exact.format, exact.bytes, scheme.why["head"], 0.0
        )
        made.append(_stored(tied, table[head](context, value), head))
    return made


def _stored(exact: TensorDecision, result: Stored | Refusal, wanted: str) -> TensorDecision:
    if isinstance(result, Refusal) and not result.reason:
        return exact
    if isinstance(result, Refusal):
        why = f"{wanted} is not possible: {result.reason}"
        return TensorDecision(exact.tensor, exact.role, exact.shape, exact.format, exact.bytes, why, 0.0)
    why = result.reason or exact.reason
    return TensorDecision(
        exact.tensor, exact.role, exact.shape, result.format, result.bytes, why, result.error
    )


def _plain(value: ir.Value) -> str:
    return str(value.dtype.numpy()) if value.dtype is not None else "unknown"
