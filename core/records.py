"""What was measured, as rows: each repeats its whole configuration and holds the raw samples.

A mean, a percentile or an error bar is a method here and never a field, so that a row can always
be read again in another way. Rows are tagged by ``kind``; core/results.py reads and writes them.
Times are integer nanoseconds, sizes bytes, information nats unless a name says bits.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from xexport.core import stats

__all__ = [
    "AtPosition",
    "Bandwidth",
    "ChunkLaw",
    "Cut",
    "Drift",
    "Environment",
    "Fallback",
    "Fidelity",
    "Latency",
    "Memory",
    "OpTime",
    "OpTimes",
    "PairedLatency",
    "Passes",
    "Placed",
    "Prefill",
    "Record",
    "Setup",
    "Together",
    "Turns",
    "Window",
]

#: One number a token; None where the candidate's (or the reference's) logits were not finite.
PerToken = tuple[float | None, ...]


class Environment(msgspec.Struct, frozen=True):
    """Where a measurement ran; a version is None where the package is not installed."""

    cpu: str
    cores: int
    threads: int
    memory_bytes: int
    os: str
    python: str
    numpy: str
    onnxruntime: str | None
    torch: str | None
    xexport: str
    load_average: float | None = None


class Setup(msgspec.Struct, frozen=True):
    """The configuration that every row repeats.

    Attributes:
        model, target, bundle: family name, target name, name of the bundle's folder.
        runner: what was measured: ``torch``, ``onnx`` (fp32 graph) or ``bundle`` (the quantized one).
        text, text_sha256: name and hash of the text whose tokens were fed, empty if none was.
        date: UTC, ISO 8601.
        model_config, target_row: the frozen config and the target's TOML as plain data.
    """

    model: str
    target: str
    bundle: str
    runner: str
    text: str
    text_sha256: str
    environment: Environment
    date: str
    model_config: dict[str, Any] = {}
    target_row: dict[str, Any] = {}


class Fidelity(msgspec.Struct, frozen=True, tag_field="kind", tag="fidelity"):
    """A candidate's logits against a reference's, position by position, over one text.

    Attributes:
        reference: name of the reference runner; the candidate is ``setup.runner``.
        chunk: tokens (or frames) per call; in the chunk form the state was carried from call to call, in
            the whole form every call was one whole sequence.
        text_bytes: bytes of text that the scored tokens stand for (bits per byte divides by it).
        kl: KL(reference || candidate) in nats.
        nll_reference, nll_candidate: -log p(next token) in nats; empty for a model that was not made to
            predict the next token.
        same_top1: 1 where both rank the same token first.
        error_max: largest absolute logit error of the token.
        error_ms, reference_ms: mean square over the vocabulary of the logit error and of the
            reference's logits.
        non_finite: tokens where either gave a logit that is not finite.
    """

    setup: Setup
    reference: str
    chunk: int
    vocab_size: int
    text_bytes: int
    kl: PerToken
    nll_reference: PerToken
    nll_candidate: PerToken
    same_top1: tuple[int, ...]
    error_max: PerToken
    error_ms: PerToken
    reference_ms: PerToken
    non_finite: int = 0
    warnings: tuple[str, ...] = ()
    form: str = "chunk"

    @property
    def tokens(self) -> int:
        """Number of compared positions."""
        return len(self.kl)

    @property
    def scored(self) -> bool:
        """Whether the next token was scored: bits per byte and perplexity are nan if not."""
        return bool(self.nll_reference)

    @property
    def max_error(self) -> float:
        return _max(self.error_max)

    @property
    def rms_error(self) -> float:
        return math.sqrt(_mean(self.error_ms))

    @property
    def relative_rms_error(self) -> float:
        """RMS logit error over the RMS of the reference's logits."""
        return _ratio(self.rms_error, math.sqrt(_mean(self.reference_ms)))

    @property
    def relative_max_error(self) -> float:
        """Largest logit error over the RMS of the reference's logits."""
        return _ratio(self.max_error, math.sqrt(_mean(self.reference_ms)))

    @property
    def kl_mean(self) -> float:
        return _mean(self.kl)

    @property
    def kl_se(self) -> float:
        return stats.block_se(_array(self.kl))

    def kl_percentile(self, q: float) -> float:
        """The ``q``-th percentile of KL over tokens; 50 is the median, 100 the maximum."""
        values = _array(self.kl)
        return math.nan if self.non_finite else stats.percentile(list(values), q)

    @property
    def agreement(self) -> float:
        """Fraction of tokens with the same first-ranked token (a token that is not finite counts as no)."""
        return sum(self.same_top1) / len(self.same_top1) if self.same_top1 else math.nan

    @property
    def agreement_se(self) -> float:
        return stats.binomial_se(sum(self.same_top1), len(self.same_top1))

    def bits_per_byte(self, which: str) -> tuple[float, float]:
        """(bits per byte, standard error from block means) of ``reference`` or ``candidate``."""
        return self._bits(_array(self.nll_reference if which == "reference" else self.nll_candidate))

    @property
    def bits_lost(self) -> tuple[float, float]:
        """(bits per byte of candidate - reference, its standard error): paired by token, so the
        error bar is far smaller than that of either figure."""
        return self._bits(_array(self.nll_candidate) - _array(self.nll_reference))

    def perplexity(self, which: str) -> tuple[float, float]:
        """(perplexity per token, standard error by the delta method) of ``reference`` or ``candidate``."""
        nll = _array(self.nll_reference if which == "reference" else self.nll_candidate)
        value = math.exp(min(_mean(nll), 700.0)) if len(nll) else math.nan
        return value, value * stats.block_se(nll)

    def _bits(self, nats: NDArray[np.float64]) -> tuple[float, float]:
        if not len(nats) or not self.text_bytes:
            return math.nan, math.nan
        scale = len(nats) / self.text_bytes / math.log(2)
        return float(nats.mean() * scale), stats.block_se(nats) * scale


class Window(msgspec.Struct, frozen=True):
    """Sums over positions ``[start, stop)`` of a stream, and the state's error at ``stop``.

    ``state_errors``: state tensor -> RMS error over the reference's RMS (absolute RMS where the
    reference's state is all zero), None where it is not finite.
    """

    start: int
    stop: int
    kl_sum: float | None
    kl_max: float | None
    nll_reference_sum: float | None
    nll_candidate_sum: float | None
    same_top1: int
    error_max: float | None
    error_ms_sum: float | None
    reference_ms_sum: float | None
    state_errors: dict[str, float | None]

    @property
    def tokens(self) -> int:
        return self.stop - self.start

    @property
    def kl_mean(self) -> float:
        return _number(self.kl_sum) / self.tokens

    @property
    def rms_error(self) -> float:
        return math.sqrt(_number(self.error_ms_sum) / self.tokens)

    @property
    def relative_rms_error(self) -> float:
        return _ratio(self.rms_error, math.sqrt(_number(self.reference_ms_sum) / self.tokens))

    @property
    def agreement(self) -> float:
        return self.same_top1 / self.tokens

    @property
    def bits_lost(self) -> float:
        """Bits per token that the candidate needs more than the reference."""
        lost = _number(self.nll_candidate_sum) - _number(self.nll_reference_sum)
        return lost / self.tokens / math.log(2)

    @property
    def worst_state(self) -> tuple[str, float]:
        """(name, error) of the state tensor that is furthest off; ("", nan) if there is no state."""
        if not self.state_errors:
            return "", math.nan
        name = max(self.state_errors, key=lambda n: _number(self.state_errors[n], math.inf))
        return name, _number(self.state_errors[name], math.inf)


class Drift(msgspec.Struct, frozen=True, tag_field="kind", tag="drift"):
    """Fidelity as a function of the token index over one long stream."""

    setup: Setup
    reference: str
    chunk: int
    windows: tuple[Window, ...]
    non_finite: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        return self.windows[-1].stop if self.windows else 0


class Cut(msgspec.Struct, frozen=True):
    """One way of cutting a sequence, and how far its result is from the whole's.

    ``logit_error`` is the largest absolute error, ``logit_rms`` the RMS of the whole's logits,
    ``state_error`` the largest relative RMS error of a final state tensor (named ``state``).
    None: not finite.
    """

    pieces: tuple[int, ...]
    logit_error: float | None
    logit_rms: float
    state_error: float | None
    state: str

    @property
    def error(self) -> float:
        """The larger of the relative logit error (max error / RMS of logits) and the state error."""
        if self.logit_error is None or self.state_error is None:
            return math.inf
        return max(_ratio(self.logit_error, self.logit_rms), self.state_error)


class ChunkLaw(msgspec.Struct, frozen=True, tag_field="kind", tag="chunk_law"):
    """Whole = chunks = steps, checked on one runner from a state that is not the initial one.

    ``start`` tokens were fed first; ``tokens`` were then fed whole and in every cut.
    """

    setup: Setup
    start: int
    tokens: int
    seed: int
    cuts: tuple[Cut, ...]
    warnings: tuple[str, ...] = ()

    @property
    def worst(self) -> Cut:
        return max(self.cuts, key=lambda cut: cut.error)

    @property
    def error(self) -> float:
        """The error of the worst cut (relative; infinite where something was not finite)."""
        return self.worst.error if self.cuts else math.nan


class Prefill(msgspec.Struct, frozen=True):
    """Raw times of one call that feeds ``length`` tokens to an empty state.

    ``logits``: of how many of the last positions the runner computed logits: 1 is what a prompt
    needs, 0 means of every one (all that the runner can do, or a row from before this was told).
    """

    length: int
    ns: tuple[int, ...]
    logits: int = 0

    @property
    def tokens_per_s(self) -> float:
        return self.length * 1e9 / stats.percentile(self.ns, 50)

    @property
    def median_ms(self) -> float:
        return stats.percentile(self.ns, 50) / 1e6


class AtPosition(msgspec.Struct, frozen=True):
    """Raw times of single-token steps beginning at ``position`` of a stream."""

    position: int
    ns: tuple[int, ...]

    @property
    def median_ms(self) -> float:
        return stats.percentile(self.ns, 50) / 1e6


class Latency(msgspec.Struct, frozen=True, tag_field="kind", tag="latency"):
    """Raw times of one runner, in nanoseconds.

    Attributes:
        warmup: steps made and thrown away before ``step_ns``.
        step_ns: calls that feed one token (a row of ``batch``) with the state carried.
        prefill: calls on an empty state, by length.
        load_ns: opening a fresh session; empty if not measured.
        first_token_ns: in each such session, the first call, feeding ``prompt`` tokens.
        positions: step times further along the stream (a growing cache shows here).
        unit: tokens (or frames) that one step feeds.
    """

    setup: Setup
    batch: int
    warmup: int
    step_ns: tuple[int, ...]
    prefill: tuple[Prefill, ...] = ()
    load_ns: tuple[int, ...] = ()
    prompt: int = 0
    first_token_ns: tuple[int, ...] = ()
    positions: tuple[AtPosition, ...] = ()
    unit: int = 1

    def step_ms(self, q: float) -> float:
        """The ``q``-th percentile of the step time in milliseconds."""
        return stats.percentile(self.step_ns, q) / 1e6

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens per second at the median step (all rows of the batch together)."""
        return self.batch * self.unit * 1e3 / self.step_ms(50)

    @property
    def prefill_tokens_per_s(self) -> float:
        """Tokens per second of the longest prefill measured; nan if none was."""
        return max(self.prefill, key=lambda p: p.length).tokens_per_s if self.prefill else math.nan

    @property
    def load_ms(self) -> float:
        return stats.percentile(self.load_ns, 50) / 1e6

    @property
    def first_token_ms(self) -> float:
        return stats.percentile(self.first_token_ns, 50) / 1e6


class Passes(msgspec.Struct, frozen=True, tag_field="kind", tag="passes"):
    """Raw times of a model in the whole-sequence form, in nanoseconds: every call is one whole sequence.

    Attributes:
        passes: calls by length, the logits of all positions computed.
        load_ns: opening a fresh session; empty if not measured.
        first_ns: in each such session, the first call, of ``first`` tokens or frames.
    """

    setup: Setup
    batch: int
    passes: tuple[Prefill, ...]
    load_ns: tuple[int, ...] = ()
    first: int = 0
    first_ns: tuple[int, ...] = ()

    @property
    def longest(self) -> Prefill:
        """The calls of the longest sequence."""
        return max(self.passes, key=lambda p: p.length)

    @property
    def load_ms(self) -> float:
        return stats.percentile(self.load_ns, 50) / 1e6

    @property
    def first_ms(self) -> float:
        return stats.percentile(self.first_ns, 50) / 1e6


class PairedLatency(msgspec.Struct, frozen=True, tag_field="kind", tag="paired_latency"):
    """Times of two runners in alternate rounds, so that both saw the same machine.

    ``setup.runner`` is the one measured, ``other`` the one it is compared with; row i of each holds
    the raw nanoseconds of round i. Calls are single steps, or if ``length`` is set whole sequences of that
    many tokens (or frames).
    """

    setup: Setup
    other: str
    ns: tuple[tuple[int, ...], ...]
    other_ns: tuple[tuple[int, ...], ...]
    length: int = 0

    @property
    def speedup(self) -> tuple[float, float, float]:
        """median(other) / median(runner) with its 95% bootstrap interval: above 1 the runner is faster."""
        return stats.median_ratio(self.other_ns, self.ns)


class Turns(msgspec.Struct, frozen=True):
    """Raw times of one kind of call, one row of samples a round.

    ``at``: where in the stream the steps began, or of how many tokens the prefill was.
    """

    at: int
    ns: tuple[tuple[int, ...], ...]

    @property
    def median_ms(self) -> float:
        return stats.percentile([n for row in self.ns for n in row], 50) / 1e6


class Together(msgspec.Struct, frozen=True, tag_field="kind", tag="together"):
    """One bundle's share of a comparison in which several bundles took turns, round by round.

    Every bundle of a comparison keeps a row of its own, with the same ``run`` and ``members``. Row i of
    ``steps[...].ns`` was timed in the same round as row i of the others at that position, so ratios are
    taken round by round (:func:`xexport.core.stats.median_ratio`).

    Attributes:
        run: names the comparison; equal in the rows of all its bundles.
        members: the bundles that took turns, in the order given.
        steps: single-token calls at increasing positions of the stream.
        prefill: calls on an empty state, by length; the logits after the last token are asked for.
    """

    setup: Setup
    run: str
    members: tuple[str, ...]
    batch: int
    steps: tuple[Turns, ...] = ()
    prefill: tuple[Turns, ...] = ()

    def step_at(self, position: int) -> Turns | None:
        """The steps that began at ``position``, if they were timed."""
        return next((t for t in self.steps if t.at == position), None)

    def prefill_of(self, length: int) -> Turns | None:
        """The prefills of ``length`` tokens, if they were timed."""
        return next((t for t in self.prefill if t.at == length), None)


class Memory(msgspec.Struct, frozen=True, tag_field="kind", tag="memory"):
    """Resident memory of a fresh process that loads a bundle and streams; bytes.

    ``start_rss`` is the interpreter with the runtime imported, before the bundle is opened.
    """

    setup: Setup
    weights_bytes: int
    state_bytes: int
    tokens: int
    start_rss: int
    loaded_rss: int
    end_rss: int
    peak_rss: int

    @property
    def added_rss(self) -> int:
        """What the bundle itself costs: the peak above the process before it was opened."""
        return max(self.peak_rss - self.start_rss, 0)


class OpTime(msgspec.Struct, frozen=True):
    """All nodes of one operator type on one execution provider, over the profiled steps.

    ``ns`` is their own time: a control-flow node's body counts under the body's operators.
    """

    op: str
    provider: str
    nodes: int
    calls: int
    ns: int


class Fallback(msgspec.Struct, frozen=True):
    """Nodes of one operator that another provider ran than the target's, all for the same reason.

    ``ns`` is their own time over the profiled calls.
    """

    op: str
    provider: str
    nodes: tuple[str, ...]
    ns: int
    why: str


class Placed(msgspec.Struct, frozen=True):
    """What one execution provider did: nodes of the graph, microseconds a call, share of the nodes' time."""

    provider: str
    nodes: int
    us_per_call: float
    share: float


class OpTimes(msgspec.Struct, frozen=True, tag_field="kind", tag="op_times"):
    """Where the time of a step goes, and which execution provider ran what, from the runtime's own profile.

    ``form`` says what was fed: ``step`` (one token a call), ``prefill`` or ``whole``; ``run_ns`` are the
    runtime's times of whole calls, under profiling (slower than without).

    Attributes:
        wanted: the execution provider of the target, empty in rows from before this was told.
        assigned: provider -> nodes of the graph that it was given. A provider that compiles runs many of
            them as one, which ``ops`` count as one. Empty if the runtime does not say.
        fallbacks: what another provider ran than the one wanted, the dearest first.
    """

    setup: Setup
    form: str
    calls: int
    tokens_per_call: int
    ops: tuple[OpTime, ...]
    run_ns: tuple[int, ...]
    wanted: str = ""
    assigned: dict[str, int] = {}
    fallbacks: tuple[Fallback, ...] = ()

    @property
    def placement(self) -> dict[str, int]:
        """Execution provider -> number of nodes it ran."""
        counts: dict[str, int] = {}
        for row in self.ops:
            counts[row.provider] = counts.get(row.provider, 0) + row.nodes
        return counts

    @property
    def placed(self) -> list[Placed]:
        """One row an execution provider, that of the target first, then the dearest."""
        times: dict[str, int] = {}
        for row in self.ops:
            times[row.provider] = times.get(row.provider, 0) + row.ns
        counts = self.placement | self.assigned
        total, calls = sum(times.values()), max(self.calls, 1)
        rows = [
            Placed(name, nodes, times.get(name, 0) / 1e3 / calls, _ratio(times.get(name, 0), total))
            for name, nodes in counts.items()
        ]
        return sorted(rows, key=lambda r: (r.provider != self.wanted, -r.us_per_call))

    @property
    def warnings(self) -> tuple[str, ...]:
        """A sentence for every reason why nodes did not run where the target says."""
        return tuple(
            f"{len(f.nodes)} {f.op} node{'s' if len(f.nodes) > 1 else ''} ran on {f.provider} instead of "
            f"{self.wanted} ({f.ns / 1e3 / max(self.calls, 1):.3g} us a {self.form}): {f.why}"
            for f in self.fallbacks
        )

    @property
    def by_op(self) -> list[tuple[str, float, int]]:
        """(operator, microseconds per call, nodes), the dearest first, providers together."""
        table: dict[str, tuple[int, int]] = {}
        for row in self.ops:
            ns, nodes = table.get(row.op, (0, 0))
            table[row.op] = (ns + row.ns, nodes + row.nodes)
        rows = [(op, ns / 1e3 / max(self.calls, 1), nodes) for op, (ns, nodes) in table.items()]
        return sorted(rows, key=lambda r: -r[1])


class Bandwidth(msgspec.Struct, frozen=True, tag_field="kind", tag="bandwidth"):
    """How fast this machine reads memory, and how much a step must read at least.

    ``read_ns``: raw times of reading ``buffer_bytes`` with ``threads`` threads; the fastest is taken
    as the machine's, which makes the floor the lowest and the fraction honest.
    """

    setup: Setup
    threads: int
    buffer_bytes: int
    read_ns: tuple[int, ...]
    bytes_per_token: int

    @property
    def bytes_per_s(self) -> float:
        return self.buffer_bytes * 1e9 / min(self.read_ns) if self.read_ns else math.nan

    @property
    def floor_ms(self) -> float:
        """The time that reading one token's weights takes at that bandwidth."""
        return self.bytes_per_token * 1e3 / self.bytes_per_s

    def fraction(self, step_ms: float) -> float:
        """floor / measured: 1 is a step that only waits for memory; a model that fits the cache can
        exceed it."""
        return _ratio(self.floor_ms, step_ms)


Record = (
    Fidelity | Drift | ChunkLaw | Latency | Passes | PairedLatency | Together | Memory | OpTimes | Bandwidth
)


def _array(values: PerToken | NDArray[np.float64]) -> NDArray[np.float64]:
    """float64, None as nan (so that a figure over it is nan, never quietly finite)."""
    return np.array(values, dtype=np.float64)


def _mean(values: PerToken | NDArray[np.float64]) -> float:
    return float(_array(values).mean()) if len(values) else math.nan


def _max(values: PerToken) -> float:
    return float(_array(values).max()) if values else math.nan


def _number(value: float | None, otherwise: float = math.nan) -> float:
    return otherwise if value is None else value


def _ratio(value: float, scale: float) -> float:
    """value / scale; 0/0 is 0 (nothing is off), x/0 infinite."""
    if scale:
        return value / scale
    return value if math.isnan(value) else (math.inf if value else 0.0)
