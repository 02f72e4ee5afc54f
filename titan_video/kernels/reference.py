"""The memory-bound operators of a video DiT block in plain torch: the definition that every faster form must equal.

Statistics, modulation and RoPE are computed in float32 (float64 for a float64 input); the result has the input's type.
Letters: B batch, L tokens, D width, H heads, K head width, C complex numbers per head (K/2), T rows of modulation.

Modulation (scale, shift, gate) is float32, [B or 1, T, D], with one of these T:

    T = 1    one row for all tokens of a sample
    T = L    one row for each token
    T = 2    with cond_mask_BL, bool [B or 1, L]: row 1 for tokens of conditioning frames (mask true), row 0 for others

y_bias [D]: a bias that y already holds, as a constant to autograd. A fused operator computes its gradient with y's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """x in the type that statistics are computed in: float32, or float64 for float64."""
    return x if x.dtype == torch.float64 else x.float()


def _select_modulation(rows_BTD: Tensor, cond_mask_BL: Tensor | None) -> Tensor:
    """Each token's row of modulation, [B, L, D], or a shape that broadcasts to it.

    `where`, not a gather: its gradient is a masked sum, which is added in a fixed order.
    """
    if cond_mask_BL is None:
        return rows_BTD
    return torch.where(cond_mask_BL.unsqueeze(-1), rows_BTD[:, 1:2], rows_BTD[:, :1])


def ada_layer_norm(
    x_BLD: Tensor, scale_BTD: Tensor, shift_BTD: Tensor, eps: float, cond_mask_BL: Tensor | None = None
) -> Tensor:
    """AdaLN: LayerNorm without affine, then x (1 + scale) + shift (DiT, Peebles and Xie 2023)."""
    normed = F.layer_norm(upcast(x_BLD), x_BLD.shape[-1:], eps=eps)
    scale, shift = (_select_modulation(rows, cond_mask_BL) for rows in (scale_BTD, shift_BTD))
    return torch.addcmul(shift, normed, 1 + scale).to(x_BLD.dtype)


def ada_layer_norm_and_input(
    x_BLD: Tensor, scale_BTD: Tensor, shift_BTD: Tensor, eps: float, cond_mask_BL: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(`ada_layer_norm` of x, x). A residual that starts from the returned x lets one operator add both gradients."""
    return ada_layer_norm(x_BLD, scale_BTD, shift_BTD, eps, cond_mask_BL), x_BLD


def _with_gradient(y_BLD: Tensor, y_bias_D: Tensor | None) -> Tensor:
    """y, of which the bias is no constant any more."""
    return y_BLD if y_bias_D is None else y_BLD + (y_bias_D - y_bias_D.detach())


def gated_residual(
    x_BLD: Tensor,
    y_BLD: Tensor,
    gate_BTD: Tensor,
    cond_mask_BL: Tensor | None = None,
    y_bias_D: Tensor | None = None,
) -> Tensor:
    """x + gate y, added in float32 and rounded once."""
    y_BLD = _with_gradient(y_BLD, y_bias_D)
    gate = _select_modulation(gate_BTD, cond_mask_BL)
    return torch.addcmul(upcast(x_BLD), upcast(y_BLD), gate).to(x_BLD.dtype)


def layer_norm(x_BLD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """LayerNorm with affine; statistics and affine in float32."""
    return F.layer_norm(upcast(x_BLD), x_BLD.shape[-1:], upcast(weight_D), upcast(bias_D), eps).to(x_BLD.dtype)


def residual_layer_norm(
    x_BLD: Tensor,
    y_BLD: Tensor,
    gate_BTD: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    cond_mask_BL: Tensor | None = None,
    y_bias_D: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(x', LayerNorm of x' with affine), where x' = x + gate y, or x + y without a gate."""
    y_BLD = _with_gradient(y_BLD, y_bias_D)
    x_BLD = x_BLD + y_BLD if gate_BTD is None else gated_residual(x_BLD, y_BLD, gate_BTD, cond_mask_BL)
    return x_BLD, layer_norm(x_BLD, weight_D, bias_D, eps)


def residual_ada_layer_norm(
    x_BLD: Tensor,
    y_BLD: Tensor,
    gate_BTD: Tensor | None,
    scale_BTD: Tensor,
    shift_BTD: Tensor,
    eps: float,
    cond_mask_BL: Tensor | None = None,
    y_bias_D: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(x', `ada_layer_norm` of x'), where x' = x + gate y, or x + y without a gate."""
    y_BLD = _with_gradient(y_BLD, y_bias_D)
    x_BLD = x_BLD + y_BLD if gate_BTD is None else gated_residual(x_BLD, y_BLD, gate_BTD, cond_mask_BL)
    return x_BLD, ada_layer_norm(x_BLD, scale_BTD, shift_BTD, eps, cond_mask_BL)


def mean_square(x: Tensor) -> Tensor:
    """Mean of x^2 over the last dim, [..., 1]: the statistic of an RMSNorm."""
    return upcast(x).square().mean(-1, keepdim=True)


def _rms_normed(x: Tensor, weight: Tensor, eps: float, mean_square: Tensor | None) -> Tensor:
    if mean_square is None:
        return F.rms_norm(upcast(x), x.shape[-1:], upcast(weight), eps)
    return upcast(x) * torch.rsqrt(mean_square + eps) * upcast(weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float, mean_square: Tensor | None = None) -> Tensor:
    """RMSNorm over the last dim (Zhang and Sennrich 2019).

    mean_square: the statistic [..., 1] of the full vector, where x is only a shard of it (tensor parallel).
    """
    return _rms_normed(x, weight, eps, mean_square).to(x.dtype)


def rms_norm_rope(
    x: Tensor, weight: Tensor, freqs_cis_BLC: Tensor, eps: float, mean_square: Tensor | None = None
) -> Tensor:
    """RMSNorm over the last dim, then RoPE on neighbouring pairs of each head's channels (RoFormer, Su et al. 2021).

    x: [B, L, D] for one norm over all heads, or [B, L, H, K] for one norm per head. weight: of x's last dim.
    freqs_cis: complex64 [B or 1, L, C] of modulus 1, the same for all heads. mean_square: as in `rms_norm`.
    Returns [B, L, H, K], rounded once, after both.
    """
    normed = _rms_normed(x, weight, eps, mean_square).reshape(*x.shape[:2], -1, freqs_cis_BLC.shape[-1], 2)
    freqs_cis = freqs_cis_BLC.unsqueeze(2)
    if torch.compiler.is_compiling():
        # The compiler generates no code for complex numbers: in real ones the whole function becomes one kernel.
        (a, b), (cos, sin) = normed.unbind(-1), torch.view_as_real(freqs_cis).unbind(-1)
        rotated = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:
        rotated = torch.view_as_real(torch.view_as_complex(normed) * freqs_cis)
    return rotated.flatten(-2).to(x.dtype)
