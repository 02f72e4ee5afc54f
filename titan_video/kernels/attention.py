"""Attention, and the one place that knows the backends: softmax(q k^T / sqrt(K)) v for q [B, L, H, K] and keys and
values [B, S, H, K].

    model.attention   kernel                                              types             head width        masked keys
    cudnn             cuDNN's                                             bf16, fp16        8n, up to 128     yes
    flash             torch's own flash attention, on a CPU too           bf16, fp16; all   8n, up to 256     on a CPU only
    efficient         torch's memory-efficient attention                  those and fp32    8n                yes
    flash3, flash4    flash_attn_interface, flash_attn.cute (packages)    bf16, fp16        8n, up to 128     no
    flex              generated for the mask by torch.compile             bf16, fp16, fp32  8n                yes
    math              plain products; the scores are held, L x S of them  all               all               yes

`use` chooses once for the whole process. The operators are called by name, not through `scaled_dot_product_attention`:
unseen, a compiled graph holds what an eager run runs, and there is a name by which activation checkpointing keeps its
result.

What torch's kernels do not do is one operator of our own, `titan_video::attention`: plain products, and keys of which
only some count beside keys that all count. The two are attended to apart, the first with a mask and the others without,
so that the many run on the fastest many run on the fastest kernel, and the parts are merged by their lse, each query's
logarithm of its sum of exponentials. A ring merges its chunks likewise.
Backward of a part is given output and lse of the whole: exp(score - lse) is then the probability among all keys, and
all that a kernel needs beside it is the row sum of output x gradient.

Letters as in models/layers.py; the kernels take [B, H, L, K].
"""

import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl
from torch.utils.flop_counter import register_flop_formula

from titan_video.config.job_config import JobConfig
from titan_video.kernels.reference import upcast

aten = torch.ops.aten

NAMES = ("auto", "cudnn", "flash", "efficient", "flash3", "flash4", "flex", "math")
_HALF = (torch.bfloat16, torch.float16)
# On a GPU: types, widest head, whether keys can be masked, compute capabilities (major; None: all from 8).
_LIMITS = {
    "cudnn": (_HALF, 128, True, None),
    "flash": (_HALF, 256, False, None),
    "efficient": ((*_HALF, torch.float32), 1 << 16, True, None),
    "flash3": (_HALF, 128, False, (9,)),
    "flash4": (_HALF, 128, False, (9, 10)),
    "flex": ((*_HALF, torch.float32), 1 << 16, True, None),
}
_PACKAGES = {"flash3": ("FA3", "flash_attn_interface"), "flash4": ("FA4", "flash_attn")}

_in_use: tuple[str, ...] = ()  # kernels in order of preference; empty until `use` is called: those of auto


# ---- the choice ----


def check(name: str, dtype: torch.dtype, head_dim: int, masked: bool) -> None:
    """ValueError if the backend can serve such a model on no GPU. masked: whether the model masks keys."""
    if reason := _unsupported_reason(name, dtype, head_dim, masked):
        legal = ", ".join(n for n in NAMES if not _unsupported_reason(n, dtype, head_dim, masked))
        raise ValueError(f"model.attention: {name}, but {reason}; legal for this model: {legal}")


def set_backend(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, masked: bool = False) -> str:
    """From here on compute attention with the backend `name` of model.attention. Returns what that means on this
    device, in words.

    dtype, head_dim, masked: of the model. ValueError where the backend cannot serve it here, with those that can.
    """
    global _in_use

    def unfit(n: str) -> str:
        return (
            _unsupported_reason(n, dtype, head_dim, masked)
            if device.type == "cuda" and n != "auto"
            else _unavailable_reason(n, device)
        )

    reason = unfit(name) or _unavailable_reason(name, device)
    if reason:
        legal = ", ".join(n for n in NAMES if not unfit(n) and not _unavailable_reason(n, device))
        raise ValueError(f"model.attention: {name}, but {reason}; legal here: {legal}")
    if name in _PACKAGES:
        implementation, package = _PACKAGES[name]
        try:
            activate_flash_attention_impl(implementation)
        except (ImportError, RuntimeError, OSError) as e:
            raise ValueError(
                f"model.attention: {name}, but the package {package} does not work here ({e}); mend it, or choose auto"
            ) from e
    _in_use = _automatic(device) if name == "auto" else ("flash",) if name in _PACKAGES else (name,)
    whole, part = (_select_backend(_in_use, device, dtype, head_dim, m) for m in (False, True))
    chosen = name if name in _PACKAGES else whole
    return f"{chosen}, for masked keys {part}" if masked and part != whole else chosen


def _automatic(device: torch.device) -> tuple[str, ...]:
    """cuDNN is 1.7 to 2.3 times as fast as torch's flash attention on Hopper, and the faster one on Blackwell's B200;
    elsewhere it is not.
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
    """The first of `order` that serves such a call. It depends on no length, so that a compiled graph holds for all."""
    if device.type != "cuda":  # the meta device, where only shapes count, too
        return order[0]
    if masked and len(order) > 1:
        order = (
            "efficient",
            *order,
        )  # it alone reads a mask that is the same for all queries without having it written out for each
    for name in order:
        if not _unsupported_reason(name, dtype, head_dim, masked):
            return name
    raise ValueError(
        f"model.attention: {order[0]}, but {_unsupported_reason(order[0], dtype, head_dim, masked)}; choose auto"
    )


def _unsupported_reason(name: str, dtype: torch.dtype, head_dim: int, masked: bool) -> str:
    """Why a kernel cannot serve such calls on any GPU; empty if it can."""
    if name not in _LIMITS:
        return ""
    dtypes, widest, masks, _ = _LIMITS[name]
    if dtype not in dtypes:
        return f"it does not compute in {str(dtype).removeprefix('torch.')} (training.mixed_precision_param)"
    if head_dim % 8 or head_dim > widest:
        return f"it takes heads whose width is a multiple of 8, up to {widest}, and this model's are {head_dim} wide"
    return "it takes no mask, and this model masks the padding of its text" if masked and not masks else ""


def _unavailable_reason(name: str, device: torch.device) -> str:
    """Why a backend is not there on this device, whatever the model; empty if it is."""
    if name not in NAMES:
        return "there is no such backend"
    if name in ("auto", "math") or device.type != "cuda":
        return "" if name in ("auto", "math", "flash") else "it runs on a GPU, and there is none here"
    major, capabilities = torch.cuda.get_device_capability(device)[0], _LIMITS[name][3]
    if major < 8 if capabilities is None else major not in capabilities:
        return f"it does not run on this GPU ({torch.cuda.get_device_name(device)})"
    if name in _PACKAGES and find_spec(_PACKAGES[name][1]) is None:
        return f"the package {_PACKAGES[name][1]} is not installed"
    if name == "cudnn" and (torch.version.hip or not torch.backends.cudnn.is_available()):
        return "this torch has no cuDNN"
    if name == "cudnn" and torch.are_deterministic_algorithms_enabled():
        return "its backward is not deterministic (debug.deterministic)"
    return ""


def _chosen(q: Tensor, masked: bool = False) -> str:
    """The kernel for queries [..., K]."""
    return _select_backend(_in_use or _automatic(q.device), q.device, q.dtype, q.shape[-1], masked)


# ---- differentiable attention ----


def attention(q_BLHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor) -> Tensor:
    """Attention to all keys, [B, L, H, K]."""
    name = _chosen(q_BLHK)
    if name == "math":
        return own_attention(q_BLHK, k_BSHK, v_BSHK)[0]
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BSHK, v_BSHK))
    out = _flex(q, k, v, None) if name == "flex" else _kernels(name, q)[0](q, k, v, None)[0]
    return out.transpose(1, 2)


def joint_attention(
    q_BLHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, more_k_BTHK: Tensor, more_v_BTHK: Tensor, mask_BT: Tensor | None
) -> Tensor:
    """Attention to the keys k and to those of `more` that count (None: all).

    What the mask holds is never looked at on the host.
    """
    name = _chosen(q_BLHK)
    if mask_BT is not None and name != "flex":
        return own_attention(q_BLHK, k_BSHK, v_BSHK, more_k_BTHK, more_v_BTHK, mask_BT)[0]
    k, v = torch.cat([k_BSHK, more_k_BTHK], dim=1), torch.cat([v_BSHK, more_v_BTHK], dim=1)
    if mask_BT is None:
        return attention(q_BLHK, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k, v))
    return _flex(q, k, v, F.pad(mask_BT, (k_BSHK.shape[1], 0), value=True)).transpose(1, 2)


@torch.library.custom_op("titan_video::attention", mutates_args=())
def own_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    more_k: Tensor | None = None,
    more_v: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, L, H, K] and lse [B, H, L] of the attention to k [B, S, H, K] and to those of more_k [B, T, H, K] that
    `mask` [B, T] counts.
    """
    out, lse = attend(q, k, v)
    if more_k is not None:
        out, lse = merge(upcast(out), lse, *attend(q, more_k, more_v, mask))
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
    """Gradients of q, k, v and, with these, of more_k and more_v."""
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


# FLOPs, 2 per multiply-add: forward is two products of queries x keys x head width; backward five, the scores again and
# four gradients.


@register_flop_formula(torch.ops.titan_video.attention)
def _flops(q, k, v, more_k=None, *args, **kwargs) -> int:
    return 2 * 2 * math.prod(q) * (k[1] + (more_k[1] if more_k else 0))


@register_flop_formula(torch.ops.titan_video.attention_backward)
def _backward_flops(grad_out, q, k, v, out, lse, more_k=None, *args, **kwargs) -> int:
    return 5 * 2 * math.prod(q) * (k[1] + (more_k[1] if more_k else 0))


# ---- parts of an attention, with lse; not differentiable ----


def attend(q_BLHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, mask_BS: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output [B, L, H, K] in q's type and lse [B, H, L], float32 (float64 for float64). mask: the keys that count."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BSHK, v_BSHK))
    out, lse = _kernels(_chosen(q, mask_BS is not None), q)[0](q, k, v, _bias(mask_BS, q))
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
    """What these keys add to the gradients of q, k and v; out and lse are those of the attention to all keys."""
    grad, q, k, v, out = (x.transpose(1, 2) for x in (grad_BLHK, q_BLHK, k_BSHK, v_BSHK, out_BLHK))
    grads = _kernels(_chosen(q, mask_BS is not None), q)[1](grad, q, k, v, out, lse_BHL, _bias(mask_BS, q))
    return tuple(x.transpose(1, 2) for x in grads)


def merge(out_BLHK: Tensor, lse_BHL: Tensor, part_BLHK: Tensor, part_lse_BHL: Tensor) -> tuple[Tensor, Tensor]:
    """Output and lse of the attention to two sets of keys from those to each. out:

    float32 (float64 for float64); it is overwritten.
    """
    share_BLH1 = (
        torch.sigmoid(part_lse_BHL - lse_BHL).transpose(1, 2).unsqueeze(-1)
    )  # the part's, of the sum of exponentials
    return out_BLHK.lerp_(upcast(part_BLHK), share_BLH1), torch.logaddexp(lse_BHL, part_lse_BHL)


def _bias(mask_BS: Tensor | None, q: Tensor) -> Tensor | None:
    """What is added to the scores, [B, H, L, S]: a large negative number where a key does not count. A finite one, so
    that a part in which none counts has no weight rather than no value."""
    if mask_BS is None:
        return None
    # CUDA kernels read rows of aligned length; SDPA, too, makes room for them.
    rows = F.pad(
        torch.zeros_like(mask_BS, dtype=q.dtype).masked_fill(~mask_BS, torch.finfo(q.dtype).min / 2),
        (0, -mask_BS.shape[1] % 16),
    )
    return rows[:, None, None, : mask_BS.shape[1]].expand(-1, q.shape[1], q.shape[2], -1)


# ---- the kernels: (q, k, v, bias) -> (out, lse), and (grad, q, k, v, out, lse, bias) -> gradients of q, k, v ----


def _kernels(name: str, q: Tensor) -> tuple[Callable, Callable]:
    if name == "flash" and q.device.type != "cuda":
        return _cpu, _cpu_backward
    return _KERNELS[name]


def _cpu(q, k, v, bias):
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)


def _cpu_backward(grad, q, k, v, out, lse, bias):
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, False, attn_mask=bias
    )


# The generator state that CUDA kernels ask for in backward is read for dropout only, of which there is none.


def _flash(q, k, v, bias):
    assert bias is None, "flash attention takes no bias"
    return aten._scaled_dot_product_flash_attention(q, k, v)[:2]


def _flash_backward(grad, q, k, v, out, lse, bias):
    state, unused = (torch.empty(shape, dtype=torch.uint64, device=q.device) for shape in (2, ()))
    lengths = q.shape[2], k.shape[2]
    return aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, None, None, *lengths, 0.0, False, state, unused
    )


def _cudnn(q, k, v, bias):
    out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, _rows(bias), True)[:2]
    return out, lse.reshape(q.shape[:-1])  # it has a last dim of 1


def _cudnn_backward(grad, q, k, v, out, lse, bias):
    seed, offset = (torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2))
    lengths = q.shape[2], k.shape[2]
    lse, bias = lse.unsqueeze(-1), _rows(bias)
    return aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse, seed, offset, bias, None, None, *lengths, 0.0, False
    )


def _rows(bias: Tensor | None) -> Tensor | None:
    """One row for each query, as cuDNN reads them."""
    return None if bias is None else bias[:, :1].contiguous()


def _efficient(q, k, v, bias):
    out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[:2]
    return out, lse[..., : q.shape[2]]  # its rows are filled up to a multiple of 32


def _efficient_backward(grad, q, k, v, out, lse, bias):
    seed, offset = (torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2))
    lse, wanted = F.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf), [True, True, True, False]
    return aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, bias, out, lse, seed, offset, 0.0, wanted
    )[:3]


def _math(q, k, v, bias):
    scores = _scores(q, k, bias)
    lse = scores.logsumexp(-1)
    return ((scores - lse.unsqueeze(-1)).exp() @ upcast(v)).to(q.dtype), lse


def _math_backward(grad, q, k, v, out, lse, bias):
    p = (_scores(q, k, bias) - lse.unsqueeze(-1)).exp()
    grad = upcast(grad)
    row_sum = (grad * upcast(out)).sum(-1, keepdim=True)
    grad_scores = p * (grad @ upcast(v).mT - row_sum) * q.shape[-1] ** -0.5
    return (grad_scores @ upcast(k)).to(q.dtype), (grad_scores.mT @ upcast(q)).to(k.dtype), (p.mT @ grad).to(v.dtype)


def _scores(q, k, bias):
    scores = upcast(q) @ upcast(k).mT * q.shape[-1] ** -0.5
    return scores if bias is None else scores + bias


_KERNELS = {
    "cudnn": (_cudnn, _cudnn_backward),
    "flash": (_flash, _flash_backward),
    "efficient": (_efficient, _efficient_backward),
    "math": (_math, _math_backward),
}


# ---- flex: one kernel that skips the blocks of keys that a mask leaves out ----

_BLOCK = 128
_compiled_flex: Callable | None = None


def _flex(q: Tensor, k: Tensor, v: Tensor, mask_BS: Tensor | None) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    global _compiled_flex
    block_mask = None if mask_BS is None else key_blocks(mask_BS, q.shape[2])
    if torch.compiler.is_compiling():
        return flex_attention(q, k, v, block_mask=block_mask)
    if _compiled_flex is None:
        _compiled_flex = torch.compile(flex_attention)
    return _compiled_flex(q, k, v, block_mask=block_mask)


def key_blocks(mask_BS: Tensor, num_queries: int):
    """The BlockMask by which all queries see the keys that count; it is made on the device, and no mask of queries x
    keys is.
    """
    from torch.nn.attention.flex_attention import BlockMask

    blocks = F.pad(mask_BS, (0, -mask_BS.shape[1] % _BLOCK)).unflatten(1, (-1, _BLOCK))
    whole, some = blocks.all(-1), blocks.any(-1)
    rows = -(-num_queries // _BLOCK)

    def listed(which_BN: Tensor) -> tuple[Tensor, Tensor]:
        """How many blocks there are, and their numbers before those of the others, alike for all blocks of queries."""
        count, numbers = which_BN.sum(-1, dtype=torch.int32), (~which_BN).int().argsort(dim=-1, stable=True).int()
        return count[:, None, None].expand(-1, 1, rows).contiguous(), numbers[:, None, None].expand(
            -1, 1, rows, -1
        ).contiguous()

    def counts(b, h, query, key):
        return mask_BS[b, key]

    lengths = num_queries, mask_BS.shape[1]
    return BlockMask.from_kv_blocks(
        *listed(some & ~whole), *listed(whole), BLOCK_SIZE=_BLOCK, mask_mod=counts, seq_lengths=lengths
    )


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about the attention backend, one line per mistake."""
    p, c = config.parallelism, config.activation_checkpoint
    if config.model.attention != "flex":
        return
    if p.context_parallel_degree > 1 and p.context_parallel_method != "ulysses":
        yield (
            "model.attention: flex, but a ring merges partial results of attention, which flex does not return; "
            "choose another backend, or parallelism.context_parallel_method ulysses"
        )
    if c.mode == "selective" and "attention" in c.save and not config.compile.enable:
        yield (
            "model.attention: flex, but outside a compiled block its output cannot be saved "
            "(activation_checkpoint.save); set compile.enable, or choose another backend"
        )
