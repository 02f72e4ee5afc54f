"""The fused operators in plain torch: forward, and backward as explicit formulas instead of autograd.

The operators run this on a CPU in place of the Triton kernels, which need a GPU. The kernels compute the same formulas.
Arguments are those of layer_norm_launch.py and of the launches in rms_norm.py. A tensor that is not needed is None as
an argument and empty as a result.
"""

from typing import Any

import torch
from torch import Tensor

OptionalTensor = Tensor | None


def layer_norm_forward(
    x: Tensor,
    y: OptionalTensor,
    gate: OptionalTensor,
    scale: OptionalTensor,
    shift: OptionalTensor,
    cond_mask: OptionalTensor,
    affine: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = out = x.new_empty(0)
    mean, rstd = (x.new_empty(0, dtype=torch.float32) for _ in range(2))
    if y is not None:
        update = y.float() if gate is None else y.float() * select_modulation(gate, cond_mask)
        x = total = (x.float() + update).to(x.dtype)
    if scale is not None:
        variance, mean = torch.var_mean(x.float(), -1, correction=0)
        rstd = torch.rsqrt(variance + eps)
        normed = (x.float() - mean[..., None]) * rstd[..., None]
        factor = select_modulation(scale, cond_mask) + (not affine)
        out = (normed * factor + select_modulation(shift, cond_mask)).to(x.dtype)
    return total, out, mean, rstd


def layer_norm_backward(
    dsum: OptionalTensor,
    dout: OptionalTensor,
    x: OptionalTensor,
    y: OptionalTensor,
    gate: OptionalTensor,
    scale: OptionalTensor,
    cond_mask: OptionalTensor,
    mean: OptionalTensor,
    rstd: OptionalTensor,
    affine: bool,
    sums: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    like = dsum if dout is None else dout
    dx, dy = (like.new_empty(0) for _ in range(2))
    grads = {}  # by place, in the order of `Sums`
    total = 0 if dsum is None else dsum.float()
    if scale is not None:
        normed = (x.float() - mean[..., None]) * rstd[..., None]
        dnormed = dout.float() * (select_modulation(scale, cond_mask) + (not affine))
        projection = normed * (dnormed * normed).mean(-1, keepdim=True)
        total = total + (dnormed - dnormed.mean(-1, keepdim=True) - projection) * rstd[..., None]
        dx = total.to(x.dtype)
    dy_float = total
    if gate is not None:
        dy_float = total * select_modulation(gate, cond_mask)
        dy = dy_float.to(like.dtype)
    (gate_place, gate_rows), (scale_place, scale_rows), _, _ = sums.parts
    if gate_rows:
        grads.setdefault(gate_place, []).append(sum_modulation_grad(total * y.float(), gate, cond_mask))
    if scale_rows:
        for grad in (dout.float() * normed, dout.float().clone()):
            grads.setdefault(scale_place, []).append(sum_modulation_grad(grad, scale, cond_mask))
    if sums.bias:
        grads.setdefault("narrow", []).append(dy_float.sum(1, keepdim=True))
    B, L, D = like.shape
    tokens = torch.stack(grads["tokens"]) if "tokens" in grads else like.new_empty(0, B, L, D, dtype=torch.float32)
    wide, narrow = (
        torch.cat(grads[place], dim=1) if place in grads else like.new_empty(B, 0, D, dtype=torch.float32)
        for place in ("wide", "narrow")
    )
    return dx, dy, tokens, wide, narrow.to(sums.narrow_type)


def select_modulation(rows: Tensor, cond_mask: OptionalTensor) -> Tensor:
    """Each token's row of modulation, float32."""
    if cond_mask is not None and rows.shape[1] == 2:
        rows = torch.where(cond_mask[..., None], rows[:, 1:], rows[:, :1])
    return rows.float()


def sum_modulation_grad(grad: Tensor, rows: Tensor, cond_mask: OptionalTensor) -> Tensor:
    """Gradient of each sample's rows [B, T, D] from the gradients of each token's row [B, L, D]."""
    if rows.shape[1] == 1:
        return grad.sum(1, keepdim=True)
    if cond_mask is not None and rows.shape[1] == 2:
        mask = cond_mask[..., None]
        return torch.stack([torch.where(mask, 0, grad).sum(1), torch.where(mask, grad, 0).sum(1)], dim=1)
    return grad


def rms_norm_forward(
    x: Tensor, weight: Tensor, cos_sin: OptionalTensor, mean_square: OptionalTensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x: [B, L, H, K]; weight: [K] for one norm per head, [H K] for one over all. cos_sin: [B or 1, L, K], pairs."""
    dims = _normalised_dims(x, weight)
    if mean_square is None:
        mean_square = x.float().square().mean(dims, keepdim=True)
    else:
        mean_square = mean_square.view(*x.shape[:2], -1, 1)
    rstd = torch.rsqrt(mean_square + eps)
    out = x.float() * rstd * _weight_by_head(weight, x)
    return (out if cos_sin is None else _rotate(out, cos_sin, 1)).to(x.dtype), rstd.squeeze(-1)


def rms_norm_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    cos_sin: OptionalTensor,
    rstd: Tensor,
    has_mean_square: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dims = _normalised_dims(x, weight)
    rstd = rstd.view(*x.shape[:2], -1, 1)
    dout = dout.float() if cos_sin is None else _rotate(dout.float(), cos_sin, -1)
    normed, dnormed = x.float() * rstd, dout * _weight_by_head(weight, x)
    projection = (dnormed * normed).sum(dims, keepdim=True)
    if has_mean_square:
        dsquare = (-0.5 * rstd.square() * projection).squeeze(-1)
        dx = dnormed * rstd
    else:
        dsquare = rstd.new_empty(0)
        dx = (dnormed - normed * projection / weight.numel()) * rstd
    dweight = rstd.new_empty(0)
    if weight_grad:
        summed_dims = (0, 1) if len(dims) == 2 else (0, 1, 2)
        dweight = (dout * normed).sum(summed_dims).view_as(weight).to(weight.dtype)
    return dx.to(x.dtype), dweight, dsquare


def _normalised_dims(x: Tensor, weight: Tensor) -> tuple[int, ...]:
    """The dims of x [B, L, H, K] that one norm covers."""
    return (-1,) if weight.numel() == x.shape[-1] else (-2, -1)


def _weight_by_head(weight: Tensor, x: Tensor) -> Tensor:
    return weight.float().view(-1, x.shape[-1])


def _rotate(x: Tensor, cos_sin: Tensor, sign: int) -> Tensor:
    """RoPE, or with sign -1 its inverse: neighbouring pairs times cos + i sign sin."""
    (a, b), (cos, sin) = (t.unflatten(-1, (-1, 2)).unbind(-1) for t in (x, cos_sin.unsqueeze(2)))
    return torch.stack([a * cos - sign * b * sin, sign * a * sin + b * cos], dim=-1).flatten(-2)
