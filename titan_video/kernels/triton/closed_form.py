"""What the fused operators compute, forward and backward in closed form, in plain torch: their form on a CPU.

The arguments are those of `_forward` and `_backward` in fused_layer_norm.py and fused_rms_norm.py. What has no use is
an empty tensor.
"""

import torch
from torch import Tensor

Rows = Tensor | None


def layer_norm_forward(
    x: Tensor, y: Rows, gate: Rows, scale: Rows, shift: Rows, clean: Rows, affine: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = out = x.new_empty(0)
    mean, rstd = (x.new_empty(0, dtype=torch.float32) for _ in range(2))
    if y is not None:
        step = y.float() if gate is None else y.float() * each(gate, clean)
        x = total = (x.float() + step).to(x.dtype)
    if scale is not None:
        variance, mean = torch.var_mean(x.float(), -1, correction=0)
        rstd = torch.rsqrt(variance + eps)
        normed = (x.float() - mean[..., None]) * rstd[..., None]
        out = (normed * (each(scale, clean) + (not affine)) + each(shift, clean)).to(x.dtype)
    return total, x.new_empty(0) if scale is None else out, mean, rstd


def layer_norm_backward(
    dsum: Rows,
    dout: Rows,
    x: Rows,
    y: Rows,
    gate: Rows,
    scale: Rows,
    clean: Rows,
    mean: Rows,
    rstd: Rows,
    affine: bool,
    gate_grad: bool,
    modulation_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    like = dsum if dout is None else dout
    dx, dy, dgate, dscale, dshift = (like.new_empty(0, dtype=like.dtype if i < 2 else torch.float32) for i in range(5))
    total = 0 if dsum is None else dsum.float()
    if scale is not None:
        normed = (x.float() - mean[..., None]) * rstd[..., None]
        dnormed = dout.float() * (each(scale, clean) + (not affine))
        total = (
            total
            + (dnormed - dnormed.mean(-1, keepdim=True) - normed * (dnormed * normed).mean(-1, keepdim=True))
            * rstd[..., None]
        )
        dx = total.to(x.dtype)
        if modulation_grad:
            dscale, dshift = (summed(grad, scale, clean) for grad in (dout.float() * normed, dout.float().clone()))
    if gate is not None:
        dy = (total * each(gate, clean)).to(like.dtype)
        if gate_grad:
            dgate = summed(total * y.float(), gate, clean)
    return dx, dy, dgate, dscale, dshift


def each(rows: Tensor, clean: Rows) -> Tensor:
    """Each token's row of modulation, float32."""
    if clean is not None and rows.shape[1] == 2:
        rows = torch.where(clean[..., None], rows[:, 1:], rows[:, :1])
    return rows.float()


def summed(grad: Tensor, rows: Tensor, clean: Rows) -> Tensor:
    """Gradient of rows [B or 1, T, D] from that of each token [B, L, D]."""
    if clean is not None and rows.shape[1] == 2:
        mask = clean[..., None]
        grad = torch.stack([torch.where(mask, 0, grad).sum(1), torch.where(mask, grad, 0).sum(1)], dim=1)
    return grad.sum_to_size(rows.shape).to(rows.dtype)


def rms_norm_forward(x: Tensor, weight: Tensor, turns: Rows, square: Rows, eps: float) -> tuple[Tensor, Tensor]:
    """x: [B, L, H, K], with a weight of K, or of H K for one norm over all heads. turns:

    [B or 1, L, K], pairs (cos, sin).
    """
    dims = _dims(x, weight)
    square = x.float().square().mean(dims, keepdim=True) if square is None else square.view(*x.shape[:2], -1, 1)
    rstd = torch.rsqrt(square + eps)
    out = x.float() * rstd * _heads(weight, x)
    return (out if turns is None else _turn(out, turns, 1)).to(x.dtype), rstd.squeeze(-1)


def rms_norm_backward(
    dout: Tensor, x: Tensor, weight: Tensor, turns: Rows, rstd: Tensor, given: bool, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dims = _dims(x, weight)
    rstd, dout = rstd.view(*x.shape[:2], -1, 1), dout.float()
    dout = dout if turns is None else _turn(dout, turns, -1)
    normed, dnormed = x.float() * rstd, dout * _heads(weight, x)
    along = (dnormed * normed).sum(dims, keepdim=True)
    dsquare = (-0.5 * rstd.square() * along).squeeze(-1) if given else rstd.new_empty(0)
    dx = dnormed * rstd if given else (dnormed - normed * along / weight.numel()) * rstd
    dweight = (
        (dout * normed).sum((0, 1) if len(dims) == 2 else (0, 1, 2)).view_as(weight).to(weight.dtype)
        if weight_grad
        else rstd.new_empty(0)
    )
    return dx.to(x.dtype), dweight, dsquare


def _dims(x: Tensor, weight: Tensor) -> tuple[int, ...]:
    """Those of x [B, L, H, K] that one norm covers."""
    return (-1,) if weight.numel() == x.shape[-1] else (-2, -1)


def _heads(weight: Tensor, x: Tensor) -> Tensor:
    return weight.float().view(-1, x.shape[-1])


def _turn(x: Tensor, turns: Tensor, sign: int) -> Tensor:
    (a, b), (cos, sin) = (t.unflatten(-1, (-1, 2)).unbind(-1) for t in (x, turns.unsqueeze(2)))
    return torch.stack([a * cos - sign * b * sin, sign * a * sin + b * cos], dim=-1).flatten(-2)
