"""The package rwkv 0.8.32 as an oracle: it runs a published .pth in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

__all__ = ["rwkv_package"]

_ORACLE = """
import sys, numpy as np, torch
from rwkv.model import RWKV
model = RWKV(model=sys.argv[1], strategy="cpu fp32")
tokens = [int(t) for t in sys.argv[3].split(",")]
logits, state = model.forward(tokens, None, full_output=True)
step, state = model.forward([5], state)
arrays = {f"s{i}": s.numpy() for i, s in enumerate(state)}
np.savez(sys.argv[2], logits=logits.numpy(), step=step.numpy(), **arrays)
"""


def rwkv_package(tensors: dict[str, Any], tokens: list[int], folder: Path) -> tuple[Any, Any, list[Any]]:
    """Its logits of ``tokens`` [T,V], of the one token 5 after them [V], and its state after that."""
    if importlib.util.find_spec("rwkv") is None:
        pytest.skip("the package rwkv (0.8.32) is not installed")
    torch.save(tensors, folder / "model.pth")
    out, text = folder / "oracle.npz", ",".join(map(str, tokens))
    # a process of its own: the package chooses its architecture by the environment when it is imported
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _ORACLE, str(folder / "model"), str(out), text],
        env={**os.environ, "RWKV_V7_ON": "0", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"},
        check=True,
        capture_output=True,
    )
    found = np.load(out)
    state = [torch.from_numpy(found[f"s{i}"]) for i in range(len(found.files) - 2)]
    return torch.from_numpy(found["logits"]), torch.from_numpy(found["step"]).flatten(), state
