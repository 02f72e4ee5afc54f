"""RMSNorm, alone or with RoPE after it, as a torch operator: one fused Triton kernel forward and one backward.

Saved for backward: x, the weight, freqs_cis, and rstd, the reciprocal root mean square of each row. Results are the
same in every run. On a CPU the same formulas run in plain torch (closed_form.py).
"""

import torch
from torch import Tensor
from torch.library import custom_op

from titan_video.kernels.triton import closed_form, launch

# ---- the interface, as in reference.py ----


def rms_norm(x: Tensor, weight: Tensor, eps: float, mean_square: Tensor | None = None) -> Tensor:
    heads = x if x.ndim == 4 else x.unsqueeze(-2)
    return rms_norm_rotate(heads, weight, None, mean_square, eps)[0].view_as(x)


def rms_norm_rope(
    x: Tensor, weight: Tensor, freqs_cis_BLC: Tensor, eps: float, mean_square: Tensor | None = None
) -> Tensor:
    heads = x if x.ndim == 4 else x.unflatten(-1, (-1, 2 * freqs_cis_BLC.shape[-1]))
    return rms_norm_rotate(heads, weight, freqs_cis_BLC, mean_square, eps)[0]


# ---- the operator ----


@custom_op("titan_video::rms_norm", mutates_args=())
def rms_norm_rotate(
    x: Tensor, weight: Tensor, freqs_cis: Tensor | None, mean_square: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(normalised and rotated x, rstd [B, L, 1 or H]).

    x: [B, L, H, K]; weight: [K] for one norm per head, [H K] for one over all heads. freqs_cis None: no RoPE.
    """
    return launch_forward(x, weight, freqs_cis, mean_square, eps)


@rms_norm_rotate.register_fake
def _(x, weight, freqs_cis, mean_square, eps):
    return x.new_empty(x.shape), empty_rstd(x, weight)


@custom_op("titan_video::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    freqs_cis: Tensor | None,
    rstd: Tensor,
    has_mean_square: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dmean_square [B, L, 1 or H]).

    Empty: dweight unless weight_grad, dmean_square unless has_mean_square (forward got the statistic as an argument).
    """
    return launch_backward(dout, x, weight, freqs_cis, rstd, has_mean_square, weight_grad)


@rms_norm_backward.register_fake
def _(dout, x, weight, freqs_cis, rstd, has_mean_square, weight_grad):
    dweight = weight.new_empty(weight.shape) if weight_grad else rstd.new_empty(0)
    return x.new_empty(x.shape), dweight, rstd.new_empty(rstd.shape if has_mean_square else 0)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, freqs_cis, mean_square, _ = inputs
    _, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.weight_grad = ctx.needs_input_grad[1]
    ctx.mean_square_shape = None if mean_square is None else mean_square.shape
    ctx.save_for_backward(x, weight, freqs_cis, rstd)


def _autograd(ctx, dout, _):
    x, weight, freqs_cis, rstd = ctx.saved_tensors
    has_mean_square = ctx.mean_square_shape is not None
    dx, dweight, dsquare = rms_norm_backward(dout, x, weight, freqs_cis, rstd, has_mean_square, ctx.weight_grad)
    dsquare = dsquare.view(ctx.mean_square_shape) if has_mean_square else None
    return dx, dweight if ctx.weight_grad else None, None, dsquare, None


rms_norm_rotate.register_autograd(_autograd, setup_context=_setup_context)


# ---- launches: the kernels on a GPU, closed_form.py on a CPU ----


def launch_forward(
    x: Tensor, weight: Tensor, freqs_cis: Tensor | None, mean_square: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    cos_sin = _get_cos_sin(freqs_cis)
    if not (x.is_cuda or launch.interpreted()):
        return closed_form.rms_norm_forward(x, weight, cos_sin, mean_square, eps)
    from titan_video.kernels.triton import rms_norm_kernels

    x = x.contiguous()
    mean_square = None if mean_square is None else mean_square.contiguous()
    out, rstd = torch.empty_like(x), empty_rstd(x, weight)
    constants, sizes, programs = _launch_options(x, weight, cos_sin, [x])
    rms_norm_kernels.rms_norm_forward[(programs,)](
        x,
        weight.contiguous(),
        cos_sin,
        mean_square,
        out,
        rstd,
        *sizes,
        eps,
        HAS_MEAN_SQUARE=mean_square is not None,
        **constants,
    )
    return out, rstd


def launch_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    freqs_cis: Tensor | None,
    rstd: Tensor,
    has_mean_square: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    cos_sin = _get_cos_sin(freqs_cis)
    if not (x.is_cuda or launch.interpreted()):
        return closed_form.rms_norm_backward(dout, x, weight, cos_sin, rstd, has_mean_square, weight_grad)
    from titan_video.kernels.triton import rms_norm_kernels

    dout, x = dout.contiguous(), x.contiguous()
    dx, dsquare = torch.empty_like(x), torch.empty_like(rstd if has_mean_square else rstd[:0])
    constants, sizes, programs = _launch_options(x, weight, cos_sin, [dout, x])
    dweight = rstd.new_empty((programs, weight.numel()) if weight_grad else 0)
    rms_norm_kernels.rms_norm_backward[(programs,)](
        dout,
        x,
        weight.contiguous(),
        cos_sin,
        rstd,
        dx,
        dweight,
        dsquare,
        *sizes,
        HAS_MEAN_SQUARE=has_mean_square,
        WEIGHT_GRAD=weight_grad,
        **constants,
    )
    return dx, dweight.sum(0).to(weight.dtype) if weight_grad else dweight, dsquare


def _launch_options(
    x: Tensor, weight: Tensor, cos_sin: Tensor | None, read_per_row: list[Tensor]
) -> tuple[dict, tuple[int, ...], int]:
    """The constants of a kernel, its sizes (N, L, tokens_per_program, cos_sin_b), and the number of programs."""
    B, L, H, K = x.shape
    heads, width = launch.power_of_2(H), launch.power_of_2(K)
    num_warps = launch.warps(heads * width)
    tokens_per_program = launch.rows_per_program(B * L, 1, num_warps, x.device)
    constants = {
        "H": H,
        "K": K,
        "HEADS": heads,
        "WIDTH": width,
        "STAGES": launch.stages(heads * width * sum(t.element_size() for t in read_per_row)),
        "PER_HEAD": weight.numel() == K,
        "ROPE": cos_sin is not None,
        "num_warps": num_warps,
    }
    cos_sin_stride = 0 if cos_sin is None or cos_sin.shape[0] == 1 else cos_sin.stride(0)
    return constants, (B * L, L, tokens_per_program, cos_sin_stride), -(-B * L // tokens_per_program)


def _get_cos_sin(freqs_cis: Tensor | None) -> Tensor | None:
    """[B or 1, L, K], the pair (cos, sin) of each complex number."""
    return None if freqs_cis is None else torch.view_as_real(freqs_cis.contiguous()).flatten(-2)


def empty_rstd(x: Tensor, weight: Tensor) -> Tensor:
    """[B, L, H] for one norm per head, [B, L, 1] for one over all heads."""
    num_norms = x.shape[2] if weight.numel() == x.shape[3] else 1
    return x.new_empty((*x.shape[:2], num_norms), dtype=torch.float32)
