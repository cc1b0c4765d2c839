"""Attaching function bodies: every custom node gets its operator's body in standard ONNX.

The body makes the file portable; a runtime with a kernel of that name ignores it. Bodies are
authored at the model's own opset and attached after every other pass, so nothing inlines them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from xexport.core.errors import ExportError, unknown_name
from xexport.core.manifest import Lowering
from xexport.core.op import OpSpec
from xexport.core.registry import get_op, op_names

__all__ = ["attach_functions"]

_FUSED = "fused_rows_"
_JOINED = "linear_group_"
_SEQUENCE = "sequence_"


def attach_functions(model: ir.Model, variants: Mapping[str, str], why: Mapping[str, str]) -> list[Lowering]:
    """Give every custom node in the model its body, and say which and why.

    Args:
        variants: operator name -> body variant; operators not listed use their default body.
        why: operator name -> reason for that choice, else the body's own.

    Operators may share a name in the graph and differ in the number of inputs (com.microsoft
    LinearAttention has optional ones): a body serves one of them.

    Raises:
        UnknownNameError: a target names a variant that the operator does not have.
        ExportError: the graph uses an operator that nobody defined, or two of the same name.
    """
    specs = {_key(s): s for s in map(get_op, op_names())}
    nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
    every = list(_with_called(nodes, model))
    counts = Counter((n.domain, n.op_type, len(n.inputs)) for n in every if n.domain)
    lowerings: list[Lowering] = []
    pending = [key for key in counts if key in specs]
    names = [key[:2] for key in pending]
    for domain, op_type, _ in counts:
        has_body = (domain, op_type, "") in model.functions  # a fused chain brings its own
        if domain == "xexport" and (domain, op_type) not in names and not has_body:
            raise ExportError(f"the graph uses an unknown operator xexport::{op_type}")
        if names.count((domain, op_type)) > 1:
            raise ExportError(
                f"the graph uses {domain}::{op_type} with different numbers of inputs",
                fix="one function can't serve both: write the layers with one of them",
            )
    done: set[tuple[str, str, int]] = set()
    while pending:
        key = pending.pop()
        if key in done:
            continue
        done.add(key)
        spec = specs[key]
        lowerings.append(_attach(model, spec, variants, why, counts[key]))
        pending += [_key(get_op(d)) for d in spec.depends]
    return sorted(lowerings + _fused(model, every), key=lambda low: low.op)


def _with_called(nodes: Iterable[ir.Node], model: ir.Model) -> Iterable[ir.Node]:
    """The nodes, each joined one followed by those that it stands for: what its body calls."""
    for node in nodes:
        yield node
        if node.domain == "xexport" and node.op_type.startswith((_JOINED, _SEQUENCE)):
            yield from _with_called(model.functions[node.op_identifier()], model)


def _fused(model: ir.Model, every: Sequence[ir.Node]) -> list[Lowering]:
    """One row for all the chains of row-wise nodes (passes/rows), one for products that were joined, one for
    rows of operators that were."""
    why = "small nodes cost more to start than to compute; their bodies hold the nodes they replace"
    joined = (
        "one start of all threads serves products that need nothing of each other; their bodies call those"
    )
    rows = []
    one = (
        "a node costs the runtime time beside its kernel; their bodies call the operators, whose kernels run"
    )
    kinds = ((_FUSED, "chains", why), (_JOINED, "groups", joined), (_SEQUENCE, "sequences", one))
    for prefix, what, reason in kinds:
        names = [n for domain, n, _ in model.functions if domain == "xexport" and n.startswith(prefix)]
        nodes = sum(node.op_type in names for node in every)
        if names:
            rows.append(Lowering(f"{prefix}*", "xexport", f"{len(names)} different {what}", reason, nodes))
    return rows


def _key(spec: OpSpec) -> tuple[str, str, int]:
    """What a node must have to be this operator."""
    return spec.domain, spec.graph_name, len(spec.inputs)


def _attach(
    model: ir.Model, spec: OpSpec, variants: Mapping[str, str], why: Mapping[str, str], nodes: int
) -> Lowering:
    variant = variants.get(spec.name, next(iter(spec.bodies)))
    if variant not in spec.bodies:
        raise unknown_name(f"body of operator {spec.name}", variant, spec.bodies)
    body = spec.bodies[variant]
    function = ir.serde.deserialize_function(body.build(model.opset_imports[""]))
    model.functions[function.identifier()] = function
    for domain, version in function.opset_imports.items():
        model.opset_imports.setdefault(domain, version)
    model.opset_imports.setdefault(spec.domain, 1)
    return Lowering(
        op=spec.graph_name,
        domain=spec.domain,
        variant=variant,
        why=why.get(spec.name, body.why),
        nodes=nodes,
    )
