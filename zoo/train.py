"""Train a small byte-level model of a family on English text: the recipe of the shipped checkpoints.

    python -m xexport.zoo.train FAMILY --text FILE_OR_FOLDER... (--minutes M | --steps N) [--out P]

Muon on the hidden matrices and AdamW on the rest (zoo/optim.py), a short warm-up, then a learning rate
that falls linearly to zero exactly when the budget is used up: of steps, or of minutes spent training.
Gradients are clipped, the windows of an epoch do not overlap (zoo/data.py), everything is seeded.
A state to resume from is written beside the output every few minutes and at the end; a run that was
stopped goes on with ``--resume``, and its clock counts only the time it really trained.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from xexport.core.checkpoint import RawCheckpoint
from xexport.core.errors import CheckpointError, InputError, OutputError, XexportError
from xexport.core.family import Family
from xexport.core.registry import get_family
from xexport.zoo.data import Corpus, Windows, read_corpus
from xexport.zoo.native import native_recurrences
from xexport.zoo.optim import make_optimizers
from xexport.zoo.score import bits_of_windows

__all__ = ["Recipe", "Run", "main", "save_checkpoint", "train"]

#: Bytes of the validation part that are scored at the end; an eighth of them on the way.
_SAMPLE = 131072


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run learns; stored in the checkpoint.

    Attributes:
        family, preset: what is trained.
        steps, minutes: the budget; exactly one is set.
        batch, length: windows a step and bytes a window.
        late_length, late_from: from this part of the budget on, windows are ``late_length`` long and
            a step has as many bytes as before.
        optimizer: ``muon`` or ``adamw`` for the hidden matrices.
        lr: peak learning rate of the hidden matrices; vectors, tables and heads have ``adam_lr``.
        warmup: steps of linear warm-up.
        weight_decay: of the hidden matrices.
        clip: largest norm of the gradient.
        seed: of the weights and of the order of the text.
        threads, device: where it runs.
    """

    family: str
    preset: str = "zoo"
    steps: int | None = None
    minutes: float | None = None
    batch: int = 8
    length: int = 256
    late_length: int = 512
    late_from: float = 0.8
    optimizer: str = "muon"
    lr: float = 8e-3
    adam_lr: float = 4e-3
    warmup: int = 50
    weight_decay: float = 0.05
    clip: float = 1.0
    seed: int = 1
    threads: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise InputError("the budget is unclear", fix="give exactly one of --steps and --minutes")
        if (self.steps or self.minutes or 0) <= 0:
            raise InputError("the budget must be positive", got=self.steps or self.minutes)
        if min(self.batch, self.length, self.late_length, self.threads) < 1:
            raise InputError("batch, length and threads must be at least 1", got=self)
        if self.optimizer not in ("muon", "adamw"):
            raise InputError("unknown optimizer", got=self.optimizer, allowed="muon, adamw")


@dataclass
class Run:
    """The state of a run, all of which a resumed run needs."""

    module: nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]
    step: int = 0
    tokens: int = 0
    windows: int = 0
    seconds: float = 0.0
    core_seconds: float = 0.0

    def save(self, path: Path, recipe: Recipe) -> None:
        """Write everything to ``path``, all or nothing."""
        row = {
            "recipe": json.dumps(asdict(recipe)),
            "module": self.module.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "counters": [self.step, self.tokens, self.windows, self.seconds, self.core_seconds],
        }
        _write_whole(path, lambda where: torch.save(row, where))

    def load(self, path: Path, recipe: Recipe) -> None:
        """Go on from what :meth:`save` wrote; the recipe must be the same but for its budget."""
        if not path.is_file():
            raise CheckpointError("there is no run to resume", got=path, fix="run once without --resume")
        row = torch.load(path, map_location=recipe.device, weights_only=True)
        same = {"steps": recipe.steps, "minutes": recipe.minutes}
        stored = {**json.loads(row["recipe"]), **same}
        if stored != asdict(recipe):
            changed = [k for k, v in asdict(recipe).items() if stored.get(k) != v]
            raise InputError(
                "the run to resume has another recipe", got=", ".join(changed), fix="repeat its options"
            )
        self.module.load_state_dict(row["module"])
        for optimizer, state in zip(self.optimizers, row["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        step, tokens, windows, self.seconds, self.core_seconds = row["counters"]
        self.step, self.tokens, self.windows = int(step), int(tokens), int(windows)


def train(
    recipe: Recipe,
    corpus: Corpus,
    out: Path,
    *,
    resume: bool = False,
    compiled: bool = False,
    config: Any = None,
    save_every: float = 300.0,
    say: Callable[[str], None] = print,
) -> float:
    """Train and write ``out``; returns the validation bits per byte.

    Args:
        recipe: what to do.
        corpus: the text.
        out: the .safetensors file to write; ``out`` + ".resume" holds the state to go on from.
        resume: go on from that state.
        compiled: run the training form through torch.compile.
        config: in place of the preset's.
        save_every: seconds of training between two saved states.
        say: takes the progress lines.

    Raises:
        InputError: an option that can't be used, or too little text.
        CheckpointError: nothing to resume, or the loss is no longer finite.
        OutputError: the output can't be written.
    """
    family = get_family(recipe.family)
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    config = config if config is not None else _preset(family, recipe.preset)
    module: nn.Module = family.train_form(config)
    family.init(module, recipe.seed)
    module.to(recipe.device)
    optimizers = make_optimizers(
        module,
        muon_lr=recipe.lr,
        adam_lr=recipe.adam_lr,
        weight_decay=recipe.weight_decay,
        kind=recipe.optimizer,
    )
    run = Run(module, optimizers)
    state_path = out.with_name(out.name + ".resume")
    if resume:
        run.load(state_path, recipe)
    forward = torch.compile(module, dynamic=False) if compiled else module
    with native_recurrences(recipe.device):
        _loop(run, recipe, corpus, forward, state_path, save_every, say)
        run.save(state_path, recipe)
        return save_checkpoint(out, family, config, recipe, run, corpus)


def _loop(
    run: Run,
    recipe: Recipe,
    corpus: Corpus,
    forward: Any,
    state_path: Path,
    save_every: float,
    say: Callable[[str], None],
) -> None:
    """Steps until the budget is used up."""
    parts = list(run.module.parameters())
    say(f"{recipe.family}: {sum(p.numel() for p in parts):,} parameters, {len(corpus.train):,} bytes")
    windows, length = None, 0
    saved = said = run.seconds
    mean = 0.0
    while (done := _done(run, recipe)) < 1.0:
        began, worked = time.perf_counter(), time.process_time()
        late = done >= recipe.late_from
        wanted = recipe.late_length if late else recipe.length
        if windows is None or wanted != length:
            # A new length is a new cutting of the text, so its windows are counted from the start.
            position = run.windows if windows is None else 0
            length = wanted
            windows = Windows(corpus.train, length, recipe.seed + late, position)
        rows = max(1, recipe.batch * recipe.length // length)
        block = torch.from_numpy(windows.take(rows)).to(recipe.device)
        loss = F.cross_entropy(forward(block[:, :-1]).flatten(0, 1).float(), block[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(parts, recipe.clip)
        value = float(loss.detach())
        if not math.isfinite(value) or not math.isfinite(float(norm)):
            raise CheckpointError("the loss is no longer finite", got=f"step {run.step}", fix="lower --lr")
        _update(run, recipe, done)
        run.step, run.tokens, run.windows = run.step + 1, run.tokens + rows * length, windows.position
        run.seconds += time.perf_counter() - began
        run.core_seconds += time.process_time() - worked
        mean = value if mean == 0.0 else 0.98 * mean + 0.02 * value
        if run.seconds - said >= 20:
            said = run.seconds
            say(
                f"step {run.step} {100 * _done(run, recipe):.1f}% loss {mean / math.log(2):.3f} bits, "
                f"{run.tokens:,} tokens, {run.tokens / run.seconds:.0f} tokens/s"
            )
        if _save_due(run.seconds - saved, save_every):
            saved = run.seconds
            run.save(state_path, recipe)
            sample = corpus.validation[: _SAMPLE // 8]
            say(f"validation {_bits(run.module, sample):.4f} bits per byte")


def _bits(module: nn.Module, text: NDArray[np.uint8]) -> float:
    """Bits per byte over windows of 512 bytes, or of the model's maximum where that is less."""
    limit = getattr(getattr(module, "config", None), "max_tokens", None) or 512
    window = min(512, limit)
    module.eval()  # batch norms neither use nor take in what is scored
    try:
        return bits_of_windows(module, text, window=window, overlap=window // 2)
    finally:
        module.train()


def _save_due(elapsed: float, every: float) -> bool:
    return elapsed >= every


def _done(run: Run, recipe: Recipe) -> float:
    """The part of the budget that is used up."""
    if recipe.steps is not None:
        return run.step / recipe.steps
    assert recipe.minutes is not None
    return run.seconds / (60.0 * recipe.minutes)


def _update(run: Run, recipe: Recipe, done: float) -> None:
    """One optimizer step at the scheduled learning rate."""
    share = min((run.step + 1) / recipe.warmup, 1.0) * (1.0 - done)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def save_checkpoint(
    out: Path,
    family: Family,
    config: Any,
    recipe: Recipe,
    run: Run,
    corpus: Corpus,
) -> float:
    """Write the weights as float16 (where that holds them) with everything that tells how they came to be.

    The validation figure is of the rounded weights, the ones that are in the file, and what the file
    holds is read back through the family's loader before it replaces an older one.

    Returns:
        Validation bits per byte.
    """
    from safetensors.torch import save_file

    module = run.module
    tensors = {k: v.detach().cpu() for k, v in module.state_dict().items()}
    tensors = {k: _rounded(v).contiguous() for k, v in tensors.items()}
    module.load_state_dict(tensors)
    bits = _bits(module, corpus.validation[:_SAMPLE])
    row = {
        **asdict(recipe),
        "steps": run.step,
        "tokens": run.tokens,
        "minutes_trained": round(run.seconds / 60, 1),
        "core_minutes": round(run.core_seconds / 60, 1),
        "parameters": sum(p.numel() for p in module.parameters()),
        "validation_bits_per_byte": round(bits, 4),
        "texts": {name: {"bytes": size, "sha256": sha} for name, (size, sha) in corpus.sources.items()},
        "torch": str(torch.__version__),
    }
    metadata = {
        "xexport.family": family.name,
        "xexport.config": json.dumps(asdict(config)),
        "xexport.layout": "training",
        "xexport.recipe": json.dumps(row),
    }
    family.load(RawCheckpoint(out, tensors, metadata))
    _write_whole(out, lambda where: save_file(tensors, where, metadata))
    return bits


def _rounded(tensor: torch.Tensor) -> torch.Tensor:
    """As float16, but for whole numbers and what that can't hold (a running variance)."""
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    return half if bool(torch.isfinite(half).all()) else tensor


def _preset(family: Family, name: str) -> Any:
    if name not in family.presets:
        raise InputError(f"{family.name} has no preset {name!r}", allowed=", ".join(family.presets))
    return family.presets[name]


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside ``path``, then rename: a stopped run leaves the older file whole."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        beside.replace(path)
    except (OSError, RuntimeError) as error:
        beside.unlink(missing_ok=True)
        raise OutputError("the checkpoint can't be written", got=f"{path}: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m xexport.zoo.train", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("family")
    parser.add_argument("--text", nargs="+", type=Path, default=[], metavar="FILE_OR_FOLDER")
    parser.add_argument("--out", type=Path, help="default: FAMILY.safetensors")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    parser.add_argument("--compile", action="store_true", help="run the module through torch.compile")
    defaults = {k: f.default for k, f in Recipe.__dataclass_fields__.items() if k != "family"}
    kinds: dict[str, Callable[[str], Any]] = {"steps": int, "minutes": float}
    for name, value in defaults.items():
        kind = kinds.get(name, type(value))
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value, help=f"default: {value}")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = vars(_parser().parse_args(arguments))
    text, out = options.pop("text"), options.pop("out")
    resume, compiled = options.pop("resume"), options.pop("compile")
    try:
        recipe = Recipe(**options)
        corpus = read_corpus(text)
        out = out or Path(f"{recipe.family}.safetensors")
        bits = train(recipe, corpus, out, resume=resume, compiled=compiled, say=_say)
    except XexportError as error:
        print(error, file=sys.stderr)
        return 1
    _say(f"{out}: {bits:.4f} bits per byte on the validation part")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
