"""The blocks of HunyuanVideo and the small networks around them. Letters: see model.py."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_video import kernels
from titan_video.kernels.attention import joint_attention
from titan_video.models.hunyuan_video.args import REFINER_RATIO, TIME_DIM, HunyuanVideoArgs
from titan_video.models.layers import (
    CastLinear,
    FeedForward,
    Linear,
    is_plain,
    linear_and_bias,
    local_shard,
    project_and_norm,
    select_modulation,
    time_features,
)
from titan_video.models.spec import StepLayout


class JointInnerAttention(nn.Module):
    """One attention over video and text tokens together. Context parallel replaces this module.

    q, k, v, text_q, text_k, text_v: [B, L or S, H, K]. text_mask: bool [B, S], the text keys that count; None: all.
    The mask is applied whatever it holds: looking inside would synchronise host and device.
    layout: as in `InnerAttention`.
    Returns the outputs of the video and of the text tokens; those of masked text tokens are undefined.
    """

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        text_q: Tensor,
        text_k: Tensor,
        text_v: Tensor,
        text_mask: Tensor | None = None,
        layout: StepLayout | None = None,
    ) -> tuple[Tensor, Tensor]:
        if layout is not None:
            k, v = k[:, : layout.seq_len], v[:, : layout.seq_len]
        out = joint_attention(torch.cat([q, text_q], dim=1), k, v, text_k, text_v, text_mask)
        return out[:, : q.shape[1]], out[:, q.shape[1] :]


class JointLinear(Linear):
    """One Linear for video and for text tokens.

    Tensor parallel shards the video tokens over its ranks, not the text.
    """

    def forward(self, x_BLD: Tensor, text_BSD: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x_BLD), super().forward(text_BSD)


class Mlp(nn.Module):
    """A vector's embedding."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.up, self.down = CastLinear(in_dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


class Condition(nn.Module):
    """The sum of the embeddings of times, of a vector of the text and, in distilled models, of the guidance scale."""

    def __init__(self, text_dim: int, dim: int, guidance: bool):
        super().__init__()
        self.time, self.text = Mlp(TIME_DIM, dim), Mlp(text_dim, dim)
        self.guidance = Mlp(TIME_DIM, dim) if guidance else None

    def forward(self, t_BT: Tensor, text_BD: Tensor, guidance_B: Tensor | None = None) -> Tensor:
        """[B, T, D]. The guidance scale is an input of row 0, the noised tokens, only."""
        condition_BTD = self.time(time_features(t_BT, TIME_DIM)) + self.text(text_BD).unsqueeze(1)
        if self.guidance is None:
            return condition_BTD
        noised_B1D = condition_BTD[:, :1] + self.guidance(time_features(guidance_B, TIME_DIM)).unsqueeze(1)
        return torch.cat([noised_B1D, condition_BTD[:, 1:]], dim=1)


class Modulation(nn.Module):
    """`parts` vectors (shift, scale, gate, ...) from each row of the condition; float32 in and out."""

    def __init__(self, dim: int, parts: int):
        super().__init__()
        self.parts, self.linear = parts, Linear(dim, parts * dim)

    def forward(self, condition_BTD: Tensor) -> tuple[Tensor, ...]:
        rows = self.linear(F.silu(condition_BTD).to(self.linear.weight.dtype))
        return kernels.upcast(rows).chunk(self.parts, dim=-1)


class HeadNorm(nn.Module):
    """RMSNorm of q and of k, each head on its own; then RoPE where freqs_cis are given."""

    def __init__(self, args: HunyuanVideoArgs):
        super().__init__()
        self.head_dim, self.eps = args.head_dim, args.eps
        self.q, self.k = (nn.Parameter(torch.empty(args.head_dim)) for _ in range(2))

    def project(
        self, x_BLD: Tensor, linears: tuple[nn.Module, ...], freqs_cis_BLC: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """q, k and v, [B, L, H, K], by these Linears."""
        projected = project_and_norm(x_BLD, None, linears, (self.q, self.k), freqs_cis_BLC, self.head_dim, self.eps)
        if projected is not None:
            return projected
        q, k, v = (linear(x_BLD).unflatten(-1, (-1, self.head_dim)) for linear in linears)
        q, k = (
            kernels.rms_norm(x, local_shard(weight), self.eps)
            if freqs_cis_BLC is None
            else kernels.rms_norm_rope(x, local_shard(weight), freqs_cis_BLC, self.eps)
            for x, weight in ((q, self.q), (k, self.k))
        )
        return q, k, v


class JointAttention(nn.Module):
    """Attention of video and text tokens to each other, each with projections of their own.

    Returns of each what `linear_and_bias` does.
    """

    def __init__(self, args: HunyuanVideoArgs):
        super().__init__()
        self.head_dim = args.head_dim
        self.q, self.k, self.v, self.o = (Linear(args.dim, args.dim) for _ in range(4))
        self.text_q, self.text_k, self.text_v, self.text_o = (Linear(args.dim, args.dim) for _ in range(4))
        self.norm, self.text_norm = HeadNorm(args), HeadNorm(args)
        self.inner_attention = JointInnerAttention()

    def forward(
        self,
        x_BLD: Tensor,
        text_BSD: Tensor,
        freqs_cis_BLC: Tensor,
        text_mask_BS: Tensor | None = None,
        layout: StepLayout | None = None,
    ) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        q, k, v = self.norm.project(x_BLD, (self.q, self.k, self.v), freqs_cis_BLC)
        text_qkv = self.text_norm.project(text_BSD, (self.text_q, self.text_k, self.text_v))
        out, text_out = self.inner_attention(q, k, v, *text_qkv, text_mask_BS, layout)
        return linear_and_bias(self.o, out.flatten(2)), linear_and_bias(self.text_o, text_out.flatten(2))


class DoubleBlock(nn.Module):
    """Joint attention and feed-forward, each with shift, scale and gate; video and text share only the attention."""

    def __init__(self, args: HunyuanVideoArgs):
        super().__init__()
        self.eps = args.eps
        self.modulation, self.text_modulation = Modulation(args.dim, 6), Modulation(args.dim, 6)
        self.attn = JointAttention(args)
        self.ffn, self.text_ffn = (FeedForward(args.dim, args.ffn_dim) for _ in range(2))

    def forward(
        self,
        x_BLD: Tensor,
        text_BSD: Tensor,
        condition_BTD: Tensor,
        freqs_cis_BLC: Tensor,
        text_mask_BS: Tensor | None = None,
        layout: StepLayout | None = None,
        cond_mask_BL: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            select_modulation(rows_BTD, cond_mask_BL) for rows_BTD in self.modulation(condition_BTD)
        )
        text_shift1, text_scale1, text_gate1, text_shift2, text_scale2, text_gate2 = self.text_modulation(
            condition_BTD[:, :1]
        )

        y, x_BLD = kernels.ada_layer_norm_and_input(x_BLD, scale1, shift1, self.eps, cond_mask_BL)
        text_y, text_BSD = kernels.ada_layer_norm_and_input(text_BSD, text_scale1, text_shift1, self.eps)
        (y, bias), (text_y, text_bias) = self.attn(y, text_y, freqs_cis_BLC, text_mask_BS, layout)
        x_BLD, y = kernels.residual_ada_layer_norm(x_BLD, y, gate1, scale2, shift2, self.eps, cond_mask_BL, bias)
        text_BSD, text_y = kernels.residual_ada_layer_norm(
            text_BSD, text_y, text_gate1, text_scale2, text_shift2, self.eps, y_bias_D=text_bias
        )
        text_y, text_bias = self.text_ffn(text_y)
        text_BSD = kernels.gated_residual(text_BSD, text_y, text_gate2, y_bias_D=text_bias)
        y, bias = self.ffn(y)
        return kernels.gated_residual(x_BLD, y, gate2, cond_mask_BL, bias), text_BSD


class AttentionAndFeedForward(nn.Module):
    """Joint attention and feed-forward in parallel, with the same weights for video and text.

    The inputs of `out` are ordered by head: a head's K channels, then its E/H channels of the feed-forward. So a range
    of heads is a contiguous range of inputs, with its share of the feed-forward.
    """

    def __init__(self, args: HunyuanVideoArgs):
        super().__init__()
        self.head_dim = args.head_dim
        self.q, self.k, self.v, self.up = (
            Linear(args.dim, width) for width in (args.dim, args.dim, args.dim, args.ffn_dim)
        )
        self.out = JointLinear(args.dim + args.ffn_dim, args.dim)
        self.norm = HeadNorm(args)
        self.inner_attention = JointInnerAttention()

    def forward(
        self,
        x_BLD: Tensor,
        text_BSD: Tensor,
        freqs_cis_BLC: Tensor,
        text_mask_BS: Tensor | None = None,
        layout: StepLayout | None = None,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = self.norm.project(x_BLD, (self.q, self.k, self.v), freqs_cis_BLC)
        text_qkv = self.norm.project(text_BSD, (self.q, self.k, self.v))
        out, text_out = self.inner_attention(q, k, v, *text_qkv, text_mask_BS, layout)
        # `out` comes right after both GELUs: checkpointing may save the matmuls that follow a GELU.
        up, text_up = self.up(x_BLD), self.up(text_BSD)
        joined_linear = kernels.fused_only("joined_linear", x_BLD)
        if joined_linear is not None and is_plain(self.out, kind=JointLinear):
            weight, bias = local_shard(self.out.weight), local_shard(self.out.bias)
            return joined_linear(out, up, weight, bias), joined_linear(text_out, text_up, weight, bias)
        return self.out(self._with_feed_forward(out, up), self._with_feed_forward(text_out, text_up))

    def _with_feed_forward(self, out_BLHK: Tensor, up_BLF: Tensor) -> Tensor:
        hidden_BLHE = F.gelu(up_BLF, approximate="tanh").unflatten(-1, (out_BLHK.shape[2], -1))
        return torch.cat([out_BLHK, hidden_BLHE], dim=-1).flatten(2)


class SingleBlock(nn.Module):
    """Video and text tokens through the same weights, with one shift, scale and gate."""

    def __init__(self, args: HunyuanVideoArgs):
        super().__init__()
        self.eps = args.eps
        self.modulation, self.attn = Modulation(args.dim, 3), AttentionAndFeedForward(args)

    def forward(
        self,
        x_BLD: Tensor,
        text_BSD: Tensor,
        condition_BTD: Tensor,
        freqs_cis_BLC: Tensor,
        text_mask_BS: Tensor | None = None,
        layout: StepLayout | None = None,
        cond_mask_BL: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        parts = self.modulation(condition_BTD)
        shift, scale, gate = (select_modulation(rows_BTD, cond_mask_BL) for rows_BTD in parts)
        text_shift, text_scale, text_gate = (select_modulation(rows_BTD, None) for rows_BTD in parts)
        y, x_BLD = kernels.ada_layer_norm_and_input(x_BLD, scale, shift, self.eps, cond_mask_BL)
        text_y, text_BSD = kernels.ada_layer_norm_and_input(text_BSD, text_scale, text_shift, self.eps)
        y, text_y = self.attn(y, text_y, freqs_cis_BLC, text_mask_BS, layout)
        return kernels.gated_residual(x_BLD, y, gate, cond_mask_BL), kernels.gated_residual(text_BSD, text_y, text_gate)


class RefinerBlock(nn.Module):
    """Self-attention of the text and feed-forward, with gates from the condition."""

    def __init__(self, args: HunyuanVideoArgs):
        super().__init__()
        D = args.dim
        self.head_dim, self.eps = args.head_dim, args.eps
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.up, self.down = nn.Linear(D, REFINER_RATIO * D), nn.Linear(REFINER_RATIO * D, D)
        self.modulation = Modulation(D, 2)
        self.norm1_weight, self.norm1_bias, self.norm2_weight, self.norm2_bias = (
            nn.Parameter(torch.empty(D)) for _ in range(4)
        )

    def forward(self, text_BSD: Tensor, condition_B1D: Tensor, mask_B1SS: Tensor | None) -> Tensor:
        gate1, gate2 = self.modulation(condition_B1D)
        y = kernels.layer_norm(text_BSD, self.norm1_weight, self.norm1_bias, self.eps)
        q, k, v = (linear(y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B1SS).transpose(1, 2).flatten(2)
        text_BSD, y = kernels.residual_layer_norm(
            text_BSD, self.o(y), gate1, self.norm2_weight, self.norm2_bias, self.eps
        )
        return kernels.gated_residual(text_BSD, self.down(F.silu(self.up(y))), gate2)


class TextRefiner(nn.Module):
    """Bidirectional attention among text tokens that come from a causal language model."""

    def __init__(self, args: HunyuanVideoArgs):
        super().__init__()
        self.proj_in = CastLinear(args.text_dim, args.dim)
        self.blocks = nn.ModuleDict({str(i): RefinerBlock(args) for i in range(args.num_refiner_layers)})

    def forward(self, text_BSD: Tensor, condition_B1D: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        mask_B1SS = None
        if mask_BS is not None:
            # Every token attends to the first one, so that padding, which attends to nothing else, has a key.
            first_S = torch.arange(mask_BS.shape[1], device=mask_BS.device) == 0
            mask_B1SS = (mask_BS[:, None, :, None] & mask_BS[:, None, None, :]) | first_S
        text_BSD = self.proj_in(text_BSD)
        for block in self.blocks.values():
            text_BSD = block(text_BSD, condition_B1D, mask_B1SS)
        return text_BSD
