"""After every export: ONNX Runtime against PyTorch at several (B,T), and the chunk law in both.

A disagreement is an error that names the layer where the two first part (locate.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xexport.core.errors import ChunkLawError, ParityError
from xexport.core.manifest import KEEP_INPUT
from xexport.core.state import StateSpec, zero_state
from xexport.exporter.writer import DATA_NAME

__all__ = ["CHECKED_SHAPES", "Checks", "OnnxForward", "chunk_error", "torch_forward", "verify"]

#: one token, odd lengths, batches, and one length past every block size a body uses
CHECKED_SHAPES = ((1, 1), (2, 1), (1, 3), (3, 5), (1, 67))
_CUTS = ((1, 4, 2, 7, 3), (1,) * 17, (9, 8), (16, 1))
_LARGE = 1 << 28  # bytes of weights above which fewer checks are made
_BRIEF_WARM = 2
_BRIEF_CUT = (1, 3, 13)
_MAP_ABOVE = 1 << 26  # bytes of weights that ONNX Runtime may copy

Array = np.ndarray[Any, Any]
Forward = Callable[[Array, Sequence[Array]], tuple[Array, list[Array]]]


@dataclass(frozen=True)
class Checks:
    """What was verified, as errors relative to the size of the reference (RMS, at least 1e-3).

    Attributes:
        parity: (B, T) -> largest error of logits and state, ONNX against PyTorch.
        chunk_error_torch, chunk_error_onnx: largest error of any way of cutting a sequence
            against feeding it whole.
        kept_error: largest error of the graph that was asked for the logits of the last positions
            only, over several numbers of them; None if it can't be asked.
    """

    parity: dict[str, float]
    chunk_error_torch: float
    chunk_error_onnx: float
    kept_error: float | None = None


def verify(
    module: torch.nn.Module,
    specs: Sequence[StateSpec],
    graph: Path,
    *,
    vocab_size: int,
    max_tokens: int | None = None,
    tolerance: float = 1e-4,
    chunk_tolerance: float = 1e-4,
    shapes: Iterable[tuple[int, int]] | None = None,
    release: Callable[[], object] | None = None,
) -> Checks:
    """Compare the graph with the module, and every cut of a sequence with the whole.

    Args:
        shapes: (B, T) to compare at; :data:`CHECKED_SHAPES`, or fewer of a model over 256 MB.
        release: called when PyTorch has done its part, before ONNX Runtime opens the graph: the two
            then never hold the weights at the same time.

    Raises:
        ChunkLawError: the PyTorch module itself breaks the chunk law.
        ParityError: the graph disagrees with the module, or breaks the chunk law alone.
    """
    limit = max_tokens or 1 << 30
    eager = torch_forward(module)
    if shapes is None and _weight_bytes(graph) > _LARGE and limit >= _BRIEF_WARM + sum(_BRIEF_CUT):
        plan = _brief_plan(eager, specs, vocab_size)
    else:
        plan = _full_plan(eager, specs, vocab_size, limit, shapes or CHECKED_SHAPES)
    if not plan.law.error <= chunk_tolerance:
        raise ChunkLawError(
            "the model breaks the chunk law: cutting a sequence changes the result",
            got=f"{plan.law.what}: error {plan.law.error:.2e} for chunks of {plan.law.cut}",
            allowed=f"at most {chunk_tolerance:.0e} of the RMS",
            fix="carry everything that looks back in the state (shifts, convolutions, positions, caches)",
        )
    if release is not None:
        release()
    run = OnnxForward(graph)
    parity: dict[str, float] = {}
    for sample in plan.samples:
        batch, length = sample.tokens.shape
        error, what = _largest(specs, *sample.wanted, *run(sample.tokens, sample.start))
        parity[f"B={batch},T={length}"] = error
        if not error <= tolerance:
            from xexport.exporter.locate import locate

            raise ParityError(
                f"ONNX Runtime and PyTorch disagree at B={batch}, T={length}",
                got=f"{what}: error {error:.2e}; {locate(module, specs, graph, batch, length, vocab_size)}",
                allowed=f"at most {tolerance:.0e} of the RMS",
                fix="this is a fault of the exporter or of an operator's body: please report it",
            )
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
        got = run(sample.tokens, sample.start, keep)
        error, what = _largest(specs, logits[:, -keep:], state, *got)
        if not error <= tolerance:
            batch, length = sample.tokens.shape
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
    long = [s for s in plan.samples if s.tokens.shape[1] > 1]
    for sample in long[:1] if plan.brief else long:
        length = sample.tokens.shape[1]
        counts = (1, 2) if plan.brief else (1, 2, length - 1, length, length + 3)
        yield from ((sample, keep) for keep in dict.fromkeys(counts))


@dataclass(frozen=True)
class _Plan:
    """What PyTorch computed, and how the chunk law is checked of ONNX Runtime.

    Attributes:
        law: the chunk law of the module.
        samples: what the graph is compared with.
        law_of: the chunk law of a forward function.
        brief: every call takes seconds: make few.
    """

    law: _Worst
    samples: list[_Sample]
    law_of: Callable[[Forward], _Worst]
    brief: bool = False


def _full_plan(
    eager: Forward, specs: Sequence[StateSpec], vocab: int, limit: int, shapes: Iterable[tuple[int, int]]
) -> _Plan:
    """Several batches and lengths, several cuts."""

    def law_of(forward: Forward) -> _Worst:
        return chunk_error(forward, specs, vocab, limit)

    law = law_of(eager)
    return _Plan(law, [_sample(eager, specs, b, t, vocab) for b, t in shapes if t <= limit], law_of)


def _brief_plan(eager: Forward, specs: Sequence[StateSpec], vocab: int) -> _Plan:
    """One sequence whole and in three pieces, which are samples too: a large model takes seconds a call.

    The pieces reach the step, the short and the long branch of every body.
    """
    rng = np.random.default_rng(7)
    warm = rng.integers(0, vocab, (1, _BRIEF_WARM), dtype=np.int64)
    tokens = rng.integers(0, vocab, (1, sum(_BRIEF_CUT)), dtype=np.int64)
    _, start = eager(warm, zero_state(specs, 1))
    whole = _Sample(tokens, start, eager(tokens, start))
    pieces, state = [], start
    for part in np.split(tokens, np.cumsum(_BRIEF_CUT)[:-1], axis=1):
        part = np.ascontiguousarray(part)
        pieces.append(_Sample(part, state, eager(part, state)))
        state = pieces[-1].wanted[1]
    logits = np.concatenate([p.wanted[0] for p in pieces], 1)
    name = "+".join(map(str, _BRIEF_CUT))
    law = _Worst(*_largest(specs, *whole.wanted, logits, state), name)

    def law_of(forward: Forward) -> _Worst:
        """The pieces one after the other against PyTorch's whole, whose equal the graph's whole was found."""
        parts, state = [], start
        for piece in pieces:
            part, state = forward(piece.tokens, state)
            parts.append(part)
        return _Worst(*_largest(specs, *whole.wanted, np.concatenate(parts, 1), state), name)

    return _Plan(law, [whole, pieces[0], pieces[1]], law_of, brief=True)


def torch_forward(module: torch.nn.Module) -> Forward:
    """The module as a function of numpy arrays."""

    def forward(tokens: Array, state: Sequence[Array]) -> tuple[Array, list[Array]]:
        with torch.inference_mode():
            logits, *new = module(torch.from_numpy(tokens), *map(torch.from_numpy, state))
        return logits.float().numpy(), [s.numpy() for s in new]

    return forward


class OnnxForward:
    """The graph in ONNX Runtime as a function of numpy arrays.

    Weights stay memory-mapped (no prepacking), so a large model is checked without a copy of it.

    Attributes:
        keeps: the graph can be asked for the logits of the last positions only.
    """

    def __init__(self, graph: Path) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        kept: list[str] = []
        if _weight_bytes(graph) > _MAP_ABOVE:
            options.add_session_config_entry("session.disable_prepacking", "1")
            kept.append("ConstantFolding")  # it would transpose every weight that has one row an output
        self._session = ort.InferenceSession(
            str(graph), options, providers=["CPUExecutionProvider"], disabled_optimizers=kept
        )
        self._names = [i.name for i in self._session.get_inputs()]
        # an input with a default is not among the inputs
        self.keeps = any(i.name == KEEP_INPUT for i in self._session.get_overridable_initializers())

    def __call__(self, tokens: Array, state: Sequence[Array], keep: int = 0) -> tuple[Array, list[Array]]:
        """Logits ``[B,T,V]``, or with ``keep`` ``[B,min(keep,T),V]``, and the new state."""
        feeds = dict(zip(self._names, [tokens, *state], strict=True))
        if keep:
            feeds[KEEP_INPUT] = np.array([keep], np.int64)
        logits, *new = self._session.run(None, feeds)
        return np.asarray(logits, np.float32), list(new)


def _weight_bytes(graph: Path) -> int:
    data = graph.with_name(DATA_NAME)  # a model of small tensors alone has none
    return data.stat().st_size if data.is_file() else 0


@dataclass(frozen=True)
class _Worst:
    error: float
    what: str
    cut: str


def chunk_error(forward: Forward, specs: Sequence[StateSpec], vocab_size: int, limit: int) -> _Worst:
    """The worst error of several cuts of one sequence against feeding it whole, from a used state."""
    rng = np.random.default_rng(7)
    length = min(17, limit // 2)
    warm = rng.integers(0, vocab_size, (2, min(5, limit - length)), dtype=np.int64)
    tokens = rng.integers(0, vocab_size, (2, length), dtype=np.int64)
    _, start = forward(warm, zero_state(specs, 2))
    whole, final = forward(tokens, start)
    worst = _Worst(0.0, "", "")
    for cut in _CUTS:
        logits, state, at = [], start, 0
        for size in cut:
            if at + size > length:
                break
            part, state = forward(tokens[:, at : at + size], state)
            logits.append(part)
            at += size
        if at < length:
            part, state = forward(tokens[:, at:], state)
            logits.append(part)
        error, what = _largest(specs, whole, final, np.concatenate(logits, 1), state)
        if not error <= worst.error:
            worst = _Worst(error, what, "+".join(map(str, cut)))
    return worst


@dataclass(frozen=True)
class _Sample:
    """Tokens [B,T], a used state, and what PyTorch makes of them."""

    tokens: Array
    start: Sequence[Array]
    wanted: tuple[Array, list[Array]]


def _sample(reference: Forward, specs: Sequence[StateSpec], batch: int, length: int, vocab: int) -> _Sample:
    rng = np.random.default_rng(batch * 1000 + length)
    warm = rng.integers(0, vocab, (batch, 2), dtype=np.int64)
    tokens = rng.integers(0, vocab, (batch, length), dtype=np.int64)
    _, start = reference(warm, zero_state(specs, batch))
    return _Sample(tokens, start, reference(tokens, start))


def _rms(values: Array) -> float:
    """RMS of the elements that are not zero: a cache that is still mostly empty must not count as small."""
    filled = np.count_nonzero(values)
    return float(np.sqrt(np.square(values, dtype=np.float64).sum() / filled)) if filled else 0.0


def _largest(
    specs: Sequence[StateSpec], want: Array, want_state: list[Array], got: Array, got_state: list[Array]
) -> tuple[float, str]:
    """The largest error of logits or a state tensor, relative to its RMS; NaN counts as infinite."""
    pairs = [("logits", want, got)]
    pairs += [(f"state {s.name}", a, b) for s, a, b in zip(specs, want_state, got_state, strict=True)]
    worst, name = 0.0, "logits"
    for what, a, b in pairs:
        if a.shape != b.shape:
            return float("inf"), f"{what} has shape {list(b.shape)} instead of {list(a.shape)}"
        scale = max(_rms(a), 1e-3)
        error = float(np.abs(a.astype(np.float64) - b).max()) / scale if a.size else 0.0
        if not np.isfinite(error):
            return float("inf"), f"{what} is not finite"
        if error > worst:
            worst, name = error, what
    return worst, name
