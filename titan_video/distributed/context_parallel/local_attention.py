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


def attend(q_BLHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, mask_BS: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output [B, L, H, K] in q's type and lse [B, H, L], float32 (float64 for float64). mask: the keys that count."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BSHK, v_BSHK))
    bias = _bias(mask_BS, q)
    out, lse = _kernel(q, k, v, bias)[0](q, k, v, bias)
    return out.transpose(1, 2), lse


def attend_backward(
    grad_BLHK: Tensor, q_BLHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, out_BLHK: Tensor, lse_BHL: Tensor, mask_BS: Tensor | None = None
) -> tuple[Tensor, ...]:
    """What this chunk adds to the gradients of q, k and v; out and lse are those of the attention to all chunks."""
    grad, q, k, v, out = (x.transpose(1, 2) for x in (grad_BLHK, q_BLHK, k_BSHK, v_BSHK, out_BLHK))
    bias = _bias(mask_BS, q)
    return tuple(x.transpose(1, 2) for x in _kernel(q, k, v, bias)[1](grad, q, k, v, out, lse_BHL, bias))


def _bias(mask_BS: Tensor | None, q: Tensor) -> Tensor | None:
    """What is added to the scores, [B, H, L, S]: a large negative number where a key does not count. A finite one, so that a chunk in which
    none counts has no weight rather than no value."""
    if mask_BS is None:
        return None
    # CUDA kernels read rows of aligned length; SDPA, too, makes room for them.
    rows = F.pad(torch.zeros_like(mask_BS, dtype=q.dtype).masked_fill(~mask_BS, torch.finfo(q.dtype).min / 2), (0, -mask_BS.shape[1] % 16))
    return rows[:, None, None, : mask_BS.shape[1]].expand(-1, q.shape[1], q.shape[2], -1)


def _kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Callable, Callable]:
    """(forward, backward): what scaled_dot_product_attention would choose for these inputs on this device."""
    if q.device.type == "cpu":
        return _cpu, _cpu_backward
    chosen = SDPBackend(torch._fused_sdp_choice(q, k, v, bias))
    if chosen == SDPBackend.FLASH_ATTENTION and q.shape[-1] % 8:
        chosen = SDPBackend.MATH  # it would pad the heads first
    return {
        SDPBackend.FLASH_ATTENTION: (_flash, _flash_backward),
        SDPBackend.CUDNN_ATTENTION: (_cudnn, _cudnn_backward),
        SDPBackend.EFFICIENT_ATTENTION: (_efficient, _efficient_backward),
    }.get(chosen, (_math, _math_backward))


def _cpu(q, k, v, bias):
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)


def _cpu_backward(grad, q, k, v, out, lse, bias):
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, False, attn_mask=bias)


# The generator state that CUDA kernels ask for in backward is read for dropout only, of which there is none.


def _flash(q, k, v, bias):
    assert bias is None, "flash attention takes no bias"
    return aten._scaled_dot_product_flash_attention(q, k, v)[:2]


def _flash_backward(grad, q, k, v, out, lse, bias):
    state, unused = (torch.empty(shape, dtype=torch.uint64, device=q.device) for shape in (2, ()))
    lengths = q.shape[2], k.shape[2]
    return aten._scaled_dot_product_flash_attention_backward(grad, q, k, v, out, lse, None, None, *lengths, 0.0, False, state, unused)


def _cudnn(q, k, v, bias):
    out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, bias, True)[:2]
    return out, lse.reshape(q.shape[:-1])  # it has a last dim of 1


def _cudnn_backward(grad, q, k, v, out, lse, bias):
    seed, offset = (torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2))
    lengths = q.shape[2], k.shape[2]
    lse = lse.unsqueeze(-1)
    return aten._scaled_dot_product_cudnn_attention_backward(grad, q, k, v, out, lse, seed, offset, bias, None, None, *lengths, 0.0, False)


def _efficient(q, k, v, bias):
    out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[:2]
    return out, lse[..., : q.shape[2]]  # its rows are filled up to a multiple of 32


def _efficient_backward(grad, q, k, v, out, lse, bias):
    seed, offset = (torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2))
    lse, wanted = F.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf), [True, True, True, False]
    return aten._scaled_dot_product_efficient_attention_backward(grad, q, k, v, bias, out, lse, seed, offset, 0.0, wanted)[:3]


def _math(q, k, v, bias):
    scores = _scores(q, k, bias)
    lse = scores.logsumexp(-1)
    return ((scores - lse.unsqueeze(-1)).exp() @ wide(v)).to(q.dtype), lse


def _math_backward(grad, q, k, v, out, lse, bias):
    p = (_scores(q, k, bias) - lse.unsqueeze(-1)).exp()
    grad = wide(grad)
    row_sum = (grad * wide(out)).sum(-1, keepdim=True)
    grad_scores = p * (grad @ wide(v).mT - row_sum) * q.shape[-1] ** -0.5
    return (grad_scores @ wide(k)).to(q.dtype), (grad_scores.mT @ wide(q)).to(k.dtype), (p.mT @ grad).to(v.dtype)


def _scores(q, k, bias):
    scores = wide(q) @ wide(k).mT * q.shape[-1] ** -0.5
    return scores if bias is None else scores + bias
