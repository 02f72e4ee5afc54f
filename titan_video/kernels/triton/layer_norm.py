"""LayerNorm, modulation and gated residuals as torch operators, each one fused Triton kernel forward and one backward.

    op               forward                                               saved for backward
    norm             x -> LayerNorm(x) scale + shift                       x, scale, mean and rstd of each row
    residual_norm    x, y -> x' = x + gate y, LayerNorm(x') scale + shift  x', scale, mean and rstd, gate; y if the gate
                                                                           needs a gradient
    gated_residual   x, y -> x + gate y                                    gate; y if the gate needs a gradient

affine: scale is LayerNorm's weight, shift its bias; otherwise 1 + scale is the factor (AdaLN). Shapes and meaning of
modulation and of the conditioning mask: reference.py; a weight or bias is modulation with one row for all. No gradient
is added with atomics, so results are the same in every run. On a GPU the kernels of layer_norm_kernels.py run, on a CPU
the same formulas in plain torch (closed_form.py).
"""

import torch
from torch import Tensor
from torch.library import custom_op

from titan_video.kernels.triton.layer_norm_launch import OptionalTensor, backward, forward

# ---- the interface, as in reference.py ----


def ada_layer_norm(
    x_BLD: Tensor, scale_BTD: Tensor, shift_BTD: Tensor, eps: float, cond_mask_BL: OptionalTensor = None
) -> Tensor:
    return norm(x_BLD, scale_BTD, shift_BTD, cond_mask_BL, False, eps)[0]


def layer_norm(x_BLD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    return norm(x_BLD, weight_D[None, None], bias_D[None, None], None, True, eps)[0]


def residual_layer_norm(
    x_BLD: Tensor,
    y_BLD: Tensor,
    gate_BTD: OptionalTensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    cond_mask_BL: OptionalTensor = None,
) -> tuple[Tensor, Tensor]:
    return residual_norm(x_BLD, y_BLD, gate_BTD, weight_D[None, None], bias_D[None, None], cond_mask_BL, True, eps)[:2]


def residual_ada_layer_norm(
    x_BLD: Tensor,
    y_BLD: Tensor,
    gate_BTD: OptionalTensor,
    scale_BTD: Tensor,
    shift_BTD: Tensor,
    eps: float,
    cond_mask_BL: OptionalTensor = None,
) -> tuple[Tensor, Tensor]:
    return residual_norm(x_BLD, y_BLD, gate_BTD, scale_BTD, shift_BTD, cond_mask_BL, False, eps)[:2]


# ---- norm ----


@custom_op("titan_video::norm", mutates_args=())
def norm(
    x: Tensor, scale: Tensor, shift: Tensor, cond_mask: OptionalTensor, affine: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(normalised x, mean [B, L], rstd [B, L])"""
    return forward(x, None, None, scale, shift, cond_mask, affine, eps)[1:]


@norm.register_fake
def _(x, scale, shift, cond_mask, affine, eps):
    return x.new_empty(x.shape), *_empty_statistics(x)


@custom_op("titan_video::norm_backward", mutates_args=())
def norm_backward(
    dout: Tensor,
    x: Tensor,
    scale: Tensor,
    cond_mask: OptionalTensor,
    mean: Tensor,
    rstd: Tensor,
    affine: bool,
    modulation_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dscale, dshift); the last two are empty unless modulation_grad."""
    dx, _, _, dscale, dshift = backward(
        None, dout, x, None, None, scale, cond_mask, mean, rstd, affine, False, modulation_grad
    )
    return dx, dscale, dshift


@norm_backward.register_fake
def _(dout, x, scale, cond_mask, mean, rstd, affine, modulation_grad):
    return x.new_empty(x.shape), _empty_grad(scale, modulation_grad), _empty_grad(scale, modulation_grad)


def _norm_setup(ctx, inputs, output) -> None:
    x, scale, _, cond_mask, ctx.affine, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.modulation_grad = any(ctx.needs_input_grad[1:3])
    ctx.save_for_backward(x, scale, cond_mask, mean, rstd)


def _norm_autograd(ctx, dout, *_):
    x, scale, cond_mask, mean, rstd = ctx.saved_tensors
    dx, *modulation = norm_backward(dout, x, scale, cond_mask, mean, rstd, ctx.affine, ctx.modulation_grad)
    return dx, *(modulation if ctx.modulation_grad else (None, None)), None, None, None


norm.register_autograd(_norm_autograd, setup_context=_norm_setup)


# ---- residual_norm ----


@custom_op("titan_video::residual_norm", mutates_args=())
def residual_norm(
    x: Tensor,
    y: Tensor,
    gate: OptionalTensor,
    scale: Tensor,
    shift: Tensor,
    cond_mask: OptionalTensor,
    affine: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x', normalised x', mean [B, L], rstd [B, L])"""
    return forward(x, y, gate, scale, shift, cond_mask, affine, eps)


@residual_norm.register_fake
def _(x, y, gate, scale, shift, cond_mask, affine, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape), *_empty_statistics(x)


@custom_op("titan_video::residual_norm_backward", mutates_args=())
def residual_norm_backward(
    dsum: Tensor,
    dout: Tensor,
    x: Tensor,
    y: OptionalTensor,
    gate: OptionalTensor,
    scale: Tensor,
    cond_mask: OptionalTensor,
    mean: Tensor,
    rstd: Tensor,
    affine: bool,
    gate_grad: bool,
    modulation_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dy, dgate, dscale, dshift).

    Empty: dy without a gate, where it equals dx; dgate unless gate_grad; dscale and dshift unless modulation_grad.
    """
    return backward(dsum, dout, x, y, gate, scale, cond_mask, mean, rstd, affine, gate_grad, modulation_grad)


@residual_norm_backward.register_fake
def _(dsum, dout, x, y, gate, scale, cond_mask, mean, rstd, affine, gate_grad, modulation_grad):
    dy = x.new_empty(x.shape if gate is not None else 0)
    dgate = _empty_grad(gate if gate_grad else scale, gate_grad)
    return x.new_empty(x.shape), dy, dgate, _empty_grad(scale, modulation_grad), _empty_grad(scale, modulation_grad)


def _residual_norm_setup(ctx, inputs, output) -> None:
    _, y, gate, scale, _, cond_mask, ctx.affine, _ = inputs
    total, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.gate_grad = ctx.needs_input_grad[2]
    ctx.modulation_grad = any(ctx.needs_input_grad[3:5])
    ctx.save_for_backward(total, y if ctx.gate_grad else None, gate, scale, cond_mask, mean, rstd)


def _residual_norm_autograd(ctx, dsum, dout, *_):
    total, y, gate, scale, cond_mask, mean, rstd = ctx.saved_tensors
    dsum, dout = (torch.zeros_like(total) if grad is None else grad for grad in (dsum, dout))
    dx, dy, dgate, *modulation = residual_norm_backward(
        dsum, dout, total, y, gate, scale, cond_mask, mean, rstd, ctx.affine, ctx.gate_grad, ctx.modulation_grad
    )
    modulation = modulation if ctx.modulation_grad else (None, None)
    return dx, dx if gate is None else dy, dgate if ctx.gate_grad else None, *modulation, None, None, None


residual_norm.register_autograd(_residual_norm_autograd, setup_context=_residual_norm_setup)


# ---- gated_residual ----


@custom_op("titan_video::gated_residual", mutates_args=())
def gated_residual(x_BLD: Tensor, y_BLD: Tensor, gate_BTD: Tensor, cond_mask_BL: OptionalTensor = None) -> Tensor:
    return forward(x_BLD, y_BLD, gate_BTD, None, None, cond_mask_BL, False, 0.0)[0]


@gated_residual.register_fake
def _(x_BLD, y_BLD, gate_BTD, cond_mask_BL=None):
    return x_BLD.new_empty(x_BLD.shape)


@custom_op("titan_video::gated_residual_backward", mutates_args=())
def gated_residual_backward(
    dsum: Tensor, y: OptionalTensor, gate: Tensor, cond_mask: OptionalTensor, gate_grad: bool
) -> tuple[Tensor, Tensor]:
    """(dy, dgate); dgate is empty unless gate_grad."""
    return backward(dsum, None, None, y, gate, None, cond_mask, None, None, False, gate_grad, False)[1:3]


@gated_residual_backward.register_fake
def _(dsum, y, gate, cond_mask, gate_grad):
    return dsum.new_empty(dsum.shape), _empty_grad(gate, gate_grad)


def _gated_residual_setup(ctx, inputs, output) -> None:
    _, y, gate, cond_mask = inputs
    ctx.gate_grad = ctx.needs_input_grad[2]
    ctx.save_for_backward(y if ctx.gate_grad else None, gate, cond_mask)


def _gated_residual_autograd(ctx, dsum):
    y, gate, cond_mask = ctx.saved_tensors
    dy, dgate = gated_residual_backward(dsum, y, gate, cond_mask, ctx.gate_grad)
    return dsum, dy, dgate if ctx.gate_grad else None, None


gated_residual.register_autograd(_gated_residual_autograd, setup_context=_gated_residual_setup)


# ---- shapes for tracing ----


def _empty_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:2], dtype=torch.float32), x.new_empty(x.shape[:2], dtype=torch.float32)


def _empty_grad(modulation: Tensor, needed: bool) -> Tensor:
    return modulation.new_empty(modulation.shape) if needed else modulation.new_empty(0, dtype=torch.float32)
