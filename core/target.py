"""A target as a row of data: runtime, provider, precision, graph form, operator bodies, limits."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib.resources import files
from typing import Any

from xexport.core.errors import TargetError, unknown_name

__all__ = ["Target", "get_target", "parse_target", "target_names"]


@dataclass(frozen=True)
class Target:
    """Where a bundle is to run.

    Attributes:
        name: file name of the TOML, for example ``cpu-int8``.
        description: one line for ``xexport targets``.
        runtime: the file in runtimes/ that runs it.
        provider: execution provider of that runtime.
        environment: the isolated environment (runtimes/environments.toml) that the runtime lives in; "" for
            the process that opens the bundle.
        precision: name of a quantization scheme (a row in quant/schemes.toml).
        graph_form: ``dynamic`` (one graph, any B and T) or ``static`` (a graph a length, B = 1).
        opset: ai.onnx operator set of the graph.
        format: of the graph's file: ``onnx``, or ``ort`` (exporter/ort_format.py).
        fuse: passes that put this project's own operators, or plainer ones, in the place of standard ones,
            in order: files in exporter/passes/.
        inline: put the operators' bodies in the place of their nodes, for a runtime without local functions.
        full_placement: promise that the provider runs every node. ONNX Runtime is opened so that it refuses a
            graph of which a node would fall back to the CPU; without the promise that is a warning. No other
            runtime can be held to that: only ``onnxruntime`` may promise.
        unroll: write the steps of every loop one after another, for a runtime without loops; static graphs
            only.
        lower: passes over the static graphs, in order: files in exporter/lower/, which put other standard
            operators in the place of those that the device can't compute, or not well.
        context: ship what the provider compiled of every static graph (a QNN context binary), so that the
            device does not compile; if it can't take it, it compiles the graph that is there as well.
        lengths: values of T that a runtime of fixed shapes prepares; longer inputs are fed in them.
        agreement: how far its runtime may be from ONNX Runtime's CPU provider on the same graph: the largest
            difference of logits and state, relative to their RMS.
        bodies: operator -> variant of its function body; operators not listed use their default.
        provider_options, session_options: passed to the runtime as they are.
        why: reasons for the choices above, shown in the manifest.
    """

    name: str
    description: str
    runtime: str
    provider: str
    precision: str
    environment: str = ""
    graph_form: str = "dynamic"
    opset: int = 23
    format: str = "onnx"
    fuse: list[str] = field(default_factory=list)
    inline: bool = False
    full_placement: bool = False
    unroll: bool = False
    lower: list[str] = field(default_factory=list)
    context: bool = False
    lengths: list[int] = field(default_factory=list)
    agreement: float = 1e-3
    bodies: dict[str, str] = field(default_factory=dict)
    provider_options: dict[str, str] = field(default_factory=dict)
    session_options: dict[str, str] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)

    @property
    def on_cpu(self) -> bool:
        """Whether ONNX Runtime's CPU provider, in the process that opens the bundle, is what it is for."""
        return (self.runtime, self.provider, self.environment) == ("onnxruntime", "CPUExecutionProvider", "")

    @property
    def where(self) -> str:
        """The runtime in a word; of ONNX Runtime its execution provider, or whose CPU, or its format."""
        if self.format == "ort":
            return "ORT format"
        if self.runtime != "onnxruntime":
            return self.runtime
        provider = self.provider.removesuffix("ExecutionProvider")
        return f"{self.environment} CPU" if self.environment and provider == "CPU" else provider

    def row(self) -> dict[str, Any]:
        """The target as plain data."""
        return asdict(self)


#: the runtime that can be told to refuse a graph of which the provider leaves a node to the CPU
_KEEPS_PROMISE = "onnxruntime"
_TYPES: dict[str, type] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": bool,
    "list[str]": list,
    "list[int]": list,
}


@cache
def target_names() -> tuple[str, ...]:
    """Names of the TOML files in targets/."""
    return tuple(sorted(p.name[:-5] for p in files("xexport.targets").iterdir() if p.name.endswith(".toml")))


def get_target(name: str) -> Target:
    """The target of that name.

    Raises:
        UnknownNameError: with the nearest names.
    """
    if name not in target_names():
        raise unknown_name("target", name, target_names())
    text = (files("xexport.targets") / f"{name}.toml").read_text(encoding="utf-8")
    return parse_target(name, text)


def parse_target(name: str, text: str) -> Target:
    """A target from the text of its TOML.

    Raises:
        TargetError: not TOML, an unknown or missing key, a value of a wrong type, or a promise that means
            nothing.
    """
    try:
        row = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TargetError(f"target {name!r} is not valid TOML", got=error) from error
    known = {f.name: f for f in fields(Target) if f.name != "name"}
    for key, value in row.items():
        if key not in known:
            raise unknown_name(f"key in target {name!r}", key, known)
        wanted = _TYPES.get(str(known[key].type), dict)
        if not isinstance(value, wanted):
            raise TargetError(
                f"key {key!r} of target {name!r} has a wrong type",
                got=type(value).__name__,
                allowed=wanted.__name__,
            )
    try:
        target = Target(name=name, **row)
    except TypeError as error:
        raise TargetError(f"target {name!r} lacks a key", got=error) from error
    if target.full_placement:
        _check_promise(target)
    return target


def _check_promise(target: Target) -> None:
    """Full placement can be promised where ONNX Runtime holds the provider to it, and nowhere else."""
    if target.runtime != _KEEPS_PROMISE:
        raise TargetError(
            f"target {target.name!r} promises full placement, and its runtime holds no provider to that",
            got=f'full_placement = true, runtime = "{target.runtime}"',
            allowed=f'runtime = "{_KEEPS_PROMISE}"',
            fix="leave the key out",
        )
    if target.provider == "CPUExecutionProvider":
        raise TargetError(
            f"target {target.name!r} promises that nothing falls back to the CPU, and is for the CPU",
            got="full_placement = true",
            fix="leave the key out",
        )
