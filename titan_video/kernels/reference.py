"""The memory-bound operators of a video DiT block in plain torch: what every faster form must equal.

Statistics and rotations are computed in float32 (float64 for a float64 input); the result has the input's type.
Letters: B batch, L tokens, D width, H heads, K head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in the type in which statistics are computed."""
    return x if x.dtype == torch.float64 else x.float()


def ada_layer_norm(x_BLD: Tensor, scale_BLD: Tensor, shift_BLD: Tensor, eps: float) -> Tensor:
    """LayerNorm without affine, then x (1 + scale) + shift (DiT, Peebles and Xie 2023). scale and shift: float32, [B or 1, L or 1, D]."""
    normed = F.layer_norm(wide(x_BLD), x_BLD.shape[-1:], eps=eps)
    return torch.addcmul(shift_BLD, normed, 1 + scale_BLD).to(x_BLD.dtype)


def gated_residual(x_BLD: Tensor, y_BLD: Tensor, gate_BLD: Tensor) -> Tensor:
    """x + gate y with a float32 gate, added in float32 and rounded once."""
    return torch.addcmul(wide(x_BLD), wide(y_BLD), gate_BLD).to(x_BLD.dtype)


def layer_norm(x_BLD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """LayerNorm with affine; statistics and affine in float32."""
    return F.layer_norm(wide(x_BLD), x_BLD.shape[-1:], wide(weight_D), wide(bias_D), eps).to(x_BLD.dtype)


def mean_square(x: Tensor) -> Tensor:
    """Mean over the last dim of x^2, [..., 1]: the statistic of an RMSNorm."""
    return wide(x).square().mean(-1, keepdim=True)


def _rms_normed(x: Tensor, weight: Tensor, eps: float, mean_square: Tensor | None) -> Tensor:
    if mean_square is None:
        return F.rms_norm(wide(x), x.shape[-1:], wide(weight), eps)
    return wide(x) * torch.rsqrt(mean_square + eps) * wide(weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float, mean_square: Tensor | None = None) -> Tensor:
    """RMSNorm over the last dim (Zhang and Sennrich 2019).

    mean_square: the statistic [..., 1], where x is only a part of the vector that is normalised (tensor parallel).
    """
    return _rms_normed(x, weight, eps, mean_square).to(x.dtype)


def rms_norm_rope(x: Tensor, weight: Tensor, rotations_BLC: Tensor, eps: float, mean_square: Tensor | None = None) -> Tensor:
    """RMSNorm over the last dim, then rotation of each head's neighbouring pairs by complex numbers of modulus 1 (RoPE, Su et al. 2021).

    x: [B, L, D] for one norm over all heads, or [B, L, H, K] for one per head; weight: of the last dim. rotations: complex64 [B or 1, L, C],
    C = K/2, the same for all heads. mean_square: as in `rms_norm`. Returns [B, L, H, K], rounded once, after both.
    """
    normed = _rms_normed(x, weight, eps, mean_square).reshape(*x.shape[:2], -1, rotations_BLC.shape[-1], 2)
    rotations = rotations_BLC.unsqueeze(2)
    if torch.compiler.is_compiling():
        # The compiler generates no code for complex numbers: in real ones the whole function becomes one kernel.
        (a, b), (cos, sin) = normed.unbind(-1), torch.view_as_real(rotations).unbind(-1)
        rotated = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:
        rotated = torch.view_as_real(torch.view_as_complex(normed) * rotations)
    return rotated.flatten(-2).to(x.dtype)
