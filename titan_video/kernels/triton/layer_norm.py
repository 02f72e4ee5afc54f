"""LayerNorm, modulation and gated residuals as torch operators, each one fused Triton kernel forward and one backward.

    op               forward                                               saved for backward
    norm             x -> LayerNorm(x) scale + shift                       x, scale, mean and rstd of each row
    residual_norm    x, y -> x' = x + gate y, LayerNorm(x') scale + shift  x', scale, mean and rstd, gate; y if the gate
                                                                           needs a gradient
    gated_residual   x, y -> x + gate y                                    gate; y if the gate needs a gradient

affine: scale is LayerNorm's weight, shift its bias; otherwise 1 + scale is the factor (AdaLN). Shapes and meaning of
modulation and of the conditioning mask: reference.py; a weight or bias is modulation with one row for all. y_bias: a
bias that y already holds, as a constant to autograd; its gradient, the sum of y's, is computed with y's. No gradient
is added with atomics, so results are the same in every run. On a GPU the kernels of layer_norm_kernels.py run, on a CPU
the same formulas in plain torch (closed_form.py).
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from titan_video.kernels.triton.layer_norm_launch import OptionalTensor, Sums, backward, forward, modulation_kind

# ---- the interface, as in reference.py ----


def ada_layer_norm(
    x_BLD: Tensor, scale_BTD: Tensor, shift_BTD: Tensor, eps: float, cond_mask_BL: OptionalTensor = None
) -> Tensor:
    return norm(x_BLD, scale_BTD, shift_BTD, cond_mask_BL, False, eps)[0]


def ada_layer_norm_and_input(
    x_BLD: Tensor, scale_BTD: Tensor, shift_BTD: Tensor, eps: float, cond_mask_BL: OptionalTensor = None
) -> tuple[Tensor, Tensor]:
    return _NormAndInput.apply(x_BLD, scale_BTD, shift_BTD, cond_mask_BL, eps)


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
    y_bias_D: OptionalTensor = None,
) -> tuple[Tensor, Tensor]:
    weight, bias = weight_D[None, None], bias_D[None, None]
    return residual_norm(x_BLD, y_BLD, gate_BTD, weight, bias, cond_mask_BL, y_bias_D, True, eps)[:2]


def residual_ada_layer_norm(
    x_BLD: Tensor,
    y_BLD: Tensor,
    gate_BTD: OptionalTensor,
    scale_BTD: Tensor,
    shift_BTD: Tensor,
    eps: float,
    cond_mask_BL: OptionalTensor = None,
    y_bias_D: OptionalTensor = None,
) -> tuple[Tensor, Tensor]:
    return residual_norm(x_BLD, y_BLD, gate_BTD, scale_BTD, shift_BTD, cond_mask_BL, y_bias_D, False, eps)[:2]


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
    dsum: OptionalTensor,
    dout: Tensor,
    x: Tensor,
    scale: Tensor,
    cond_mask: OptionalTensor,
    mean: Tensor,
    rstd: Tensor,
    affine: bool,
    modulation_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, tokens, wide, narrow): see `Sums`. dsum: a gradient of x from elsewhere, which is added; or None."""
    sums = make_sums(x, None, scale, cond_mask, affine, False, modulation_grad, None)
    dx, _, *grads = backward(dsum, dout, x, None, None, scale, cond_mask, mean, rstd, affine, sums)
    return dx, *grads


@norm_backward.register_fake
def _(dsum, dout, x, scale, cond_mask, mean, rstd, affine, modulation_grad):
    sums = make_sums(x, None, scale, cond_mask, affine, False, modulation_grad, None)
    return x.new_empty(x.shape), *_empty_grads(x, sums)


def _norm_setup(ctx, inputs, output) -> None:
    x, scale, shift, cond_mask, ctx.affine, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    _save_norm(ctx, x, scale, shift, cond_mask, mean, rstd)


def _save_norm(ctx, x, scale, shift, cond_mask, mean, rstd) -> None:
    ctx.modulation_grad = any(ctx.needs_input_grad[1:3])
    ctx.like = _metadata(None, scale, shift, None)
    ctx.save_for_backward(x, scale, cond_mask, mean, rstd)


def _norm_grads(ctx, dsum, dout) -> tuple:
    x, scale, cond_mask, mean, rstd = ctx.saved_tensors
    dx, *grads = norm_backward(dsum, dout, x, scale, cond_mask, mean, rstd, ctx.affine, ctx.modulation_grad)
    sums = make_sums(x, None, scale, cond_mask, ctx.affine, False, ctx.modulation_grad, None)
    return dx, *_split(ctx, sums, grads)[1:3]


def _norm_autograd(ctx, dout, *_):
    return *_norm_grads(ctx, None, dout), None, None, None


norm.register_autograd(_norm_autograd, setup_context=_norm_setup)


class _NormAndInput(torch.autograd.Function):
    """`norm`, and x once more: one kernel adds the gradients of both. An operator may not return its input."""

    @staticmethod
    def forward(ctx, x, scale, shift, cond_mask, eps):
        out, mean, rstd = norm(x, scale, shift, cond_mask, False, eps)
        ctx.set_materialize_grads(False)
        ctx.affine = False
        _save_norm(ctx, x, scale, shift, cond_mask, mean, rstd)
        return out, x.view_as(x)

    @staticmethod
    def backward(ctx, dout, dsum):
        if dout is None:
            return dsum, None, None, None, None
        return *_norm_grads(ctx, dsum, dout), None, None


# ---- residual_norm ----


@custom_op("titan_video::residual_norm", mutates_args=())
def residual_norm(
    x: Tensor,
    y: Tensor,
    gate: OptionalTensor,
    scale: Tensor,
    shift: Tensor,
    cond_mask: OptionalTensor,
    y_bias: OptionalTensor,
    affine: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x', normalised x', mean [B, L], rstd [B, L])"""
    return forward(x, y, gate, scale, shift, cond_mask, affine, eps)


@residual_norm.register_fake
def _(x, y, gate, scale, shift, cond_mask, y_bias, affine, eps):
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
    bias_type: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dy, tokens, wide, narrow): see `Sums`. dy is empty without a gate, where it equals dx.

    bias_type: of a bias that y holds and whose gradient is needed, or None.
    """
    sums = make_sums(x, gate, scale, cond_mask, affine, gate_grad, modulation_grad, bias_type)
    return backward(dsum, dout, x, y, gate, scale, cond_mask, mean, rstd, affine, sums)


@residual_norm_backward.register_fake
def _(dsum, dout, x, y, gate, scale, cond_mask, mean, rstd, affine, gate_grad, modulation_grad, bias_type):
    sums = make_sums(x, gate, scale, cond_mask, affine, gate_grad, modulation_grad, bias_type)
    return x.new_empty(x.shape), x.new_empty(x.shape if gate is not None else 0), *_empty_grads(x, sums)


def _residual_norm_setup(ctx, inputs, output) -> None:
    _, y, gate, scale, shift, cond_mask, y_bias, ctx.affine, _ = inputs
    total, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.gate_grad = ctx.needs_input_grad[2]
    ctx.modulation_grad = any(ctx.needs_input_grad[3:5])
    ctx.bias_type = y_bias.dtype if ctx.needs_input_grad[6] else None
    ctx.like = _metadata(gate, scale, shift, y_bias)
    ctx.save_for_backward(total, y if ctx.gate_grad else None, gate, scale, cond_mask, mean, rstd)


def _residual_norm_autograd(ctx, dsum, dout, *_):
    total, y, gate, scale, cond_mask, mean, rstd = ctx.saved_tensors
    dsum, dout = (torch.zeros_like(total) if grad is None else grad for grad in (dsum, dout))
    options = ctx.affine, ctx.gate_grad, ctx.modulation_grad, ctx.bias_type
    dx, dy, *grads = residual_norm_backward(dsum, dout, total, y, gate, scale, cond_mask, mean, rstd, *options)
    dgate, dscale, dshift, dbias = _split(ctx, make_sums(total, gate, scale, cond_mask, *options), grads)
    return dx, dx if gate is None else dy, dgate, dscale, dshift, None, dbias, None, None


residual_norm.register_autograd(_residual_norm_autograd, setup_context=_residual_norm_setup)


# ---- gated_residual ----


@custom_op("titan_video::gated_residual", mutates_args=())
def gated_residual(
    x_BLD: Tensor,
    y_BLD: Tensor,
    gate_BTD: Tensor,
    cond_mask_BL: OptionalTensor = None,
    y_bias_D: OptionalTensor = None,
) -> Tensor:
    return forward(x_BLD, y_BLD, gate_BTD, None, None, cond_mask_BL, False, 0.0)[0]


@gated_residual.register_fake
def _(x_BLD, y_BLD, gate_BTD, cond_mask_BL=None, y_bias_D=None):
    return x_BLD.new_empty(x_BLD.shape)


@custom_op("titan_video::gated_residual_backward", mutates_args=())
def gated_residual_backward(
    dsum: Tensor,
    y: OptionalTensor,
    gate: Tensor,
    cond_mask: OptionalTensor,
    gate_grad: bool,
    bias_type: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dy, tokens, wide, narrow): see `Sums`."""
    sums = make_sums(dsum, gate, None, cond_mask, False, gate_grad, False, bias_type)
    return backward(dsum, None, None, y, gate, None, cond_mask, None, None, False, sums)[1:]


@gated_residual_backward.register_fake
def _(dsum, y, gate, cond_mask, gate_grad, bias_type):
    sums = make_sums(dsum, gate, None, cond_mask, False, gate_grad, False, bias_type)
    return dsum.new_empty(dsum.shape), *_empty_grads(dsum, sums)


def _gated_residual_setup(ctx, inputs, output) -> None:
    _, y, gate, cond_mask, y_bias = inputs
    ctx.gate_grad = ctx.needs_input_grad[2]
    ctx.bias_type = y_bias.dtype if y_bias is not None and ctx.needs_input_grad[4] else None
    ctx.like = _metadata(gate, None, None, y_bias)
    ctx.save_for_backward(y if ctx.gate_grad else None, gate, cond_mask)


def _gated_residual_autograd(ctx, dsum):
    y, gate, cond_mask = ctx.saved_tensors
    dy, *grads = gated_residual_backward(dsum, y, gate, cond_mask, ctx.gate_grad, ctx.bias_type)
    sums = make_sums(dsum, gate, None, cond_mask, False, ctx.gate_grad, False, ctx.bias_type)
    dgate, _, _, dbias = _split(ctx, sums, grads)
    return dsum, dy, dgate, None, dbias


gated_residual.register_autograd(_gated_residual_autograd, setup_context=_gated_residual_setup)


# ---- gradients of modulation, weights and biases ----


def make_sums(
    x: Tensor,
    gate: OptionalTensor,
    scale: OptionalTensor,
    cond_mask: OptionalTensor,
    affine: bool,
    gate_grad: bool,
    modulation_grad: bool,
    bias_type: torch.dtype | None,
) -> Sums:
    types = {scale.dtype} if affine and modulation_grad else set()
    types |= set() if bias_type is None else {bias_type}
    return Sums(
        gate_rows=gate.shape[1] if gate_grad else 0,
        gate_kind=modulation_kind(gate, cond_mask, x.shape[1]),
        scale_rows=scale.shape[1] if modulation_grad else 0,
        scale_kind=modulation_kind(scale, cond_mask, x.shape[1]),
        affine=affine,
        bias=bias_type is not None,
        narrow_type=types.pop() if len(types) == 1 and x.shape[0] == 1 else torch.float32,
    )


def _metadata(*tensors: OptionalTensor) -> list[tuple[torch.Size, torch.dtype] | None]:
    return [None if t is None else (t.shape, t.dtype) for t in tensors]


def _split(ctx: Any, sums: Sums, grads: list[Tensor]) -> list[OptionalTensor]:
    """The gradients of gate, scale, shift and bias, in the shapes and types of `ctx.like`."""
    found = sums.split(*grads)
    for i, (grad, like) in enumerate(zip(found, ctx.like, strict=True)):
        if grad is not None:
            shape, dtype = like
            samples = shape[0] if len(shape) == 3 else 1
            grad = grad.sum(0, keepdim=True) if samples == 1 < grad.shape[0] else grad
            found[i] = grad.to(dtype).view(shape)
    return found


# ---- shapes for tracing ----


def _empty_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:2], dtype=torch.float32), x.new_empty(x.shape[:2], dtype=torch.float32)


def _empty_grads(x: Tensor, sums: Sums) -> tuple[Tensor, Tensor, Tensor]:
    B, L, D = x.shape
    tokens = x.new_empty(sums.per_token, B, L, D, dtype=torch.float32)
    wide = x.new_empty(B, sums.wide_rows, D, dtype=torch.float32)
    return tokens, wide, x.new_empty(B, sums.rows - sums.wide_rows, D, dtype=sums.narrow_type)
