"""Sizes that no model can have are refused, by the configuration itself: one table for all families.

The families that are not here (RWKV, Mamba) take their sizes from the checkpoint's shapes, which must agree.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from xexport.core.errors import InputError
from xexport.core.registry import get_family

#: family to what is changed in its tiny preset, and what the error says
SIZES: dict[str, list[tuple[dict[str, Any], str]]] = {
    "aft": [
        ({"kind": "global"}, "unknown kind"),
        ({"layers": 0}, "too small"),
        ({"window": 1}, "window of an AFT"),
        ({"kind": "conv", "heads": 5}, "multiple of its heads"),
        ({"kind": "image", "window": 4}, "window that has a middle"),
        ({"kind": "image", "grid": (0, 5)}, "grid of patches"),
    ],
    "conformer": [
        ({"layers": 0}, "too small"),
        ({"chunk": 0}, "too small"),
        ({"kernel": 1}, "too small"),
        ({"width": 33}, "even multiple"),
        ({"blank": 29}, "not in the vocabulary"),
    ],
    "gtrxl": [
        ({"memory": 0}, "too small"),
        ({"heads": 5}, "multiple of its heads"),
    ],
    "hyena": [
        ({"order": 1}, "order"),
        ({"filter_features": 4}, "pairs"),
        ({"max_tokens": 1}, "too small"),
    ],
    "linear_attention": [
        ({"rule": "hgrn"}, "unknown rule"),
        ({"layers": 0}, "too small"),
        ({"conv_size": 1}, "too small"),
        ({"key_size": 0, "heads": 3}, "not a multiple"),
    ],
    "linformer": [
        ({"layers": 0}, "too small"),
        ({"heads": 5}, "multiple of its heads"),
        ({"rows": 25}, "fewer rows"),
        ({"sharing": "all"}, "unknown sharing"),
    ],
    "lmuformer": [
        ({"memory": 0}, "too small"),
        ({"theta": 1}, "span of a Legendre memory"),
    ],
    "longnet": [
        ({"width": 30}, "even multiple"),
        ({"layers": 0}, "too small"),
        ({"segments": (4, 8)}, "in pairs"),
        ({"segments": (), "rates": ()}, "in pairs"),
        ({"rates": (2, 2, 4)}, "one of the rates must be 1"),
        ({"rates": (0, 1, 1)}, "in pairs"),
        ({"spread": "even"}, "unknown spread"),
        ({"segments": (1021, 1031, 1033)}, "leaves the range"),
    ],
    "m2_gpt": [
        ({"order": 3}, "not an M2-GPT"),
        ({"mlp_blocks": 0}, "not an M2-GPT"),
        ({"ffn": 33}, "not whole blocks"),
        ({"mlp_blocks": 5}, "not whole blocks"),
    ],
    "mamba_mixer": [
        ({"conv_kernel": 1}, "too small"),
        ({"group": 5}, "multiple of the group"),
    ],
    "monarch_mixer": [
        ({"ffn": 33}, "not whole blocks"),
        ({"filter_features": 4}, "holds time and pairs"),
        ({"max_tokens": 1}, "too small"),
        ({"blocks": 0}, "too small"),
    ],
    "performer": [
        ({"layers": 0}, "too small"),
        ({"width": 30, "heads": 4}, "even multiple"),
        ({"kernel": "cosine"}, "unknown kernel"),
    ],
    "reformer": [
        ({"attention": ("lsh", "full")}, "unknown attention"),
        ({"buckets": (3,)}, "must be even"),
        ({"lsh_before": 3}, "chunks in view"),
        ({"lsh_after": 1}, "no later chunks"),
        ({"axial_widths": (12, 12)}, "do not add up"),
        ({"max_tokens": 200}, "fewer axial positions"),
        ({"hashes": 0}, "too small"),
    ],
    "retnet": [
        ({"width": 30}, "even multiple"),
        ({"layers": 0}, "below 1"),
        ({"value_factor": 1.3}, "not whole"),
    ],
    "slab": [
        ({"taps": 1}, "too small"),
        ({"heads": 3}, "even multiple of its heads"),
    ],
    "striped_hyena": [
        ({"heads": 5}, "no multiple"),
        ({"attention": (3,)}, "none of the blocks"),
        ({"state_size": 0}, "too small"),
        ({"activation": "relu"}, "activation"),
    ],
    "tokenformer": [
        ({"heads": 3}, "no multiple of the heads"),
        ({"rope_share": 0.0}, "rotated in pairs"),
        ({"rope_share": 0.2}, "rotated in pairs"),
        ({"activation": "relu"}, "unknown activation"),
        ({"ffn_slots": 0}, "too small"),
    ],
    "transformer": [
        ({"layers": 0}, "too small"),
        ({"kv_heads": 3}, "not a multiple"),
        ({"width": 30}, "whole and even"),
        ({"head_size": 5}, "whole and even"),
        ({"windows": (1,)}, "windows"),
        ({"windows": (4, 4, 4)}, "windows"),
        ({"sinks": 2}, "need a window"),
        ({"block": "post"}, "unknown kind"),
        ({"activation": "tanh"}, "unknown kind"),
        ({"block": "simplified"}, "no kv_heads"),
        ({"rope_bands": (1.0, 2.0)}, "rope_bands"),
    ],
    "block_transformer": [
        ({"layers": 0}, "below 1"),
        ({"block": 5}, "share the width"),
        ({"heads": 5}, "divide the width"),
        ({"start_token": 29}, "not in the vocabulary"),
    ],
    "hourglass": [
        ({"valley": 0}, "below 1"),
        ({"factors": (3, 1)}, "2 or more"),
        ({"pre": (1,)}, "every level"),
        ({"heads": 3}, "not a multiple"),
    ],
    "hybrid": [
        ({"experts": 4, "experts_used": 5, "expert_ffn": 8}, "impossible experts"),
        ({"heads": 5}, "no multiple of the heads"),
        ({"rotary": 5}, "must be even"),
        ({"attention": (3,)}, "none of the layers"),
    ],
    "megabyte": [
        ({"layers": 0}, "below 1"),
        ({"style": "fast"}, "unknown style"),
        ({"patch": 5}, "share the width"),
        ({"heads": 5}, "whole and even"),
        ({"shift": True, "local_width": 9, "local_heads": 1, "head_size": 12}, "even width"),
    ],
}


@pytest.mark.parametrize(
    ("family", "changes", "match"),
    [
        pytest.param(name, changes, match, id=f"{name}-{'-'.join(changes)}")
        for name, rows in SIZES.items()
        for changes, match in rows
    ],
)
def test_impossible_sizes_are_refused(family: str, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        dataclasses.replace(get_family(family).presets["tiny"], **changes)
