"""MambaMixer: selective scans over tokens and over channels, every mixer reads all earlier outputs.

Sources:
    1. A. Behrouz, M. Santacatterina and R. Zabih, MambaMixer, arXiv 2403.19888: section 3.2 (selective token
       mixer, selective channel mixer, weighted averaging of earlier features), 5.1 (over time the scan goes
       one way, over variates both). Its authors published no code.
    2. A. Gu and T. Dao, Mamba, arXiv 2312.00752, figure 3: the mixer that [1] says its token mixer is.

Glossary:
    B batch, T tokens, d width, L blocks, P channels in a group, G = d/P groups, E inner width of the channel
    mixer, D and N inner width and state size of the token mixer, K taps.

Token mixer: Mamba's, over time. Channel mixer: for every token, over its G groups of P channels each,
    (x_f, x_b, z) = W x,   y = W_out ((S_f(x_f) + Flip(S_b(Flip(x_b)))) * silu(z))
where Flip turns the order of the groups round and S is a convolution, SiLU and a selective scan from zero.
With T_0 = C_0 the embedded tokens, the mixers l = 1 .. L read
    N(sum_{i<l} a_{l,i} T_i + b_{l,i} C_i)   and   N(sum_{i<=l} t_{l,i} T_i + sum_{i<l} g_{l,i} C_i),
RMS norm N, and the head one more average of this kind, over all outputs. Every weight is learned, and 1 at
first: a residual network to begin with.

Departures: in [1] channels are mixed over vectors of all tokens, which looks ahead; here a token's channels
are mixed alone, so a place in the scan has P channels in place of them, and there is no state over time. B, C
and dt come from behind the convolution, as in [2] (in the formulas of [1], from in front of it). [1] says
neither where norms are nor what the head reads. T_0 = C_0 have one weight, the sum of both.

State per layer: ``conv`` [B,K-1,D] and ``ssm`` [B,D,N] of the token mixer. Constant.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xexport.core.checkpoint import RawCheckpoint
from xexport.core.errors import InputError
from xexport.core.family import Family, LoadedModel
from xexport.core.state import StateSpec
from xexport.models._chunk import FromFirstState, RMSNorm, layer_states
from xexport.models._mamba import MIXER_ROLES, SelectiveMixer, first_value, selective
from xexport.models._own import load_own
from xexport.models.mamba import MambaConfig

__all__ = ["FAMILY", "MambaMixer", "MambaMixerConfig", "MambaMixerTraining"]


@dataclass(frozen=True)
class MambaMixerConfig:
    """Sizes of a MambaMixer.

    Attributes:
        vocab_size, width, layers: V, d, L.
        group: P.
        state_size: N of both mixers.
        conv_kernel: K of both mixers.
        expand: D/d and E/P.
        norm_eps: of the RMS norms.
    """

    vocab_size: int = 256
    width: int = 160
    layers: int = 10
    group: int = 16
    state_size: int = 16
    conv_kernel: int = 4
    expand: int = 2
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        sizes = (self.vocab_size, self.width, self.layers, self.group, self.state_size, self.expand)
        if min(sizes) < 1 or self.conv_kernel < 2:
            raise InputError("a MambaMixer size is too small", got=self)
        if self.width % self.group:
            raise InputError("the width must be a multiple of the group", got=(self.width, self.group))

    @property
    def token(self) -> MambaConfig:
        """Sizes of the token mixer."""
        return self._mixer(self.width)

    @property
    def channel(self) -> MambaConfig:
        """Sizes of the channel mixer, whose width is a group's."""
        return self._mixer(self.group)

    def _mixer(self, width: int) -> MambaConfig:
        inner, n, k = self.expand * width, self.state_size, self.conv_kernel
        return MambaConfig(self.layers, width, inner_width=inner, state_size=n, conv_kernel=k)


class _Direction(nn.Module):
    """One of the channel mixer's scans, S."""

    def __init__(self, c: MambaConfig) -> None:
        super().__init__()
        D, N, R, K = c.inner, c.state_size, c.rank, c.conv_kernel
        self.sizes, self.norm_eps = (R, N, N), 0.0
        self.A_log = nn.Parameter(torch.zeros(D, N))
        self.D = nn.Parameter(torch.ones(D))
        self.conv1d = nn.Conv1d(D, D, K, groups=D)
        self.x_proj = nn.Linear(D, R + 2 * N, bias=False)
        self.dt_proj = nn.Linear(R, D)

    def forward(self, x: Tensor) -> Tensor:
        """[B*T,G,E] -> the same shape, from zero."""
        conv = x.new_zeros(x.shape[0], self.conv1d.weight.shape[2] - 1, x.shape[2])
        return selective(self, x, conv, x.new_zeros(x.shape[0], *self.A_log.shape))[0]


class _ChannelMixer(nn.Module):
    def __init__(self, c: MambaConfig) -> None:
        super().__init__()
        self.group = c.width
        self.in_proj = nn.Linear(c.width, 3 * c.inner, bias=False)
        self.forth, self.back = _Direction(c), _Direction(c)
        self.out_proj = nn.Linear(c.inner, c.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B,T,d] -> [B,T,d], every token by itself."""
        groups = x.reshape(-1, x.shape[2] // self.group, self.group)
        forth, back, gate = self.in_proj(groups).chunk(3, -1)
        y = self.forth(forth) + self.back(back.flip(1)).flip(1)
        mixed: Tensor = self.out_proj(y * F.silu(gate))
        return mixed.reshape(x.shape)


class _Average(nn.Module):
    """A weighted sum of earlier outputs, then the RMS norm."""

    def __init__(self, count: int, c: MambaMixerConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(count))
        self.norm = RMSNorm(c.width, c.norm_eps)

    def forward(self, outputs: Tensor) -> Tensor:
        """[B,T,count,d] -> [B,T,d]."""
        y: Tensor = self.norm((outputs * self.weight[:, None]).sum(2))
        return y


class _Block(nn.Module):
    def __init__(self, c: MambaMixerConfig, index: int) -> None:
        super().__init__()
        self.token_average = _Average(2 * index + 1, c)
        self.token_mixer = SelectiveMixer(c.token)
        self.channel_average = _Average(2 * index + 2, c)
        self.channel_mixer = _ChannelMixer(c.channel)

    def forward(self, outputs: Tensor, conv: Tensor, ssm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs so far [B,T,2l-1,d], in the order T_0, T_1, C_1, T_2 .. -> two more, new conv and ssm."""
        y, conv, ssm = self.token_mixer(self.token_average(outputs), conv, ssm)
        outputs = torch.cat((outputs, y.unsqueeze(2)), 2)
        y = self.channel_mixer(self.channel_average(outputs))
        return torch.cat((outputs, y.unsqueeze(2)), 2), conv, ssm


class MambaMixer(nn.Module):
    """The chunk form: ``forward(tokens [B,T] int64, *state) -> (logits [B,T,V], *new_state)``."""

    max_tokens: int | None = None

    def __init__(self, config: MambaMixerConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(_Block(config, i) for i in range(config.layers))
        self.average = _Average(2 * config.layers + 1, config)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)

    def state_spec(self) -> list[StateSpec]:
        """Two tensors a layer, zero before the first token."""
        c = self.config.token
        shapes: dict[str, tuple[int | str, ...]] = {
            "conv": ("B", c.conv_kernel - 1, c.inner),
            "ssm": ("B", c.inner, c.state_size),
        }
        return layer_states(self.config.layers, shapes)

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        outputs, new = self.embed(tokens).unsqueeze(2), []
        for i, block in enumerate(self.layers):
            outputs, *after = block(outputs, *state[2 * i : 2 * i + 2])
            new += after
        return self.head(self.average(outputs)), *new


class MambaMixerTraining(FromFirstState, MambaMixer):
    """The same parameters, whole sequences from the first state."""


@torch.no_grad()
def _init(module: MambaMixer, seed: int) -> None:
    """Mamba's initial values in both mixers, ones for the averages; deterministic in ``seed``."""
    c, generator = module.config, torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if name in ("embed.weight", "head.weight"):
            std = 0.5 if name == "embed.weight" else 0.25 * c.width**-0.5
            p.copy_(torch.randn(p.shape, generator=generator) * std)
        else:
            p.copy_(first_value(c.channel if "channel_mixer" in name else c.token, name, p, generator))


def _load(raw: RawCheckpoint) -> LoadedModel:
    return load_own(FAMILY, raw, title="a MambaMixer", fix="its authors published no weights")


FAMILY = Family(
    name="mamba_mixer",
    title="MambaMixer: selective scans over tokens and channels (arXiv 2403.19888)",
    sources=("https://arxiv.org/abs/2403.19888", "https://arxiv.org/abs/2312.00752"),
    config=MambaMixerConfig,
    presets={
        "tiny": MambaMixerConfig(29, 24, 2, group=4, state_size=4),
        "zoo": MambaMixerConfig(width=240, layers=5, state_size=8),  # a CPU trains it in minutes
        # [1] has no language model: the sizes of Mamba's smallest
        "130m": MambaMixerConfig(50280, 768, 24, group=16),
    },
    build=MambaMixer,
    load=_load,
    train_form=MambaMixerTraining,
    init=_init,
    roles=(
        ("embed.*", "embedding"),
        ("head.*", "head"),
        ("*norm.*", "norm"),
        ("*average.weight", "gate"),
        *MIXER_ROLES,
    ),
    state_note="constant: D x N and (K-1) x D numbers a layer; nothing for the channels",
)
