"""The attention kernels of torch's SDPA, called by name, and attention by plain matmuls.

A kernel computes attention to a part of the keys: forward also returns lse, the log-sum-exp of the scores, with which
results of several parts are merged, and backward takes output and lse of all parts. Tensors are [B, H, L, K], lse is
[B, H, L], and bias [B, H, L, S] is added to the scores.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_video.kernels.reference import upcast

aten = torch.ops.aten

HALF_TYPES = (torch.bfloat16, torch.float16)
ANY_HEAD_DIM = 1 << 16


@dataclass(frozen=True)
class Backend:
    """An attention kernel: the calls that it serves on a GPU, and its functions."""

    dtypes: tuple[torch.dtype, ...]
    max_head_dim: int
    masks_keys: bool
    forward: Callable | None = None  # (q, k, v, bias) -> (out, lse)
    backward: Callable | None = None  # (grad, q, k, v, out, lse, bias) -> gradients of q, k and v
    differentiable: Callable | None = None  # instead of these two: (q, k, v, mask [B, S] or None) -> out
    capabilities: tuple[int, ...] = ()  # major compute capabilities; empty: all from 8 on
    unavailable_reason: Callable[[], str] = lambda: ""  # why this installation does not have it; empty if it has
    activate: Callable[[], None] = lambda: None  # called when it is chosen


def cpu(q, k, v, bias):
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)


def cpu_backward(grad, q, k, v, out, lse, bias):
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, False, attn_mask=bias
    )


# Backward of a CUDA kernel takes a state of the random generator. It is read for dropout only, and there is none.


def flash(q, k, v, bias):
    assert bias is None, "flash attention takes no bias"
    return aten._scaled_dot_product_flash_attention(q, k, v)[:2]


def flash_backward(grad, q, k, v, out, lse, bias):
    state = torch.empty(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty((), dtype=torch.uint64, device=q.device)
    return aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, False, state, unused
    )


def cudnn(q, k, v, bias):
    out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, _rows(bias), True)[:2]
    return out, lse.reshape(q.shape[:-1])  # cuDNN's has a last dim of 1


def cudnn_backward(grad, q, k, v, out, lse, bias):
    seed, offset = (torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2))
    lse = lse.unsqueeze(-1)
    bias = _rows(bias)
    return aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse, seed, offset, bias, None, None, q.shape[2], k.shape[2], 0.0, False
    )


def _cudnn_unavailable_reason() -> str:
    if torch.version.hip or not torch.backends.cudnn.is_available():
        return "this torch has no cuDNN"
    if torch.are_deterministic_algorithms_enabled():
        return "its backward is not deterministic (debug.deterministic)"
    return ""


def _rows(bias: Tensor | None) -> Tensor | None:
    """One row for each query in memory, as cuDNN reads them."""
    return None if bias is None else bias[:, :1].contiguous()


def efficient(q, k, v, bias):
    out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[:2]
    return out, lse[..., : q.shape[2]]  # the kernel pads its rows to a multiple of 32


def efficient_backward(grad, q, k, v, out, lse, bias):
    seed, offset = (torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2))
    lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
    needs_grad = [True, True, True, False]  # q, k, v, bias
    return aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, bias, out, lse, seed, offset, 0.0, needs_grad
    )[:3]


def math(q, k, v, bias):
    scores = _scores(q, k, bias)
    lse = scores.logsumexp(-1)
    return ((scores - lse.unsqueeze(-1)).exp() @ upcast(v)).to(q.dtype), lse


def math_backward(grad, q, k, v, out, lse, bias):
    p = (_scores(q, k, bias) - lse.unsqueeze(-1)).exp()
    grad = upcast(grad)
    row_sum = (grad * upcast(out)).sum(-1, keepdim=True)
    grad_scores = p * (grad @ upcast(v).mT - row_sum) * q.shape[-1] ** -0.5
    return (grad_scores @ upcast(k)).to(q.dtype), (grad_scores.mT @ upcast(q)).to(k.dtype), (p.mT @ grad).to(v.dtype)


def _scores(q, k, bias):
    scores = upcast(q) @ upcast(k).mT * q.shape[-1] ** -0.5
    return scores if bias is None else scores + bias


BACKENDS = {
    "cudnn": Backend(HALF_TYPES, 128, True, cudnn, cudnn_backward, unavailable_reason=_cudnn_unavailable_reason),
    "flash": Backend(HALF_TYPES, 256, False, flash, flash_backward),
    "efficient": Backend((*HALF_TYPES, torch.float32), ANY_HEAD_DIM, True, efficient, efficient_backward),
    "math": Backend((*HALF_TYPES, torch.float32, torch.float64), ANY_HEAD_DIM, True, math, math_backward),
}
