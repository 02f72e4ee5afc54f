"""Parts that every video DiT shares: tokens from latents, positions, rotations, time features, attention, initialisers.

Letters: B batch, L tokens, D width, H heads, K head width, C latent channels, F/H/W latent frames, height, width, P = C
    * patch volume.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torch.utils.weak import WeakTensorKeyDictionary

from titan_video import kernels
from titan_video.kernels.attention import attention, joint_attention
from titan_video.kernels.gelu import gelu_linear
from titan_video.models.spec import TokenShape

Patch = tuple[int, int, int]
TEMPORAL_STRIDE, SPATIAL_STRIDES = 4, {16: 8, 48: 16}  # of the VAEs, in space by latent channels


def token_shape(latent_FHW: tuple[int, ...], patch: Patch) -> TokenShape:
    """The token grid of a latent grid; ValueError if the patch does not divide it."""
    if any(n % p for n, p in zip(latent_FHW, patch, strict=True)):
        raise ValueError(
            f"latent grid {tuple(latent_FHW)} is not divisible by the model's patch {patch}; choose data.buckets to fit"
        )
    return TokenShape(*(n // p for n, p in zip(latent_FHW, patch, strict=True)))


def latent_shape(bucket: tuple[int, ...], args: Any) -> tuple[int, ...]:
    """[C, F, H, W] of the latents of a clip [frames, height, width]; ValueError where no known VAE has the model's
    channels.
    """
    frames, height, width = bucket
    if args.out_channels not in SPATIAL_STRIDES:
        raise ValueError(
            f"model.flavor: the model has {args.out_channels} latent channels; VAEs of {sorted(SPATIAL_STRIDES)} "
            f"are known"
        )
    stride = SPATIAL_STRIDES[args.out_channels]
    return args.out_channels, (frames - 1) // TEMPORAL_STRIDE + 1, height // stride, width // stride


def num_clip_tokens(bucket: tuple[int, ...], args: Any) -> int:
    """Tokens of such a clip."""
    return token_shape(latent_shape(bucket, args)[1:], args.patch).num_tokens


def patchify(x_BCFHW: Tensor, patch: Patch) -> Tensor:
    """[B, C, F, H, W] -> tokens [B, L, P]; P runs over (C, patch frames, patch height, patch width), L over (F, H, W)."""
    B, C, *grid = x_BCFHW.shape
    s, (pf, ph, pw) = token_shape(tuple(grid), patch), patch
    x = x_BCFHW.reshape(B, C, s.frames, pf, s.height, ph, s.width, pw)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(B, s.num_tokens, C * pf * ph * pw)


def unpatchify(x_BLP: Tensor, shape: TokenShape, patch: Patch) -> Tensor:
    """Inverse of `patchify`."""
    (B, _, P), (pf, ph, pw) = x_BLP.shape, patch
    C = P // (pf * ph * pw)
    x = x_BLP.reshape(B, shape.frames, shape.height, shape.width, C, pf, ph, pw).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return x.reshape(B, C, shape.frames * pf, shape.height * ph, shape.width * pw)


def positions(shape: TokenShape, device: torch.device | str = "cpu") -> Tensor:
    """Frame, row and column of each token, [1, L, 3], int64, in the order of `patchify`."""
    axes = [torch.arange(n, device=device) for n in (shape.frames, shape.height, shape.width)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(1, -1, 3)


def rope_freqs_cis(pos_BL3: Tensor, axes_dim: tuple[int, int, int], theta: float) -> Tensor:
    """Unit complex numbers [B, L, K/2] for `kernels.rms_norm_rope`: each axis of the position turns its own part of the
    head.

    axes_dim: head channels of frame, row and column; their sum is K. Angles are computed in float64: at float32 a far
    token's would be off by 1e-4. They are kept for as long as the tensor of positions is.
    """
    kept = _kept_freqs.setdefault(pos_BL3, {})
    if (axes_dim, theta) not in kept:
        kept[axes_dim, theta] = _freqs_cis(pos_BL3, axes_dim, theta)
    return kept[axes_dim, theta]


_kept_freqs = WeakTensorKeyDictionary()


def _freqs_cis(pos_BL3: Tensor, axes_dim: tuple[int, int, int], theta: float) -> Tensor:
    angles = []
    for axis, dim in enumerate(axes_dim):
        rates = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=pos_BL3.device) / dim)
        angles.append(pos_BL3[..., axis, None].double() * rates)
    angle = torch.cat(angles, dim=-1)
    return torch.complex(angle.cos().float(), angle.sin().float())


def time_features(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """[cos, sin] features of a time in [0, 1000], [..., dim], float32; angles in float64 as in the public Wan code."""
    rates = torch.exp(
        torch.arange(dim // 2, dtype=torch.float64, device=t.device) * (-math.log(max_period) / (dim // 2))
    )
    angles = t.double().unsqueeze(-1) * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def select_modulation(modulation_BT: Tensor, cond_mask_BL: Tensor | None) -> Tensor:
    """The rows of modulation that the kernels choose from:

    both for noisy and clean tokens, or the first alone where no token is clean.
    """
    return modulation_BT[:, :1] if cond_mask_BL is None else modulation_BT


def local(weight: Tensor) -> Tensor:
    """The part of a block's weight that this rank computes with.

    Under tensor parallel a weight is a DTensor. A replicated one meets only this rank's share of the tokens, so its
    gradient is a partial sum, which is completed where gradients are reduced.
    """
    if isinstance(weight, DTensor):
        return weight.to_local(grad_placements=[Partial() if p.is_replicate() else p for p in weight.placements])
    return weight


class Linear(nn.Linear):
    """A Linear of a block: plain tensors in and out, under tensor parallel too. adapter: what is added to it
    (lora/adapters.py), or None.

    product: what multiplies, F.linear or the same in float8 (distributed/float8.py).
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.adapter: nn.Module | None = None
        self.product: Callable[..., Tensor] = F.linear

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x, local(self.weight), local(self.bias))
        return y if self.adapter is None else y + self.adapter(x)


class FeedForward(nn.Module):
    def __init__(self, dim: int, ffn_dim: int):
        super().__init__()
        self.up, self.down = Linear(dim, ffn_dim), Linear(ffn_dim, dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        up, down = self.up(x_BLD), self.down
        # A compiler does not compute again what a product reads, and other products (adapters, float8, tensor parallel)
        # keep their inputs themselves.
        is_plain = type(down) is Linear and down.adapter is None and down.product is F.linear
        if is_plain and kernels.current_backend() == "triton" and not torch.compiler.is_compiling():
            return gelu_linear(up, local(down.weight), local(down.bias))
        return down(F.gelu(up, approximate="tanh"))


def cast_params(model: nn.Module, fp32: tuple[str, ...], dtype: torch.dtype) -> None:
    """Make the weights of a model `dtype`, in place, but for those of the root modules and parameters `fp32` (see
    ParallelPlan).
    """
    for name, child in model.named_children():
        if name not in fp32:
            child.to(dtype)


class CastLinear(nn.Linear):
    """A Linear whose input takes the weight's type: the door through which activations enter the model's arithmetic."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class InnerAttention(nn.Module):
    """softmax(q k^T / sqrt(K)) v, [B, L, H, K] in and out. Context parallel replaces this module.

    seq_len: keys that count, where those at the end are padding; None: all.
    """

    def forward(self, q_BLHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, seq_len: int | None = None) -> Tensor:
        if seq_len is not None:
            k_BSHK, v_BSHK = k_BSHK[:, :seq_len], v_BSHK[:, :seq_len]
        return attention(q_BLHK, k_BSHK, v_BSHK)


class JointInnerAttention(nn.Module):
    """One attention in which video and text tokens both ask and answer. Context parallel replaces this module.

    text_mask: the text keys that count; None: all. It is applied whatever it holds: looking inside would make the host
        wait for the device.
    seq_len: video keys that count, where those at the end are padding; None: all. Returns the video's and the text's
    rows, [B, L, H, K] and [B, S, H, K]; those of text tokens that do not count mean nothing.
    """

    def forward(
        self,
        q_BLHK: Tensor,
        k_BLHK: Tensor,
        v_BLHK: Tensor,
        text_q_BSHK: Tensor,
        text_k_BSHK: Tensor,
        text_v_BSHK: Tensor,
        text_mask_BS: Tensor | None = None,
        seq_len: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        if seq_len is not None:
            k_BLHK, v_BLHK = k_BLHK[:, :seq_len], v_BLHK[:, :seq_len]
        out = joint_attention(
            torch.cat([q_BLHK, text_q_BSHK], dim=1), k_BLHK, v_BLHK, text_k_BSHK, text_v_BSHK, text_mask_BS
        )
        return out[:, : q_BLHK.shape[1]], out[:, q_BLHK.shape[1] :]


class JointLinear(Linear):
    """One Linear for video tokens and for text tokens.

    Tensor parallel spreads the first over its ranks, but not the second.
    """

    def forward(self, x_BLD: Tensor, text_BSD: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x_BLD), super().forward(text_BSD)


class RMSStats(nn.Module):
    """Statistics of the RMSNorms of q and the keys, [B, L, 1] each, or None where a norm sees its whole vector and
    takes its own.

    Tensor parallel replaces this module where a norm runs over all heads, of which a rank then holds a part.
    """

    def forward(self, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        return (None,) * len(tensors)


def xavier_uniform_(weight: Tensor, generator: torch.Generator) -> None:
    """Glorot and Bengio 2010, for a [out, in] matrix."""
    bound = math.sqrt(6 / (weight.shape[0] + weight.shape[1]))
    weight.uniform_(-bound, bound, generator=generator)


def attention_flops(batch: int, queries: int, keys: int, width: int) -> int:
    """FLOPs of one attention core forward: two products of queries x keys x width, two per multiply-add."""
    return 4 * batch * queries * keys * width
