"""How many parameters the presets of a family have, counted without memory for them."""

from __future__ import annotations

import math
from functools import cache

import torch

from xexport.core.errors import InputError
from xexport.core.registry import find_family

__all__ = ["nearest_preset", "preset_parameters"]

#: a preset further from the size asked for than this factor is not "about" that size
_ABOUT = 1.5


@cache
def preset_parameters(family: str) -> dict[str, int]:
    """Preset -> number of parameters and stored buffers, the smallest first (built on the meta device).

    Raises:
        UnknownNameError: no such family.
    """
    found = find_family(family)
    with torch.device("meta"):
        sizes = {
            name: sum(t.numel() for t in found.build(config).state_dict().values())
            for name, config in found.presets.items()
        }
    return dict(sorted(sizes.items(), key=lambda row: row[1]))


def nearest_preset(family: str, parameters: int) -> str:
    """The preset whose number of parameters is nearest, by ratio.

    Raises:
        UnknownNameError: no such family.
        InputError: none is within a factor of 1.5; the error lists what there is.
    """
    sizes = preset_parameters(family)
    name = min(sizes, key=lambda n: abs(math.log(sizes[n] / parameters)))
    if max(sizes[name] / parameters, parameters / sizes[name]) > _ABOUT:
        raise InputError(
            f"{family} has no preset of about {parameters:,} parameters",
            allowed=", ".join(f"{n} ({count:,})" for n, count in sizes.items()),
            fix="name a size that all of the models have, or export this one yourself and name its folder",
        )
    return name
