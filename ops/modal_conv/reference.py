"""The gated modal convolution as a plain loop over the tokens: the definition.

With packed = [x0, x1, v] side by side and z = x1 v, a channel with N complex modes does

    s_t[n] = lambda[n] s_{t-1}[n] + z_t          y_t = x0_t (Re sum_n R[n] s_t[n] + D z_t)

which is x0 (h * z) for the filter h_t = Re sum_n R[n] lambda[n]^t + [t = 0] D. Complex numbers are pairs
(real, imaginary) on the axis before the last. Sources: Massaroli et al., Laughing Hyena Distillery, arXiv
2310.18780, sections 2.2 and 3.1 (the modal form and its recurrence); togethercomputer/stripedhyena
(Apache-2.0), whose state is updated before it is read, as here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xexport.ops.fft_conv.reference import causal_conv

__all__ = ["modal_conv", "modal_conv_whole", "modal_filter"]


@torch.library.custom_op("xexport::modal_conv", mutates_args=())
def modal_conv(
    packed: Tensor, poles: Tensor, residues: Tensor, skip: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Run a chunk.

    Args:
        packed: ``[B,T,3D]``, x0, x1 and v.
        poles, residues: ``[N,2,D]``, lambda and R.
        skip: ``[D]``.
        state: ``[B,N,2,D]``, s before the chunk; zeros before the first token.

    Returns:
        y ``[B,T,D]`` and the state after the chunk.
    """
    out, gate, v = packed.chunk(3, -1)
    z = gate * v
    re, im = state.unbind(2)
    (pole_re, pole_im), (res_re, res_im) = poles.unbind(1), residues.unbind(1)
    y = skip * z
    for t in range(z.shape[1]):
        re, im = pole_re * re - pole_im * im + z[:, t, None], pole_re * im + pole_im * re
        y[:, t] += (res_re * re - res_im * im).sum(1)
    return out * y, torch.stack((re, im), 2)


@modal_conv.register_fake
def _(packed: Tensor, poles: Tensor, residues: Tensor, skip: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, width = packed.shape
    return packed.new_empty(batch, tokens, width // 3), state.new_empty(state.shape)


def modal_filter(poles: Tensor, residues: Tensor, length: int) -> Tensor:
    """``Re sum_n R lambda^t`` for t < length, differentiable: ``[N,2,D]`` twice to ``[D,length]``."""
    pole, residue = (torch.view_as_complex(x.transpose(1, 2).contiguous()) for x in (poles, residues))
    time = torch.arange(length, dtype=poles.dtype, device=poles.device)
    powers = (pole.log()[:, :, None] * time).exp()
    return (residue[:, :, None] * powers).real.sum(0)


def modal_conv_whole(packed: Tensor, poles: Tensor, residues: Tensor, skip: Tensor) -> Tensor:
    """A whole sequence from the first state ``[B,T,3D] -> [B,T,D]``, differentiable; no pole may be 0."""
    out, gate, v = packed.chunk(3, -1)
    z = gate * v
    h = modal_filter(poles, residues, z.shape[1])
    return out * (causal_conv(z.transpose(1, 2), h).transpose(1, 2) + skip * z)
