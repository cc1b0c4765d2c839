"""AFT: attention-free Transformers (simple, full, local, conv): averages weighted by keys and positions.

Sources:
    1. S. Zhai et al., An Attention Free Transformer, arXiv 2105.14103: equation 2 (full), 4 (local), 5
       (simple), 6 (conv), 7 and 8 (parameterization), section 5.1 (the block, initial values), 5.2 (sizes of
       the language models).
    2. PyPI aft-pytorch 0.2.2: another implementation of full and simple.

Glossary:
    B batch, T tokens, d width, L = max_tokens, s window of learned biases, r rank of the biases (d' in [1]),
    h heads of ``conv``, C numbers of one token that are summed: exp(k) v and exp(k).

One block (pre-norm): Y = X + AFT(LN(X)) W_O,  X' = Y + gelu(LN(Y) W_1) W_2. Causal in all four kinds:
    AFT_t = sigmoid(q_t) * (sum_{s<=t} exp(k_s + w_ts) * v_s) / (sum_{s<=t} exp(k_s + w_ts))
    simple: w = 0.                                          full: w_ts = u_t . v_s.
    local:  w_ts = u_t . v_s for t - s < window, else 0.
    conv:   w_ts = w^i_{t-s} for t - s < window, else 0; one row w^i a head, and one key a head:
            w^i = gain_i (filter_i - mean(filter_i)) / std(filter_i) + shift_i.
``u``, ``v`` are learned per layer and position, [L,r]. Local and conv see everything before the window too:
that is the paper's point, and a window of keys is only half of their state.

How it is computed. [1] writes local and conv as (exp(w) - 1) in the window plus a sum over everything, which
cancels where w is far below 0. Here the sum is over what has left the window and the window has exp(w): only
positive terms. The window carries keys and values, not exp(k) v: a few large keys would make numbers that
differ by 10^5, whose rounding is larger than the rest, and float16 ends at exp(11). Full is softmax
attention of one head with queries u_t, keys v_s and values C_s: its own normaliser is in numerator and
denominator of AFT_t.

Departures: exponents k are clamped to +-40 but for ``simple``, whose state has its largest exponent; so are a
window's w below -40, and those of conv above 20. Nothing overflows or is 0/0 then. The image form of conv
(two axes, not causal) is not done here.

State per layer. simple: ``aa``, ``bb``, ``pp`` [B,d] (ops/wkv4 with decay and bonus 0: there is a maximum, so
no key overflows). full: ``keys`` [B,1,L,r], ``values`` [B,1,L,2d], bounded. local: ``keys``, ``values``
[B,s-1,d], ``sums`` [B,2d]. conv: ``keys`` [B,s-1,h], ``values`` [B,s-1,d], ``sums`` [B,d+h].
``position`` [1] int64, where u, v or learned position embeddings need it; without (simple or conv,
``positions=False``) the stream has no end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xexport.core.checkpoint import RawCheckpoint
from xexport.core.family import Family, LoadedModel
from xexport.core.state import StateSpec
from xexport.models._aft import KEY, NO_KEY, AftConfig, Block, Mixer, filter_weights
from xexport.models._aft_image import AftImage, AftImageTraining, image_tensors
from xexport.models._chunk import FromFirstState, layer_states
from xexport.models._fill import fill, fill_by_training
from xexport.models._own import load_own
from xexport.ops.band_product.reference import band_product
from xexport.ops.cached_attention.reference import cached_attention
from xexport.ops.causal_conv1d.reference import causal_conv1d
from xexport.ops.wkv4.reference import wkv4

__all__ = ["FAMILY", "Aft", "AftConfig", "AftTraining"]


class _Simple(Mixer):
    @staticmethod
    def states(c: AftConfig) -> Mapping[str, tuple[int | str, ...]]:
        return dict.fromkeys(("aa", "bb", "pp"), ("B", c.width))

    def average(self, x: Tensor, here: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        zero = x.new_zeros(self.c.width)
        return wkv4(zero, zero, self.k_proj(x), self.v_proj(x), *state)


class _Full(Mixer):
    def __init__(self, c: AftConfig) -> None:
        super().__init__(c)
        self.u, self.v = (nn.Parameter(torch.zeros(c.max_tokens, c.rank)) for _ in range(2))

    @staticmethod
    def states(c: AftConfig) -> Mapping[str, tuple[int | str, ...]]:
        return {"keys": ("B", 1, c.max_tokens, c.rank), "values": ("B", 1, c.max_tokens, 2 * c.width)}

    def average(self, x: Tensor, here: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        q, k = (F.embedding(here, y).expand(x.shape[0], -1, -1) for y in (self.u, self.v))
        sums, *new = self.attend(q, k, self.terms(self.keys(x), self.v_proj(x)), here, *state)
        return (self.quotient(sums), *new)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, here: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """One head of softmax attention without a scale: what is in the cache, then the chunk."""
        keys, values = state
        return tuple(cached_attention(q, k, v, keys, values, here[:1], 1, 1, 1.0))


class _FullTraining(_Full):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, here: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """The same of a whole sequence, differentiable."""
        q, k, v = q[:, None], k[:, None], v[:, None]
        return (F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)[:, 0], *state)


class _Windowed(Mixer):
    """A window with weights of its own, and a sum of all that has left it."""

    @staticmethod
    def states(c: AftConfig) -> Mapping[str, tuple[int | str, ...]]:
        keys = c.heads if c.per_head else c.width
        before = c.window - 1
        return {
            "keys": ("B", before, keys),
            "values": ("B", before, c.width),
            "sums": ("B", c.width + keys),
        }

    def average(self, x: Tensor, here: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        keys, values, sums = state
        length = x.shape[1]
        keys = torch.cat((keys, self.keys(x)), 1)
        values = torch.cat((values, self.v_proj(x)), 1)
        rows = self.terms(keys, values)  # [B,s-1+T,C]
        behind = torch.cat((sums[:, None], rows[:, :length]), 1).cumsum(1)
        seen = self.seen(rows, behind[:, :length], here)
        return self.quotient(seen), keys[:, length:], values[:, length:], behind[:, length]

    def seen(self, rows: Tensor, behind: Tensor, here: Tensor) -> Tensor:
        """What every token sees, weighted: [B,T,C].

        Args:
            rows: [B,s-1+T,C], what was before the chunk, and the chunk.
            behind: [B,T,C], sums of what has left each token's window.
            here: [T], positions.
        """
        raise NotImplementedError


class _Local(_Windowed):
    """The chunk form holds the weights that u and v make, see :func:`_weights`."""

    weight: Tensor

    def __init__(self, c: AftConfig) -> None:
        super().__init__(c)
        self.register_buffer("weight", torch.ones(c.max_tokens, c.window + 1))

    def seen(self, rows: Tensor, behind: Tensor, here: Tensor) -> Tensor:
        inside, beyond = torch.split(F.embedding(here, self.weights()), [self.c.window, 1], -1)
        return band_product(inside, rows) + beyond * behind

    def weights(self) -> Tensor:
        """[L,s+1]."""
        return self.weight


class _LocalTraining(_Local):
    def __init__(self, c: AftConfig) -> None:
        super().__init__(c)
        del self.weight
        self.u, self.v = (nn.Parameter(torch.zeros(c.max_tokens, c.rank)) for _ in range(2))

    def weights(self) -> Tensor:
        return _weights(self.u, self.v, self.c.window)


def _weights(u: Tensor, v: Tensor, window: int) -> Tensor:
    """The weights of what position t sees, [L,window+1] of u, v [L,r], the largest of each row 1.

    The first are those of its window, exp(u_t . v_s) for s = t-window+1 .. t (1 in front of the first token,
    where there are rows of zeros); the last is that of everything before. One factor a row cancels in AFT_t.
    """
    bias = torch.einsum("tr,trj->tj", u, F.pad(v, (0, 0, window - 1, 0)).unfold(0, window, 1))
    bias = F.pad(bias.clamp(min=-KEY), (0, 1))
    return (bias - bias.amax(-1, keepdim=True)).exp()


class _Conv(_Windowed):
    def __init__(self, c: AftConfig) -> None:
        super().__init__(c)
        self.filter = nn.Parameter(torch.zeros(c.heads, c.window))
        self.gain, self.shift = (nn.Parameter(torch.zeros(c.heads)) for _ in range(2))

    def seen(self, rows: Tensor, behind: Tensor, here: Tensor) -> Tensor:
        taps = self.taps()
        before, chunk = rows[:, : self.c.window - 1], rows[:, self.c.window - 1 :]
        near, _ = causal_conv1d(chunk, taps, torch.zeros_like(taps[0]), before)
        return near + behind

    def taps(self) -> Tensor:
        """exp(w) for every summed number, [s,C], the present token's last."""
        weight = filter_weights(self.filter, self.gain, self.shift).t()
        return torch.cat((self.spread(weight), weight), -1)


_MIXERS: dict[str, type[Mixer]] = {"simple": _Simple, "full": _Full, "local": _Local, "conv": _Conv}
_TRAINED: dict[str, type[Mixer]] = {**_MIXERS, "full": _FullTraining, "local": _LocalTraining}


class Aft(nn.Module):
    """The chunk form: ``forward(tokens [B,T] int64, *state) -> (logits [B,T,V], *new_state)``.

    Where the stream is bounded, position + T must not exceed ``max_tokens``: a runtime checks it beforehand.
    """

    mixers: Mapping[str, type[Mixer]] = _MIXERS

    def __init__(self, config: AftConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.max_tokens = config.max_tokens if config.bounded else None
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.place = nn.Embedding(config.max_tokens, config.width) if config.positions else None
        self.layers = nn.ModuleList(
            Block(config, self.mixers[config.kind](config)) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width, config.eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)

    def state_spec(self) -> Sequence[StateSpec]:
        """The state of every layer, then the position where there is one."""
        c = self.config
        specs = layer_states(c.layers, _MIXERS[c.kind].states(c))
        first = {"simple": {"pp": -1e30}, "local": {"keys": NO_KEY}, "conv": {"keys": NO_KEY}}.get(c.kind, {})
        specs = [StateSpec(s.name, s.shape, init=first.get(s.name.rsplit(".")[-1], 0.0)) for s in specs]
        return [*specs, StateSpec("position", (1,), "int64")] if c.bounded else specs

    def blocks(self) -> list[Block]:
        """The blocks in their order."""
        return list(self.layers)  # type: ignore[arg-type]

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        bounded, length = self.config.bounded, tokens.shape[1]
        position = state[-1] if bounded else tokens.new_zeros(1)
        here = position + torch.arange(length, device=tokens.device)
        x = self.embed(tokens)
        if self.place is not None:
            x = x + self.place(here)
        each = len(state) // self.config.layers
        new: list[Tensor] = []
        for i, block in enumerate(self.blocks()):
            y, *after = block.mixer(block.mixer_norm(x), here, *state[i * each : (i + 1) * each])
            x = block.ffn(x + y)
            new += after
        return (self.head(self.norm(x)), *new, *([position + length] if bounded else []))


class AftTraining(FromFirstState, Aft):
    """The training form, T <= max_tokens: the same parameters, but for local's biases, which are u and v."""

    mixers = _TRAINED


def _build(config: AftConfig) -> nn.Module:
    return AftImage(config) if config.kind == "image" else Aft(config)


def _train_form(config: AftConfig) -> nn.Module:
    return AftImageTraining(config) if config.kind == "image" else AftTraining(config)


def _from_training(config: AftConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, with the weights that local's u and v, or an image's filters, make in their place."""
    if config.kind == "image":
        return image_tensors(config, tensors)
    result = {name: value.detach() for name, value in tensors.items()}
    if config.kind == "local":
        for i in range(config.layers):
            prefix = f"layers.{i}.mixer."
            u, v = (result.pop(prefix + name).double() for name in "uv")
            result[prefix + "weight"] = _weights(u, v, config.window).float()
    return result


def _init(module: nn.Module, seed: int) -> None:
    """Fill an AFT (either form) with weights to train from.

    Projections that read the residual stream have the variance 1/fan_in, those that write to it are smaller
    by sqrt(2 * layers); the head starts small. Of the positions, as [1] has it: u and v are N(0, 10^-2), gain
    and shift of conv 0.
    """
    assert isinstance(module, (Aft, AftImage))
    if not isinstance(module, (AftTraining, AftImageTraining)):
        return fill_by_training(FAMILY, module, seed)
    c = module.config
    fixed = {"embed.weight": 0.5, "place.weight": 0.02, "*.u": 0.1, "*.v": 0.1, "*.filter": 1.0}
    writes = dict.fromkeys(("*o_proj.weight", "*fc2.weight"), c.layers)
    fill(module, seed, writes=writes, fixed=fixed, vectors={"*.gain": 0.0, "*.shift": 0.0})


def _load(raw: RawCheckpoint) -> LoadedModel:
    return load_own(FAMILY, raw, title="an AFT", fix="none was published: the paper's authors gave no code")


def _tiny(kind: str, positions: bool = True) -> AftConfig:
    return AftConfig(kind, 29, 32, 2, 48, 96, window=5, rank=8, heads=4, positions=positions)


FAMILY = Family(
    name="aft",
    title="AFT: attention-free, averages by keys and position biases (arXiv 2105.14103)",
    sources=("https://arxiv.org/abs/2105.14103", "PyPI aft-pytorch 0.2.2"),
    config=AftConfig,
    presets={
        "tiny": _tiny("local"),
        "tiny-simple": _tiny("simple", positions=False),
        "tiny-full": _tiny("full"),
        "tiny-conv": _tiny("conv", positions=False),
        "tiny-image": AftConfig(
            "image", 11, 32, 2, 48, window=3, heads=4, positions=False, grid=(4, 5), patch=12
        ),
        "zoo": AftConfig(max_tokens=512),  # as long as the windows it was trained on
        # enwik8, table 4 of [1]
        "local-32": AftConfig("local", 256, 256, 24, 1024, 1024, window=32, rank=256),
        "local-32-wide": AftConfig("local", 256, 512, 12, 2048, 1024, window=32, rank=256),
        "simple": AftConfig("simple", 256, 256, 24, 1024, 1024),
        "full": AftConfig("full", 256, 256, 24, 1024, 1024, rank=256),
        # the heads and window of table 7, in the language model's sizes
        "conv-32-11": AftConfig("conv", 256, 256, 24, 1024, 1024, window=11, heads=32, positions=False),
        # 1000 classes of 224 x 224 x 3 in patches of 16 x 16, in the sizes of DeiT's two smaller models
        "image-tiny": AftConfig(
            "image", 1000, 192, 12, 768, window=11, heads=32, positions=False, grid=(14, 14), patch=768
        ),
        "image-small": AftConfig(
            "image", 1000, 384, 12, 1536, window=11, heads=32, positions=False, grid=(14, 14), patch=768
        ),
    },
    build=_build,
    load=_load,
    train_form=_train_form,
    from_training=_from_training,
    init=_init,
    roles=(
        ("embed.*", "embedding"),
        ("patches.weight", "projection"),
        ("place.*", "embedding"),
        ("head.*", "head"),
        ("*norm.*", "norm"),
        ("*.mixer.[uv]", "low_rank"),
        ("*.mixer.weight", "gate"),
        ("*.mixer.filter", "conv"),
        ("*.mixer.gain", "gate"),
        ("*.mixer.shift", "gate"),
        ("*_proj.weight", "projection"),
        ("*.fc?.weight", "projection"),
        ("*.bias", "norm"),
    ),
    state_note="simple: three vectors a layer; local and conv: a window and a sum; full: every token up to L",
)
