"""Attention and its backends: softmax(q k^T / sqrt(K)) v for q [B, L, H, K] and k, v [B, S, H, K].

    model.attention   kernel                                            dtypes             head width      masked keys
    cudnn             cuDNN's                                           bf16, fp16         8n, up to 128   yes
    flash             torch's flash attention, also on a CPU            bf16, fp16; all    8n, up to 256   on a CPU only
    efficient         torch's memory-efficient attention                bf16, fp16, fp32   8n              yes
    flash3, flash4    of the packages in attention_backends.py          bf16, fp16         8n, up to 128   no
    flex              FlexAttention, in attention_backends.py           bf16, fp16, fp32   8n              yes
    math              plain matmuls; it stores the L x S scores         all                all             yes

`set_backend` chooses once for the whole process. The operators are called by name, not through
`scaled_dot_product_attention`: there is no silent fallback, a compiled graph runs what an eager run runs, and
activation checkpointing finds the operator by its name.

`titan_video::attention` is our own operator for what torch's kernels lack: plain matmuls, and masked keys (the text)
beside keys without a mask (the video). It attends to the two sets separately, so that the long unmasked one runs on the
fastest kernel, and merges the two results by their lse, the log-sum-exp of each query's scores. Ring attention merges
its chunks in the same way. The backward of one part takes output and lse of the whole attention: exp(score - lse) is
then the probability among all keys, and the only other thing a kernel needs is the row sum of output x gradient
(FlashAttention-2, Dao 2023).

Letters as in models/layers.py; S and T are numbers of keys.
"""

import math
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from titan_video import kernels
from titan_video.kernels import sdpa
from titan_video.kernels.reference import upcast
from titan_video.kernels.sdpa import Backend
from titan_video.tools.parts import resolve

NAMES = ("auto", "cudnn", "flash", "efficient", "flash3", "flash4", "flex", "math")
OPTIONAL_PART = "titan_video.kernels.attention_backends"
OPTIONAL = {name: f"{OPTIONAL_PART}:{name.upper()}" for name in ("flash3", "flash4", "flex")}

BACKENDS = dict(sdpa.BACKENDS)  # those of OPTIONAL are added at their first use
_order: tuple[str, ...] = ()  # chosen kernels, by preference; empty until `set_backend` is called: those of auto


# ---- the choice ----


def check(name: str, dtype: torch.dtype, head_dim: int, masked: bool) -> None:
    """ValueError: no GPU can run such a model with this backend. masked: whether the model masks keys."""
    if reason := _unsupported_reason(name, dtype, head_dim, masked):
        legal = ", ".join(n for n in _installed() if not _unsupported_reason(n, dtype, head_dim, masked))
        raise ValueError(f"model.attention: {name}, but {reason}; legal for this model: {legal}")


def set_backend(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, masked: bool = False) -> str:
    """Compute attention with the backend `name` of model.attention from now on.

    dtype, head_dim, masked: of the model. Returns a description of what runs on this device. ValueError: the backend
    cannot run this model here; the message lists those that can.
    """
    global _order

    def refuse(n: str) -> str:
        unsupported = device.type == "cuda" and _unsupported_reason(n, dtype, head_dim, masked)
        return unsupported or _unavailable_reason(n, device)

    if reason := refuse(name):
        legal = ", ".join(n for n in _installed() if not refuse(n))
        raise ValueError(f"model.attention: {name}, but {reason}; legal here: {legal}")
    if name not in ("auto", "math"):
        _get_backend(name).activate()
    _order = _automatic(device) if name == "auto" else (name,)
    chosen = _select_backend(_order, device, dtype, head_dim, masked=False)
    if not masked:
        return chosen
    for_masked = _select_backend(_order, device, dtype, head_dim, masked=True)
    return chosen if for_masked == chosen else f"{chosen}, for masked keys {for_masked}"


def _installed() -> tuple[str, ...]:
    part_exists = find_spec(OPTIONAL_PART) is not None
    return tuple(name for name in NAMES if part_exists or name not in OPTIONAL)


def _automatic(device: torch.device) -> tuple[str, ...]:
    """The kernels of `auto`, by preference.

    cuDNN is 1.7 to 2.3 times as fast as torch's flash attention on Hopper, and also faster on Blackwell's B200. On
    other GPUs it is slower.
    """
    if device.type != "cuda":
        return ("flash",)
    if torch.version.hip or _unavailable_reason("cudnn", device):
        return ("flash", "efficient", "math")
    major, _ = torch.cuda.get_device_capability(device)
    return ("cudnn", "flash", "efficient", "math") if major in (9, 10) else ("flash", "efficient", "cudnn", "math")


def _select_backend(
    order: tuple[str, ...], device: torch.device, dtype: torch.dtype, head_dim: int, masked: bool
) -> str:
    """The first of `order` that serves such a call. No length matters, so one compiled graph holds for all lengths."""
    if device.type != "cuda":  # also the meta device, where only shapes matter
        return order[0]
    if masked and len(order) > 1:
        # It alone reads a mask that is the same for all queries without a copy for each query.
        order = ("efficient", *order)
    for name in order:
        if not _unsupported_reason(name, dtype, head_dim, masked):
            return name
    reason = _unsupported_reason(order[0], dtype, head_dim, masked)
    raise ValueError(f"model.attention: {order[0]}, but {reason}; choose auto")


def _unsupported_reason(name: str, dtype: torch.dtype, head_dim: int, masked: bool) -> str:
    """Why a kernel cannot serve such calls on any GPU; empty if it can."""
    if name in ("auto", "math") or name not in NAMES:
        return ""
    backend = _get_backend(name)
    if dtype not in backend.dtypes:
        return f"it does not compute in {str(dtype).removeprefix('torch.')} (training.mixed_precision_param)"
    widest = backend.max_head_dim
    if head_dim % 8 or head_dim > widest:
        return f"it takes heads whose width is a multiple of 8, up to {widest}, and this model's are {head_dim} wide"
    if masked and not backend.masks_keys:
        return "it takes no mask, and this model masks the padding of its text"
    return ""


def _unavailable_reason(name: str, device: torch.device) -> str:
    """Why this device or installation does not have a backend, whatever the model; empty if it has."""
    if name not in NAMES:
        return "there is no such backend"
    if name in ("auto", "math") or device.type != "cuda":
        return "" if name in ("auto", "math", "flash") else "it runs on a GPU, and there is none here"
    backend = _get_backend(name)
    major, _ = torch.cuda.get_device_capability(device)
    if (major not in backend.capabilities) if backend.capabilities else major < 8:
        return f"it does not run on this GPU ({torch.cuda.get_device_name(device)})"
    return backend.unavailable_reason()


def _get_backend(name: str) -> Backend:
    """ValueError: the backend is of the optional part, which is not there."""
    if name not in BACKENDS:
        BACKENDS[name] = resolve(OPTIONAL[name], asked_by=f'model.attention = "{name}"')
    return BACKENDS[name]


def _chosen(q: Tensor, masked: bool = False) -> str:
    """The kernel for queries [..., K]."""
    return _select_backend(_order or _automatic(q.device), q.device, q.dtype, q.shape[-1], masked)


def _kernels(name: str, device: torch.device) -> tuple[Callable, Callable]:
    """(forward, backward)"""
    if name == "flash" and device.type != "cuda":
        return sdpa.cpu, sdpa.cpu_backward
    backend = _get_backend(name)
    return backend.forward, backend.backward


# ---- differentiable attention ----


def attention(q_BLHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor) -> Tensor:
    """Attention to all keys, [B, L, H, K]."""
    name = _chosen(q_BLHK)
    if name == "math":
        return own_attention(q_BLHK, k_BSHK, v_BSHK)[0]
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BSHK, v_BSHK))
    if differentiable := _get_backend(name).differentiable:
        return differentiable(q, k, v, None).transpose(1, 2)
    forward, _ = _kernels(name, q.device)
    return forward(q, k, v, None)[0].transpose(1, 2)


def joint_attention(
    q_BLHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, more_k_BTHK: Tensor, more_v_BTHK: Tensor, mask_BT: Tensor | None
) -> Tensor:
    """Attention to the keys k and to those of more_k where the mask is true (None: to all), [B, L, H, K].

    The mask's values stay on the device: the host never waits for them.
    """
    differentiable = _get_backend(_chosen(q_BLHK)).differentiable
    if mask_BT is not None and not differentiable:
        return own_attention(q_BLHK, k_BSHK, v_BSHK, more_k_BTHK, more_v_BTHK, mask_BT)[0]
    k, v = torch.cat([k_BSHK, more_k_BTHK], dim=1), torch.cat([v_BSHK, more_v_BTHK], dim=1)
    if mask_BT is None:
        return attention(q_BLHK, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k, v))
    return differentiable(q, k, v, F.pad(mask_BT, (k_BSHK.shape[1], 0), value=True)).transpose(1, 2)


@torch.library.custom_op("titan_video::attention", mutates_args=())
def own_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    more_k: Tensor | None = None,
    more_v: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention to k [B, S, H, K] and to those of more_k [B, T, H, K] where `mask` [B, T] is true.

    Returns the output [B, L, H, K] and lse [B, H, L].
    """
    out, lse = attend(q, k, v)
    if more_k is not None:
        part, part_lse = attend(q, more_k, more_v, mask)
        if fused := kernels.fused_only("merge_attention", q):
            return fused(out, lse, part, part_lse)
        out, lse = merge(upcast(out), lse, part, part_lse)
    return out.to(q.dtype).contiguous(), lse.contiguous()


@own_attention.register_fake
def _(q, k, v, more_k=None, more_v=None, mask=None):
    lse_type = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=lse_type)


@torch.library.custom_op("titan_video::attention_backward", mutates_args=())
def own_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    more_k: Tensor | None = None,
    more_v: Tensor | None = None,
    mask: Tensor | None = None,
) -> list[Tensor]:
    """Gradients of q, k and v, and of more_k and more_v if there are such."""
    grad_out = grad_out.contiguous()
    grad_q, *grads = attend_backward(grad_out, q, k, v, out, lse)
    if more_k is not None:
        more_q, *more = attend_backward(grad_out, q, more_k, more_v, out, lse, mask)
        grad_q, grads = grad_q + more_q, [*grads, *more]
    return [x.contiguous() for x in (grad_q, *grads)]


@own_attention_backward.register_fake
def _(grad_out, q, k, v, out, lse, more_k=None, more_v=None, mask=None):
    return [x.new_empty(x.shape) for x in (q, k, v, more_k, more_v) if x is not None]


def _setup_context(ctx, inputs, output):
    q, k, v, *more = inputs
    ctx.save_for_backward(q, k, v, *output, *more)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    grads = own_attention_backward(grad_out, *ctx.saved_tensors)
    return *grads, *[None] * (6 - len(grads))


own_attention.register_autograd(_backward, setup_context=_setup_context)


# FLOPs, 2 per multiply-add. Forward: two matmuls of queries x keys x head width. Backward: five, one for the scores and
# four for gradients.


@register_flop_formula(torch.ops.titan_video.attention)
def _flops(q, k, v, more_k=None, *args, **kwargs) -> int:
    return 2 * 2 * math.prod(q) * (k[1] + (more_k[1] if more_k else 0))


@register_flop_formula(torch.ops.titan_video.attention_backward)
def _backward_flops(grad_out, q, k, v, out, lse, more_k=None, *args, **kwargs) -> int:
    return 5 * 2 * math.prod(q) * (k[1] + (more_k[1] if more_k else 0))


# ---- attention to a part of the keys, with lse; not differentiable ----


def attend(q_BLHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, mask_BS: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output [B, L, H, K] in q's type and lse [B, H, L], float32 (float64 for float64). mask: true to attend."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BSHK, v_BSHK))
    forward, _ = _kernels(_chosen(q, mask_BS is not None), q.device)
    out, lse = forward(q, k, v, _bias(mask_BS, q))
    return out.transpose(1, 2), lse


def attend_backward(
    grad_BLHK: Tensor,
    q_BLHK: Tensor,
    k_BSHK: Tensor,
    v_BSHK: Tensor,
    out_BLHK: Tensor,
    lse_BHL: Tensor,
    mask_BS: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of q, k and v that come from these keys. out, lse: of the attention to all keys."""
    grad, q, k, v, out = (x.transpose(1, 2) for x in (grad_BLHK, q_BLHK, k_BSHK, v_BSHK, out_BLHK))
    _, backward = _kernels(_chosen(q, mask_BS is not None), q.device)
    grads = backward(grad, q, k, v, out, lse_BHL, _bias(mask_BS, q))
    return tuple(x.transpose(1, 2) for x in grads)


def merge(out_BLHK: Tensor, lse_BHL: Tensor, part_BLHK: Tensor, part_lse_BHL: Tensor) -> tuple[Tensor, Tensor]:
    """Output and lse of the attention to two sets of keys, from the output and lse of each.

    out: float32 (float64 for float64); it is overwritten.
    """
    # The part's share of the sum of exponentials.
    weight_BLH1 = torch.sigmoid(part_lse_BHL - lse_BHL).transpose(1, 2).unsqueeze(-1)
    return out_BLHK.lerp_(upcast(part_BLHK), weight_BLH1), torch.logaddexp(lse_BHL, part_lse_BHL)


def _bias(mask_BS: Tensor | None, q: Tensor) -> Tensor | None:
    """The mask as an additive bias of the scores, [B, H, L, S]: a large negative number where it is false.

    The number is finite, so that a part whose keys are all masked gets no weight instead of NaN.
    """
    if mask_BS is None:
        return None
    bias_BS = torch.zeros_like(mask_BS, dtype=q.dtype).masked_fill(~mask_BS, torch.finfo(q.dtype).min / 2)
    # CUDA kernels need rows of aligned length; SDPA pads them likewise.
    rows = F.pad(bias_BS, (0, -mask_BS.shape[1] % 16))
    return rows[:, None, None, : mask_BS.shape[1]].expand(-1, q.shape[1], q.shape[2], -1)
