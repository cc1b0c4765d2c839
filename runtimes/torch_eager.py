"""The PyTorch module itself as a stream: the reference that bundles are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from xexport.core.contract import Contract, contract_of
from xexport.core.errors import RuntimeFailure
from xexport.core.extras import require
from xexport.core.state import StateSpec, check_state_specs, zero_state
from xexport.runtimes.inputs import Inputs, checker
from xexport.runtimes.stream import Stream
from xexport.runtimes.tokenizers import NoTokenizer, Tokenizer

if TYPE_CHECKING:
    from xexport.core.family import ChunkModule

__all__ = ["TorchCell", "TorchStream"]


class TorchStream(Stream):
    """An nn.Module in the chunk form or the whole form, fed and saved as a bundle's stream is.

    The module is put in eval mode and runs eagerly under ``torch.inference_mode``.

    Args:
        module: ``forward(tokens [B,T] int64, *state) -> (logits [B,T,V], *new_state)`` with
            ``state_spec()``; ``vocab_size`` and what :func:`xexport.core.contract.contract_of` reads
            are used if it has them.
        batch: B.
        name: for messages and reports.
        tokenizer: for :meth:`generate`.
        head: path of the ``nn.Linear`` that makes the logits position by position: with it,
            ``feed(..., keep=n)`` gives it the last n positions alone, which is what a careful user of
            PyTorch would write. Without, every position is computed.
        contract: its form and input; by default what the module says itself.

    Raises:
        RuntimeFailure: the module's outputs aren't logits and one tensor a state.
    """

    def __init__(
        self,
        module: ChunkModule,
        batch: int = 1,
        name: str = "torch",
        *,
        tokenizer: Tokenizer | None = None,
        head: str | None = None,
        contract: Contract | None = None,
    ) -> None:
        require("torch", extra="export", why="to run a PyTorch module")
        contract = contract or contract_of(module)
        specs = tuple(module.state_spec()) if contract.streams else ()
        check_state_specs(specs, contract.inputs.name)
        cell = TorchCell(module, specs, batch, head)
        vocab = getattr(module, "vocab_size", None)
        super().__init__(
            cell,
            specs,
            vocab_size=int(vocab or 1),
            batch=batch,
            contract=contract,
            fingerprint=f"{name}:{id(module)}",
            tokenizer=tokenizer or NoTokenizer(),
        )
        self.name = name
        self._module = module  # kept alive: the fingerprint is its identity
        if vocab is None:
            spec = contract.inputs
            first = spec.random(np.random.default_rng(0), batch, contract.nearest(1), self.vocab_size)
            self.vocab_size = int(self.feed(first).shape[-1])
            self._check = checker(contract, batch, self.vocab_size)
            self.reset()


class TorchCell:
    """State tensors of a module, moved on by each call; ``head`` is as in :class:`TorchStream`."""

    def __init__(
        self, module: Any, specs: tuple[StateSpec, ...], batch: int, head: str | None = None
    ) -> None:
        self._module = module.eval()
        self._specs, self._batch = specs, batch
        self._names = tuple(s.name for s in specs)
        self._state: tuple[Any, ...] = ()
        self._head = None if head is None else self._module.get_submodule(head)
        self.keeps = head is not None

    def run(self, inputs: Inputs, keep: int = 0) -> npt.NDArray[np.float32]:
        """Run ids ``[B,T]`` or features ``[B,T,F]``."""
        import torch

        length = inputs.shape[1]
        wanted = min(keep or length, length)
        cut = self._only_last(wanted) if wanted < length else nullcontext()
        with torch.inference_mode(), cut:
            given = torch.from_numpy(inputs if inputs.flags.writeable else inputs.copy())
            outputs = self._module(given, *self._state)
            if not isinstance(outputs, tuple | list) or len(outputs) != 1 + len(self._names):
                count = len(outputs) if isinstance(outputs, tuple | list) else type(outputs).__name__
                raise RuntimeFailure(
                    f"the module isn't in the {'chunk' if self._names else 'whole'} form",
                    got=f"{count} outputs",
                    allowed=f"logits and {len(self._names)} state tensors",
                )
            logits: npt.NDArray[np.float32] = outputs[0][:, -wanted:].float().numpy().copy()
        self._state = tuple(outputs[1:])
        return logits

    @contextmanager
    def _only_last(self, count: int) -> Iterator[None]:
        """Give the head the last ``count`` positions of its input ``[B,T,C]``."""
        if self._head is None:
            yield
            return
        # a hook, not a slice of the logits: the product with a large vocabulary is what is saved
        hook = self._head.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, -count:],))
        try:
            yield
        finally:
            hook.remove()

    def read(self) -> dict[str, npt.NDArray[Any]]:
        """A copy of the state."""
        return {n: t.numpy().copy() for n, t in zip(self._names, self._state, strict=True)}

    def reset(self) -> None:
        """Back to the state before the first token."""
        self.write(dict(zip(self._names, zero_state(self._specs, self._batch), strict=True)))

    def write(self, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
        """Overwrite the state."""
        import torch

        self._state = tuple(torch.from_numpy(tensors[n].copy()) for n in self._names)
