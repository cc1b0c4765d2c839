"""Reading a checkpoint file or folder without executing anything in it.

``.pth``/``.pt``/``.bin`` go through ``torch.load(weights_only=True, mmap=True)``, ``.safetensors``
through safetensors; a folder is read as a Hugging Face one (config.json and one or many
safetensors files). Tensors stay memory-mapped views, so opening a large file costs no memory.
"""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from xexport.core.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = [
    "RawCheckpoint",
    "match_tensors",
    "open_checkpoint",
    "own_config",
    "require_keys",
    "require_own_config",
    "unreadable",
]

ConfigT = TypeVar("ConfigT")

_PICKLED = (".pth", ".pt", ".bin", ".ckpt")


@dataclass(frozen=True)
class RawCheckpoint:
    """What is in a checkpoint, not yet read as any family.

    Attributes:
        path: the file or folder.
        tensors: stored name -> tensor (memory-mapped where the format allows).
        metadata: the safetensors ``__metadata__`` table, else empty.
        config: the parsed config.json of a Hugging Face folder, else empty.
    """

    path: Path
    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


def open_checkpoint(path: str | Path) -> RawCheckpoint:
    """Open a checkpoint of any supported container.

    Raises:
        CheckpointError: missing, empty, truncated, of an unknown container, or holding
            anything but tensors.
    """
    where = Path(path)
    if not where.exists():
        raise CheckpointError("the checkpoint does not exist", got=where, fix="check the path")
    if where.is_dir():
        return _open_folder(where)
    if where.stat().st_size == 0:
        raise CheckpointError("the checkpoint is empty (0 bytes)", got=where, fix="download it again")
    if where.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(where)
        return RawCheckpoint(where, tensors, metadata)
    if where.suffix in _PICKLED:
        return RawCheckpoint(where, _read_pickled(where))
    raise CheckpointError(
        "unknown checkpoint format",
        got=where.name,
        allowed=".safetensors, .pth, .pt, .bin, .ckpt, or a Hugging Face folder",
    )


def require_keys(raw: RawCheckpoint, keys: tuple[str, ...], family: str) -> None:
    """Raise a CheckpointError that lists which of ``keys`` the checkpoint lacks."""
    missing = [k for k in keys if k not in raw.tensors]
    if missing:
        raise CheckpointError(
            f"this checkpoint is not one of {family}: {len(missing)} expected tensors are missing",
            got=f"{raw.path.name}: {len(raw.tensors)} tensors, as {', '.join(list(raw.tensors)[:4])}",
            allowed=f"among others {', '.join(missing[:4])}",
            fix="name the model this file belongs to, or rename its keys to the published layout",
        )


def match_tensors(
    tensors: Mapping[str, torch.Tensor], module: torch.nn.Module, source: str
) -> dict[str, torch.Tensor]:
    """The tensors that ``module`` (which may be on the meta device) wants, in its own shapes.

    Leading axes of length 1 may be there or not; tensors the module does not want are left out.

    Raises:
        CheckpointError: a tensor is missing or has another shape; names the first and counts the rest.
    """
    wanted = {name: tuple(p.shape) for name, p in module.state_dict().items()}
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(wanted)} tensors are missing",
            got=f"{source}, without {', '.join(missing[:4])}",
            fix="the file is incomplete, or its keys are not in the published layout",
        )
    wrong = [n for n, shape in wanted.items() if _core_shape(tuple(tensors[n].shape)) != _core_shape(shape)]
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"tensor {name!r} has a wrong shape" + (f" (and {len(wrong) - 1} more)" if wrong[1:] else ""),
            got=f"{list(tensors[name].shape)} in {source}",
            allowed=list(wanted[name]),
        )
    return {name: tensors[name].reshape(shape) for name, shape in wanted.items()}


def _core_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def own_config(raw: RawCheckpoint, family: str, config: type[ConfigT]) -> ConfigT | None:
    """The configuration in the metadata of a file that xexport's own training wrote, else None.

    Such a safetensors file names its family (``xexport.family``), holds its configuration as JSON
    (``xexport.config``) and its tensors in the training layout (``xexport.layout`` = ``training``).
    JSON has no tuples, so a list becomes one.

    Raises:
        CheckpointError: the metadata is of this family but can't be used.
    """
    if raw.metadata.get("xexport.family") != family:
        return None
    layout = raw.metadata.get("xexport.layout")
    if layout != "training":
        raise CheckpointError("unknown tensor layout in the metadata", got=layout, allowed="training")
    try:
        row = json.loads(raw.metadata["xexport.config"])
        known = {f.name for f in fields(config)}  # type: ignore[arg-type]
        unknown = sorted(set(row) - known)
        if unknown:
            raise CheckpointError(
                f"the {family} configuration in the metadata has unknown keys",
                got=", ".join(unknown),
                allowed=", ".join(sorted(known)),
                fix="a newer xexport may have written the file: upgrade",
            )
        return config(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"the {family} configuration in the metadata can't be read", got=f"{raw.path.name}: {error}"
        ) from error


def require_own_config(
    raw: RawCheckpoint, family: str, config: type[ConfigT], *, title: str, fix: str = ""
) -> ConfigT:
    """:func:`own_config` of a family that reads nothing else.

    Args:
        title: the family as a person writes it, with its article: ``a Performer``.
        fix: why there is nothing else to read, if there is a reason.

    Raises:
        CheckpointError: the file is not of our own training.
    """
    found = own_config(raw, family, config)
    if found is None:
        raise unreadable(raw, title, "a safetensors file from xexport's own training", fix)
    return found


def unreadable(raw: RawCheckpoint, title: str, allowed: str, fix: str = "") -> CheckpointError:
    """The error for a file that is not ``title``, the family with its article: ``a Performer``."""
    return CheckpointError(
        f"this is not {title} checkpoint that can be read",
        got=f"{raw.path.name}: tensors such as {', '.join(list(raw.tensors)[:4])}",
        allowed=allowed,
        fix=fix or None,
    )


def _open_folder(folder: Path) -> RawCheckpoint:
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise CheckpointError(
            "this folder is not a Hugging Face checkpoint: it has no config.json",
            got=folder,
            fix="name a folder with config.json and its weights, or a weight file itself",
        )
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(
            "config.json can't be read", got=f"{config_path}: {error}", fix="download it again"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(
            "config.json does not hold an object", got=type(config).__name__, allowed="an object {...}"
        )
    files = _weight_files(folder)
    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        if file.suffix == ".safetensors":
            part, meta = _read_safetensors(file)
            metadata.update(meta)
        else:
            part = _read_pickled(file)
        tensors.update(part)
    return RawCheckpoint(folder, tensors, metadata, config)


def _weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder; an index names its shards, which must lie beside it."""
    for index_name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        index = folder / index_name
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise CheckpointError("the shard index can't be read", got=f"{index}: {error}") from error
            for name in names:
                if Path(name).name != name:
                    raise CheckpointError(
                        "a shard name in the index leaves the folder",
                        got=name,
                        allowed="names of files beside the index",
                    )
                if not (folder / name).is_file():
                    raise CheckpointError("a shard named in the index is missing", got=folder / name)
            return [folder / name for name in names]
    for pattern in ("*.safetensors", "pytorch_model*.bin", "*.pth"):
        found = sorted(folder.glob(pattern))
        if found:
            return found
    raise CheckpointError(
        "the folder has no weights", got=folder, allowed="*.safetensors, pytorch_model*.bin or *.pth"
    )


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    _require_torch()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            metadata = handle.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            "the safetensors file can't be read: it is truncated or corrupt",
            got=f"{path}: {error}",
            fix="download it again",
        ) from error
    return tensors, dict(metadata)


def _read_pickled(path: Path) -> dict[str, torch.Tensor]:
    _require_torch()
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, on pickle protocols and old containers
            loaded = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None
            )
    # a damaged pickle can raise nearly anything: AttributeError, TypeError, struct.error ...
    except Exception as error:
        reason = str(error).split("\n", 1)[0]
        raise CheckpointError(
            "the checkpoint can't be read as weights only: it is truncated, corrupt, or holds code",
            got=f"{path}: {reason}",
            fix="download it again; a file that needs code to load is refused on purpose",
        ) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
        raise CheckpointError(
            "the checkpoint is not a table of tensors",
            got=f"{path}: {_odd_one(loaded)}",
            allowed="a dict of name -> tensor, or one under the key state_dict",
            fix="save module.state_dict() alone",
        )
    if not loaded:
        raise CheckpointError("the checkpoint holds no tensors", got=path, fix="save module.state_dict()")
    return {str(k): v.detach() for k, v in loaded.items()}


def _odd_one(loaded: Any) -> str:
    """What is there instead of tensors."""
    import torch

    if not isinstance(loaded, dict):
        return type(loaded).__name__
    return next(
        f"{k!r} is a {type(v).__name__}" for k, v in loaded.items() if not isinstance(v, torch.Tensor)
    )


def _require_torch() -> None:
    from xexport.core.extras import require

    require("torch", extra="export", why="to read a checkpoint")
    require("safetensors", extra="export", why="to read a checkpoint")
