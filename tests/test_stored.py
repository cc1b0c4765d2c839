"""A module whose weights stay in the file's 16 bits computes what the widened one does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tolerances import TOLERANCES

from xexport.core.contract import contract_of
from xexport.core.registry import family_names, get_family
from xexport.core.state import zero_state
from xexport.exporter.forward import torch_forward
from xexport.models._stored import assign_stored


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", family_names())
def test_weights_of_16_bits_are_widened_wherever_they_are_used(name: str, dtype: torch.dtype) -> None:
    """Also where a forward function asks a weight for its dtype, to make other numbers of it."""
    family = get_family(name)
    config = family.presets["tiny"]
    module = family.build(config)
    family.init(module, 0)
    stored = {k: v.to(dtype) if v.is_floating_point() else v for k, v in module.state_dict().items()}
    module.load_state_dict({k: v.to(module.state_dict()[k].dtype) for k, v in stored.items()})
    lean = family.build(config)
    assign_stored(lean, stored)
    contract = contract_of(module)
    inputs = contract.inputs.random(
        np.random.default_rng(0),
        2,
        contract.nearest(6 * contract.inputs.multiple),
        getattr(config, "vocab_size", 2),
    )
    state = zero_state(module.state_spec(), 2) if contract.streams else ()
    want, after = torch_forward(module.eval())(inputs, state)
    got, moved = torch_forward(lean.eval())(inputs, state)
    for a, b in zip((got, *moved), (want, *after), strict=True):
        size = max(1e-3, float(np.sqrt(np.mean(np.square(b.astype(np.float64))))))
        assert np.abs(a - b).max() <= TOLERANCES["model_fp32"] * size
