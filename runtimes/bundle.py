"""A bundle on disk: checked, described, and opened. Needs no torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from xexport.core.errors import BundleError, InputError
from xexport.core.manifest import FileEntry, Manifest, read_manifest, safe_path
from xexport.core.state import StateSpec
from xexport.runtimes.opening import open_engine
from xexport.runtimes.tokenizers import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from xexport.runtimes.onnxruntime import OrtEngine
    from xexport.runtimes.stream import Stream

__all__ = ["Bundle", "load"]

_ITEM_BYTES = {"float32": 4, "float16": 2, "int64": 8}


def load(path: str | os.PathLike[str], *, verify: bool = True) -> Bundle:
    """Read a bundle and check that it arrived whole.

    Args:
        path: the folder that ``xexport MODEL --target T`` wrote.
        verify: compare every file's SHA-256 with the manifest (about a second a gigabyte); without
            it only presence and size are checked.

    Raises:
        BundleError: no bundle, a manifest of another version, or a file that is missing, a link,
            of another size or changed; the message names the file.
    """
    folder = Path(path)
    safe_path(folder, "manifest.json")
    manifest = read_manifest(folder)
    listed = {entry.path for entry in manifest.files}
    for name in (manifest.graph, *manifest.graphs.values(), *manifest.contexts.values()):
        if name not in listed:
            raise BundleError("the manifest doesn't list its own graph", got=name)
    for entry in manifest.files:
        _check_file(folder, entry, verify=verify)
    return Bundle(folder, manifest)


@dataclass(frozen=True)
class Bundle:
    """A model that is whole by itself: graph, weights, tokenizer and what is known about them.

    Attributes:
        path: the folder.
        manifest: everything in manifest.json.
    """

    path: Path
    manifest: Manifest
    _engines: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def fingerprint(self) -> str:
        """Names this graph with these weights (SHA-256 over the hashes of the graph's files)."""
        digest = hashlib.sha256()
        for entry in sorted(self.manifest.graph_files, key=lambda e: e.path):
            digest.update(f"{entry.path}:{entry.sha256}\n".encode())
        return digest.hexdigest()

    @property
    def bytes_of_weights(self) -> int:
        """Size of the graph and its external data: what a device must keep."""
        return sum(entry.bytes for entry in self.manifest.graph_files)

    def bytes_of_state(self, batch: int = 1) -> int:
        """Size of the state of ``batch`` parallel sequences (a stream holds it twice)."""
        return sum(_ITEM_BYTES[s.dtype] * _elements(s.shape, batch) for s in self.state_specs())

    def state_specs(self) -> tuple[StateSpec, ...]:
        """The state tensors, in the graph's order."""
        return tuple(StateSpec(s.name, s.shape, s.dtype, s.init) for s in self.manifest.state)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that was shipped with the model; ids in, ids out if there is none."""
        if "tokenizer" not in self._engines:
            self._engines["tokenizer"] = load_tokenizer(self.manifest.tokenizer, self.path)
        tokenizer: Tokenizer = self._engines["tokenizer"]
        return tokenizer

    def engine(self, *, threads: int = 0, runtime: str | None = None) -> OrtEngine:
        """The opened graph; the same arguments give the same engine, so streams share weights.

        Args:
            threads: 0 takes every physical core.
            runtime: one of runtimes/opening.py ``runtime_names``; the manifest's own by default.

        Raises:
            RuntimeFailure: the runtime is unknown, not available, or refused the graph.
        """
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 0:
            raise InputError("bad number of threads", got=threads, allowed="0 (every core) or more")
        name = runtime or self.manifest.runtime
        key = (threads, name)
        if key not in self._engines:
            self._engines[key] = open_engine(self.path, self.manifest, runtime=runtime, threads=threads)
        engine: OrtEngine = self._engines[key]
        return engine

    def stream(self, batch: int = 1, *, threads: int = 0, runtime: str | None = None) -> Stream:
        """A new stream at its first token; of a whole-form model, what is fed whole sequences.

        Args:
            batch: parallel sequences.
            threads, runtime: see :meth:`engine`.

        Raises:
            InputError: a bad batch or number of threads.
            RuntimeFailure: see :meth:`engine`.
        """
        from xexport.runtimes.stream import Stream

        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise InputError("bad batch size", got=batch, allowed="1 or more")
        model = self.manifest.model
        return Stream(
            self.engine(threads=threads, runtime=runtime).cell(batch),
            self.state_specs(),
            vocab_size=model.vocab_size,
            batch=batch,
            contract=model.contract,
            fingerprint=self.fingerprint,
            tokenizer=self.tokenizer(),
        )

    def inspect(self) -> dict[str, Any]:
        """What there is to know without opening the graph: the manifest, sizes, formats of weights."""
        manifest: dict[str, Any] = msgspec.to_builtins(self.manifest)
        return {
            "bundle": str(self.path),
            "fingerprint": self.fingerprint,
            "bytes": {
                "weights": self.bytes_of_weights,
                "state": self.bytes_of_state(),
                "files": sum(entry.bytes for entry in self.manifest.files),
            },
            "formats": self._formats(),
            **manifest,
        }

    def _formats(self) -> dict[str, dict[str, int]]:
        """Storage format -> how many tensors and bytes."""
        rows: dict[str, dict[str, int]] = {}
        for decision in self.manifest.decisions:
            row = rows.setdefault(decision.format, {"tensors": 0, "bytes": 0})
            row["tensors"] += 1
            row["bytes"] += decision.bytes
        return rows


def _check_file(folder: Path, entry: FileEntry, *, verify: bool) -> None:
    path = safe_path(folder, entry.path)
    if not path.is_file():
        raise BundleError(
            f"the bundle lacks its file {entry.path}", got=path, fix="copy the whole folder again"
        )
    size = path.stat().st_size
    if size != entry.bytes:
        raise BundleError(
            f"the bundle's file {entry.path} has a wrong size",
            got=f"{size} bytes",
            allowed=f"{entry.bytes} bytes",
            fix="the copy is not complete: copy the folder again",
        )
    if not verify:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != entry.sha256:
        raise BundleError(
            f"the bundle's file {entry.path} was changed after the export",
            got=f"sha256 {found}",
            allowed=f"sha256 {entry.sha256}",
            fix="copy the folder again from where it was exported, or export again",
        )


def _elements(shape: Sequence[int | str], batch: int) -> int:
    count = 1
    for dim in shape:
        count *= batch if dim == "B" else int(dim)
    return count
