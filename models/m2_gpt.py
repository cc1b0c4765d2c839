"""M2-GPT: causal Monarch Mixer, gated long convolutions and block-diagonal MLPs (arXiv 2310.12109).

Sources:
    1. Fu et al., Monarch Mixer, arXiv 2310.12109: section 3 (Monarch matrices on both axes), 5 (models).
    2. HazyResearch/m2 (Apache-2.0), ``monarch_mixer_sequence_mixer.py`` with ``bidirectional=False``.
    3. Poli et al., Hyena, arXiv 2302.10866: the filters and the streaming, all of models/hyena.py.

The block (pre-norm, X the residual stream), of width d, the products on the model axis block-diagonal:
    x_0, x_1, v = shortconv(LN(X) W_in)               causal, three taps
    Y  = X + (x_0 (h * (x_1 v) + D x_1 v)) W_out      (*: causal long convolution, a Monarch matrix on time)
    X' = Y + (gelu(a) b) W_o + bias,  [a, b] = LN(Y) W_g
The sequence mixer is that of [2], which is Hyena's operator of order 2; the feed-forward network is that of
[2] too. Departures: norms stand before the parts, as in every causal model here, where [2] (a BERT) has one
after the feed-forward network. No layout of a published causal checkpoint is known here.

The long convolution is the product of Monarch matrices that the function body of ``ops/fft_conv`` spells out
(a DFT in two factors); our kernel computes the same sum. See models/monarch_mixer.py for M2-BERT.

State: that of models/hyena.py: two short-convolution rows and the inputs of the long convolution, up to
``max_tokens``, and the position.
"""

from __future__ import annotations

import dataclasses

from xexport.core.checkpoint import RawCheckpoint, unreadable
from xexport.core.errors import InputError
from xexport.core.family import Family, LoadedModel
from xexport.models import hyena
from xexport.models.hyena import HyenaConfig

__all__ = ["FAMILY", "M2GPTConfig"]


@dataclasses.dataclass(frozen=True)
class M2GPTConfig(HyenaConfig):
    """Sizes of an M2-GPT: those of a Hyena of order 2 with ``mlp_blocks`` blocks in its products."""

    mlp_blocks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order != 2 or self.mlp_blocks < 1:
            raise InputError(
                "not an M2-GPT",
                got=f"order {self.order}, {self.mlp_blocks} blocks",
                allowed="order 2, 1 block",
            )
        if self.width % self.mlp_blocks or self.ffn % self.mlp_blocks:
            raise InputError(
                "the widths of an M2-GPT are not whole blocks",
                got=(self.width, self.ffn),
                allowed=f"multiples of mlp_blocks = {self.mlp_blocks}",
            )


def _load(raw: RawCheckpoint) -> LoadedModel:
    own = hyena.load_own(raw, "m2_gpt", M2GPTConfig)
    if own is None:
        raise unreadable(raw, "an M2-GPT", "a safetensors file from xexport's own training")
    return own


FAMILY = dataclasses.replace(
    hyena.FAMILY,
    name="m2_gpt",
    title="M2-GPT: causal Monarch Mixer (arXiv 2310.12109)",
    sources=(
        "https://arxiv.org/abs/2310.12109",
        "https://github.com/HazyResearch/m2",
        "https://arxiv.org/abs/2302.10866",
    ),
    config=M2GPTConfig,
    presets={
        "tiny": M2GPTConfig(
            vocab_size=29,
            width=24,
            layers=2,
            ffn=32,
            max_tokens=50,
            filter_width=8,
            filter_features=5,
            mlp_blocks=2,
        ),
        "zoo": M2GPTConfig(width=192, layers=6, ffn=512, filter_frequency=5.0),
        # near the paper's 145M and 360M parameters, GPT-2's vocabulary; depth and width are our choice
        "145m": M2GPTConfig(50257, 768, 16, 3072, filter_frequency=10.0),
        "360m": M2GPTConfig(50257, 1024, 35, 4096, filter_frequency=10.0),
    },
    load=_load,
    layout=Family.layout,
    reads="",
    roles=(*hyena.FAMILY.roles, ("*.parts.*", "projection")),
)
