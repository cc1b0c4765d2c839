"""Grouping: row-wise steps that can be computed together, because no other node stands between them.

Level of a node: 0 without row-wise or other nodes before it. A node that is no step has the highest level
of those before it; a step has the highest of the steps before it, and one more than that of any other node
before it. On a path from a step through another node to a step the level grows, so steps of one level
never wait for each other through a node outside: replacing them by one node makes no cycle.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from xexport.core.manifest import Refusal
from xexport.exporter.passes.rows.match import Step, match
from xexport.exporter.passes.rows.values import Lead, lead_of

__all__ = ["Group", "find_groups"]

#: a single node is as fast in ONNX Runtime
_FEWEST = 2


@dataclass(frozen=True)
class Group:
    """Steps of one level over the same rows, in graph order."""

    steps: tuple[Step, ...]

    @property
    def lead(self) -> Lead:
        """The names of the rows' first two dimensions."""
        return self.steps[0].lead


def find_groups(graph: ir.Graph) -> tuple[list[Group], list[Refusal]]:
    """Every group worth fusing, and why the other row-wise nodes stay."""
    steps, refusals = _steps(graph)
    levels: dict[ir.Node, int] = {}
    members: dict[tuple[int, Lead], list[Step]] = {}
    for node in graph:
        step = steps.get(node)
        level = _level(node, step, steps, levels)
        levels[node] = level
        if step is not None:
            members.setdefault((level, step.lead), []).append(step)
    groups = []
    for found in members.values():
        kept, reason = _worth(found)
        if reason is None:
            groups.append(Group(tuple(kept)))
        else:
            refusals += [Refusal("rows", s.node.name or "", reason) for s in found if s.computes]
    return groups, refusals


def _steps(graph: ir.Graph) -> tuple[dict[ir.Node, Step], list[Refusal]]:
    steps: dict[ir.Node, Step] = {}
    refusals = []
    for node in graph:
        found = match(node)
        if isinstance(found, str):
            refusals.append(Refusal("rows", node.name or node.op_type, found))
        elif found is not None:
            steps[node] = found
    return steps, refusals


def _level(node: ir.Node, step: Step | None, steps: dict[ir.Node, Step], levels: dict[ir.Node, int]) -> int:
    level = 0
    for before in _producers(step.reads if step is not None else _reads(node)):
        joined = step is not None and before in steps and steps[before].lead == step.lead
        level = max(level, levels.get(before, 0) + (0 if joined or step is None else 1))
    return level


def _producers(values: Iterable[ir.Value | None]) -> Iterator[ir.Node]:
    for value in values:
        producer = value.producer() if value is not None else None
        if producer is not None:
            yield producer


def _reads(node: ir.Node) -> Iterator[ir.Value | None]:
    """The inputs of a node, and what the subgraphs of its attributes read from outside."""
    yield from node.inputs
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in ir.traversal.RecursiveGraphIterator(attribute.as_graph()):
                yield from inner.inputs


def _worth(steps: list[Step]) -> tuple[list[Step], str | None]:
    """The steps without views that nothing in the group computes with or from; or why there is no gain."""
    while True:
        written = {v for s in steps if s.computes for v in s.writes}
        read = {v for s in steps for v in s.reads}
        for s in steps:  # a view of what the group computes is part of it too
            if not s.computes and s.reads[0] in written:
                written |= set(s.writes)
        kept = [s for s in steps if s.computes or s.reads[0] in written or read & set(s.writes)]
        if len(kept) == len(steps):
            break
        steps = kept
    if sum(s.computes for s in steps) < _FEWEST:
        return steps, "it stands alone between other nodes, where fusing gains nothing"
    made = {v for s in steps for v in s.writes}
    if not any(lead_of(v) == s.lead and v not in made for s in steps for v in s.reads):
        return steps, "the rows it works on come from nowhere"
    return steps, None
