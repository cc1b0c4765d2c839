"""Hyena: gated implicit long convolutions, streamed exactly through a bounded cache of their inputs.

Sources:
    1. Poli et al., Hyena Hierarchy: Towards Larger Convolutional Language Models, arXiv 2302.10866:
       section 3.1 (the operator), 3.2 (filters and window), appendix A (sizes).
    2. HazyResearch/safari, ``hyena.py`` (Apache-2.0): the form that was trained, followed here where
       it departs from the paper.
    3. Nguyen et al., HyenaDNA, arXiv 2306.15794, and its Hugging Face checkpoints: a window that ends
       above zero, and a trained table of features.
    4. Massaroli et al., Laughing Hyena Distillery, arXiv 2310.18780: the distilled form.

Glossary:
    B batch, T tokens, d width, N order (projections besides v), L = max_tokens, the filters' length.

One block (pre-norm, X the residual stream): Y = Hyena(LN(X)) + X,  X' = MLP(LN(Y)) + Y.
The operator of order N:
    x_0, ..., x_{N-1}, v = shortconv(X W_in)             causal, depthwise, three taps, with bias
    for n = N-1, ..., 1:   z = x_n * v;   v = h_n * z + D_n z        (* with h: causal convolution)
    out = (x_0 v) W_out
The paper's recurrence convolves first and then gates, N times; safari (and StripedHyena) gate first,
N-1 times, as the short convolution already stands for the first. That is what is done here.

The filters are implicit, h_n[t] = window(t) * FFN(features(t)) with sine activations: models/_implicit.py.
The training form holds the FFN. The chunk form holds the filters it makes, [d,L] each, computed once in
float64: nothing of the FFN is left at run time.

Streaming: a long convolution has no finite state, so the state is the inputs so far, at most L of them.
It is exact at every token up to L and there is no token L+1: a runtime refuses it (LimitError).
The filters are functions of t/L; train at the full length, or the far end of them is untrained.

Distilled (``--distill M``), every filter is a sum of M damped oscillations, found by models/_distill.py.
That is an approximation, whose error the export reports; its state is M complex numbers a channel, and it
has no last token, though what it does beyond L is what its oscillations do, not what was trained.

State: ``layers.<i>.short`` [B,2,(N+1)d] float32 (the last two projections), ``layers.<i>.cache.<j>``
[B,d,L] float32 for convolution j = 0 .. N-2, ``position`` [1] int64 (shared by the batch).
Distilled: ``layers.<i>.modes.<j>`` [B,M,2,d] float32, real and imaginary parts, for cache and position.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from xexport.core.family import Family
from xexport.core.progress import Silent
from xexport.models._hyena import Hyena, HyenaConfig, HyenaDistilled, HyenaStack, HyenaTrain, build_hyena
from xexport.models._hyena_load import distill, dna_layout, from_training, load_hyena, load_own

__all__ = ["FAMILY", "Hyena", "HyenaConfig", "HyenaDistilled", "HyenaTrain", "load_own"]


def _init(module: nn.Module, seed: int) -> None:
    """Fill a Hyena (any form) with weights to train from.

    The chunk form gets the filters that the training form would have. Projections that read the
    residual stream have the variance 1/fan_in, those that write to it are smaller by sqrt(2*layers);
    the short convolutions begin near the identity; the filters' FFN has safari's initialisation, but
    for a last layer scaled so that a filter's norm is about 1, not its points.
    """
    assert isinstance(module, HyenaStack)
    if isinstance(module, HyenaDistilled):
        exact = Hyena(dataclasses.replace(module.config, distilled_order=0))
        _init(exact, seed)
        order = module.config.distilled_order
        module.load_state_dict(distill(exact.config, exact.state_dict(), order, Silent())[1])
        return
    if isinstance(module, Hyena):
        train = HyenaTrain(module.config)
        _init(train, seed)
        module.load_state_dict(from_training(module.config, train.state_dict()))
        return
    c = module.config
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(_first_value(c, name, p, rng))


def _first_value(c: HyenaConfig, name: str, p: Tensor, rng: torch.Generator) -> Tensor:
    """The initial value of one parameter of the training form."""
    noise = torch.randn(p.shape, generator=rng)
    if name.endswith("frequency"):
        return torch.full(p.shape, c.filter_frequency)
    if name.endswith("conv_weight"):
        return noise * 0.2 + torch.tensor([0.0, 0.0, 1.0])[:, None]
    if name.endswith("filter_skip"):
        return noise
    if ".filters." in name:
        fan_in = p.shape[-1] if p.ndim == 2 else c.filter_width
        bound: float = fan_in**-0.5 * (c.max_tokens**-0.5 * 8 if ".last." in name else 1.0)
        return (torch.rand(p.shape, generator=rng) * 2 - 1) * bound
    if p.ndim < 2:
        return torch.full(p.shape, 0.0 if name.endswith("bias") else 1.0)
    if name == "embed.weight":
        return noise * 0.5
    writes = name.endswith(("out_proj.weight", "fc2.weight")) or ".wo." in name
    depth = (2 * c.layers) ** -0.5 if writes else 1.0
    std: float = p.shape[1] ** -0.5 * (0.25 if name == "head.weight" else depth)
    return noise * std


def _sized(layers: int, width: int, ffn: int) -> HyenaConfig:
    """A size of the paper's appendix A; GPT-2's vocabulary."""
    return HyenaConfig(vocab_size=50257, width=width, layers=layers, ffn=ffn)


FAMILY = Family(
    name="hyena",
    title="Hyena: gated implicit long convolutions (arXiv 2302.10866)",
    sources=(
        "https://arxiv.org/abs/2302.10866",
        "https://github.com/HazyResearch/safari",
        "https://arxiv.org/abs/2306.15794",
        "https://arxiv.org/abs/2310.18780",
    ),
    config=HyenaConfig,
    presets={
        "tiny": HyenaConfig(
            vocab_size=29,
            width=24,
            layers=2,
            ffn=40,
            max_tokens=50,
            order=3,
            filter_width=8,
            filter_features=5,
        ),
        "zoo": HyenaConfig(filter_frequency=5.0),  # 0.05 nats better than 14 after 120 steps
        "125m": _sized(18, 768, 1536),
        "153m": _sized(18, 864, 1728),
        "355m": _sized(36, 1024, 2048),
    },
    build=build_hyena,
    load=load_hyena,
    layout=dna_layout,
    reads="keys of HyenaDNA (hyena.backbone.*), or model_type hyenadna in config.json",
    train_form=HyenaTrain,
    from_training=from_training,
    init=_init,
    distill=distill,
    roles=(
        ("embed.*", "embedding"),
        ("head.*", "head"),
        ("*norm.*", "norm"),
        ("*.poles", "decay"),
        ("*.residues", "other"),
        ("*.filters.*", "filter"),
        ("*.conv_*", "conv"),
        ("*.filter_skip", "filter"),
        ("*_proj.weight", "projection"),
        ("*.fc?.weight", "projection"),
    ),
    state_note="the inputs of every long convolution, up to max_tokens, and two short-convolution rows; "
    "distilled: a few complex numbers a channel, for ever",
)
