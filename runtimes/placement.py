"""Which execution provider ONNX Runtime gave every node to, and why a node fell back to the CPU.

Source: ONNX Runtime's session configuration keys ``session.disable_cpu_ep_fallback`` and
``session.record_ep_graph_assignment_info`` (1.24 and newer; older ones have only the profile, in which a
provider that compiles shows each of its subgraphs as one node).

ONNX Runtime does not say why it left a node to the CPU, so the reason is derived from what can be known:
whether the provider has a kernel of that operator at all, whether it took other nodes of it, and whether the
node works on the integers of shapes, which ONNX Runtime keeps on the CPU on purpose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from xexport.core.errors import RuntimeFailure

__all__ = ["Assigned", "assignment", "broken_promise", "is_broken_promise", "record", "why_on_cpu"]

_RECORD = "session.record_ep_graph_assignment_info"
_PROMISE = "fallback to CPU EP has been explicitly disabled"
_NAMED = 6
_INTEGERS = {"int64", "int32", "bool"}


class Assigned(NamedTuple):
    """A node of the graph as it was divided among the providers."""

    name: str
    op: str
    domain: str
    provider: str


def record(options: Any) -> None:
    """Ask a session to remember which provider took which node; older versions ignore it."""
    options.add_session_config_entry(_RECORD, "1")


def assignment(session: Any) -> list[Assigned]:
    """Every node with its provider, of a session opened with :func:`record`; empty if this ORT can't say."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return []
    return [
        Assigned(node.name, node.op_type, node.domain, part.ep_name)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]


def is_broken_promise(error: Exception) -> bool:
    """Whether ORT refused a graph because a node would fall back to the CPU."""
    return _PROMISE in str(error)


def broken_promise(session: Any, wanted: str) -> RuntimeFailure:
    """The refusal with the nodes that would have fallen back.

    Args:
        session: the graph opened again, without the promise and with :func:`record`.
        wanted: the execution provider that promises.
    """
    nodes = assignment(session)
    strays = [n for n in nodes if n.provider != wanted]
    taken = Counter(n.op for n in nodes if n.provider == wanted)
    said = [f"{n.op} {n.name!r} ({why_on_cpu(n.op, n.domain, wanted, taken[n.op])})" for n in strays[:_NAMED]]
    more = f", and {len(strays) - _NAMED} more" if len(strays) > _NAMED else ""
    return RuntimeFailure(
        f"the target promises that {wanted} runs every node, and it does not",
        got=f"{len(strays)} of {len(nodes)} nodes would fall back to the CPU: {'; '.join(said)}{more}"
        if strays
        else "this ONNX Runtime does not say which nodes would fall back",
        fix="pick other bodies for these operators in the target's [bodies], or drop its full_placement",
    )


def why_on_cpu(op: str, domain: str, wanted: str, taken: int, types: Iterable[str] = ()) -> str:
    """Why a node is on the CPU although ``wanted`` was asked for, as far as it can be known.

    Args:
        op, domain: its operator.
        wanted: the execution provider of the target.
        taken: how many other nodes of that operator the provider did take.
        types: element types of its inputs, if known.
    """
    kinds = list(types)
    if domain == "xexport":
        return "our native kernel runs on the CPU alone"
    if op == "If" and not domain:
        return "its branch is chosen on the CPU; the nodes in it are placed by themselves"
    if kinds and set(kinds) <= _INTEGERS:
        return "it works on integers of shapes, which ONNX Runtime keeps on the CPU"
    of = f" of {', '.join(kinds)}" if kinds else ""
    kernels = _kernels(wanted)
    if kernels and op not in kernels:
        return f"{wanted} has no kernel of it"
    if kernels:
        return f"{wanted} has a kernel of it, but not for this node{of}"
    if taken:
        return f"{wanted} took {taken} others of it, but not this one{of}"
    return f"{wanted} takes none of it"


def _kernels(provider: str) -> frozenset[str]:
    """Operators that a provider has kernels of; empty if it compiles subgraphs, or ORT can't say."""
    from onnxruntime.capi import onnxruntime_pybind11_state as native

    every = getattr(native, "get_all_opkernel_def", None)
    found = {k.op_name for k in every() if k.provider == provider} if every else set()
    registered = getattr(native, "get_registered_ep_kernel_defs", None)
    if not found and registered:
        try:
            found = {k.op_name for k in registered(provider)}
        except Exception:  # ORT raises its own class where that provider is no registered plugin
            return frozenset()
    return frozenset(found)
