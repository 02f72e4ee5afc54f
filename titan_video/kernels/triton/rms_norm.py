"""RMSNorm, alone or with rotation after it, as an operator of torch: on a GPU one Triton kernel forward, one backward.

Kept for backward: x, the weight, the rotations, 1/root of the mean square of each row. Results are the same from run to
run, as in fused_layer_norm.py.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from titan_video.kernels.triton import closed_form as plain
from titan_video.kernels.triton import launch


def rms_norm(x: Tensor, weight: Tensor, eps: float, mean_square: Tensor | None = None) -> Tensor:
    heads = x if x.ndim == 4 else x.unsqueeze(-2)
    return rms_norm_rotate(heads, weight, None, mean_square, eps)[0].view_as(x)


def rms_norm_rope(
    x: Tensor, weight: Tensor, freqs_cis_BLC: Tensor, eps: float, mean_square: Tensor | None = None
) -> Tensor:
    heads = x if x.ndim == 4 else x.unflatten(-1, (-1, 2 * freqs_cis_BLC.shape[-1]))
    return rms_norm_rotate(heads, weight, freqs_cis_BLC, mean_square, eps)[0]


@custom_op("titan_video::rms_norm", mutates_args=())
def rms_norm_rotate(
    x: Tensor, weight: Tensor, freqs_cis: Tensor | None, mean_square: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """x: [B, L, H, K]; weight: [K] for a norm of each head, [H K] for one over all.

    (normed and rotated, 1/root [B, L, 1 or H])
    """
    return _forward(x, weight, freqs_cis, mean_square, eps)


@custom_op("titan_video::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    dout: Tensor, x: Tensor, weight: Tensor, freqs_cis: Tensor | None, rstd: Tensor, given: bool, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dmean_square [B, L, 1 or H]); empty are dweight unless weight_grad, dmean_square unless that was
    given.
    """
    return _backward(dout, x, weight, freqs_cis, rstd, given, weight_grad)


def _forward(
    x: Tensor, weight: Tensor, freqs_cis: Tensor | None, mean_square: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    if not (x.is_cuda or launch.interpreted()):
        return plain.rms_norm_forward(x, weight, _turns(freqs_cis), mean_square, eps)
    from titan_video.kernels.triton import rms_norm_kernels as rms_norm_triton

    x, turns, square = x.contiguous(), _turns(freqs_cis), None if mean_square is None else mean_square.contiguous()
    out, rstd = torch.empty_like(x), _roots(x, weight)
    options, run, sizes = _options(x, weight, turns, (x,))
    rms_norm_triton.rms_norm_forward[(-(-sizes[0] // run),)](
        x, weight.contiguous(), turns, square, out, rstd, *sizes, eps, GIVEN=square is not None, **options
    )
    return out, rstd


def _backward(
    dout: Tensor, x: Tensor, weight: Tensor, freqs_cis: Tensor | None, rstd: Tensor, given: bool, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not (x.is_cuda or launch.interpreted()):
        return plain.rms_norm_backward(dout, x, weight, _turns(freqs_cis), rstd, given, weight_grad)
    from titan_video.kernels.triton import rms_norm_kernels as rms_norm_triton

    dout, x, turns = dout.contiguous(), x.contiguous(), _turns(freqs_cis)
    dx, dsquare = torch.empty_like(x), torch.empty_like(rstd if given else rstd[:0])
    options, run, sizes = _options(x, weight, turns, (dout, x))
    programs = -(-sizes[0] // run)
    dweight = rstd.new_empty((programs, weight.numel()) if weight_grad else 0)
    rms_norm_triton.rms_norm_backward[(programs,)](
        dout,
        x,
        weight.contiguous(),
        turns,
        rstd,
        dx,
        dweight,
        dsquare,
        *sizes,
        GIVEN=given,
        WEIGHT_GRAD=weight_grad,
        **options,
    )
    return dx, dweight.sum(0).to(weight.dtype) if weight_grad else dweight, dsquare


def _options(
    x: Tensor, weight: Tensor, turns: Tensor | None, streams: tuple[Tensor, ...]
) -> tuple[dict, int, tuple[int, ...]]:
    """The kernels' constants, the tokens that a program takes, and sizes:

    tokens, those of a sample, of a program, stride of the rotations.
    """
    B, L, H, K = x.shape
    heads, width = launch.power_of_2(H), launch.power_of_2(K)
    num_warps = launch.warps(heads * width)
    run = launch.run_length(B * L, 1, num_warps, x.device)
    stages = launch.stages(heads * width * sum(t.element_size() for t in streams))
    options = {
        "H": H,
        "K": K,
        "HEADS": heads,
        "WIDTH": width,
        "STAGES": stages,
        "PER_HEAD": weight.numel() == K,
        "ROPE": turns is not None,
        "num_warps": num_warps,
    }
    return options, run, (B * L, L, run, 0 if turns is None or turns.shape[0] == 1 else turns.stride(0))


def _turns(freqs_cis: Tensor | None) -> Tensor | None:
    """[B or 1, L, K]: of each pair (cos, sin)."""
    return None if freqs_cis is None else torch.view_as_real(freqs_cis.contiguous()).flatten(-2)


def _roots(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:2], x.shape[2] if weight.numel() == x.shape[3] else 1), dtype=torch.float32)


@rms_norm_rotate.register_fake
def _(x, weight, freqs_cis, mean_square, eps):
    return x.new_empty(x.shape), _roots(x, weight)


@rms_norm_backward.register_fake
def _(dout, x, weight, freqs_cis, rstd, given, weight_grad):
    dweight = weight.new_empty(weight.shape) if weight_grad else rstd.new_empty(0)
    return x.new_empty(x.shape), dweight, rstd.new_empty(rstd.shape if given else 0)


def _keep(ctx, inputs, output) -> None:
    x, weight, freqs_cis, mean_square, _ = inputs
    _, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.given, ctx.weight_grad = mean_square is not None, ctx.needs_input_grad[1]
    ctx.given_shape = mean_square.shape if ctx.given else None
    ctx.save_for_backward(x, weight, freqs_cis, rstd)


def _gradients(ctx, dout, _):
    x, weight, freqs_cis, rstd = ctx.saved_tensors
    dx, dweight, dsquare = rms_norm_backward(dout, x, weight, freqs_cis, rstd, ctx.given, ctx.weight_grad)
    return dx, dweight if ctx.weight_grad else None, None, dsquare.view(ctx.given_shape) if ctx.given else None, None


rms_norm_rotate.register_autograd(_gradients, setup_context=_keep)
