"""The verdict in words: what was paid in accuracy for what speed, from records alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from xexport.core.manifest import Manifest
from xexport.core.records import ChunkLaw, Fidelity, Latency, PairedLatency, Record
from xexport.report import format as fmt
from xexport.report.entries import all_of, compared_latency, fidelity_of, last_of, latency_of, same_machine
from xexport.report.jsonout import weights_bytes

__all__ = [
    "BLUR",
    "RUNNER_NAMES",
    "Sentence",
    "Speed",
    "accuracy_sentences",
    "headline",
    "price",
    "size_sentences",
    "speed_against",
    "verdict",
]

RUNNER_NAMES = {"torch": "PyTorch", "onnx": "ONNX fp32", "bundle": "this bundle"}

#: A loss of more than this share of the reference's bits per byte is called worse.
WORSE = 0.01
#: Without an interval (runs that were not interleaved) a ratio nearer to 1 than this says nothing.
BLUR = 0.05


class Sentence(NamedTuple):
    """One statement; ``tone`` is ``good``, ``bad`` or ``plain``."""

    tone: str
    text: str


class Speed(NamedTuple):
    """How many times as fast as ``other`` a bundle's step is; an interval only from paired rounds.

    ``length``: of the whole sequences that were timed instead of steps, 0 if steps were.
    """

    other: str
    ratio: float
    low: float
    high: float
    paired: bool
    length: int = 0

    @property
    def slower(self) -> bool:
        return self.high < 1 if self.paired else self.ratio < 1 - BLUR

    @property
    def faster(self) -> bool:
        return self.low > 1 if self.paired else self.ratio > 1 + BLUR


def speed_against(records: Sequence[Record], other: str) -> Speed | None:
    """The bundle's step against another runner's: from interleaved rounds where there are any."""
    mine = latency_of(records)
    pairs = [p for p in all_of(records, PairedLatency, "bundle") if p.other == other and not p.length]
    pairs = [p for p in pairs if mine is None or same_machine(p, mine)]
    if pairs:
        return Speed(other, *pairs[-1].speedup, True)
    run = compared_latency(records)
    if other not in run:
        return None
    return Speed(other, run[other].step_ms(50) / run["bundle"].step_ms(50), math.nan, math.nan, False)


def headline(records: Sequence[Record]) -> str:
    """What was paid for what, in one line; empty if neither was measured."""
    row, speed = fidelity_of(records), speed_against(records, "torch") or speed_against(records, "onnx")
    parts = []
    if speed is not None:
        name = RUNNER_NAMES[speed.other]
        if speed.slower:
            parts.append(f"a step takes {fmt.times(1 / speed.ratio)} as long as in {name}")
        else:
            parts.append(
                f"{fmt.times(speed.ratio)} as fast as {name}" if speed.faster else f"As fast as {name}"
            )
    if row is not None:
        parts.append(price(row))
    text = ", ".join(parts)
    if speed is not None and _busy(records):
        text += " (timed on a busy machine)"
    return f"{text[0].upper()}{text[1:]}." if text else ""


def price(row: Fidelity) -> str:
    """What was paid in accuracy, as the end of a sentence."""
    if row.non_finite:
        return "but broken: it gives values that are not finite"
    if not row.scored:
        reference = RUNNER_NAMES.get(row.reference, row.reference)
        return (
            f"with the same first choice as {reference} at {fmt.percent(row.agreement, 2)} of the positions"
        )
    lost, error = row.bits_lost
    before = row.bits_per_byte("reference")[0]
    if math.isnan(lost):
        return "but broken: it gives values that are not finite"
    if abs(lost) <= 2 * error or not before:
        return "at no measurable loss"
    more = "more" if lost > 0 else "fewer"
    return f"for {fmt.figure(100 * abs(lost) / before, 2)}% {more} bits per byte"


def verdict(manifest: Manifest, records: Sequence[Record]) -> list[Sentence]:
    """Speed, accuracy, size and the chunk law, one sentence each; nothing that was not measured."""
    found = [
        *_speed(records, manifest.model.input.unit),
        *accuracy_sentences(records),
        *_distilled(records),
        *size_sentences(manifest),
        *_law(records, manifest.model.input.unit),
    ]
    if not any(isinstance(r, Fidelity | Latency) for r in records):
        found.append(
            Sentence(
                "plain",
                "Neither accuracy nor speed was measured: run “xexport validate” and “xexport profile”.",
            )
        )
    return found


def _speed(records: Sequence[Record], unit: str) -> list[Sentence]:
    latency = latency_of(records)
    if latency is None:
        return []
    threads = latency.setup.environment.threads
    of = f" of {latency.unit} {unit}s" if latency.unit > 1 else ""
    median, slow = fmt.ms(latency.step_ms(50)), fmt.ms(latency.step_ms(99))
    found = [
        Sentence(
            "plain",
            f"A step{of} takes {median} here (median; 99% within {slow}), "
            f"which is {fmt.count(latency.decode_tokens_per_s)} {unit}s per second "
            f"on {threads} thread{'s' if threads != 1 else ''} of {latency.setup.environment.cpu}.",
        )
    ]
    if _busy(records):
        facts = latency.setup.environment
        found.append(
            Sentence(
                "bad",
                f"The machine was busy while this was timed (load {facts.load_average:.1f} on {facts.cores} "
                "cores): times are too long, and ratios uncertain. Run “xexport profile” when it is idle.",
            )
        )
    for other in ("onnx", "torch"):
        speed = speed_against(records, other)
        if speed is not None:
            found.append(_speed_sentence(speed))
    prefill = _prefill(compared_latency(records), unit)
    return [*found, prefill] if prefill else found


def _prefill(run: Mapping[str, Latency], unit: str) -> Sentence | None:
    """Prefill against fp32, at the longest prompt that both were timed with in one run."""
    other = run.get("onnx") or run.get("torch")
    speeds = {p.length: p.tokens_per_s for p in other.prefill} if other else {}
    common = [p for p in run["bundle"].prefill if p.length in speeds] if other else []
    if other is None or not common:
        return None
    longest = max(common, key=lambda p: p.length)
    ratio = longest.tokens_per_s / speeds[longest.length]
    name = RUNNER_NAMES.get(other.setup.runner, other.setup.runner)
    rest = f"{fmt.count(longest.tokens_per_s)} {unit}s per second in a call of {longest.length}"
    how = "timed one after the other, without an interval"
    if ratio < 1 - BLUR:
        return Sentence(
            "bad", f"Prefill is slower than {name} here: {fmt.times(ratio)} as fast, {rest} ({how})."
        )
    tone, much = (
        ("good", fmt.times(ratio)) if ratio > 1 + BLUR else ("plain", f"{fmt.times(ratio)}, that is, about")
    )
    return Sentence(tone, f"Prefill is {much} as fast as {name}: {rest} ({how}).")


def _busy(records: Sequence[Record]) -> bool:
    """Whether other work than the export's own took the machine while the bundle was timed."""
    latency = latency_of(records)
    load = latency.setup.environment.load_average if latency else None
    return latency is not None and load is not None and load > latency.setup.environment.cores + 1


def _speed_sentence(speed: Speed) -> Sentence:
    name = RUNNER_NAMES[speed.other]
    how = (
        f"95% interval {fmt.figure(speed.low)} to {fmt.figure(speed.high)}, measured in alternate rounds"
        if speed.paired
        else "from separate runs, without an interval"
    )
    if speed.slower:
        longer = fmt.times(1 / speed.ratio)
        text = f"This target makes the model slower than {name} here: a step takes {longer} as long"
        if speed.paired:
            how = (
                f"95% interval {fmt.figure(1 / speed.high)} to {fmt.figure(1 / speed.low)}, "
                "measured in alternate rounds"
            )
        return Sentence("bad", f"{text} ({how}).")
    if speed.faster:
        return Sentence("good", f"That is {fmt.times(speed.ratio)} as fast as {name} ({how}).")
    return Sentence("plain", f"That is as fast as {name}: {fmt.times(speed.ratio)} ({how}).")


def accuracy_sentences(records: Sequence[Record]) -> list[Sentence]:
    """What was lost, in bits per byte if the next token was scored, and how near the logits are."""
    row = fidelity_of(records)
    if row is None:
        return []
    if row.non_finite:
        return [
            Sentence(
                "bad",
                f"The bundle is broken: {row.non_finite} of {row.tokens} positions gave logits that are not "
                "finite, so no accuracy can be stated.",
            )
        ]
    if not row.scored:
        return [Sentence("plain", _unscored(row))]
    lost, error = row.bits_lost
    before, after = row.bits_per_byte("reference")[0], row.bits_per_byte("candidate")[0]
    share = lost / before if before else math.nan
    where = f"on {fmt.count(row.tokens)} tokens of {row.setup.text or 'the given text'}"
    reference = RUNNER_NAMES.get(row.reference, row.reference)
    figures = f"{before:.4f} in {reference}, {after:.4f} in the bundle"
    same = (
        f"Both rank the same token first {fmt.percent(row.agreement, 2)} of the time "
        f"(± {fmt.percent(row.agreement_se, 2)})"
    )
    most = fmt.figure(row.kl_percentile(100))
    tail = f"{same}; the mean KL divergence is {fmt.figure(row.kl_mean)} nats, at most {most}."
    paid = f"{fmt.plus_minus(lost, error)} bits per byte ({fmt.figure(100 * share, 2)}%)"
    if share > WORSE and lost > 2 * error:
        head = Sentence(
            "bad", f"This target makes the model worse than fp32: it costs {paid} {where}: {figures}."
        )
    elif lost > 2 * error:
        head = Sentence("plain", f"It costs {paid} {where}: {figures}.")
    elif lost < -2 * error:
        head = Sentence(
            "plain",
            f"It predicts this text better than the reference, by {fmt.plus_minus(-lost, error)} bits per "
            f"byte, {where}: chance, not skill, as quantization adds no knowledge.",
        )
    else:
        same_bits = f"{after:.4f} bits per byte in the bundle, {before:.4f} in {reference}"
        head = Sentence("good", f"No loss can be measured {where}: {same_bits}.")
    return [head, Sentence("plain", tail)]


def _unscored(row: Fidelity) -> str:
    reference = RUNNER_NAMES.get(row.reference, row.reference)
    return (
        f"At {fmt.percent(row.agreement, 2)} (± {fmt.percent(row.agreement_se, 2)}) of "
        f"{fmt.count(row.tokens)} positions of {row.setup.text or 'the given text'} the bundle and "
        f"{reference} rank the same output first; the mean KL divergence is {fmt.figure(row.kl_mean)} nats, "
        f"at most {fmt.figure(row.kl_percentile(100))}."
    )


def _distilled(records: Sequence[Record]) -> list[Sentence]:
    """What approximated filters cost before anything was exported, against the exact ones."""
    row = fidelity_of(records, "distilled")
    if row is None:
        return []
    before, after = row.bits_per_byte("reference")[0], row.bits_per_byte("candidate")[0]
    worse = not row.bits_lost[0] <= WORSE * before
    text = (
        f"Its filters are distilled: in PyTorch, over {fmt.count(row.tokens)} tokens, that takes it from "
        f"{fmt.figure(before, 4)} to {fmt.figure(after, 4)} bits per byte (KL {fmt.figure(row.kl_mean)} nats "
        f"a token, the same token first at {fmt.percent(row.agreement, 1)}). All other figures compare this "
        "bundle with the distilled model."
    )
    return [Sentence("bad" if worse else "good", text)]


def size_sentences(manifest: Manifest) -> list[Sentence]:
    """Bytes of the model, against its fp32 size."""
    weights = weights_bytes(manifest)
    full = 4 * manifest.model.parameters
    if not weights or not full:
        return []
    text = f"The model is {fmt.bytes_text(weights)}"
    if full > 1.1 * weights:
        text += f", {fmt.figure(full / weights, 2)} times smaller than its {fmt.bytes_text(full)} in fp32"
    return [Sentence("plain", text + ".")]


def _law(records: Sequence[Record], unit: str) -> list[Sentence]:
    law = last_of(records, ChunkLaw)
    if law is None:
        return []
    ways = f"{len(law.cuts)} ways of cutting {law.tokens} {unit}s"
    if not math.isfinite(law.error):
        return [
            Sentence("bad", f"The chunk law does not hold: among {ways} one gave values that are not finite.")
        ]
    if law.error == 0:
        return [Sentence("plain", f"{ways[0].upper()}{ways[1:]} into chunks all give the same bits.")]
    return [
        Sentence(
            "plain",
            f"Of {ways} into chunks, the worst changes a logit or the state by {fmt.figure(law.error, 2)} "
            "of their RMS.",
        )
    ]
