"""Attention of one rank's queries to one chunk of keys, with what a ring needs to put chunks together: each query's lse, the
logarithm of its sum of exponentials.

These are the kernels that `scaled_dot_product_attention` runs on, called by name because it keeps the lse to itself. Backward of a chunk
is given output and lse of the attention to all chunks: exp(score - lse) is then the probability among all keys, and all
that a kernel needs beside it is the row sum of output x gradient. Letters as in models/layers.py; the kernels take [B, H, L, K].
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from titan_video.kernels import wide

aten = torch.ops.aten


def attend(q_BLHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor) -> tuple[Tensor, Tensor]:
    """Output [B, L, H, K] in q's type and lse [B, H, L], float32 (float64 for float64)."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BSHK, v_BSHK))
    out, lse = _kernel(q, k, v)[0](q, k, v)
    return out.transpose(1, 2), lse


def attend_backward(grad_BLHK: Tensor, q_BLHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, out_BLHK: Tensor, lse_BHL: Tensor) -> tuple[Tensor, ...]:
    """What this chunk adds to the gradients of q, k and v; out and lse are those of the attention to all chunks."""
    grad, q, k, v, out = (x.transpose(1, 2) for x in (grad_BLHK, q_BLHK, k_BSHK, v_BSHK, out_BLHK))
    return tuple(x.transpose(1, 2) for x in _kernel(q, k, v)[1](grad, q, k, v, out, lse_BHL))


def _kernel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Callable, Callable]:
    """(forward, backward): what scaled_dot_product_attention would choose for these inputs on this device."""
    if q.device.type == "cpu":
        return _cpu, _cpu_backward
    chosen = SDPBackend(torch._fused_sdp_choice(q, k, v))
    if chosen == SDPBackend.FLASH_ATTENTION and q.shape[-1] % 8:
        chosen = SDPBackend.MATH  # it would pad the heads first
    return {
        SDPBackend.FLASH_ATTENTION: (_flash, _flash_backward),
        SDPBackend.CUDNN_ATTENTION: (_cudnn, _cudnn_backward),
        SDPBackend.EFFICIENT_ATTENTION: (_efficient, _efficient_backward),
    }.get(chosen, (_math, _math_backward))


def _cpu(q, k, v):
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)


def _cpu_backward(grad, q, k, v, out, lse):
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, False)


# The generator state that CUDA kernels ask for in backward is read for dropout only, of which there is none.


def _flash(q, k, v):
    return aten._scaled_dot_product_flash_attention(q, k, v)[:2]


def _flash_backward(grad, q, k, v, out, lse):
    state, unused = (torch.empty(shape, dtype=torch.uint64, device=q.device) for shape in (2, ()))
    lengths = q.shape[2], k.shape[2]
    return aten._scaled_dot_product_flash_attention_backward(grad, q, k, v, out, lse, None, None, *lengths, 0.0, False, state, unused)


def _cudnn(q, k, v):
    out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
    return out, lse.reshape(q.shape[:-1])  # it has a last dim of 1


def _cudnn_backward(grad, q, k, v, out, lse):
    seed, offset = (torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2))
    lengths = q.shape[2], k.shape[2]
    lse = lse.unsqueeze(-1)
    return aten._scaled_dot_product_cudnn_attention_backward(grad, q, k, v, out, lse, seed, offset, None, None, None, *lengths, 0.0, False)


def _efficient(q, k, v):
    out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
    return out, lse[..., : q.shape[2]]  # its rows are filled up to a multiple of 32


def _efficient_backward(grad, q, k, v, out, lse):
    seed, offset = (torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2))
    lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
    return aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, None, out, lse, seed, offset, 0.0, [True, True, True, False])[:3]


def _math(q, k, v):
    scores = wide(q) @ wide(k).mT * q.shape[-1] ** -0.5
    lse = scores.logsumexp(-1)
    return ((scores - lse.unsqueeze(-1)).exp() @ wide(v)).to(q.dtype), lse


def _math_backward(grad, q, k, v, out, lse):
    scale = q.shape[-1] ** -0.5
    grad, wide_q, wide_k = wide(grad), wide(q), wide(k)
    p = (wide_q @ wide_k.mT * scale - lse.unsqueeze(-1)).exp()
    row_sum = (grad * wide(out)).sum(-1, keepdim=True)
    grad_scores = p * (grad @ wide(v).mT - row_sum) * scale
    return (grad_scores @ wide_k).to(q.dtype), (grad_scores.mT @ wide_q).to(k.dtype), (p.mT @ grad).to(v.dtype)
