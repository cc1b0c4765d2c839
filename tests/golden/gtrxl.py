"""Make gtrxl.npz again: ``python tests/golden/gtrxl.py FOLDER``, a checkout of dhruvramani/Transformers-RL.

Another implementation than the paper's, which was not published: its relative attention, gates and networks,
as they stand in FOLDER. It leaves out the ReLU in front of a gate; it is put in here, as section 3.1 of arXiv
1910.06764 has it. Its matrices of gates have biases that the paper's don't: they are 0.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["make"]

HERE = Path(__file__).parent
WIDTH, HEADS, SIZE, INNER, LAYERS, LENGTH = 12, 3, 5, 10, 2, 14


def make(folder: Path) -> dict[str, np.ndarray]:
    """Names of the file -> arrays."""
    sys.path.insert(0, str(folder))
    theirs: Any = importlib.import_module("layers")
    torch.manual_seed(0)
    model = theirs.StableTransformerXL(WIDTH, LAYERS, HEADS, SIZE, INNER).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        gate = "gate" in name and name.endswith("bias")
        p.copy_(torch.zeros(p.shape) if gate else torch.randn(p.shape) * p.shape[-1] ** -0.5)
    x = torch.randn(LENGTH, 2, WIDTH)
    places = model.pos_embs(torch.arange(LENGTH - 1, -1, -1.0))
    ahead = torch.ones(LENGTH, LENGTH).triu(1).bool()[..., None]
    y, nothing = x, x[:0]
    for layer in model.layers:
        seen = layer.mha(layer.norm1(y), places, nothing, model.u, model.v, mask=ahead)
        y = layer.gate1(y, seen.relu())
        y = layer.gate2(y, layer.ff(layer.norm2(y)).relu())
    weights = {f"weight.{k}": v for k, v in model.state_dict().items() if "inv_freq" not in k}
    arrays = {"in": x.transpose(0, 1), "out": y.transpose(0, 1), **weights}
    return {name: value.numpy() for name, value in arrays.items()}


if __name__ == "__main__":
    np.savez_compressed(HERE / "gtrxl.npz", **make(Path(sys.argv[1])))
