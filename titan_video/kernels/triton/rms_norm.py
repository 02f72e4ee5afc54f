"""RMSNorm, alone or with RoPE after it, as a torch operator: one fused Triton kernel forward and one backward.

Saved for backward: x, the weight, freqs_cis, and rstd, the reciprocal root mean square of each row. Results are the
same in every run. On a CPU the same formulas run in plain torch (closed_form.py).
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from titan_video.kernels.triton import closed_form, launch
from titan_video.kernels.triton.sums import add_partial_sums

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
    cos_sin = get_cos_sin(freqs_cis)
    if not (x.is_cuda or launch.interpreted()):
        return closed_form.rms_norm_forward(x, weight, cos_sin, mean_square, eps)
    mean_square = None if mean_square is None else mean_square.contiguous()
    [out], [rstd] = forward_kernel([x.contiguous()], [weight.contiguous()], cos_sin, mean_square, eps)
    return out, rstd


def forward_kernel(
    xs: list[Tensor], weights: list[Tensor], cos_sin: Tensor | None, mean_square: Tensor | None, eps: float
) -> tuple[list[Tensor], list[Tensor]]:
    """(results, rstds) of one tensor or two."""
    from titan_video.kernels.triton import rms_norm_kernels

    kernel = rms_norm_kernels.rms_norm_forward
    outs, rstds = [torch.empty_like(x) for x in xs], [empty_rstd(x, w) for x, w in zip(xs, weights, strict=True)]
    constants = _constants(xs, weights[0], cos_sin, xs[:1], False) | {"HAS_MEAN_SQUARE": mean_square is not None}
    tensors = (*_two(xs), *_two(weights), cos_sin, mean_square, *_two(outs), *_two(rstds), *_tokens(xs))
    sizes = xs[0].shape[1], _cos_sin_stride(cos_sin)
    total, first = _programs(kernel, (*tensors, 0, *sizes, eps), constants, xs)
    kernel[(total,)](*tensors, first, *sizes, eps, **constants)
    return outs, rstds


def launch_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    freqs_cis: Tensor | None,
    rstd: Tensor,
    has_mean_square: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    cos_sin = get_cos_sin(freqs_cis)
    if not (x.is_cuda or launch.interpreted()):
        return closed_form.rms_norm_backward(dout, x, weight, cos_sin, rstd, has_mean_square, weight_grad)
    x = x.contiguous()
    dx, dsquare = torch.empty_like(x), torch.empty_like(rstd) if has_mean_square else None
    run = BackwardKernel([dout.contiguous()], [x], [weight.contiguous()], cos_sin, [rstd], [dx], dsquare, weight_grad)
    sums = rstd.new_empty(run.programs, run.sum_cols)
    run(sums)
    dweight = add_partial_sums(sums[None], 0, weight.dtype)[1]
    return dx, dweight.flatten(), rstd.new_empty(0) if dsquare is None else dsquare


class BackwardKernel:
    """One launch, of one tensor or two. dxs: what it writes, [B, L, H, K] or [B, L, H K], of any stride over tokens."""

    def __init__(
        self,
        douts: list[Tensor],
        xs: list[Tensor],
        weights: list[Tensor],
        cos_sin: Tensor | None,
        rstds: list[Tensor],
        dxs: list[Tensor],
        dsquare: Tensor | None,
        weight_grad: bool,
        bias_grad: bool = False,
    ):
        from titan_video.kernels.triton import rms_norm_kernels

        self.kernel = rms_norm_kernels.rms_norm_backward
        self.constants = _constants(xs, weights[0], cos_sin, [douts[0], xs[0]], True) | {
            "HAS_MEAN_SQUARE": dsquare is not None,
            "WEIGHT_GRAD": weight_grad,
            "BIAS_GRAD": bias_grad,
        }
        self.tensors = (*_two(douts), *_two(xs), *_two(weights), cos_sin, *_two(rstds), *_two(dxs))
        strides = [dx.stride(1) for dx in dxs]
        self.sizes = dsquare, strides[0], strides[-1], *_tokens(xs)
        self.last = xs[0].shape[1], _cos_sin_stride(cos_sin)
        args = (*self.tensors, rstds[0][:0], *self.sizes, 0, *self.last)
        self.programs, self.first = _programs(self.kernel, args, self.constants, xs)
        self.sum_cols = weights[0].numel() * weight_grad + xs[0].shape[2] * xs[0].shape[3] * bias_grad

    def __call__(self, sums: Tensor) -> None:
        """sums: float32 [programs, sum_cols]; the second tensor's begin at row `first`."""
        self.kernel[(self.programs,)](*self.tensors, sums, *self.sizes, self.first, *self.last, **self.constants)


def _two(tensors: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    return tensors[0], tensors[1] if len(tensors) > 1 else None


def _tokens(xs: list[Tensor]) -> tuple[int, int]:
    numbers = [x.shape[0] * x.shape[1] for x in xs]
    return numbers[0], numbers[1] if len(xs) > 1 else 0


def _programs(kernel: Any, args: tuple, constants: dict, xs: list[Tensor]) -> tuple[int, int]:
    """(all programs, those of the first tensor). Two tensors share them by their tokens."""
    first, second = _tokens(xs)
    programs = min(launch.num_programs(kernel, args, constants, xs[0].device), first + second)
    if not second:
        return programs, programs
    share = min(max(round(programs * second / (first + second)), 1), programs - 1)
    return programs, programs - share


def _constants(
    xs: list[Tensor], weight: Tensor, cos_sin: Tensor | None, read_per_row: list[Tensor], backward: bool
) -> dict:
    H, K = xs[0].shape[2:]
    heads, width = launch.power_of_2(H), launch.power_of_2(K)
    return {
        "H": H,
        "K": K,
        "HEADS": heads,
        "WIDTH": width,
        "STAGES": launch.stages(heads * width * sum(t.element_size() for t in read_per_row)),
        "PER_HEAD": weight.numel() == K,
        "ROPE": cos_sin is not None,
        "PAIR": len(xs) > 1,
        "num_warps": launch.warps(heads * width, backward),
    }


def _cos_sin_stride(cos_sin: Tensor | None) -> int:
    return 0 if cos_sin is None or cos_sin.shape[0] == 1 else cos_sin.stride(0)


def get_cos_sin(freqs_cis: Tensor | None) -> Tensor | None:
    """[B or 1, L, K], the pair (cos, sin) of each complex number."""
    return None if freqs_cis is None else torch.view_as_real(freqs_cis.contiguous()).flatten(-2)


def empty_rstd(x: Tensor, weight: Tensor) -> Tensor:
    """[B, L, H] for one norm per head, [B, L, 1] for one over all heads."""
    num_norms = x.shape[2] if weight.numel() == x.shape[3] else 1
    return x.new_empty((*x.shape[:2], num_norms), dtype=torch.float32)
