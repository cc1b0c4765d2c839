"""Tracing a module into one graph with dynamic batch and length.

The module may live on the meta device: then no weight is ever allocated, and the initializers are
bound to the checkpoint's own memory-mapped tensors afterwards (weights.py).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch

from xexport.core.contract import Contract, contract_of
from xexport.core.errors import ExportError, XexportError
from xexport.core.state import StateSpec, check_state_specs, state_shape
from xexport.exporter.translate import translation_table

__all__ = ["LOGITS", "output_name", "trace"]

LOGITS = "logits"
_MAX_OPSET, _MAX_IR = 25, 10
#: the example: sizes that differ from one another and from 1, so that nothing is specialised away
_BATCH, _LENGTH = 2, 3
#: composite operators that torch.onnx or translate.py translates although torch has no decomposition of them
_COMPOSITES = {
    torch.ops.aten.item.default,
    torch.ops.aten.to.dtype,
    torch.ops.aten.unflatten.int,
    torch.ops.aten.flatten.using_ints,
    torch.ops.aten.chunk.default,
}


def output_name(state_name: str) -> str:
    """The graph output that carries the new value of a state tensor."""
    return f"{state_name}.out"


def trace(
    module: torch.nn.Module,
    specs: Sequence[StateSpec],
    *,
    opset: int,
    contract: Contract | None = None,
) -> ir.Model:
    """The module's graph, unoptimised, with the initializers still the module's parameters.

    Graph inputs are ``tokens`` [B,T], or the features that the contract names, and the state names;
    outputs ``logits`` [B,T,V] and ``<state>.out``. Custom operators stay single nodes. T is static if the
    contract has a fixed length.

    Args:
        contract: what the module takes; by default what it says itself.

    Raises:
        ExportError: the module can't be traced with a dynamic batch and length, or the result is
            not of the opset that was asked for.
    """
    contract = contract or contract_of(module)
    check_state_specs(specs, contract.inputs.name)
    if opset > _MAX_OPSET:
        raise ExportError("this opset can't be written", got=opset, allowed=f"up to {_MAX_OPSET}")
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    with torch.device(device):
        length = contract.nearest(_LENGTH * contract.inputs.multiple)
        inputs = torch.zeros(
            contract.inputs.shape(_BATCH, length), dtype=getattr(torch, contract.inputs.dtype)
        )
        state = tuple(torch.zeros(state_shape(s, _BATCH), dtype=getattr(torch, s.dtype)) for s in specs)
    batch: list[dict[int, Any]] = [{i: "B" for i, d in enumerate(s.shape) if d == "B"} for s in specs]
    first = {0: "B"} if contract.fixed_length is not None else {0: "B", 1: "T"}
    dynamic: tuple[Any, ...] = (first, tuple(batch)) if specs else (first,)
    names = [s.name for s in specs]
    was_training = module.training
    module.eval()
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                _capture(_Positional(module), (inputs, *state), dynamic),
                dynamo=True,
                custom_translation_table=translation_table(),
                opset_version=opset,
                dynamic_shapes=dynamic,
                input_names=[contract.inputs.name, *names],
                output_names=[LOGITS, *map(output_name, names)],
                optimize=False,
                verbose=False,
            )
    except XexportError:
        raise
    except Exception as error:
        raise ExportError(
            "torch.onnx could not trace this module with a dynamic batch and length",
            got=_root_cause(error),
            fix=f"the forward must take ({_arguments(contract)}) and may not branch or loop on B or T",
        ) from error
    finally:
        module.train(was_training)
    assert program is not None
    model = program.model
    _check_signature(model, specs, contract)
    _check_versions(model, opset)
    for name in list(model.graph.initializers):
        if name.startswith("module."):
            _rename_initializer(model, name, name.removeprefix("module."))
    return model


def _arguments(contract: Contract) -> str:
    """The arguments of forward as an error names them."""
    spec = contract.inputs
    shape = f"[B,T,{spec.width}]" if spec.width else "[B,T]"
    return f"{spec.name} {shape}, *state" if contract.streams else f"{spec.name} {shape}"


class _Positional(torch.nn.Module):
    """Gives torch.export a forward of exactly (tokens, *state), whatever the module's own looks like."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, tokens: torch.Tensor, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = self.module(tokens, *state)
        return tuple(out)


def _capture(
    module: torch.nn.Module, example: tuple[torch.Tensor, ...], dynamic: tuple[Any, ...]
) -> torch.export.ExportedProgram:
    """torch.export, with the program's decomposition skipped where it would change nothing.

    torch.onnx always decomposes, which traces the whole model a second time (half of an export of 24
    layers) even if every operator in it has an ONNX translation of its own.
    """
    shapes = torch.utils._pytree.tree_map(lambda _: torch.export.Dim.DYNAMIC, dynamic)
    # as torch.onnx does, so that sizes of 0 and 1 are nothing special
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        program = torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
    decompose = program.run_decompositions

    def run_decompositions(table: dict[Any, Any] | None = None, **options: Any) -> Any:
        if table is not None and not _needs_decomposition(program, table):
            return program
        return decompose(table, **options)

    program.run_decompositions = run_decompositions
    return program


def _needs_decomposition(program: torch.export.ExportedProgram, table: dict[Any, Any]) -> bool:
    """Whether an operator of the program has to be rewritten before torch.onnx can translate it.

    ``table`` holds the decompositions of every operator that torch.onnx does not translate itself.
    """
    known = {*torch.export.default_decompositions(), *torch._decomp.decomposition_table}
    for node in program.graph.nodes:
        op = node.target
        if node.op == "get_attr" or isinstance(op, torch._ops.HigherOrderOperator):
            return True  # a subgraph, or a constant that decomposition lifts
        if not isinstance(op, torch._ops.OpOverload):
            continue
        name: str = op.name()  # type: ignore[no-untyped-call]
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
        unknown = composite and op not in known and op not in _COMPOSITES
        if op in table or unknown or op._schema.is_mutable:
            return True
    return False


def _check_signature(model: ir.Model, specs: Sequence[StateSpec], contract: Contract) -> None:
    """Every input and output must be there, with the state's shape unchanged and B and T dynamic."""
    graph = model.graph
    if len(graph.inputs) != 1 + len(specs) or len(graph.outputs) != 1 + len(specs):
        raise ExportError(
            "the module's forward does not match its state_spec",
            got=f"{len(graph.outputs) - 1} new state tensors for {len(specs)} state tensors",
            fix="return (logits, *new_state) in the order of state_spec()",
        )
    for spec, new in zip(specs, graph.outputs[1:], strict=True):
        wanted = [str(d) for d in spec.shape]
        got = [str(d) for d in new.shape] if new.shape is not None else wanted
        if got != wanted:
            raise ExportError(
                f"the new value of state {spec.name!r} has another shape than the old one",
                got=f"[{', '.join(got)}]",
                allowed=f"[{', '.join(wanted)}]",
                fix="the chunk form's state must keep its shape for every T",
            )
    logits = graph.outputs[0].shape
    if logits is None:
        return
    got = [str(d) for d in logits]
    # of features there may be fewer positions than frames, by a rule that is the model's own
    known = ["B", str(contract.fixed_length or "T")] if not contract.inputs.width else ["B"]
    if len(got) != 3 or got[: len(known)] != known:
        raise ExportError("the first output must be logits [B,T,V]", got=logits)


def _check_versions(model: ir.Model, opset: int) -> None:
    if model.opset_imports.get("") != opset or (model.ir_version or 0) > _MAX_IR:
        raise ExportError(
            "torch.onnx stamped the model with other versions than asked",
            got=f"opset {model.opset_imports.get('')}, IR {model.ir_version}",
            allowed=f"opset {opset}, IR <= {_MAX_IR}",
        )


def _rename_initializer(model: ir.Model, old: str, new: str) -> None:
    value = model.graph.initializers.pop(old)
    value.name = new
    if value.const_value is not None:
        value.const_value.name = new
    model.graph.initializers[new] = value


def _root_cause(error: BaseException) -> str:
    """The innermost message of torch's long chain, in a few lines."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = f"{type(error).__name__}: {error}".strip()
    return "\n".join(text.splitlines()[:6])


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx warns and logs about its own internals; none of it is about the user's model."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
