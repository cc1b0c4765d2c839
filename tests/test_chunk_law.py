"""The chunk law, and the exports against PyTorch, of families that are asked the same: one row each."""

from __future__ import annotations

from typing import Any

import pytest
from chunk_form import TARGETS, check_cuts, check_export, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from xexport.core.registry import get_family

#: family -> the longest piece to cut a sequence into: longer than what its layers look back
LONGEST = {
    "block_transformer": 13,
    "gtrxl": 23,
    "hourglass": 13,
    "lmuformer": 29,
    "mamba_mixer": 13,
    "megabyte": 13,
    "rwkv": 13,
    "rwkv4": 13,
    "slab": 23,
}
EXPORTED = [
    *(
        (family, target)
        for family in ("gtrxl", "lmuformer", "mamba_mixer", "rwkv4", "slab")
        for target in TARGETS
    ),
    *((f, t) for f in ("block_transformer", "hourglass", "megabyte") for t in ("cpu-fp32", "cpu-int8")),
]


@pytest.mark.parametrize("name", LONGEST)
@settings(max_examples=12, deadline=None)
@given(data=st.data(), batch=st.integers(1, 3), seed=st.integers(0, 50))
def test_any_cut_gives_the_same_logits_and_state(
    name: str, data: st.DataObject, batch: int, seed: int
) -> None:
    family = get_family(name)
    variant = data.draw(st.sampled_from([v for v in family.presets if v.startswith("tiny")]))
    lengths = data.draw(st.lists(st.integers(1, LONGEST[name]), min_size=1, max_size=5))
    check_cuts(random_model(family, family.presets[variant], seed), batch, lengths)


@pytest.mark.parametrize(("name", "target"), EXPORTED)
def test_bundle_is_pytorch(exporter: Any, name: str, target: str) -> None:
    check_export(exporter, name, target)
