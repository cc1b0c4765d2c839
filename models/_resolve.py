"""What the user named (a family with weights or a preset, or a module of their own) -> module and weights."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from xexport.core.checkpoint import RawCheckpoint, open_checkpoint
from xexport.core.contract import CHUNKS_OF_TOKENS, Contract, contract_of
from xexport.core.errors import CheckpointError, InputError, unknown_name
from xexport.core.family import Family, LoadedModel
from xexport.core.progress import Progress, Silent
from xexport.core.registry import family_aliases, family_names, find_family, get_family
from xexport.core.state import StateSpec, state_shape
from xexport.models._stored import assign_stored

__all__ = ["Source", "distilled", "from_module", "recognise", "resolve"]


@dataclass(frozen=True)
class Source:
    """A model that is ready to be traced.

    Attributes:
        skeleton: the module to trace; of a family, on the meta device (it holds no weights).
        tensors: parameter and buffer name -> stored tensor, possibly memory-mapped, of any dtype.
        specs: its state; empty in the whole form.
        contract: its form and what it reads.
        roles: (glob, role) rows for quantization.
        random: the weights were never trained.
        path: the checkpoint's file or folder, if there is one.
        recognised: why its family is this one, if nobody named it.
        exact: what it was distilled from, if it was.
    """

    family: str
    title: str
    config: dict[str, Any]
    skeleton: torch.nn.Module
    tensors: Mapping[str, torch.Tensor]
    specs: tuple[StateSpec, ...]
    roles: tuple[tuple[str, str], ...]
    tokenizer: str | None
    origin: str
    contract: Contract = CHUNKS_OF_TOKENS
    notes: tuple[str, ...] = ()
    random: bool = False
    path: Path | None = None
    recognised: str = ""
    exact: Source | None = None

    @property
    def parameters(self) -> int:
        return sum(t.numel() for t in self.tensors.values())

    @property
    def head(self) -> str | None:
        """Path of the one ``nn.Linear`` that makes the logits, if the roles name it."""
        paths = {
            path
            for path, child in self.skeleton.named_modules()
            if isinstance(child, torch.nn.Linear) and self._role(f"{path}.weight") == "head"
        }
        return paths.pop() if len(paths) == 1 else None

    def _role(self, name: str) -> str:
        return next((role for glob, role in self.roles if fnmatchcase(name, glob)), "other")

    def eager(self, *, lean: bool = False) -> torch.nn.Module:
        """The module with its weights, for the PyTorch side of every comparison. It computes in float32.

        Args:
            lean: leave large weights in the checkpoint's file and dtype and widen each one where it
                is used: the same results from next to no memory, but slower, so not for timing.
        """
        wanted = self.skeleton.state_dict()
        if not any(p.is_meta for p in wanted.values()):
            return self.skeleton.eval()
        module = copy.deepcopy(self.skeleton)
        if lean:
            assign_stored(module, self.tensors)
        else:
            state = {k: self.tensors[k].detach().to(wanted[k].dtype) for k in wanted}
            module.load_state_dict(state, assign=True)
        return module.eval().requires_grad_(False)


def resolve(
    model: str, *, weights: str | Path | None = None, preset: str | None = None, seed: int = 0
) -> Source:
    """The source a user named.

    ``model`` is a family, or the path of a checkpoint that one family recognises. Without ``weights``,
    the family's trained zoo checkpoint is used; with ``preset``, that size with random weights.

    Raises:
        UnknownNameError: no such family or preset.
        CheckpointError: the weights can't be read as that family, or are not recognised.
        InputError: both ``weights`` and ``preset``, or neither and the zoo has none; either beside a path.
    """
    if model not in family_names() and model not in family_aliases() and Path(model).exists():
        if weights is not None or preset is not None:
            raise InputError(
                "a checkpoint brings its own weights and size",
                got=model,
                fix="leave out --weights and --preset",
            )
        return _recognised(Path(model))
    family = find_family(model)
    if weights is not None and preset is not None:
        raise InputError(
            "--weights and --preset exclude each other", fix="the size of a checkpoint is read from it"
        )
    if preset is not None:
        return _random(family, preset, seed)
    path = Path(weights) if weights is not None else _zoo(family)
    return _read(family, open_checkpoint(path))


def distilled(source: Source, order: int, progress: Progress | None = None) -> Source:
    """The same model with its long filters approximated by ``order`` modes each (Family.distill).

    Raises:
        InputError: its family has no such filters, or not ones of this order.
    """
    family = get_family(source.family) if source.family in family_names() else None
    if family is None or family.distill is None:
        can = [name for name in family_names() if get_family(name).distill is not None]
        raise InputError(
            "this model has no long filters to distill",
            got=source.family,
            allowed=", ".join(can),
            fix="leave out --distill",
        )
    config, tensors, notes = family.distill(
        family.config(**source.config), source.tensors, order, progress or Silent()
    )
    found = _from_loaded(family, LoadedModel(family.name, config, tensors), source.origin)
    state = (
        f"state of a stream: {_state_bytes(found):,} bytes, {_state_bytes(source):,} with the exact filters"
    )
    return dataclasses.replace(
        source,
        config=found.config,
        skeleton=found.skeleton,
        tensors=tensors,
        specs=found.specs,
        contract=found.contract,
        notes=(*source.notes, f"distilled to {order} modes a filter: an approximation", state, *notes),
        exact=source,
    )


def _state_bytes(source: Source) -> int:
    return sum(math.prod(state_shape(s, 1)) * getattr(torch, s.dtype).itemsize for s in source.specs)


def recognise(raw: RawCheckpoint) -> tuple[Family, str]:
    """The one family that says it can read a checkpoint, and from what it knows.

    Raises:
        CheckpointError: none does, or several do; lists what each looks for.
    """
    families = [get_family(name) for name in family_names()]
    found = [(f, why) for f in families if (why := f.recognise(raw)) is not None]
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            "this checkpoint could be of several families",
            got="; ".join(f"{f.name}: {why}" for f, why in found),
            fix=f"name one: xexport {found[0][0].name} --weights {raw.path}",
        )
    kind = raw.config.get("model_type")
    keys = f"{len(raw.tensors)} tensors, as {', '.join(list(raw.tensors)[:4])}"
    raise CheckpointError(
        "no family recognises this checkpoint",
        got=f"{raw.path.name}: {f'model_type {kind!r} in config.json, ' if kind else ''}{keys}",
        allowed="\n    ".join(
            [
                "xexport.family in a safetensors file's metadata, or",
                *(f"{f.name}: {f.reads or 'files of our own training'}" for f in families),
            ]
        ),
        fix=(
            "name its folder: config.json lies beside it"
            if raw.path.is_file() and (raw.path.parent / "config.json").is_file()
            else "if it is one of these with other key names, name it: xexport MODEL --weights PATH"
        ),
    )


def _recognised(path: Path) -> Source:
    if (path / "manifest.json").is_file():
        raise CheckpointError(
            "this folder is a bundle, not a checkpoint", got=path, fix=f"xexport run {path} --prompt TEXT"
        )
    raw = open_checkpoint(path)
    family, why = recognise(raw)
    source = _read(family, raw)
    return dataclasses.replace(
        source, recognised=why, notes=(f"recognised as {family.name}: {why}", *source.notes)
    )


def _read(family: Family, raw: RawCheckpoint) -> Source:
    return dataclasses.replace(_from_loaded(family, family.load(raw), raw.path.name), path=raw.path)


def from_module(module: torch.nn.Module, name: str | None = None) -> Source:
    """A user's own module in the chunk form, or with ``form = "whole"``.

    Raises:
        InputError: it is in the chunk form and has no ``state_spec()``, or says something impossible of
            itself.
    """
    state_spec = getattr(module, "state_spec", None)
    contract = contract_of(module)
    if contract.streams and not callable(state_spec):
        raise InputError(
            "the module has no state_spec()",
            got=type(module).__name__,
            fix="give it a state_spec() that returns one xexport.StateSpec a state tensor, and a "
            "forward(tokens [B,T], *state) -> (logits [B,T,V], *new_state); if it is not causal, "
            'form = "whole" and a forward(tokens [B,T]) -> (logits,)',
        )
    roles = getattr(module, "tensor_roles", None)
    rows = tuple(dict(roles()).items()) if callable(roles) else ()
    title = name or type(module).__name__
    return Source(
        family=title,
        title=f"{type(module).__name__} (a module of the user's own)",
        config={},
        skeleton=module.eval(),
        tensors={k: v.detach() for k, v in module.state_dict().items()},
        specs=tuple(_specs(state_spec())) if callable(state_spec) else (),
        roles=rows,
        tokenizer=None,
        contract=contract,
        origin=f"module {type(module).__module__}.{type(module).__qualname__}",
    )


def _specs(rows: Sequence[Any]) -> list[StateSpec]:
    for row in rows:
        if not isinstance(row, StateSpec):
            raise InputError(
                "state_spec() must return xexport.StateSpec rows", got=type(row).__name__, allowed="StateSpec"
            )
    return list(rows)


def _zoo(family: Family) -> Path:
    from importlib.resources import files

    path = Path(str(files("xexport.zoo") / "checkpoints" / f"{family.name}.safetensors"))
    if not path.is_file():
        raise InputError(
            f"this installation ships no trained checkpoint of {family.name}",
            fix=f"name one with --weights, or a size with random weights: --preset "
            f"{' | '.join(family.presets)}",
        )
    return path


def _skeleton(family: Family, config: Any) -> torch.nn.Module:
    with torch.device("meta"):
        module: torch.nn.Module = family.build(config)
    return module.eval().requires_grad_(False)


def _random(family: Family, preset: str, seed: int) -> Source:
    if preset not in family.presets:
        raise unknown_name(f"preset of {family.name}", preset, family.presets)
    config = family.presets[preset]
    module = family.build(config).eval().requires_grad_(False)
    family.init(module, seed)
    loaded = LoadedModel(family.name, config, module.state_dict(), source=f"preset {preset}, seed {seed}")
    source = _from_loaded(family, loaded, loaded.source)
    return dataclasses.replace(
        source, random=True, notes=(*source.notes, f"random weights (preset {preset}, seed {seed})")
    )


def _from_loaded(family: Family, loaded: LoadedModel, origin: str) -> Source:
    skeleton = _skeleton(family, loaded.config)
    unused = len(set(loaded.tensors) - set(skeleton.state_dict()))
    if unused:
        raise CheckpointError(
            f"{unused} tensors of the checkpoint have no place in the model",
            got=", ".join(sorted(set(loaded.tensors) - set(skeleton.state_dict()))[:4]),
            fix="this is a fault of the family's loader: please report it",
        )
    contract = contract_of(skeleton, family.form)
    reads_bytes = contract.inputs.kind == "tokens" and getattr(skeleton, "vocab_size", None) == 256
    states = getattr(skeleton, "state_spec", None)
    return Source(
        family=family.name,
        title=family.title,
        config=dataclasses.asdict(loaded.config),
        skeleton=skeleton,
        tensors=loaded.tensors,
        specs=tuple(_specs(states())) if callable(states) else (),
        roles=family.roles,
        tokenizer=loaded.tokenizer or ("bytes" if reads_bytes else None),
        origin=origin,
        contract=contract,
        notes=loaded.notes,
    )
