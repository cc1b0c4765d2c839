"""Implicit long filters, made by a small network of sines from a table of times (Hyena, Monarch Mixer).

Sources: Poli et al., Hyena, arXiv 2302.10866, section 3.2, and its published code (HazyResearch/safari,
HyenaDNA, HazyResearch/m2), whose layout of the tensors :func:`published_filters` reads.

    h[t] = window(t) * FFN(features(t))         sine activations
    features(t) = [t/(L-1), cos(f w), -sin(f w)],   w = 2 pi t / L,   bands f = 1e-4 .. bands-1
    window(t) = shift + exp(-|delta_c| t/(L-1)),  delta from log(0.01)/1.5 to log(0.01)/0.3 over the channels
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xexport.core.errors import CheckpointError

__all__ = ["FilterSizes", "ImplicitFilter", "published_filters"]


@dataclass(frozen=True)
class FilterSizes:
    """Sizes of the network that makes ``count`` filters a channel.

    Attributes:
        channels, count, length: d, filters a channel, L.
        width, inner: width of the network, and its layers between first and last.
        features: width of ``features(t)``, odd: time, and as many cosines as sines.
        shift: what the window ends at.
    """

    channels: int
    count: int
    length: int
    width: int
    inner: int
    features: int
    shift: float = 0.0


class ImplicitFilter(nn.Module):
    """The network that makes the filters of a layer; see the module's docstring."""

    def __init__(self, sizes: FilterSizes) -> None:
        super().__init__()
        self.sizes = sizes
        widths = [sizes.features] + [sizes.width] * (sizes.inner + 1)
        self.ffn = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.last = nn.Linear(sizes.width, sizes.channels * sizes.count, bias=False)
        self.frequency = nn.Parameter(torch.ones(sizes.width))

    def forward(self, length: int) -> Tensor:
        """The first ``length`` points of the filters, ``[count,d,length]``."""
        s = self.sizes
        step = torch.arange(length, dtype=self.frequency.dtype, device=self.frequency.device)
        time = (step / (s.length - 1))[:, None]
        bands = (s.features - 1) // 2
        phase = _line(step, 1e-4, bands - 1, bands) * (2 * math.pi / s.length * step[:, None])
        z = torch.cat((time, phase.cos(), -phase.sin()), 1)
        slow, fast = (-math.log(1e-2) / share for share in (1.5, 0.3))
        window = torch.exp(-time * _line(step, slow, fast, s.channels * s.count))
        return self.windowed(z, window + s.shift)

    def windowed(self, features: Tensor, window: Tensor) -> Tensor:
        """Filters ``[count,d,length]`` from ``[length,features]`` and a window ``[length,count*d]``."""
        z = features
        for linear in self.ffn:
            z = torch.sin(self.frequency * linear(z))
        shaped = torch.unflatten((self.last(z) * window).T, 0, (self.sizes.channels, self.sizes.count))
        return shaped.transpose(0, 1)


def published_filters(
    t: Mapping[str, Tensor], sizes: FilterSizes, prefix: str, network: str = "implicit_filter"
) -> Tensor:
    """The filters ``[count,d,L]`` of a published checkpoint, made in float64.

    Args:
        t: its tensors; those under ``prefix`` hold a table of features, decays and the networks.
        network: which of them: M2-BERT has a second one for what comes later.

    Raises:
        CheckpointError: one is missing.
    """
    made = f"{prefix}{network}."
    try:
        shared = next(v for k, v in t.items() if k.startswith(made) and k.endswith("freq"))
        state = {"frequency": shared[0], "last.weight": t[f"{made}{2 * sizes.inner + 2}.weight"]}
        for j in range(sizes.inner + 1):
            state |= {f"ffn.{j}.{k}": t[f"{made}{2 * j}.{k}"] for k in ("weight", "bias")}
        features = t[f"{prefix}pos_emb.z"][0].double()
        deltas = t[f"{prefix}modulation.deltas"].double().flatten()
    except (KeyError, StopIteration) as error:
        raise CheckpointError(
            "a filter's network lacks a tensor", got=error, fix="is it truncated?"
        ) from error
    with torch.device("cpu"):
        ffn = ImplicitFilter(sizes).double()
    ffn.load_state_dict(state)
    time = torch.linspace(0, 1, sizes.length, dtype=torch.float64)[:, None]
    with torch.no_grad():
        return ffn.windowed(features, torch.exp(-time * deltas.abs()) + sizes.shift)


def _line(like: Tensor, start: float, end: float, count: int) -> Tensor:
    return torch.linspace(start, end, count, dtype=like.dtype, device=like.device)
