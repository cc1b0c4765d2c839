"""A program over rows as a plain loop in float64: the definition that the kernel is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from xexport.ops.fused_rows.program import Instruction, Kind, OpCode, Program

__all__ = ["run_program"]

Array = np.ndarray[Any, Any]
_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


_UNARY: dict[OpCode, Callable[[Array], Array]] = {
    OpCode.COPY: lambda x: x,
    OpCode.NEG: lambda x: -x,
    OpCode.ABS: np.abs,
    OpCode.EXP: np.exp,
    OpCode.SQRT: np.sqrt,
    OpCode.RECIPROCAL: lambda x: 1 / x,
    OpCode.SIGMOID: _sigmoid,
    OpCode.TANH: np.tanh,
    OpCode.RELU: lambda x: np.maximum(x, 0),
    OpCode.SOFTPLUS: lambda x: np.logaddexp(x, 0),
    OpCode.GELU: lambda x: x / 2 * (1 + _erf(x / math.sqrt(2))),
    OpCode.GELU_TANH: lambda x: x * _sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
    OpCode.ERF: _erf,
    OpCode.SILU: lambda x: x * _sigmoid(x),
}
_BINARY: dict[OpCode, Callable[[Array, Array], Array]] = {
    OpCode.ADD: np.add,
    OpCode.SUB: np.subtract,
    OpCode.MUL: np.multiply,
    OpCode.DIV: np.divide,
    OpCode.MAX: np.maximum,
    OpCode.MIN: np.minimum,
}
_REDUCE: dict[OpCode, Callable[[Array], Array]] = {
    OpCode.SUM: lambda x: x.sum(-1),
    OpCode.MEAN: lambda x: x.mean(-1),
    OpCode.LARGEST: lambda x: x.max(-1),
    OpCode.L2: lambda x: np.sqrt((x * x).sum(-1)),
}


def run_program(program: Program, inputs: Sequence[Array]) -> list[Array]:
    """The outputs of a program, float64.

    Args:
        inputs: as ``program.inputs``: ROWS [B,T,...], TOKENS [T,...], FIXED [...], HISTORY [B,...].
    """
    first = next(i for i, port in enumerate(program.inputs) if port.kind == Kind.ROWS)
    B, T = inputs[first].shape[:2]
    flat = [_flat(x, port.kind) for x, port in zip(inputs, program.inputs, strict=True)]
    outputs = [np.zeros((B, T, p.width) if p.kind == Kind.OUTPUT else (B, p.width)) for p in program.outputs]
    with np.errstate(all="ignore"):
        for b in range(B):
            _sequence(program, flat, outputs, b, T)
    lead = {Kind.OUTPUT: (B, T), Kind.TAIL: (B,)}
    return [y.reshape(*lead[p.kind], *p.shape) for y, p in zip(outputs, program.outputs, strict=True)]


def _flat(x: Array, kind: Kind) -> Array:
    lead = {Kind.ROWS: 2, Kind.TOKENS: 1, Kind.FIXED: 0, Kind.HISTORY: 1}[kind]
    return x.astype(np.float64).reshape(*x.shape[:lead], -1)


def _sequence(program: Program, inputs: list[Array], outputs: list[Array], b: int, T: int) -> None:
    registers = np.zeros(program.registers)
    constants = np.array(program.constants, np.float32).astype(np.float64)
    for shift in program.shifts:
        registers[shift.offset : shift.offset + shift.width] = inputs[shift.history][b]
    for t in range(T):
        places = [
            _base(p.kind, p.index, registers, inputs, outputs, constants, b, t)[p.offset : p.offset + p.width]
            for p in program.places
        ]
        for instruction in program.instructions:
            _execute(instruction, places, constants)
        before = [places[s.source].copy() for s in program.shifts]
        for shift, values in zip(program.shifts, before, strict=True):
            registers[shift.offset : shift.offset + shift.width] = values[: shift.width]
        if t == T - 1:
            for tail in program.tails:
                outputs[tail.output][b] = places[tail.source][: tail.width]


def _base(
    kind: Kind,
    index: int,
    registers: Array,
    inputs: list[Array],
    outputs: list[Array],
    constants: Array,
    b: int,
    t: int,
) -> Array:
    match kind:
        case Kind.REGISTER:
            return registers
        case Kind.ROWS:
            return np.asarray(inputs[index][b, t])
        case Kind.TOKENS:
            return np.asarray(inputs[index][t])
        case Kind.FIXED:
            return inputs[index]
        case Kind.OUTPUT:
            return np.asarray(outputs[index][b, t])
        case _:
            return constants[index : index + 1]


def _execute(i: Instruction, places: list[Array], constants: Array) -> None:
    def operand(place: int, single: bool, step: int) -> Array:
        at = np.arange(i.outer)[:, None] * step + (0 if single else np.arange(i.inner)[None, :])
        return np.broadcast_to(places[place][at], (i.outer, i.inner))

    if i.op in _UNARY:
        places[i.dst][: i.inner] = _UNARY[i.op](places[i.a][: i.inner])
        return
    if i.op in _BINARY:
        a, b = operand(i.a, i.a_single, i.a_step), operand(i.b, i.b_single, i.b_step)
        places[i.dst][: i.outer * i.inner] = _BINARY[i.op](a, b).reshape(-1)
        return
    if i.op == OpCode.MUL_ADD:
        a, b, c = (places[p][: i.inner] for p in (i.a, i.b, i.c))
        places[i.dst][: i.inner] = a * b + c
        return
    rows, columns = np.arange(i.outer)[:, None], np.arange(i.inner)[None, :]
    if i.op == OpCode.PICK:
        picked = places[i.a][rows * i.a_step + columns * i.b_step]
        places[i.dst][: i.outer * i.inner] = picked.reshape(-1)
        return
    x = places[i.a][: i.outer * i.inner].reshape(i.outer, i.inner)
    if i.op == OpCode.PLACE:
        places[i.dst][rows * i.b_step + columns] = x
        return
    if i.op in _REDUCE:
        places[i.dst][: i.outer] = _REDUCE[i.op](x)
        return
    if i.op == OpCode.LAYER_NORM:
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + constants[i.a_step]) * places[i.b][: i.inner]
    if i.c >= 0:
        y = y + places[i.c][: i.inner]
    places[i.dst][: i.outer * i.inner] = y.reshape(-1)
