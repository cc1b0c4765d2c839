"""A program over rows: what one ``xexport::fused_rows_<i>`` node computes, as plain numbers.

A tensor [B,T,...] is B*T rows. Everything between two matrix products of a step works on each row by
itself (norms, gates, decays, interpolations) or on a row and the one before it (token shift), so a whole
chain of such ONNX nodes is one pass over the rows. The node's attributes ``program`` (integers) and
``constants`` (floats) hold the chain; the node's function body holds the ONNX nodes themselves.

Sources: the operators are those of ONNX (onnx.ai/onnx/operators), opset 23, on float32.

Words:
    place        where a row's values are: a register, an input row, a fixed vector, an output row, a literal
    instruction  reads places, writes a place; ``outer`` times ``inner`` floats
    step         floats that an operand's pointer moves on from one outer turn to the next: 0 repeats a
                 vector (a weight shared by heads), 1 with ``single`` spreads one float over each turn
    shift        a place that holds another place's values of the row before; before the first row of a
                 sequence the values of a history input
    tail         an output [B,w] that gets a place's values of the last row of every sequence
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

__all__ = ["Instruction", "Kind", "OpCode", "Place", "Port", "Program", "Shift", "Tail"]

_VERSION = 1


class OpCode(IntEnum):
    """What an instruction does; the order is that of ``OpCode`` in loops.h."""

    COPY = 0
    NEG = 1
    ABS = 2
    EXP = 3
    SQRT = 4
    RECIPROCAL = 5
    SIGMOID = 6
    TANH = 7
    RELU = 8
    SOFTPLUS = 9
    GELU = 10
    GELU_TANH = 11
    ERF = 12
    SILU = 13
    ADD = 14
    SUB = 15
    MUL = 16
    DIV = 17
    MAX = 18
    MIN = 19
    SUM = 20
    MEAN = 21
    LARGEST = 22
    L2 = 23
    LAYER_NORM = 24
    RMS_NORM = 25
    MUL_ADD = 26
    PICK = 27
    PLACE = 28


class Kind(IntEnum):
    """What an input, an output or a place is."""

    REGISTER = 0
    ROWS = 1  # [B,T,w] input
    TOKENS = 2  # [T,w] input, the same for every sequence
    FIXED = 3  # [w] input, the same for every row
    HISTORY = 4  # [B,w] input: the row before the first
    OUTPUT = 5  # [B,T,...] output
    TAIL = 6  # [B,w] output: of the last row
    LITERAL = 7  # a float of ``constants``


@dataclass(frozen=True)
class Port:
    """An input or output of the node: ``shape`` without B and T."""

    kind: Kind
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        """Floats a row."""
        width = 1
        for dim in self.shape:
            width *= dim
        return width


@dataclass(frozen=True)
class Place:
    """``width`` floats at ``offset`` of port, register file or constant table number ``index``."""

    kind: Kind
    index: int
    width: int
    offset: int = 0


@dataclass(frozen=True)
class Instruction:
    """``dst[i*inner + j] = op(a[i*a_step + j], b[i*b_step + j])``; operands that are ``single`` ignore j.

    A reduction writes ``dst[i]`` from ``a[i*inner : (i+1)*inner]``. A norm does the same with weight ``b``
    and bias ``c`` (-1: none) over each stretch of ``inner``, and its epsilon is literal ``a_step``.
    MUL_ADD is ``a*b + c`` without steps for ``c``. PICK copies ``a[i*a_step + j*b_step]`` to
    ``dst[i*inner + j]``, PLACE copies ``a[i*inner + j]`` to ``dst[i*b_step + j]``.
    """

    op: OpCode
    dst: int
    a: int
    b: int = -1
    c: int = -1
    outer: int = 1
    inner: int = 1
    a_single: bool = False
    a_step: int = 0
    b_single: bool = False
    b_step: int = 0


@dataclass(frozen=True)
class Shift:
    """Register ``offset`` holds place ``source`` of the row before; input ``history`` before the first."""

    source: int
    history: int
    offset: int
    width: int


@dataclass(frozen=True)
class Tail:
    """Output ``output`` gets place ``source`` of every sequence's last row."""

    source: int
    output: int
    width: int


@dataclass(frozen=True)
class Program:
    """A whole program; see the module for the words.

    Attributes:
        registers: floats of the register file.
        depth: shifts that a value can hang on one after another: as many rows before the first of a
            part of a sequence have to be computed again.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    places: tuple[Place, ...]
    instructions: tuple[Instruction, ...]
    shifts: tuple[Shift, ...]
    tails: tuple[Tail, ...]
    constants: tuple[float, ...]
    registers: int
    depth: int

    def encode(self) -> list[int]:
        """The attribute ``program``."""
        return list(self._numbers())

    def _numbers(self) -> Iterator[int]:
        counts = (self.inputs, self.outputs, self.places, self.instructions, self.shifts, self.tails)
        yield from (_VERSION, *map(len, counts), self.registers, self.depth)
        for port in (*self.inputs, *self.outputs):
            yield from (int(port.kind), len(port.shape), *port.shape)
        for place in self.places:
            yield from (int(place.kind), place.index, place.width, place.offset)
        for i in self.instructions:
            yield from (int(i.op), i.dst, i.a, i.b, i.c, i.outer, i.inner)
            yield from (int(i.a_single), i.a_step, int(i.b_single), i.b_step)
        for shift in self.shifts:
            yield from (shift.source, shift.history, shift.offset, shift.width)
        for tail in self.tails:
            yield from (tail.source, tail.output, tail.width)
