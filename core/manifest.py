"""manifest.json: everything a device needs to know about a bundle, as a versioned schema.

Reading one needs msgspec only. Nothing in a manifest is executed, and every path in it is a plain
file name inside the bundle's own folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from xexport.core.contract import TOKENS, Contract, InputSpec
from xexport.core.errors import BundleError, InputError

__all__ = [
    "KEEP_INPUT",
    "MANIFEST_NAME",
    "SCHEMA_VERSION",
    "Activation",
    "Appended",
    "FileEntry",
    "GraphTensor",
    "Lowering",
    "Manifest",
    "ModelInfo",
    "Refusal",
    "Ring",
    "StateTensor",
    "TensorDecision",
    "decode_manifest",
    "encode_manifest",
    "read_manifest",
    "safe_path",
]

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
_GRAPH = "model.onnx"  # and its data file
#: graph input int64 [1], default 0: of how many of the last positions logits are computed (0: of all T)
KEEP_INPUT = "logits_to_keep"


class FileEntry(msgspec.Struct, frozen=True):
    """One file of the bundle that must arrive unchanged."""

    path: str
    sha256: str
    bytes: int


class GraphTensor(msgspec.Struct, frozen=True):
    """A graph input or output; symbolic dimensions are strings."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Ring(msgspec.Struct, frozen=True):
    """Rows of a state tensor that a stream's tokens fill in turn, over and over.

    Token n, ``start <= n`` and below ``until`` if that is not 0, writes row
    ``first + (n - start) mod span // rate``, or none.
    """

    first: int
    span: int
    start: int = 0
    until: int = 0
    rate: int = 1

    def written(self, begin: int, count: int) -> list[int]:
        """Rows that ``count`` tokens from ``begin`` on may write."""
        end = min(begin + count, self.until) if self.until else begin + count
        begin = max(begin, self.start, end - self.span)
        if end - begin == 1:
            return [self.first + (begin - self.start) % self.span // self.rate]
        return sorted({self.first + (n - self.start) % self.span // self.rate for n in range(begin, end)})


class Appended(msgspec.Struct, frozen=True):
    """A state tensor that one node reads and only appends to, so that its kernel may update it in place.

    The node is of operator ``op``; the stream lies along ``axis`` and ends at the value of the state
    tensor ``position``, [1] int64, behind which there is nothing yet. With ``rings`` its tokens overwrite
    older ones: of those rows a runtime keeps a copy until the run has succeeded.
    """

    op: str
    axis: int
    position: str
    rings: tuple[Ring, ...] = ()


class StateTensor(msgspec.Struct, frozen=True):
    """One state tensor: graph input ``name``, graph output ``output``, value before the first token."""

    name: str
    output: str
    dtype: str
    shape: tuple[int | str, ...]
    init: float
    appended: Appended | None = None


class Lowering(msgspec.Struct, frozen=True):
    """Which body an operator got, and why."""

    op: str
    domain: str
    variant: str
    why: str
    nodes: int


class TensorDecision(msgspec.Struct, frozen=True):
    """How one weight tensor is stored, and why.

    ``error`` is the relative RMS error of the stored against the original values (0 for exact).
    """

    tensor: str
    role: str
    shape: tuple[int, ...]
    format: str
    bytes: int
    reason: str
    error: float


class Activation(msgspec.Struct, frozen=True):
    """The fixed range that a value is rounded in, and how calibration chose it.

    ``low`` to ``high`` in 2^bits steps, by ``method``; ``seen_low`` and ``seen_high`` are the extremes that
    occurred.
    """

    value: str
    low: float
    high: float
    bits: int
    method: str
    seen_low: float
    seen_high: float


class Refusal(msgspec.Struct, frozen=True, rename={"pass_": "pass"}):
    """A node that a pass of the exporter looked at and left as it is, and why."""

    pass_: str
    node: str
    reason: str


class ModelInfo(msgspec.Struct, frozen=True):
    """What was exported; how it may be called is :attr:`contract`."""

    family: str
    title: str
    config: dict[str, Any]
    parameters: int
    vocab_size: int
    max_tokens: int | None
    source: str
    notes: tuple[str, ...] = ()
    form: str = "chunk"
    fixed_length: int | None = None
    input: InputSpec = TOKENS
    predicts_next: bool = True

    @property
    def contract(self) -> Contract:
        """How the model may be called."""
        return Contract(self.form, self.input, self.fixed_length, self.max_tokens, self.predicts_next)


class Manifest(msgspec.Struct, frozen=True):
    """The whole of manifest.json."""

    schema_version: int
    xexport_version: str
    created: str
    model: ModelInfo
    target: str
    precision: str
    runtime: str
    provider: str
    target_row: dict[str, Any]
    opset: int
    ir_version: int
    graph: str
    graph_form: str
    files: tuple[FileEntry, ...]
    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]
    state: tuple[StateTensor, ...]
    tokenizer: dict[str, Any]
    lowerings: tuple[Lowering, ...]
    decisions: tuple[TensorDecision, ...]
    checks: dict[str, Any]
    environment: dict[str, Any]
    warnings: tuple[str, ...] = ()
    figures: dict[str, Any] = {}
    refusals: tuple[Refusal, ...] = ()
    #: T -> file, of a bundle with graphs of fixed shape [1,T]; ``graph`` is the one of the smallest T
    graphs: dict[int, str] = {}
    #: T -> file: the same graphs compiled for the target's device, weights included (ONNX models of one node)
    contexts: dict[int, str] = {}
    activations: tuple[Activation, ...] = ()

    @property
    def graph_files(self) -> tuple[FileEntry, ...]:
        """The graphs with their weights: what a device must keep."""
        names = {self.graph, *self.graphs.values()}
        return tuple(f for f in self.files if f.path in names or f.path.startswith(_GRAPH))


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2)


def decode_manifest(data: bytes, where: str = MANIFEST_NAME) -> Manifest:
    """Parse and validate a manifest.

    Raises:
        BundleError: not JSON, not of the schema, of an unknown version, or with a path that leaves
            the bundle's folder.
    """
    try:
        version = msgspec.json.decode(data, type=_Version).schema_version
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError("the manifest is not valid", got=f"{where}: {error}") from error
    if version != SCHEMA_VERSION:
        raise BundleError(
            "the manifest has a schema version this xexport can't read",
            got=version,
            allowed=SCHEMA_VERSION,
            fix="upgrade xexport, or export the model again",
        )
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
        _ = manifest.model.contract  # checks itself
    except (msgspec.DecodeError, UnicodeDecodeError, InputError) as error:
        raise BundleError("the manifest is not valid", got=f"{where}: {error}") from error
    for name in [
        manifest.graph,
        *manifest.graphs.values(),
        *manifest.contexts.values(),
        *(f.path for f in manifest.files),
    ]:
        safe_path(Path(), name)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle folder.

    Raises:
        BundleError: the folder is no bundle, or its manifest is not valid.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise BundleError(
            "this folder is not a bundle: it has no manifest.json",
            got=folder,
            fix="name a folder that `xexport MODEL --target T` wrote",
        )
    return decode_manifest(path.read_bytes(), str(path))


def safe_path(folder: Path, name: str) -> Path:
    """``folder / name`` for a plain file name.

    Raises:
        BundleError: the name is absolute, has a separator or ``..``, or is a link.
    """
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name or ":" in name:
        raise BundleError("a path in the manifest leaves the bundle's folder", got=name)
    path = folder / name
    if path.is_symlink():
        raise BundleError("a file of the bundle is a symbolic link", got=path)
    return path


class _Version(msgspec.Struct):
    schema_version: int
