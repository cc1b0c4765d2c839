"""What a model file hands to the rest: its configs, how to build it, how to read its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from xexport.core.progress import Progress
from xexport.core.state import StateSpec

if TYPE_CHECKING:
    import torch

    from xexport.core.checkpoint import RawCheckpoint

__all__ = ["ROLES", "ChunkModule", "Family", "LoadedModel"]

#: What a parameter does, which is what decides how it may be quantized. A ``choice`` decides which of several
#: things is done at all (an expert, a bucket): rounding it does not round the result, it makes another.
ROLES = (
    *("embedding", "head", "projection", "low_rank", "decay", "gate", "choice"),
    *("norm", "conv", "filter", "other"),
)


class ChunkModule(Protocol):
    """An nn.Module in the chunk form, or in the whole form.

    ``forward(tokens [B,T] int64, *state) -> (logits [B,T,V], *new_state)`` for every T >= 1,
    state tensors in the order of :meth:`state_spec`. In the whole form
    ``forward(tokens) -> (logits,)`` and no state. Optional attributes: ``form`` (``chunk`` or
    ``whole``), ``input_spec`` (:class:`xexport.core.contract.InputSpec`, if it doesn't read tokens),
    ``fixed_length`` (whole form: the only T), ``max_tokens`` (int or None: the longest stream the
    state can hold, or the longest sequence), ``predicts_next`` (bool), ``vocab_size`` (int) and
    ``tensor_roles()`` (glob over parameter names -> one of :data:`ROLES`).
    """

    def forward(self, tokens: torch.Tensor, *state: torch.Tensor) -> tuple[torch.Tensor, ...]: ...

    def state_spec(self) -> Sequence[StateSpec]: ...


@dataclass(frozen=True)
class LoadedModel:
    """A family's reading of one checkpoint.

    ``tensors`` are keyed by the parameter names of ``family.build(config)`` and may be views into
    a memory-mapped file, of any float dtype; nothing in them has been converted yet.
    """

    family: str
    config: Any
    tensors: Mapping[str, torch.Tensor]
    tokenizer: str | None = None
    source: str = ""
    notes: tuple[str, ...] = ()


def _no_layout(raw: RawCheckpoint) -> str | None:
    return None


def _same_tensors(config: Any, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    return dict(tensors)


#: what :attr:`Family.distill` is
Distill = Callable[
    [Any, "Mapping[str, torch.Tensor]", int, Progress],
    tuple[Any, "Mapping[str, torch.Tensor]", Sequence[str]],
]


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: the file name of the model, and the word the user types.
        title: one line for ``xexport models``.
        sources: papers and code the architecture was read from.
        config: frozen dataclass of plain values (JSON-able).
        presets: named configs; ``"tiny"`` exists in every family and is for tests.
        build: config -> nn.Module in its form, on the current torch device (meta included).
        load: RawCheckpoint -> LoadedModel; raises CheckpointError for a layout it does not know.
        layout: RawCheckpoint -> why this family can read a file that xexport did not train, or None. A
            Hugging Face folder has its parsed config.json in ``raw.config``.
        reads: what ``layout`` looks for, in a few words, for whoever brings something else; empty if
            the family knows files of our own training only.
        train_form: config -> nn.Module whose ``forward(tokens [B,T]) -> logits`` is differentiable
            and fast; its state_dict is what ``from_training`` turns into the chunk form's.
        from_training: (config, training state_dict) -> tensors for ``build(config)``; the same ones by
            default.
        roles: (glob over parameter names, role) rows, the first match wins.
        distill: (config, tensors of ``build(config)``, order, progress) -> (config, tensors, notes): the same
            model with its long filters approximated by ``order`` modes each, so that its state is constant;
            the notes say the error. None if the family has no such filters.
        init: fills a built module with random but sane weights (for benchmarks and tests).
        form: ``chunk``, or ``whole`` for models that are not causal; a module's own ``form`` wins.
    """

    name: str
    title: str
    sources: tuple[str, ...]
    config: type
    presets: Mapping[str, Any]
    build: Callable[[Any], Any]
    load: Callable[[RawCheckpoint], LoadedModel]
    train_form: Callable[[Any], Any]
    init: Callable[[Any, int], None]
    layout: Callable[[RawCheckpoint], str | None] = _no_layout
    from_training: Callable[[Any, Mapping[str, Any]], Mapping[str, Any]] = _same_tensors
    distill: Distill | None = None
    roles: tuple[tuple[str, str], ...] = ()
    aliases: tuple[str, ...] = field(default=())
    state_note: str = ""
    reads: str = ""
    form: str = "chunk"

    def recognise(self, raw: RawCheckpoint) -> str | None:
        """Why this family can read a checkpoint (its own metadata, or :attr:`layout`), or None."""
        if raw.metadata.get("xexport.family") == self.name:
            return f"its metadata says {self.name}, trained by xexport"
        return self.layout(raw)
