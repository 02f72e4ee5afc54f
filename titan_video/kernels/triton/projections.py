"""q, k and v of an attention from its input: three products, then RMSNorm (and RoPE) of q and k, as one function.

Backward is one function too, which autograd's graph of the single parts could not be: the gradients of q, k and v are
written side by side, so that those of the three weights are one product and no sum of two tensors is needed, and the
kernel that writes the gradient of q or k sums it for the bias. Weights stay the parameters that they are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from titan_video.kernels.triton import closed_form, launch
from titan_video.kernels.triton.columns import Columns
from titan_video.kernels.triton.rms_norm import BackwardKernel, empty_rstd, forward_kernel, get_cos_sin
from titan_video.kernels.triton.sums import add_partial_sums


def project_and_norm(
    x_BLD: Tensor,
    context_BSD: Tensor | None,
    weights: tuple[Tensor, Tensor, Tensor],
    biases: tuple[Tensor, Tensor, Tensor],
    norms: tuple[Tensor, Tensor],
    freqs_cis_BLC: Tensor | None,
    head_dim: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, L, H, K], k and v [B, S, H, K]. q is of x, k and v of the context, or of x where that is None.

    weights, biases: of q, k and v, [H K, D] and [H K]. norms: weights of the RMSNorms of q and k, [H K] for one over
    all heads, [K] for one per head. freqs_cis: as in reference.py; None: no RoPE.
    """
    return _ProjectAndNorm.apply(x_BLD, context_BSD, *weights, *biases, *norms, freqs_cis_BLC, head_dim, eps)


class _ProjectAndNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, context, w_q, w_k, w_v, b_q, b_k, b_v, norm_q, norm_k, freqs_cis, head_dim, eps):
        source = x if context is None else context
        q, k, v = (
            F.linear(t, w, b).unflatten(-1, (-1, head_dim))
            for t, w, b in ((x, w_q, b_q), (source, w_k, b_k), (source, w_v, b_v))
        )
        q_out, k_out, q_rstd, k_rstd = rms_norm_pair(q, k, norm_q, norm_k, freqs_cis, eps)
        ctx.save_for_backward(x, context, w_q, w_k, w_v, q, k, norm_q, norm_k, freqs_cis, q_rstd, k_rstd)
        ctx.bias_type = b_q.dtype
        return q_out, k_out, v

    @staticmethod
    def backward(ctx, dq, dk, dv):
        x, context, w_q, w_k, w_v, q, k, norm_q, norm_k, freqs_cis, q_rstd, k_rstd = ctx.saved_tensors
        needed = ctx.needs_input_grad
        joint = context is None
        dqkv, dkv, sums = project_backward(dq, dk, dv, q, k, norm_q, norm_k, freqs_cis, q_rstd, k_rstd, joint)
        width = w_q.shape[0]
        if joint:
            parts = [(x, (w_q, w_k, w_v), dqkv, any(needed[2:5]), needed[0])]
        else:
            parts = [
                (x, (w_q,), dqkv, needed[2], needed[0]),
                (context, (w_k, w_v), dkv, any(needed[3:5]), needed[1]),
            ]
        dweights, dinputs = [], []
        for source, weights, grad, weights_needed, source_needed in parts:
            rows, inputs = grad.flatten(0, 1), source.flatten(0, 1)
            dweights += (rows.mT @ inputs).split(width) if weights_needed else [None] * len(weights)
            dinputs.append(_input_grad(rows, weights).view_as(source) if source_needed else None)
        norm_cols = norm_q.numel()
        dnorms = [sums[i, :norm_cols].to(norm.dtype) for i, norm in enumerate((norm_q, norm_k))]
        dbiases = [row[norm_cols:].to(ctx.bias_type) for row in sums]
        grads = [*dinputs, *[None] * (2 - len(dinputs)), *dweights, *dbiases, *dnorms]
        return *(grad if need else None for grad, need in zip(grads, needed[:10], strict=True)), None, None, None


def _input_grad(rows: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """The sum of each part of the rows times its weight, summed by the products themselves."""
    width = weights[0].shape[0]
    total = rows[:, :width] @ weights[0]
    for i, weight in enumerate(weights[1:], start=1):
        total = torch.addmm(total, rows[:, i * width : (i + 1) * width], weight, out=total)
    return total


# ---- RMSNorm of q and k in one launch ----


@custom_op("titan_video::rms_norm_pair", mutates_args=())
def rms_norm_pair(
    q: Tensor, k: Tensor, norm_q: Tensor, norm_k: Tensor, freqs_cis: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, and the rstd of each), as rms_norm.py computes them one by one."""
    cos_sin = get_cos_sin(freqs_cis)
    if q.is_cuda or launch.interpreted():
        xs, weights = [q.contiguous(), k.contiguous()], [norm_q.contiguous(), norm_k.contiguous()]
        outs, rstds = forward_kernel(xs, weights, cos_sin, None, eps)
        return *outs, *rstds
    q, q_rstd = closed_form.rms_norm_forward(q, norm_q, cos_sin, None, eps)
    k, k_rstd = closed_form.rms_norm_forward(k, norm_k, cos_sin, None, eps)
    return q, k, q_rstd, k_rstd


@rms_norm_pair.register_fake
def _(q, k, norm_q, norm_k, freqs_cis, eps):
    return q.new_empty(q.shape), k.new_empty(k.shape), empty_rstd(q, norm_q), empty_rstd(k, norm_k)


# ---- backward up to the products ----


@custom_op("titan_video::project_backward", mutates_args=())
def project_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    q: Tensor,
    k: Tensor,
    norm_q: Tensor,
    norm_k: Tensor,
    freqs_cis: Tensor | None,
    q_rstd: Tensor,
    k_rstd: Tensor,
    joint: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the products' results, and of q, k and v the gradients of norm and bias, [3, N + H K].

    joint: the first result is of q, k and v, [B, L, 3 H K], and the second is empty; otherwise they are of q, [B, L,
    H K], and of k and v, [B, S, 2 H K]. v has no norm: the first N of its row are undefined.
    """
    width, norm_cols = q.shape[2] * q.shape[3], norm_q.numel()
    dqkv, dkv, sums = _empty_gradients(q, k, norm_q, joint)
    dq_out = dqkv[..., :width]
    dk_out, dv_out = (dqkv[..., width:] if joint else dkv).split(width, dim=-1)
    cos_sin = get_cos_sin(freqs_cis)
    if not (q.is_cuda or launch.interpreted()):
        sums.zero_()
        for i, (out, *args) in enumerate(((dq_out, dq, q, norm_q, q_rstd), (dk_out, dk, k, norm_k, k_rstd))):
            grad, x, norm, rstd = args
            dx, dnorm, _ = closed_form.rms_norm_backward(grad, x, norm, cos_sin, rstd, False, True)
            out.copy_(dx.flatten(2))
            sums[i, :norm_cols] = dnorm
        dv_out.copy_(dv.flatten(2))
        for i, out in enumerate((dq_out, dk_out, dv_out)):
            sums[i, norm_cols:] = out.float().sum((0, 1))
        return dqkv, dkv, sums
    dq, dk, dv = dq.contiguous(), dk.contiguous(), dv.contiguous()
    xs, weights = [q.contiguous(), k.contiguous()], [norm_q.contiguous(), norm_k.contiguous()]
    norms = BackwardKernel([dq, dk], xs, weights, cos_sin, [q_rstd, k_rstd], [dq_out, dk_out], None, True, True)
    copy = Columns(dv, None, dv_out, None, dv.shape[0] * dv.shape[1], width, dv_out.stride(1), True)
    partial = q_rstd.new_empty(norms.programs + copy.programs, norm_cols + width)
    norms(partial)
    copy(partial[norms.programs :, norm_cols:])
    ends = norms.first, norms.programs, partial.shape[0]
    return dqkv, dkv, add_partial_sums(partial, 0, sums.dtype, ends)[1]


@project_backward.register_fake
def _(dq, dk, dv, q, k, norm_q, norm_k, freqs_cis, q_rstd, k_rstd, joint):
    return _empty_gradients(q, k, norm_q, joint)


def _empty_gradients(q: Tensor, k: Tensor, norm_q: Tensor, joint: bool) -> tuple[Tensor, Tensor, Tensor]:
    (B, L, H, K), S = q.shape, k.shape[1]
    dqkv = q.new_empty(B, L, (3 if joint else 1) * H * K)
    dkv = q.new_empty((0,) if joint else (B, S, 2 * H * K))
    return dqkv, dkv, norm_q.new_empty(3, norm_q.numel() + H * K)
