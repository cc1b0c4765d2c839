"""Several bundles opened in one process and timed in turns: what ``xexport compare`` measures."""

from __future__ import annotations

from collections.abc import Sequence

from xexport.core.errors import InputError
from xexport.core.progress import Progress, Silent
from xexport.core.records import Together
from xexport.evaluate.corpus import read_corpus
from xexport.evaluate.suite import setup_for
from xexport.evaluate.together import Rival, default_positions, measure_together
from xexport.runtimes.bundle import Bundle

__all__ = ["measure_bundles"]

_STEPS = 4
_PREFILL = (128, 512)
_TEXT = 1 << 13


def measure_bundles(
    bundles: Sequence[Bundle],
    *,
    positions: Sequence[int] | None = None,
    prefill: Sequence[int] | None = None,
    rounds: int = 12,
    threads: int = 0,
    progress: Progress | None = None,
) -> list[Together]:
    """Time the bundles in turns, each on its own tokens of the built-in text.

    Args:
        positions: where in the stream steps are timed; by default early, later, and as far as each
            bounded model goes. None in the whole-sequence form.
        prefill: lengths of prefills or whole sequences; 128, 512 and fixed lengths by default.
        rounds: rounds at each position.
        threads: 0 takes every core.

    Returns:
        One row a bundle, in their order.

    Raises:
        InputError: fewer than two bundles, no rounds, or a position that no bundle can reach.
        FormError: models of both forms, or with different inputs.
        RuntimeFailure: a bundle can't run here.
    """
    if rounds < 2:
        raise InputError("too few rounds for an interval", got=rounds, allowed="2 or more")
    if any(length < 1 for length in prefill or ()):
        raise InputError("bad length of a prefill", got=list(prefill or ()), allowed="1 or more")
    progress = progress or Silent()
    progress.stage("open the bundles", len(bundles))
    rivals = {}
    for index, bundle in enumerate(bundles):
        manifest = bundle.manifest
        model = manifest.model
        corpus = read_corpus(bundle.tokenizer(), model.vocab_size, count=_TEXT, inputs=model.input)
        setup = setup_for(manifest, bundle.path.name, corpus, threads or None)
        # two folders of one name in different places are two bundles
        rivals[f"{index}:{bundle.path.name}"] = Rival(bundle.stream(threads=threads), corpus.tokens, setup)
        progress.advance()
    contracts = [bundle.manifest.model.contract for bundle in bundles]
    places = positions or ()
    if not places and all(c.streams for c in contracts):
        places = default_positions([c.max_tokens for c in contracts], rounds=rounds, steps=_STEPS)
    fixed = {c.fixed_length for c in contracts if c.fixed_length is not None}
    rows = measure_together(
        rivals,
        positions=places,
        prefill=prefill or sorted({*_PREFILL, *fixed}),
        rounds=rounds,
        steps=_STEPS,
        progress=progress,
    )
    return list(rows.values())
