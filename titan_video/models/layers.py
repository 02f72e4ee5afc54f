"""Parts that every video DiT shares: tokens from latents, positions, RoPE, time features, attention, initialisers.

Letters: B batch, L tokens, D width, H heads, K head width, S text tokens, C latent channels, F/H/W latent frames,
height, width, P = C * patch volume.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torch.utils.weak import WeakTensorKeyDictionary

from titan_video import kernels
from titan_video.kernels.attention import attention
from titan_video.models.spec import StepLayout, TokenShape

Patch = tuple[int, int, int]


def token_shape(latent_FHW: tuple[int, ...], patch: Patch) -> TokenShape:
    """The token grid of a latent grid; ValueError if the patch does not divide it."""
    if any(n % p for n, p in zip(latent_FHW, patch, strict=True)):
        raise ValueError(
            f"latent grid {tuple(latent_FHW)} is not divisible by the model's patch {patch}; choose data.buckets to fit"
        )
    return TokenShape(*(n // p for n, p in zip(latent_FHW, patch, strict=True)))


def patchify(x_BCFHW: Tensor, patch: Patch) -> Tensor:
    """[B, C, F, H, W] -> tokens [B, L, P]; L runs over (F, H, W), P over (C, patch frames, height, width)."""
    token_shape(tuple(x_BCFHW.shape[2:]), patch)
    f, h, w = patch
    return rearrange(x_BCFHW, "B C (F f) (H h) (W w) -> B (F H W) (C f h w)", f=f, h=h, w=w)


def unpatchify(x_BLP: Tensor, shape: TokenShape, patch: Patch) -> Tensor:
    """Inverse of `patchify`."""
    f, h, w = patch
    return rearrange(
        x_BLP,
        "B (F H W) (C f h w) -> B C (F f) (H h) (W w)",
        F=shape.frames,
        H=shape.height,
        W=shape.width,
        f=f,
        h=h,
        w=w,
    )


def positions(shape: TokenShape, device: torch.device | str = "cpu") -> Tensor:
    """Frame, row and column of each token, [1, L, 3], int64, in the order of `patchify`."""
    axes = [torch.arange(n, device=device) for n in (shape.frames, shape.height, shape.width)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(1, -1, 3)


def rope_freqs_cis(pos_BL3: Tensor, axes_dim: tuple[int, int, int], theta: float) -> Tensor:
    """RoPE as unit complex numbers [B, L, K/2] for `kernels.rms_norm_rope`; each position axis has its own channels.

    axes_dim: head channels of frame, row and column; their sum is K. Angles are computed in float64: in float32 those
    of a far token would be off by 1e-4. The result is cached for as long as the tensor of positions lives.
    """
    cached = _freqs_cis_cache.setdefault(pos_BL3, {})
    if (axes_dim, theta) not in cached:
        cached[axes_dim, theta] = _compute_freqs_cis(pos_BL3, axes_dim, theta)
    return cached[axes_dim, theta]


_freqs_cis_cache = WeakTensorKeyDictionary()


def _compute_freqs_cis(pos_BL3: Tensor, axes_dim: tuple[int, int, int], theta: float) -> Tensor:
    angles = []
    for axis, dim in enumerate(axes_dim):
        rates = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=pos_BL3.device) / dim)
        angles.append(pos_BL3[..., axis, None].double() * rates)
    angle = torch.cat(angles, dim=-1)
    return torch.complex(angle.cos().float(), angle.sin().float())


def time_features(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """[cos, sin] features of a time in [0, 1000], [..., dim], float32; angles in float64 as in the public Wan code."""
    exponents = torch.arange(dim // 2, dtype=torch.float64, device=t.device)
    rates = torch.exp(exponents * (-math.log(max_period) / (dim // 2)))
    angles = t.double().unsqueeze(-1) * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def select_modulation(modulation_BT: Tensor, cond_mask_BL: Tensor | None) -> Tensor:
    """The rows of modulation that a kernel selects from: row 0 for noised tokens, row 1 for conditioning tokens.

    Without conditioning tokens (mask None), row 0 alone.
    """
    return modulation_BT[:, :1] if cond_mask_BL is None else modulation_BT


def local_shard(weight: Tensor) -> Tensor:
    """The part of a block's weight that this rank computes with.

    Under tensor parallel a weight is a DTensor. A replicated one meets only this rank's share of the tokens, so its
    gradient is a partial sum, which is completed where gradients are reduced.
    """
    if isinstance(weight, DTensor):
        return weight.to_local(grad_placements=[Partial() if p.is_replicate() else p for p in weight.placements])
    return weight


class Linear(nn.Linear):
    """A Linear of a block: plain tensors in and out, under tensor parallel too.

    adapter: a module whose output is added (lora/adapters.py), or None. linear_fn: F.linear, the same in float8
    (distributed/float8.py), or a module that multiplies by quantized weights (lora/quantized_base.py).
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.adapter: nn.Module | None = None
        self.linear_fn: Callable[..., Tensor] = F.linear

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear_fn(x, local_shard(self.weight), local_shard(self.bias))
        return y if self.adapter is None else y + self.adapter(x)


class FeedForward(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, dim: int, ffn_dim: int):
        super().__init__()
        self.up = Linear(dim, ffn_dim)
        self.down = Linear(ffn_dim, dim)

    def forward(self, x_BLD: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `linear_and_bias`."""
        gelu_linear = kernels.fused_only("gelu_linear", x_BLD)
        if gelu_linear is None or not is_plain(self.down):
            return linear_and_bias(self.down, F.gelu(self.up(x_BLD), approximate="tanh"))
        (up, up_bias), bias = linear_and_bias(self.up, x_BLD), local_shard(self.down.bias)
        return gelu_linear(up, local_shard(self.down.weight), bias.detach(), up_bias), bias


def is_plain(*linears: nn.Module, kind: type[nn.Module] = Linear) -> bool:
    """Whether these are products with a weight and no more: no adapter, no float8, nothing sent by tensor parallel."""
    return all(type(m) is kind and m.adapter is None and m.linear_fn is F.linear for m in linears)


def linear_and_bias(linear: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """(linear(x), bias). With fused kernels the bias is a constant in the first, and its gradient is left to the
    operator that reads it (`y_bias` of kernels/reference.py); otherwise the second is None.
    """
    if kernels.fused_only("gated_residual", x) is None or not is_plain(linear):
        return linear(x), None
    bias = local_shard(linear.bias)
    return F.linear(x, local_shard(linear.weight), bias.detach()), bias


def project_and_norm(
    x_BLD: Tensor,
    context_BSD: Tensor | None,
    linears: tuple[nn.Module, nn.Module, nn.Module],
    norms: tuple[Tensor, Tensor],
    freqs_cis_BLC: Tensor | None,
    head_dim: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """q, k and v by one fused operator, see kernels/triton/projections.py; None where it does not apply.

    linears: of q, k and v. norms: weights of the RMSNorms of q and k. The others are as there.
    """
    fused = kernels.fused_only("project_and_norm", x_BLD)
    if fused is None or not is_plain(*linears):
        return None
    weights, biases, norms = (
        tuple(map(local_shard, tensors)) for tensors in ([m.weight for m in linears], [m.bias for m in linears], norms)
    )
    return fused(x_BLD, context_BSD, weights, biases, norms, freqs_cis_BLC, head_dim, eps)


def is_adapter(name: str) -> bool:
    """Whether a parameter, by its clean name, belongs to the `adapter` of a Linear."""
    return name.rsplit(".", 2)[-2:-1] == ["adapter"]


def cast_params(model: nn.Module, fp32: tuple[str, ...], dtype: torch.dtype) -> None:
    """Cast the weights to `dtype`, in place, except the root modules and parameters `fp32` (see ParallelPlan)."""
    for name, child in model.named_children():
        if name not in fp32:
            child.to(dtype)


class CastLinear(nn.Linear):
    """A Linear that casts its input to the weight's type: where activations enter the model's compute type."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class InnerAttention(nn.Module):
    """softmax(q k^T / sqrt(K)) v, [B, L, H, K] in and out. Context parallel replaces this module.

    layout: of the micro-batch; keys beyond its seq_len are padding. None: all keys count.
    """

    def forward(self, q_BLHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, layout: StepLayout | None = None) -> Tensor:
        if layout is not None:
            k_BSHK, v_BSHK = k_BSHK[:, : layout.seq_len], v_BSHK[:, : layout.seq_len]
        return attention(q_BLHK, k_BSHK, v_BSHK)


class RMSStats(nn.Module):
    """Mean squares of q and the keys for their RMSNorms, [B, L, 1] each; None where a norm sees its full vector.

    Tensor parallel replaces this module where a norm runs over all heads and a rank holds a part of them.
    """

    def forward(self, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        return (None,) * len(tensors)


def xavier_uniform_(weight: Tensor, generator: torch.Generator, shape: torch.Size | None = None) -> None:
    """Glorot and Bengio 2010, for an [out, in] matrix, or each of several; with `shape`, at the scale of that shape."""
    *_, rows, columns = shape or weight.shape
    bound = math.sqrt(6 / (rows + columns))
    weight.uniform_(-bound, bound, generator=generator)


def attention_flops(batch: int, queries: int, keys: int, width: int) -> int:
    """FLOPs of one attention forward: two matmuls of queries x keys x width, two FLOPs per multiply-add."""
    return 4 * batch * queries * keys * width
