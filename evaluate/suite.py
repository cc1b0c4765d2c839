"""What is measured of every bundle, in which order and at which size."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from xexport.core.contract import Contract
from xexport.core.errors import InputError
from xexport.core.manifest import Manifest
from xexport.core.progress import Progress
from xexport.core.records import ChunkLaw, Record, Setup
from xexport.core.runner import Runner
from xexport.evaluate.bandwidth import measure_bandwidth
from xexport.evaluate.chunks import chunk_law
from xexport.evaluate.corpus import Corpus
from xexport.evaluate.drift import compare_and_drift
from xexport.evaluate.environment import make_setup
from xexport.evaluate.latency import SAMPLES, measure_latency, paired_latency
from xexport.evaluate.memory import measure_memory
from xexport.evaluate.optimes import profile_ops
from xexport.evaluate.whole import compare_whole, measure_passes, paired_passes, windows
from xexport.runtimes.bundle import Bundle

__all__ = ["Sizes", "accuracy", "law", "setup_for", "sizes_asked", "sizes_for", "speed"]

_LARGE = 50_000_000  # parameters
_BUDGET = 8.0  # seconds of the slowest runner's time for each of fidelity and drift
_PROBE = 64  # tokens


@dataclass(frozen=True)
class Sizes:
    """How much is measured; a slow model gets less, so that an export stays a matter of minutes.

    ``timed`` False leaves out everything that is about speed and memory: accuracy alone.
    """

    fidelity_tokens: int = 8192
    drift_tokens: int = 8192
    chunk_tokens: int = 96
    steps: int = 200
    prefill: tuple[int, ...] = (128, 512)
    positions: tuple[int, ...] = (100, 1000, 1900)
    timed: bool = True


def sizes_for(parameters: int, *runners: Runner) -> Sizes:
    """The amount of work, from the model's size and, if given, the speed of the slowest of its runners."""
    sizes = Sizes()
    if parameters > _LARGE:
        sizes = Sizes(1024, 1024, 48, 40, (128,), ())
    if not runners:
        return sizes
    slowest = max(_seconds_per_token(runner) for runner in runners)
    affordable = int(_BUDGET / slowest) // 256 * 256
    tokens = max(512, min(sizes.fidelity_tokens, affordable))
    return replace(sizes, fidelity_tokens=tokens, drift_tokens=tokens)


def sizes_asked(
    sizes: Sizes,
    contract: Contract,
    *,
    steps: int | None = None,
    prefill: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
) -> Sizes:
    """``sizes`` with what a user named in the place of its own.

    Args:
        contract: of the model that will be timed.
        steps: single tokens to time, at least 1.
        prefill: lengths of prompts, each at least 1.
        positions: where in the stream steps are timed again; 0 is its beginning.

    Raises:
        InputError: a number that is too small, or a position that the model's stream does not reach.
        FormError: positions of a model in the whole-sequence form.
    """
    asked = {
        "steps": () if steps is None else (steps,),
        "prefill": prefill or (),
        "position": positions or (),
    }
    for name, values in asked.items():
        least = 0 if name == "position" else 1
        if values and min(values) < least:
            raise InputError(f"--{name} is too small", got=min(values), allowed=f"{least} or more")
    if positions:
        contract.require_state("be timed at a position of a stream")
        last = (
            None if contract.max_tokens is None else contract.max_tokens - SAMPLES * contract.inputs.multiple
        )
        far = [p for p in positions if last is not None and p > last]
        if far:
            raise InputError(
                f"the model's stream ends before --position {far[0]} is timed",
                got=f"{far[0]}, and {SAMPLES} steps from there",
                allowed=f"up to {last}: its longest stream is {contract.max_tokens}",
            )
    return replace(
        sizes,
        steps=steps or sizes.steps,
        prefill=tuple(prefill or sizes.prefill),
        positions=tuple(sorted(set(positions or sizes.positions))),
    )


def _seconds_per_token(runner: Runner) -> float:
    contract = runner.contract
    count = contract.nearest(_PROBE)
    values = contract.inputs.random(np.random.default_rng(0), runner.batch, count, runner.vocab_size)
    runner.feed(values)
    runner.reset()
    began = time.perf_counter()
    runner.feed(values)
    seconds = time.perf_counter() - began
    runner.reset()
    return seconds / count


def setup_for(
    manifest: Manifest,
    bundle: str,
    corpus: Corpus | None,
    threads: int | None = None,
    runtime: str | None = None,
) -> Setup:
    """The configuration that every row repeats.

    What another runtime than the bundle's own gives is a runner of its own, ``bundle with RUNTIME``, so that
    no report takes it for the bundle's.
    """
    return make_setup(
        runner="bundle" if runtime in (None, manifest.runtime) else f"bundle with {runtime}",
        model=manifest.model.family,
        target=manifest.target,
        bundle=bundle,
        text=corpus.name if corpus else "",
        text_sha256=corpus.sha256 if corpus else "",
        threads=threads,
        model_config=manifest.model.config,
        target_row=manifest.target_row,
    )


def accuracy(
    reference: Runner,
    candidates: Mapping[str, Runner],
    corpus: Corpus,
    setup: Setup,
    sizes: Sizes,
    progress: Progress,
    *,
    reference_name: str = "torch",
) -> list[Record]:
    """Fidelity of the candidates against the reference, which runs once; in the chunk form drift too."""
    if not reference.contract.streams:
        pieces = windows(corpus.tokens, reference, clips=corpus.clips, count=sizes.fidelity_tokens)
        found = compare_whole(
            reference,
            candidates,
            pieces,
            setup=setup,
            bytes_per_token=corpus.bytes / len(corpus.tokens),
            reference_name=reference_name,
            progress=progress,
        )
        return [*found.values()]
    limits = [r.max_tokens + 1 for r in (reference, *candidates.values()) if r.max_tokens is not None]
    part = corpus.head(min(max(sizes.fidelity_tokens, sizes.drift_tokens), *limits, len(corpus.tokens)))
    scored = max(1, round(part.bytes * (len(part.tokens) - 1) / len(part.tokens)))
    rows, drifts = compare_and_drift(
        reference,
        candidates,
        part.tokens,
        setup=setup,
        text_bytes=scored,
        reference_name=reference_name,
        progress=progress,
    )
    return [*rows.values(), *drifts.values()]


def law(runner: Runner, corpus: Corpus, setup: Setup, sizes: Sizes, progress: Progress) -> ChunkLaw:
    """The chunk law of the bundle as it will run."""
    tokens = corpus.head(sizes.chunk_tokens * runner.contract.inputs.multiple).tokens
    return chunk_law(runner, tokens, setup=setup, progress=progress)


def speed(
    bundle: Bundle,
    others: Mapping[str, Runner],
    corpus: Corpus,
    setup: Setup,
    sizes: Sizes,
    progress: Progress,
    *,
    threads: int = 0,
    runtime: str | None = None,
) -> list[Record]:
    """Latency, memory, per-operator time and bandwidth of a bundle, and its speed against others'.

    Of a model in the whole-sequence form: whole passes, memory and per-operator time. ``runtime`` is the one
    that runs the bundle, its own by default.
    """
    streams = bundle.manifest.model.contract.streams
    timed = _stream_times if streams else _whole_times
    rows = timed(bundle, others, corpus, setup, sizes, progress, threads, runtime)
    progress.stage("memory and operators")
    rows.append(
        measure_memory(
            bundle.path,
            setup=setup,
            weights_bytes=bundle.bytes_of_weights,
            state_bytes=bundle.bytes_of_state(),
            runtime=runtime,
        )
    )
    forms = [(min(50, sizes.steps), 1), (3, sizes.prefill[0])] if streams else [(5, sizes.prefill[0])]
    rows += [
        profile_ops(
            bundle.path,
            corpus.tokens,
            setup=setup,
            steps=steps,
            tokens_per_call=count,
            threads=threads,
            runtime=runtime,
        )
        for steps, count in forms
    ]
    if streams:
        rows.append(measure_bandwidth(_bytes_per_token(bundle.manifest), setup=setup, repeats=5))
    return rows


def _stream_times(
    bundle: Bundle,
    others: Mapping[str, Runner],
    corpus: Corpus,
    setup: Setup,
    sizes: Sizes,
    progress: Progress,
    threads: int,
    runtime: str | None,
) -> list[Record]:
    """Steps and prefill of a bundle, and of the others, with steps in turns."""
    runner = bundle.stream(threads=threads, runtime=runtime)
    tokens = corpus.tokens
    rows: list[Record] = [
        measure_latency(
            runner,
            tokens,
            setup=setup,
            steps=sizes.steps,
            prefill=sizes.prefill,
            positions=sizes.positions,
            open_runner=lambda: Bundle(bundle.path, bundle.manifest).stream(threads=threads, runtime=runtime),
            progress=progress,
        )
    ]
    for name, other in others.items():
        brief = msgspec.structs.replace(setup, runner=name)
        rows.append(
            measure_latency(
                other,
                tokens,
                setup=brief,
                steps=max(20, sizes.steps // 4),
                prefill=sizes.prefill[-1:],
                repeats=3,
                progress=progress,
            )
        )
        rows.append(
            paired_latency(
                runner, other, tokens, setup=setup, other_name=name, rounds=12, steps=5, progress=progress
            )
        )
    return rows


def _whole_times(
    bundle: Bundle,
    others: Mapping[str, Runner],
    corpus: Corpus,
    setup: Setup,
    sizes: Sizes,
    progress: Progress,
    threads: int,
    runtime: str | None,
) -> list[Record]:
    """Whole sequences of several lengths, of a bundle and of the others; one length in turns."""
    runner, values = bundle.stream(threads=threads, runtime=runtime), corpus.tokens
    lengths = (max(sizes.prefill[0] // 4, 1), *sizes.prefill)
    rows: list[Record] = [
        measure_passes(
            runner,
            values,
            setup=setup,
            lengths=lengths,
            open_runner=lambda: Bundle(bundle.path, bundle.manifest).stream(threads=threads, runtime=runtime),
            progress=progress,
        )
    ]
    for name, other in others.items():
        brief = msgspec.structs.replace(setup, runner=name)
        rows += [
            measure_passes(other, values, setup=brief, lengths=lengths[-1:], repeats=3, progress=progress),
            paired_passes(
                runner,
                other,
                values,
                setup=setup,
                other_name=name,
                length=lengths[-1],
                progress=progress,
            ),
        ]
    return rows


def _bytes_per_token(manifest: Manifest) -> int:
    """Weights that one step must read: all but the embedding table, of which it reads one row."""
    return sum(d.bytes for d in manifest.decisions if d.role != "embedding")
