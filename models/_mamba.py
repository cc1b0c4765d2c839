"""What models of the Mamba kind share: the frame of Mamba-1 and 2 (blocks of one norm and one mixer, with the
published names), and Mamba-1's mixer.

Source: Hugging Face transformers, models/mamba and models/mamba2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xexport.core.checkpoint import RawCheckpoint, require_keys
from xexport.core.state import StateSpec
from xexport.models._chunk import RMSNorm, layer_states
from xexport.ops.causal_conv1d.reference import causal_conv1d
from xexport.ops.selective_scan.reference import selective_scan

__all__ = ["MIXER_ROLES", "MambaFrame", "SelectiveMixer", "first_value", "selective", "tied_head"]

#: of a selective mixer's parameters, and of what no pattern before knew
MIXER_ROLES = (
    ("*.in_proj.weight", "projection"),
    ("*.out_proj.weight", "projection"),
    ("*.x_proj.weight", "gate"),
    ("*.dt_proj.*", "decay"),
    ("*.A_log", "decay"),
    ("*.conv1d.*", "conv"),
    ("*", "other"),
)


class _Layer(nn.Module):
    def __init__(self, config: Any, mixer: nn.Module) -> None:
        super().__init__()
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.mixer = mixer


class _Backbone(nn.Module):
    def __init__(self, config: Any, mixer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(_Layer(config, mixer()) for _ in range(config.layers))
        self.norm_f = RMSNorm(config.width, config.norm_eps)


class MambaFrame(nn.Module):
    """Mamba-1 or 2 in the chunk form.

    Args:
        config: layers, width, vocab_size, norm_eps.
        mixer: makes one layer's mixer, (x [B,T,d], conv, ssm) -> (y [B,T,d], new conv, new ssm).
        states: shapes of a layer's ``conv`` and ``ssm``, in this order.
    """

    max_tokens: int | None = None

    def __init__(
        self, config: Any, mixer: Callable[[], nn.Module], states: Mapping[str, tuple[int | str, ...]]
    ) -> None:
        super().__init__()
        self.config = config
        self.vocab_size: int = config.vocab_size
        self.backbone = _Backbone(config, mixer)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self._states = dict(states)

    def forward(self, tokens: Tensor, *state: Tensor) -> Any:
        """(tokens [B,T] int64, state as :meth:`state_spec`) -> (logits [B,T,V], new state)."""
        x = self.backbone.embeddings(tokens)
        new: list[Tensor] = []
        for index, layer in enumerate(self.backbone.layers):
            assert isinstance(layer, _Layer)
            y, conv, ssm = layer.mixer(layer.norm(x), state[2 * index], state[2 * index + 1])
            x = x + y
            new += [conv, ssm]
        return (self.lm_head(self.backbone.norm_f(x)), *new)

    def state_spec(self) -> Sequence[StateSpec]:
        """Two tensors a layer, all float32, all zero before the first token."""
        return layer_states(self.config.layers, self._states)


class SelectiveMixer(nn.Module):
    """The mixer of Mamba-1 (arXiv 2312.00752, figure 3), with the published names.

    Args:
        config: width, inner, state_size, rank, conv_kernel, conv_bias, projection_bias, mixer_norm_eps, as in
            :class:`xexport.models.mamba.MambaConfig`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        D, N, R, K = config.inner, config.state_size, config.rank, config.conv_kernel
        self.sizes = (R, N, N)
        self.norm_eps = config.mixer_norm_eps
        self.A_log = nn.Parameter(torch.zeros(D, N))
        self.D = nn.Parameter(torch.ones(D))
        self.conv1d = nn.Conv1d(D, D, K, groups=D, bias=config.conv_bias)
        self.in_proj = nn.Linear(config.width, 2 * D, bias=config.projection_bias)
        self.x_proj = nn.Linear(D, R + 2 * N, bias=False)
        self.dt_proj = nn.Linear(R, D)
        self.out_proj = nn.Linear(D, config.width, bias=config.projection_bias)

    def forward(self, x: Tensor, conv: Tensor, ssm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x [B,T,d], conv [B,K-1,D], ssm [B,D,N]) -> (y [B,T,d], new conv, new ssm)."""
        x, z = self.in_proj(x).chunk(2, -1)
        y, conv, ssm = selective(self, x, conv, ssm)
        return self.out_proj(y * F.silu(z)), conv, ssm


def selective(m: Any, x: Tensor, conv: Tensor, ssm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The path through a mixer's convolution, SiLU and scan.

    Args:
        m: has conv1d, x_proj, dt_proj, A_log [D,N], D [D] and ``sizes``, what x_proj makes: (R, N, N); and
            ``norm_eps``, above 0 for RMS norms of those three.
        x: [B,T,D]. conv: [B,K-1,D], the inputs before. ssm: [B,D,N].

    Returns:
        y [B,T,D], new conv, new ssm.
    """
    weight, bias = m.conv1d.weight[:, 0], m.conv1d.bias
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    x, conv = causal_conv1d(x, weight.t(), bias, conv, silu=True)
    dt, B, C = m.x_proj(x).split(m.sizes, -1)
    if m.norm_eps:
        # without a weight torch exports one of the input's full shape, made anew at every token
        ones = [torch.ones(size, dtype=x.dtype, device=x.device) for size in m.sizes]
        dt, B, C = (F.rms_norm(p, w.shape, w, m.norm_eps) for p, w in zip((dt, B, C), ones, strict=True))
    dt = F.softplus(m.dt_proj(dt))
    y, ssm = selective_scan(x, dt, -torch.exp(m.A_log), B, C, m.D, ssm)
    return y, conv, ssm


def first_value(c: Any, name: str, p: Tensor, generator: torch.Generator) -> Tensor:
    """The initial value of one parameter of a mixer or a norm, as in mamba_simple.py of state-spaces/mamba.

    dt is between 0.001 and 0.1, A = -1..-N; linear layers have PyTorch's default, out_proj is smaller by
    sqrt(layers).

    Args:
        c: state_size, rank, conv_kernel, layers.
    """
    value = torch.empty(p.shape)
    if name.endswith("A_log"):
        value.copy_(torch.arange(1, c.state_size + 1).log())
    elif name.endswith("dt_proj.bias"):
        dt = torch.exp(value.uniform_(math.log(0.001), math.log(0.1), generator=generator))
        value = dt + torch.log(-torch.expm1(-dt))  # softplus maps it back to dt
    elif name.endswith("dt_proj.weight"):
        value.uniform_(-(c.rank**-0.5), c.rank**-0.5, generator=generator)
    elif p.dim() > 1 or name.endswith("conv1d.bias"):
        bound = (c.conv_kernel if "conv1d" in name else p.shape[-1]) ** -0.5
        # residual branches are scaled down with the depth
        bound *= c.layers**-0.5 if "out_proj" in name else 1.0
        value.uniform_(-bound, bound, generator=generator)
    else:
        value.fill_(0.0 if name.endswith("bias") else 1.0)
    return value


def tied_head(
    raw: RawCheckpoint, tensors: Mapping[str, Tensor], family: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors with a head (the embedding where the checkpoint has none), and notes on it.

    Raises:
        CheckpointError: there is no embedding either.
    """
    if "lm_head.weight" in tensors:
        return dict(tensors), []
    require_keys(raw, ("backbone.embeddings.weight",), family)
    head = {"lm_head.weight": tensors["backbone.embeddings.weight"]}
    return {**tensors, **head}, ["the head is tied to the embedding: both are written"]
