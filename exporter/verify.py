"""After every export: ONNX Runtime against PyTorch at several (B,T), and the chunk law in both.

A model in the whole-sequence form has no chunks: it is compared at several (B,T) alone. A disagreement is
an error that names the layer where the two first part (locate.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from xexport.core.contract import Contract, contract_of
from xexport.core.errors import ChunkLawError, ParityError
from xexport.core.state import StateSpec, zero_state
from xexport.exporter.forward import Array, Forward, OnnxForward, largest_error, torch_forward, weight_bytes

__all__ = ["CHECKED_SHAPES", "Checks", "verify"]

#: one token, odd lengths, batches, and one length past every block size a body uses; of an input whose
#: length is a multiple of n, that many times n
CHECKED_SHAPES = ((1, 1), (2, 1), (1, 3), (3, 5), (1, 67))
#: nothing is carried, so length matters more: even and odd, short and of several blocks
_WHOLE_SHAPES = (*CHECKED_SHAPES, (2, 130))
_BRIEF_WHOLE = ((1, 1), (1, 16))
_CUTS = ((1, 4, 2, 7, 3), (1,) * 17, (9, 8), (16, 1))
_LARGE = 1 << 28  # bytes of weights above which fewer checks are made
_BRIEF_WARM = 2
_BRIEF_CUT = (1, 3, 13)
_NO_LAW = "does not apply: the model has the whole-sequence form only, there are no chunks"


@dataclass(frozen=True)
class Checks:
    """What was verified, as errors relative to the size of the reference (RMS, at least 1e-3).

    Attributes:
        parity: (B, T) -> largest error of logits and state, ONNX against PyTorch.
        chunk_error_torch, chunk_error_onnx: largest error of any way of cutting a sequence
            against feeding it whole; None in the whole-sequence form.
        kept_error: largest error of the graph that was asked for the logits of the last positions
            only, over several numbers of them; None if it can't be asked.
    """

    parity: dict[str, float]
    chunk_error_torch: float | None
    chunk_error_onnx: float | None
    kept_error: float | None = None

    def row(self) -> dict[str, Any]:
        """As plain data for the manifest; says so if the chunk law does not apply."""
        if self.chunk_error_torch is None:
            return {"parity": self.parity, "chunk_law": _NO_LAW}
        return dict(self.__dict__)


class _Source(NamedTuple):
    """Where inputs to try come from."""

    contract: Contract
    vocab: int

    def draw(self, seed: int | np.random.Generator, batch: int, length: int) -> Array:
        """Random inputs of ``length`` times the input's unit, or the nearest that is allowed."""
        rng = np.random.default_rng(seed)
        spec = self.contract.inputs
        made: Array = spec.random(rng, batch, self.contract.nearest(length * spec.multiple), self.vocab)
        return made

    @property
    def limit(self) -> int:
        """The longest stream, in the input's unit."""
        return (self.contract.max_tokens or 1 << 30) // self.contract.inputs.multiple


def verify(
    module: torch.nn.Module,
    specs: Sequence[StateSpec],
    graph: Path,
    *,
    vocab_size: int,
    contract: Contract | None = None,
    tolerance: float = 1e-4,
    chunk_tolerance: float = 1e-4,
    shapes: Iterable[tuple[int, int]] | None = None,
    release: Callable[[], object] | None = None,
) -> Checks:
    """Compare the graph with the module, and every cut of a sequence with the whole.

    Args:
        contract: what the module takes; by default what it says itself.
        shapes: (B, T) to compare at; :data:`CHECKED_SHAPES`, or fewer of a model over 256 MB.
        release: called when PyTorch has done its part, before ONNX Runtime opens the graph: the two
            then never hold the weights at the same time.

    Raises:
        ChunkLawError: the PyTorch module itself breaks the chunk law.
        ParityError: the graph disagrees with the module, or breaks the chunk law alone.
    """
    source = _Source(contract or contract_of(module), vocab_size)
    eager = torch_forward(module)
    plan = _plan(eager, specs, source, shapes, large=weight_bytes(graph) > _LARGE)
    if plan.law is not None and not plan.law.error <= chunk_tolerance:
        raise ChunkLawError(
            "the model breaks the chunk law: cutting a sequence changes the result",
            got=f"{plan.law.what}: error {plan.law.error:.2e} for chunks of {plan.law.cut}",
            allowed=f"at most {chunk_tolerance:.0e} of the RMS",
            fix="carry everything that looks back in the state (shifts, convolutions, positions, caches); "
            'a model that is not causal says form = "whole"',
        )
    if release is not None:
        release()
    run = OnnxForward(graph)
    parity: dict[str, float] = {}
    for sample in plan.samples:
        batch, length = sample.inputs.shape[:2]
        error, what = largest_error(specs, *sample.wanted, *run(sample.inputs, sample.start))
        parity[f"B={batch},T={length}"] = error
        if not error <= tolerance:
            from xexport.exporter.locate import locate

            where = locate(module, specs, graph, batch, length, vocab_size, source.contract.inputs)
            raise ParityError(
                f"ONNX Runtime and PyTorch disagree at B={batch}, T={length}",
                got=f"{what}: error {error:.2e}; {where}",
                allowed=f"at most {tolerance:.0e} of the RMS",
                fix="this is a fault of the exporter or of an operator's body: please report it",
            )
    if plan.law is None or plan.law_of is None:
        return Checks(parity, None, None)
    law_onnx = plan.law_of(run)
    if not law_onnx.error <= chunk_tolerance:
        raise ParityError(
            "the exported graph breaks the chunk law although the module keeps it",
            got=f"{law_onnx.what}: error {law_onnx.error:.2e} for chunks of {law_onnx.cut}",
            allowed=f"at most {chunk_tolerance:.0e} of the RMS",
        )
    kept = _check_kept(run, specs, plan, tolerance) if run.keeps else None
    return Checks(parity, plan.law.error, law_onnx.error, kept)


def _check_kept(run: OnnxForward, specs: Sequence[StateSpec], plan: _Plan, tolerance: float) -> float:
    """The largest error of the last n logits, and of the state, for several n.

    Raises:
        ParityError: larger than ``tolerance``.
    """
    worst = 0.0
    for sample, keep in _kept_cases(plan):
        logits, state = sample.wanted
        got = run(sample.inputs, sample.start, keep)
        error, what = largest_error(specs, logits[:, -keep:], state, *got)
        if not error <= tolerance:
            batch, length = sample.inputs.shape[:2]
            raise ParityError(
                f"the last {keep} positions' logits are not those of the whole, at B={batch}, T={length}",
                got=f"{what}: error {error:.2e}",
                allowed=f"at most {tolerance:.0e} of the RMS",
                fix="this is a fault of exporter/passes/keep.py: please report it",
            )
        worst = max(worst, error)
    return worst


def _kept_cases(plan: _Plan) -> Iterator[tuple[_Sample, int]]:
    """One, some, all but one, all, and more positions than there are, on samples of some length."""
    long = [s for s in plan.samples if s.inputs.shape[1] > 1]
    for sample in long[:1] if plan.brief else long:
        length = sample.inputs.shape[1]
        counts = (1, 2) if plan.brief else (1, 2, length - 1, length, length + 3)
        yield from ((sample, keep) for keep in dict.fromkeys(counts))


@dataclass(frozen=True)
class _Plan:
    """What PyTorch computed, and how the chunk law is checked of ONNX Runtime.

    Attributes:
        samples: what the graph is compared with.
        law: the chunk law of the module; None where there is none.
        law_of: the chunk law of a forward function.
        brief: every call takes seconds: make few.
    """

    samples: list[_Sample]
    law: _Worst | None = None
    law_of: Callable[[Forward], _Worst] | None = None
    brief: bool = False


def _plan(
    eager: Forward,
    specs: Sequence[StateSpec],
    source: _Source,
    shapes: Iterable[tuple[int, int]] | None,
    *,
    large: bool,
) -> _Plan:
    """Several batches and lengths, and several cuts if there is a chunk law; few of a large model."""
    if not source.contract.streams:
        wanted = _BRIEF_WHOLE if large else _WHOLE_SHAPES
        inputs = [source.draw(b * 1000 + t, b, t) for b, t in shapes or wanted]
        distinct = {x.shape: x for x in inputs}  # a fixed length leaves fewer
        return _Plan([_Sample(x, (), eager(x, ())) for x in distinct.values()], brief=large)
    if shapes is None and large and source.limit >= _BRIEF_WARM + sum(_BRIEF_CUT):
        return _brief_plan(eager, specs, source)

    def law_of(forward: Forward) -> _Worst:
        return _chunk_error(forward, specs, source)

    law = law_of(eager)
    fitting = [(b, t) for b, t in shapes or CHECKED_SHAPES if t <= source.limit]
    return _Plan([_sample(eager, specs, b, t, source) for b, t in fitting], law, law_of)


def _brief_plan(eager: Forward, specs: Sequence[StateSpec], source: _Source) -> _Plan:
    """One sequence whole and in three pieces, which are samples too: a large model takes seconds a call.

    The pieces reach the step, the short and the long branch of every body.
    """
    rng = np.random.default_rng(7)
    warm = source.draw(rng, 1, _BRIEF_WARM)
    inputs = source.draw(rng, 1, sum(_BRIEF_CUT))
    _, start = eager(warm, zero_state(specs, 1))
    whole = _Sample(inputs, start, eager(inputs, start))
    pieces, state = [], start
    unit = source.contract.inputs.multiple
    for part in np.split(inputs, unit * np.cumsum(_BRIEF_CUT)[:-1], axis=1):
        part = np.ascontiguousarray(part)
        pieces.append(_Sample(part, state, eager(part, state)))
        state = pieces[-1].wanted[1]
    logits = np.concatenate([p.wanted[0] for p in pieces], 1)
    name = "+".join(map(str, _BRIEF_CUT))
    law = _Worst(*largest_error(specs, *whole.wanted, logits, state), name)

    def law_of(forward: Forward) -> _Worst:
        """The pieces one after the other against PyTorch's whole, whose equal the graph's whole was found."""
        parts, state = [], start
        for piece in pieces:
            part, state = forward(piece.inputs, state)
            parts.append(part)
        return _Worst(*largest_error(specs, *whole.wanted, np.concatenate(parts, 1), state), name)

    return _Plan([whole, pieces[0], pieces[1]], law, law_of, brief=True)


@dataclass(frozen=True)
class _Worst:
    error: float
    what: str
    cut: str


def _chunk_error(forward: Forward, specs: Sequence[StateSpec], source: _Source) -> _Worst:
    """The worst error of several cuts of one sequence against feeding it whole, from a used state."""
    rng = np.random.default_rng(7)
    length = min(17, source.limit // 2)
    warm = source.draw(rng, 2, min(5, source.limit - length))
    inputs = source.draw(rng, 2, length)
    unit = source.contract.inputs.multiple
    _, start = forward(warm, zero_state(specs, 2))
    whole, final = forward(inputs, start)
    worst = _Worst(0.0, "", "")
    for cut in _CUTS:
        logits, state, at = [], start, 0
        for size in cut:
            if at + size > length:
                break
            part, state = forward(inputs[:, at * unit : (at + size) * unit], state)
            logits.append(part)
            at += size
        if at < length:
            part, state = forward(inputs[:, at * unit :], state)
            logits.append(part)
        error, what = largest_error(specs, whole, final, np.concatenate(logits, 1), state)
        if not error <= worst.error:
            worst = _Worst(error, what, "+".join(map(str, cut)))
    return worst


@dataclass(frozen=True)
class _Sample:
    """Inputs [B,T] or [B,T,F], a used state, and what PyTorch makes of them."""

    inputs: Array
    start: Sequence[Array]
    wanted: tuple[Array, list[Array]]


def _sample(
    reference: Forward, specs: Sequence[StateSpec], batch: int, length: int, source: _Source
) -> _Sample:
    rng = np.random.default_rng(batch * 1000 + length)
    warm = source.draw(rng, batch, 2)
    inputs = source.draw(rng, batch, length)
    _, start = reference(warm, zero_state(specs, batch))
    return _Sample(inputs, start, reference(inputs, start))
