"""From a group of steps to a program: operands become places, results get registers or outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from math import prod

import onnx_ir as ir

from xexport.exporter.passes.rows.groups import Group
from xexport.exporter.passes.rows.match import Step
from xexport.exporter.passes.rows.values import operand_of, spread, trailing_of
from xexport.ops.fused_rows.program import Instruction, Kind, OpCode, Place, Port, Program, Shift, Tail

__all__ = ["Compiled", "compile_group"]

_MOST_PORTS = 128
_ALIGN = 16  # floats: a cache line


@dataclass(frozen=True)
class Compiled:
    """A program with the graph's values for its inputs and outputs, in order."""

    program: Program
    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]


@dataclass(frozen=True)
class _Source:
    """Where numbers come from: result number ``index`` of the group, an input, or a literal."""

    kind: Kind  # REGISTER stands for any result
    index: int
    width: int
    offset: int = 0


@dataclass
class _Draft:
    """An instruction whose operands have no places yet."""

    op: OpCode
    dst: int
    a: _Source
    b: _Source | None = None
    c: _Source | None = None
    outer: int = 1
    inner: int = 1
    a_single: bool = False
    a_step: int = 0
    b_single: bool = False
    b_step: int = 0
    offset: int = 0  # in the result

    def operands(self) -> list[_Source]:
        return [s for s in (self.a, self.b, self.c) if s is not None]


@dataclass
class _Compiler:
    group: Group
    inputs: list[ir.Value] = field(default_factory=list)
    ports: list[Port] = field(default_factory=list)
    literals: list[float] = field(default_factory=lambda: [0.0])
    drafts: list[_Draft] = field(default_factory=list)
    sources: dict[ir.Value, _Source] = field(default_factory=dict)
    widths: list[int] = field(default_factory=list)
    shifts: list[tuple[_Source, int, int]] = field(default_factory=list)  # source, history, result
    tails: list[tuple[_Source, ir.Value]] = field(default_factory=list)

    def result(self, width: int) -> _Source:
        self.widths.append(width)
        return _Source(Kind.REGISTER, len(self.widths) - 1, width)

    def literal(self, number: float) -> _Source:
        if number not in self.literals:
            self.literals.append(number)
        return _Source(Kind.LITERAL, self.literals.index(number), 1)

    def port(self, value: ir.Value, kind: Kind, shape: tuple[int, ...]) -> _Source:
        for index, (known, port) in enumerate(zip(self.inputs, self.ports, strict=True)):
            if known is value and port.kind == kind:
                return _Source(kind, index, port.width)
        self.inputs.append(value)
        self.ports.append(Port(kind, shape))
        return _Source(kind, len(self.ports) - 1, prod(shape))

    def source(self, value: ir.Value, rank: int) -> _Source:
        """The numbers of an operand of a step whose result has this rank."""
        if value in self.sources:
            return self.sources[value]
        operand = operand_of(value, self.group.lead, rank)
        assert operand is not None
        if operand.kind == Kind.LITERAL:
            return self.literal(operand.literal)
        shape = (prod(operand.shape),) if operand.kind == Kind.FIXED else operand.shape
        return self.port(value, operand.kind, shape)

    def rows(self, value: ir.Value) -> _Source:
        assert value.shape is not None
        return self.source(value, len(value.shape))


def compile_group(group: Group) -> Compiled | str:
    """The program of a group, or why there is none."""
    c = _Compiler(group)
    for step in group.steps:
        _STEPS[step.kind](c, step)
    _peephole(c, _wanted(group))
    return _allocate(c)


def _wanted(group: Group) -> list[ir.Value]:
    """Values that other nodes, or the graph, need."""
    covered = {node for step in group.steps for node in step.covers}
    made: list[ir.Value] = []
    own: set[ir.Value] = set()
    for step in group.steps:
        if step.free and step.reads[0] not in own:
            continue  # the node can stay for its other readers
        own |= set(step.writes)
        for value in step.writes:
            if value.is_graph_output() or any(user not in covered for user, _ in value.uses()):
                made.append(value)
    return made


def _view(c: _Compiler, step: Step) -> None:
    root = c.rows(step.reads[0])
    for value, offset in zip(step.writes, step.offsets, strict=True):
        c.sources[value] = replace(root, offset=root.offset + offset, width=prod(trailing_of(value)))


def _unary(c: _Compiler, step: Step) -> None:
    a = c.rows(step.reads[0])
    to = c.sources[step.writes[0]] = c.result(a.width)
    c.drafts.append(_Draft(step.op, to.index, a, inner=a.width))


def _binary(c: _Compiler, step: Step) -> None:
    out = step.writes[0]
    assert out.shape is not None
    result = trailing_of(out)
    operands = [operand_of(v, step.lead, len(out.shape)) for v in step.reads]
    ways = [spread(o.shape, result) for o in operands if o is not None]
    (a_way, b_way), size = ways, prod(result)
    assert a_way is not None
    assert b_way is not None
    outer = max(a_way[0], b_way[0], 1)
    inner = size // outer
    a, b = (c.source(v, len(out.shape)) for v in step.reads)
    to = c.sources[out] = c.result(size)
    a_step = a_way[3] if a_way[0] or a_way[2] else inner
    b_step = b_way[3] if b_way[0] or b_way[2] else inner
    c.drafts.append(_Draft(step.op, to.index, a, b, None, outer, inner, a_way[2], a_step, b_way[2], b_step))


def _clip(c: _Compiler, step: Step) -> None:
    a = c.rows(step.reads[0])
    for op, bound in zip((OpCode.MAX, OpCode.MIN), step.numbers, strict=True):
        if bound is None:
            continue
        to = c.result(a.width)
        b = c.literal(bound)
        c.drafts.append(_Draft(op, to.index, a, b, None, 1, a.width, b_single=True, a_step=a.width))
        a = to
    c.sources[step.writes[0]] = a


def _reduce(c: _Compiler, step: Step) -> None:
    a, shape = c.rows(step.reads[0]), trailing_of(step.reads[0])
    outer = prod(shape[:-1])
    to = c.sources[step.writes[0]] = c.result(outer)
    c.drafts.append(_Draft(step.op, to.index, a, outer=outer, inner=shape[-1]))


def _norm(c: _Compiler, step: Step) -> None:
    a, shape = c.rows(step.reads[0]), trailing_of(step.reads[0])
    weights = [c.port(v, Kind.FIXED, (shape[-1],)) for v in step.reads[1:]]
    epsilon = c.literal(step.numbers[0] or 0.0).index
    to = c.sources[step.writes[0]] = c.result(a.width)
    bias = weights[1] if len(weights) > 1 else None
    c.drafts.append(
        _Draft(step.op, to.index, a, weights[0], bias, prod(shape[:-1]), shape[-1], a_step=epsilon)
    )


def _pick(c: _Compiler, step: Step) -> None:
    a, last, stride = c.rows(step.reads[0]), trailing_of(step.reads[0])[-1], int(step.numbers[0] or 1)
    for value, offset in zip(step.writes, step.offsets, strict=True):
        width, inner = prod(trailing_of(value)), trailing_of(value)[-1]
        to = c.sources[value] = c.result(width)
        begin = replace(a, offset=a.offset + offset, width=a.width - offset)
        outer = width // inner
        c.drafts.append(
            _Draft(OpCode.PICK, to.index, begin, None, None, outer, inner, a_step=last, b_step=stride)
        )


def _join(c: _Compiler, step: Step) -> None:
    shape, offset = trailing_of(step.writes[0]), 0
    to = c.sources[step.writes[0]] = c.result(prod(shape))
    for value in step.reads:
        a, inner = c.rows(value), trailing_of(value)[-1]
        outer = prod(shape[:-1])
        draft = _Draft(OpCode.PLACE, to.index, a, None, None, outer, inner, b_step=shape[-1], offset=offset)
        c.drafts.append(draft)
        offset += inner


def _shift(c: _Compiler, step: Step) -> None:
    rows, history = step.reads
    source = c.rows(rows)
    before = c.port(history, Kind.HISTORY, trailing_of(history, 1))
    to = c.sources[step.writes[0]] = c.result(source.width)
    c.shifts.append((source, before.index, to.index))


def _tail(c: _Compiler, step: Step) -> None:
    c.tails.append((c.rows(step.reads[0]), step.writes[0]))


_STEPS = {
    "view": _view,
    "unary": _unary,
    "binary": _binary,
    "clip": _clip,
    "reduce": _reduce,
    "norm": _norm,
    "pick": _pick,
    "join": _join,
    "shift": _shift,
    "tail": _tail,
}


def _peephole(c: _Compiler, wanted: Iterable[ir.Value]) -> None:
    """x * sigmoid(x) and a * b + c in one pass over the row, where the inner result has no other reader."""
    busy = {c.sources[v].index for v in wanted if v in c.sources}
    busy |= {s.index for s, *_ in c.shifts} | {s.index for s, _ in c.tails if s.kind == Kind.REGISTER}
    readers: dict[int, int] = {}
    for draft in c.drafts:
        for source in draft.operands():
            if source.kind == Kind.REGISTER:
                readers[source.index] = readers.get(source.index, 0) + 1
    made = {d.dst: d for d in c.drafts}

    def inner(source: _Source | None, op: OpCode) -> _Draft | None:
        if source is None or source.kind != Kind.REGISTER or source.index in busy:
            return None
        draft = made.get(source.index)
        whole = draft is not None and draft.op == op and readers[source.index] == 1 and not source.offset
        return draft if whole and draft is not None and draft.inner == source.width else None

    gone: set[int] = set()
    for draft in c.drafts:
        plain = draft.outer == 1 and not draft.a_single and not draft.b_single
        if not plain or draft.b is None:
            continue
        for one, other in ((draft.a, draft.b), (draft.b, draft.a)):
            if draft.op == OpCode.MUL and (s := inner(one, OpCode.SIGMOID)) and s.a == other:
                draft.op, draft.a, draft.b, draft.a_step, draft.b_step = OpCode.SILU, other, None, 0, 0
                gone.add(s.dst)
                break
            if draft.op == OpCode.ADD and (m := inner(one, OpCode.MUL)) and _plain(m):
                draft.op, draft.a, draft.b, draft.c = OpCode.MUL_ADD, m.a, m.b, other
                draft.a_step = draft.b_step = 0
                gone.add(m.dst)
                break
    c.drafts = [d for d in c.drafts if d.dst not in gone]


def _plain(draft: _Draft) -> bool:
    return draft.outer == 1 and not draft.a_single and not draft.b_single and draft.c is None


def _allocate(c: _Compiler) -> Compiled | str:
    tail_values = {value for _, value in c.tails}
    outputs = [v for v in _wanted(c.group) if v not in tail_values]
    homes = _homes(c, outputs)
    ports = [Port(Kind.OUTPUT, trailing_of(v)) for v in outputs]
    tails = []
    for source, value in c.tails:
        tails.append((source, len(ports), source.width))
        ports.append(Port(Kind.TAIL, trailing_of(value, 1)))
    if len(c.ports) > _MOST_PORTS or len(ports) > _MOST_PORTS:
        return f"it has more than {_MOST_PORTS} inputs or outputs"
    offsets, registers = _registers(c, homes)
    table: dict[Place, int] = {}

    def place(source: _Source | None) -> int:
        if source is None:
            return -1
        home = Place(source.kind, source.index, source.width, source.offset)
        if source.kind == Kind.REGISTER:
            if source.index in homes:
                home = Place(Kind.OUTPUT, homes[source.index], source.width, source.offset)
            else:
                home = Place(Kind.REGISTER, 0, source.width, offsets[source.index] + source.offset)
        return table.setdefault(home, len(table))

    instructions = [_finished(d, c.widths, place) for d in c.drafts]
    shifts = [Shift(place(s), h, offsets[r], c.widths[r]) for s, h, r in c.shifts]
    program = Program(
        inputs=tuple(c.ports),
        outputs=tuple(ports),
        tails=tuple(Tail(place(s), o, w) for s, o, w in tails),
        places=tuple(table),
        instructions=tuple(instructions),
        shifts=tuple(shifts),
        constants=tuple(c.literals),
        registers=registers,
        depth=_depth(c),
    )
    values = (*outputs, *(value for _, value in c.tails))
    return Compiled(program, tuple(c.inputs), values)


def _finished(d: _Draft, widths: list[int], place: Callable[[_Source | None], int]) -> Instruction:
    dst = place(_Source(Kind.REGISTER, d.dst, widths[d.dst] - d.offset, d.offset))
    return Instruction(
        d.op,
        dst,
        place(d.a),
        place(d.b),
        place(d.c),
        d.outer,
        d.inner,
        d.a_single,
        d.a_step,
        d.b_single,
        d.b_step,
    )


def _homes(c: _Compiler, outputs: list[ir.Value]) -> dict[int, int]:
    """Results that are computed straight into an output; every further output of one gets a copy."""
    homes: dict[int, int] = {}
    shifted = {result for *_, result in c.shifts}
    for number, value in enumerate(outputs):
        source = c.sources[value]
        whole = source.kind == Kind.REGISTER and source.width == c.widths[source.index]
        if whole and source.index not in homes and source.index not in shifted:
            homes[source.index] = number
            continue
        copy = c.result(source.width)
        c.drafts.append(_Draft(OpCode.COPY, copy.index, source, inner=source.width))
        homes[copy.index] = number
    return homes


def _registers(c: _Compiler, homes: dict[int, int]) -> tuple[dict[int, int], int]:
    """Offsets in the register file; a result's space is free again after its last reader."""
    kept = {r for *_, r in c.shifts} | {s.index for s, *_ in c.shifts if s.kind == Kind.REGISTER}
    kept |= {s.index for s, _ in c.tails if s.kind == Kind.REGISTER}
    last = {s.index: i for i, d in enumerate(c.drafts) for s in d.operands() if s.kind == Kind.REGISTER}
    offsets: dict[int, int] = {}
    free: dict[int, list[int]] = {}
    end = 0

    def take(result: int) -> None:
        nonlocal end
        size = -(-c.widths[result] // _ALIGN) * _ALIGN
        if free.get(size):
            offsets[result] = free[size].pop()
        else:
            offsets[result], end = end, end + size

    for *_, result in c.shifts:
        take(result)
    for i, draft in enumerate(c.drafts):
        if draft.dst not in homes and draft.dst not in offsets:
            take(draft.dst)
        for index in {s.index for s in draft.operands() if s.kind == Kind.REGISTER}:
            if last[index] == i and index in offsets and index not in kept:
                free.setdefault(-(-c.widths[index] // _ALIGN) * _ALIGN, []).append(offsets[index])
    return offsets, end


def _depth(c: _Compiler) -> int:
    """The most shifts that a value hangs on one after another."""
    depth: dict[int, int] = {}
    of = {result: source for source, _, result in c.shifts}

    def deep(result: int) -> int:
        if result not in depth:
            if result in of:
                source = of[result]
                depth[result] = 1 + (deep(source.index) if source.kind == Kind.REGISTER else 0)
            else:
                reads = [
                    s.index
                    for d in c.drafts
                    if d.dst == result
                    for s in d.operands()
                    if s.kind == Kind.REGISTER
                ]
                depth[result] = max(map(deep, reads), default=0)
        return depth[result]

    return max((deep(result) for result in of), default=0)
