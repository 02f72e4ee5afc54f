"""The last product of HunyuanVideo's single block: of attention and feed-forward together, which lie side by side.

The product reads one tensor with, head by head, K channels of attention and E of GELU. Here it is written in one pass
in forward and is not saved: backward writes it again, in the kernel that computes GELU's gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from titan_video.kernels.triton import columns, launch


def joined_linear(out: Tensor, u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """linear(x) for x = [out, gelu(u)] head by head, with the tanh form of GELU.

    out [B, L, H, K] of attention, u [B, L, H E], weight [D, H (K + E)], bias [D] -> [B, L, D].
    Only out, u and the weight are saved.
    """
    return _JoinedLinear.apply(out, u, weight, bias)


class _JoinedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out: Tensor, u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(out, u, weight)
        return F.linear(join_gelu(out, u), weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, u, weight = ctx.saved_tensors
        out_grad, u_grad, weight_grad, bias_grad = ctx.needs_input_grad
        rows, dout, du, dweight = grad.flatten(0, -2), None, None, None
        if out_grad or u_grad:
            dout, du, joined = join_gelu_backward(grad @ weight, out, u)
        elif weight_grad:
            joined = join_gelu(out, u)
        if weight_grad:
            dweight = rows.mT @ joined.flatten(0, -2)
        return dout if out_grad else None, du if u_grad else None, dweight, rows.sum(0) if bias_grad else None


@custom_op("titan_video::join_gelu", mutates_args=())
def join_gelu(out: Tensor, u: Tensor) -> Tensor:
    """[B, L, H (K + E)] from out [B, L, H, K] and u [B, L, H E]."""
    joined, heads = _empty(out, u)
    heads[..., : out.shape[3]] = out
    torch.ops.aten.gelu.out(u.unflatten(-1, (out.shape[2], -1)), approximate="tanh", out=heads[..., out.shape[3] :])
    return joined


@join_gelu.register_fake
def _(out, u):
    return _empty(out, u)[0]


@custom_op("titan_video::join_gelu_backward", mutates_args=())
def join_gelu_backward(grad: Tensor, out: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dout, du, the joined tensor). grad: of that tensor."""
    H, K = out.shape[2:]
    of_heads = grad.unflatten(-1, (H, -1))
    if not ((u.is_cuda or launch.interpreted()) and u.dtype != torch.float64):
        du = torch.ops.aten.gelu_backward(of_heads[..., K:].flatten(2), u, approximate="tanh")
        return of_heads[..., :K].contiguous(), du, join_gelu(out, u)
    joined, heads = _empty(out, u)
    heads[..., :K] = out
    du = columns.launch_joined_backward(grad, u, joined, (u.shape[-1] // H, K))
    return of_heads[..., :K].contiguous(), du, joined


@join_gelu_backward.register_fake
def _(grad, out, u):
    return out.new_empty(out.shape), u.new_empty(u.shape), _empty(out, u)[0]


def _empty(out: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """A joined tensor, [B, L, H (K + E)], and its view [B, L, H, K + E]."""
    B, L, H, K = out.shape
    joined = u.new_empty(B, L, H * K + u.shape[-1])
    return joined, joined.unflatten(-1, (H, -1))
