"""The mixer of Mamba-2, which hybrids have too: a short convolution and a state space, one decay a head.

Sources:
    [1] T. Dao and A. Gu, "Transformers are SSMs", arXiv 2405.21060: section 7 and figure 6 (the block),
        equation 16 and section 6 (SSD).
    [2] Hugging Face transformers, models/mamba2: the checkpoint layout.

Symbols (B batch, T tokens, d width, D inner width, H heads, P head size, N state size, G groups, K kernel):
    z            the gate                                                   [B,T,D]
    x            the input of the state space, through the convolution      [B,T,H,P]
    Bm, Cm       input and output maps of the state, one a group            [B,T,G,N]
    dt           step size, softplus(dt_proj + dt_bias), clamped            [B,T,H]
    A            -exp(A_log), one number a head                             [H]

    S_t = e^{dt A} S_{t-1} + Bm_t (dt x_t)^T        y_t = S_t^T Cm_t + D x_t        S [N,P]

That is gated linear attention with q = Cm, k = Bm, v = dt x and the log decay dt A, so the operator
linear_recurrence runs it; B and C of a group are repeated for its heads.

Departure: [2] has the rows of dt in ``in_proj``; here they are a matrix of their own, ``dt_proj``, since a
decay is not to be quantized like the large projection it lies in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xexport.core.checkpoint import RawCheckpoint
from xexport.core.errors import CheckpointError
from xexport.models._chunk import RMSNorm
from xexport.ops.causal_conv1d.reference import causal_conv1d
from xexport.ops.linear_attention.parallel import gated_parallel
from xexport.ops.linear_recurrence.reference import linear_recurrence

__all__ = ["SSD_ROLES", "SsdMixer", "SsdSizes", "parse_limit", "split_in_proj", "ssd_init"]

#: rows for the roles of a family whose layers have such a mixer
SSD_ROLES = (
    ("*.in_proj.weight", "projection"),
    ("*.out_proj.weight", "projection"),
    ("*.dt_proj.*", "decay"),
    ("*.dt_bias", "decay"),
    ("*.A_log", "decay"),
    ("*.conv1d.*", "conv"),
)


@dataclass(frozen=True)
class SsdSizes:
    """Sizes of one mixer.

    Attributes:
        width, heads, head_size, state_size, groups, conv_kernel: d, H, P, N, G, K.
        norm_groups: the gated norm takes the mean over one of so many equal parts.
        norm_eps: of the gated norm.
        conv_bias, projection_bias: biases of the convolution, and of in_proj and out_proj.
        dt_min, dt_max: limits of the step size; a maximum of 0 is none.
    """

    width: int
    heads: int
    head_size: int
    state_size: int
    groups: int = 1
    conv_kernel: int = 4
    norm_groups: int = 1
    norm_eps: float = 1e-5
    conv_bias: bool = True
    projection_bias: bool = False
    dt_min: float = 0.0
    dt_max: float = 0.0

    @property
    def inner(self) -> int:
        """D."""
        return self.heads * self.head_size

    @property
    def convolved(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.inner + 2 * self.groups * self.state_size

    @property
    def states(self) -> dict[str, tuple[int | str, ...]]:
        """Shapes of the two states: the last inputs of the convolution, oldest first, and S."""
        return {
            "conv": ("B", self.conv_kernel - 1, self.convolved),
            "ssm": ("B", self.heads, self.state_size, self.head_size),
        }


class _GatedNorm(RMSNorm):
    """The norm of y silu(z), over parts of equal size."""

    def __init__(self, width: int, eps: float, groups: int) -> None:
        super().__init__(width, eps)
        self.groups = groups

    def gated(self, y: Tensor, z: Tensor) -> Tensor:
        y = y * F.silu(z)
        if self.groups == 1:
            return self(y)  # type: ignore[no-any-return]
        parts = torch.unflatten(y, -1, (self.groups, -1))
        size = parts.shape[-1]
        # without a weight torch exports one of the input's full shape, made anew at every token
        ones = torch.ones(size, dtype=y.dtype, device=y.device)
        return F.rms_norm(parts, (size,), ones, self.eps).flatten(-2) * self.weight


class SsdMixer(nn.Module):
    """The mixer; parameter names are those of [2] but for ``dt_proj``."""

    def __init__(self, sizes: SsdSizes) -> None:
        super().__init__()
        self.sizes = s = sizes
        self.A_log, self.dt_bias = nn.Parameter(torch.zeros(s.heads)), nn.Parameter(torch.zeros(s.heads))
        self.D = nn.Parameter(torch.ones(s.heads))
        self.conv1d = nn.Conv1d(s.convolved, s.convolved, s.conv_kernel, groups=s.convolved, bias=s.conv_bias)
        self.in_proj = nn.Linear(s.width, s.inner + s.convolved, bias=s.projection_bias)
        self.dt_proj = nn.Linear(s.width, s.heads, bias=s.projection_bias)
        self.norm = _GatedNorm(s.inner, s.norm_eps, s.norm_groups)
        self.out_proj = nn.Linear(s.inner, s.width, bias=s.projection_bias)

    def _convolve(self, x: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Causal depthwise convolution, then SiLU: (x [B,T,X], last [B,K-1,X]) -> (y, new last)."""
        weight, bias = self.conv1d.weight[:, 0], self.conv1d.bias
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
        return causal_conv1d(x, weight.t(), bias, last, silu=True)

    def _repeated(self, x: Tensor) -> Tensor:
        """[B,T,G N] -> [B,T,H,N]: every head has the map of its group."""
        s = self.sizes
        x = torch.unflatten(x, -1, (s.groups, 1, s.state_size))
        return x.expand(-1, -1, -1, s.heads // s.groups, -1).flatten(2, 3)

    def _steps(self, x: Tensor) -> Tensor:
        """dt [B,T,H]."""
        s = self.sizes
        dt = F.softplus(self.dt_proj(x) + self.dt_bias)
        if s.dt_min > 0 or s.dt_max > 0:
            dt = dt.clamp(s.dt_min, s.dt_max if s.dt_max > 0 else None)
        return dt

    def forward(self, u: Tensor, conv: Tensor, ssm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(u [B,T,d], conv [B,K-1,X], ssm [B,H,N,P]) -> (y [B,T,d], new conv, new ssm)."""
        s = self.sizes
        z, mixed = torch.split(self.in_proj(u), [s.inner, s.convolved], -1)
        mixed, conv = self._convolve(mixed, conv)
        maps = s.groups * s.state_size
        x, B, C = torch.split(mixed, [s.inner, maps, maps], -1)
        dt, x = self._steps(u), torch.unflatten(x, -1, (s.heads, s.head_size))
        y, ssm = _attend(
            self._repeated(C), self._repeated(B), x * dt.unsqueeze(-1), ssm, dt * -torch.exp(self.A_log)
        )
        y = y + x * self.D.unsqueeze(-1)
        return self.out_proj(self.norm.gated(y.flatten(-2), z)), conv, ssm


def _attend(q: Tensor, k: Tensor, v: Tensor, state: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """Gated linear attention with the heads as an axis, differentiable where a gradient is asked for."""
    inputs = (q, k, v, state, decay)
    if torch.is_grad_enabled() and not torch.compiler.is_exporting() and any(x.requires_grad for x in inputs):
        return gated_parallel(*inputs)
    heads = k.shape[2]
    packed = (x.flatten(-2) for x in (q, k, v))
    y, state = linear_recurrence(*packed, state, decay, heads, 1.0)
    return torch.unflatten(y, -1, (heads, -1)), state


def split_in_proj(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of [2] with the last H rows of every ``in_proj`` as ``dt_proj``; they are views."""
    out: dict[str, Tensor] = {}
    for name, value in tensors.items():
        place, dot, leaf = name.rpartition(".in_proj.")
        heads = tensors.get(f"{place}.dt_bias")
        if not dot or heads is None or value.shape[0] <= heads.numel():
            out[name] = value
            continue
        cut = value.shape[0] - heads.numel()
        out[name], out[f"{place}.dt_proj.{leaf}"] = value[:cut], value[cut:]
    return out


def parse_limit(raw: RawCheckpoint) -> tuple[float, float]:
    """(dt_min, dt_max) of a config.json, which writes infinity in more than one way; no maximum is 0.

    Raises:
        CheckpointError: ``time_step_limit`` is no pair of numbers.
    """
    limit: Any = raw.config.get("time_step_limit", (0.0, math.inf))
    try:
        low, high = (float(x["__float__"] if isinstance(x, dict) else x) for x in limit)
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(
            "time_step_limit in config.json is no pair of numbers", got=limit, allowed="[least, most]"
        ) from error
    return low, 0.0 if math.isinf(high) else high


def ssd_init(name: str, shape: torch.Size, layers: int, generator: torch.Generator) -> Tensor:
    """The initial value of a parameter of the mixer: dt between 0.001 and 0.1, A from -1 to -16."""
    value = torch.empty(shape)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "A_log":
        return value.uniform_(1, 16, generator=generator).log()
    if leaf == "dt_bias":
        dt = torch.exp(value.uniform_(math.log(0.001), math.log(0.1), generator=generator))
        return dt + torch.log(-torch.expm1(-dt))  # softplus maps it back to dt
    if value.dim() > 1 or name.endswith("conv1d.bias"):
        bound = (4 if "conv1d" in name else shape[-1]) ** -0.5
        # PyTorch's default for linear layers; residual branches are scaled down with the depth
        bound *= layers**-0.5 if "out_proj" in name else 1.0
        return value.uniform_(-bound, bound, generator=generator)
    return value.fill_(0.0 if leaf == "bias" else 1.0)
