"""What is asked of every family's training form and initial weights, and of a file of our own training."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Any

import pytest
import torch
from chunk_form import check_gradients, check_init, check_own_file, check_training_form, chunk_form, trained

from xexport.core.registry import family_names, get_family

#: the training form has parameters of its own, which loading folds: each family's file compares the two
FOLDED = {
    *("conformer", "gtrxl", "hyena", "lmuformer", "m2_gpt", "monarch_mixer", "slab"),
    *("aft/tiny", "aft/tiny-image"),
}
#: of a fixed length
OTHER_FORM = FOLDED | {"linformer"}
#: a fixed length, inputs that are no tokens, or what starts at 0 and holds back the gradient of others
OTHER_GRADIENTS = {
    *("conformer", "linformer", "slab"),
    *("aft/tiny-conv", "aft/tiny-image", "transformer/tiny-simplified"),
}
#: known by the authors' names too, so that another file than ours may be somebody's: see each family's file
PUBLISHED = {
    *("hybrid", "mamba", "mamba2", "rwkv", "rwkv4", "rwkv5", "rwkv6", "striped_hyena"),
    *("block_transformer", "longnet/tiny"),
}


def cases(without: Set[str] = frozenset()) -> list[Any]:
    """Every family's tiny presets, but for those of a set of families and family/preset."""
    rows = ((name, preset) for name in family_names() for preset in get_family(name).presets)
    return [
        pytest.param(*row, id="/".join(row))
        for row in rows
        if row[1].startswith("tiny") and not {row[0], "/".join(row)} & without
    ]


@pytest.mark.parametrize(("name", "preset"), cases(OTHER_FORM))
def test_training_form_is_the_exported_form_from_the_first_state(name: str, preset: str) -> None:
    family = get_family(name)
    check_training_form(family, family.presets[preset])


@pytest.mark.parametrize(("name", "preset"), cases(OTHER_GRADIENTS))
def test_every_parameter_gets_a_gradient(name: str, preset: str) -> None:
    family = get_family(name)
    check_gradients(family, family.presets[preset])


@pytest.mark.parametrize(("name", "preset"), cases())
def test_init_depends_on_the_seed_alone(name: str, preset: str) -> None:
    family = get_family(name)
    check_init(family, family.presets[preset])


@pytest.mark.parametrize(("name", "preset"), cases(PUBLISHED))
def test_a_file_of_our_own_training_loads(name: str, preset: str, tmp_path: Path) -> None:
    family = get_family(name)
    module = trained(family, family.presets[preset])
    wanted = chunk_form(family, module).state_dict()
    check_own_file(family, family.presets[preset], module.state_dict(), wanted, tmp_path)


def test_a_block_transformer_of_our_own_training_loads(tmp_path: Path) -> None:
    """Its names are the authors', which it reads without metadata too."""
    family = get_family("block_transformer")
    wanted = chunk_form(family, trained(family, family.presets["tiny"])).state_dict()
    tensors = {k: v for k, v in wanted.items() if not k.endswith("turns")}
    check_own_file(family, family.presets["tiny"], tensors, wanted, tmp_path, another={"x": torch.zeros(1)})
