"""The HunyuanVideo diffusion transformer: tokens in, velocity tokens out.

    t, guidance, pooled text -- condition ------------------------------------ a vector, which modulates every norm
    below x_BLP -- patch_embedding --+
    text -- text_refiner ------+- double blocks: own weights for video and text -- single blocks: shared weights --
              proj_out -- v_BLP |
    t, mean text -- text_condition

In each block video and text tokens attend to each other in one attention, which leaves out the text's padding. How a
given frame comes in (image-to-video) depends on the variant:
    latent_concat   as channels of x beside the noise: C of the frame's latents, zero but in the first frame, and one that marks that frame
    token_replace   as tokens: the first latent frame of x is clean, and its tokens are modulated with time 0

Architecture: Kong et al. 2024, "HunyuanVideo: a systematic framework for large video generative models", and its public
code (Tencent-Hunyuan/HunyuanVideo, hyvideo/modules); `diffusers.HunyuanVideoTransformer3DModel` is the oracle of the
tests.

What is float32 here: the public code computes condition and modulation in the type of the weights. Here the small
the condition, and the last modulation, keep float32 weights. A block's modulation is a third of its weights, so it has
the block's type, and float32 only before and after the product.

Letters: B batch, L video tokens, S text tokens, N both, D width, H heads, K head width, E feed-forward width, P patch
    width, C rotations
of a head, T times of a clip: 1, or 2 where its first frame may be clean (then row 0 is the noisy tokens' time, row 1
    that of the clean ones).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_video import kernels
from titan_video.models.conditioning import ConditioningSpec
from titan_video.models.layers import (
    CastLinear,
    FeedForward,
    JointInnerAttention,
    JointLinear,
    Linear,
    Patch,
    attention_flops,
    local,
    rope_freqs_cis,
    select_modulation,
    time_features,
    xavier_uniform_,
)

TIME_DIM = 256  # width of the time features
IMAGE_TOKENS = 576  # of one image, before they are thinned out
STILL = 0.001  # of the first frame in what the public image-to-video samplers start from
REFINER_RATIO = 4  # feed-forward width of the text refiner, in widths


@dataclass(frozen=True)
class HunyuanVideoArgs:
    """Architecture. The defaults that no flavor changes are those of every public HunyuanVideo.

    in_channels: latent channels, and beyond `out_channels` those of the condition, which follow them in x. text_dim:
    width of the text tokens; pooled_dim: of the vector of the whole text. guidance: whether the guidance scale is an
    input (a distilled model).
    axes_dim: head channels that turn with the frame, the row and the column. image_condition: "", "latent_concat" or
        "token_replace".
    """

    dim: int
    num_heads: int
    num_double_layers: int
    num_single_layers: int
    ffn_dim: int
    num_refiner_layers: int = 2
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    text_len: int = 256
    pooled_dim: int = 768
    guidance: bool = True
    image_condition: str = ""
    patch: Patch = (1, 2, 2)
    eps: float = 1e-6
    axes_dim: tuple[int, int, int] = (16, 56, 56)
    rope_theta: float = 256.0

    @property
    def num_layers(self) -> int:
        """Blocks in all."""
        return self.num_double_layers + self.num_single_layers

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def conditioning(self) -> ConditioningSpec:
        """What the model is given beside noise, time and text."""
        common = {"pooled_text": True, "guidance": self.guidance}
        if self.image_condition == "latent_concat":
            return ConditioningSpec(
                num_cond_frames=1, form="mask_last", text_image_tokens=IMAGE_TOKENS // 2, still=STILL, **common
            )
        if self.image_condition == "token_replace":
            return ConditioningSpec(
                num_cond_frames=1, form="clean", text_image_tokens=IMAGE_TOKENS // 4, still=STILL, **common
            )
        return ConditioningSpec(**common)

    @property
    def boundary(self) -> float:
        """One model for all noise levels."""
        return 0.0

    @property
    def patch_volume(self) -> int:
        return self.patch[0] * self.patch[1] * self.patch[2]

    @property
    def clean_first_frame(self) -> bool:
        """Whether the first latent frame may be given clean."""
        return self.image_condition == "token_replace"

    def block_flops(self, num_tokens: int, batch: int = 1) -> int:
        """FLOPs of all blocks' forward for `batch` clips of `num_tokens` tokens."""
        N, D, T = num_tokens + self.text_len, self.dim, 1 + self.clean_first_frame
        linear = 2 * N * (4 * D * D + 2 * D * self.ffn_dim)
        double = linear + 2 * (T + 1) * 6 * D * D  # the text is modulated by one time only
        single = linear + 2 * T * 3 * D * D
        attention = self.num_layers * attention_flops(batch, N, N, D)
        return batch * (self.num_double_layers * double + self.num_single_layers * single) + attention

    def flops(self, num_tokens: int, batch: int = 1) -> int:
        """FLOPs of a forward, 2 per multiply-add, for `batch` clips of `num_tokens` tokens.

        Backward takes twice as many.
        """
        S, D, T = self.text_len, self.dim, 1 + self.clean_first_frame
        ends = 2 * num_tokens * self.patch_volume * (self.in_channels + self.out_channels) * D + 2 * 2 * D * D
        time, pooled, mean = (2 * (width * D + D * D) for width in (TIME_DIM, self.pooled_dim, self.text_dim))
        condition = T * time + pooled + self.guidance * time + time + mean
        refiner = 2 * S * (4 * D * D + 2 * REFINER_RATIO * D * D) + 2 * 2 * D * D + attention_flops(1, S, S, D)
        text = 2 * S * self.text_dim * D + self.num_refiner_layers * refiner
        return self.block_flops(num_tokens, batch) + batch * (ends + condition + text)


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
        """[B, T, D]. The guidance scale is an input of the noisy tokens, row 0, only."""
        condition_BTD = self.time(time_features(t_BT, TIME_DIM)) + self.text(text_BD).unsqueeze(1)
        if self.guidance is None:
            return condition_BTD
        noisy_B1D = condition_BTD[:, :1] + self.guidance(time_features(guidance_B, TIME_DIM)).unsqueeze(1)
        return torch.cat([noisy_B1D, condition_BTD[:, 1:]], dim=1)


class Modulation(nn.Module):
    """`parts` vectors (shift, scale, gate, ...) from each row of the condition; float32 in and out."""

    def __init__(self, dim: int, parts: int):
        super().__init__()
        self.parts, self.linear = parts, Linear(dim, parts * dim)

    def forward(self, condition_BTD: Tensor) -> tuple[Tensor, ...]:
        rows = self.linear(F.silu(condition_BTD).to(self.linear.weight.dtype))
        return kernels.upcast(rows).chunk(self.parts, dim=-1)


class HeadNorm(nn.Module):
    """RMSNorm of q and of k, each head on its own; with rotations they are turned after it."""

    def __init__(self, args: HunyuanVideoArgs):
        super().__init__()
        self.head_dim, self.eps = args.head_dim, args.eps
        self.q, self.k = (nn.Parameter(torch.empty(args.head_dim)) for _ in range(2))

    def forward(self, q_BLD: Tensor, k_BLD: Tensor, freqs_cis_BLC: Tensor | None = None) -> tuple[Tensor, Tensor]:
        parts = [
            (x.unflatten(-1, (-1, self.head_dim)), local(weight)) for x, weight in ((q_BLD, self.q), (k_BLD, self.k))
        ]
        if freqs_cis_BLC is None:
            q, k = (kernels.rms_norm(x, weight, self.eps) for x, weight in parts)
        else:
            q, k = (kernels.rms_norm_rope(x, weight, freqs_cis_BLC, self.eps) for x, weight in parts)
        return q, k


class JointAttention(nn.Module):
    """Attention of video and text tokens to each other, each with projections of their own."""

    def __init__(self, args: HunyuanVideoArgs):
        super().__init__()
        self.head_dim = args.head_dim
        self.q, self.k, self.v, self.o = (Linear(args.dim, args.dim) for _ in range(4))
        self.text_q, self.text_k, self.text_v, self.text_o = (Linear(args.dim, args.dim) for _ in range(4))
        self.norm, self.text_norm, self.core = HeadNorm(args), HeadNorm(args), JointInnerAttention()

    def forward(
        self,
        x_BLD: Tensor,
        text_BSD: Tensor,
        freqs_cis_BLC: Tensor,
        text_mask_BS: Tensor | None = None,
        seq_len: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        q, k = self.norm(self.q(x_BLD), self.k(x_BLD), freqs_cis_BLC)
        text_q, text_k = self.text_norm(self.text_q(text_BSD), self.text_k(text_BSD))
        v, text_v = (y.unflatten(-1, (-1, self.head_dim)) for y in (self.v(x_BLD), self.text_v(text_BSD)))
        out, text_out = self.core(q, k, v, text_q, text_k, text_v, text_mask_BS, seq_len)
        return self.o(out.flatten(2)), self.text_o(text_out.flatten(2))


class DoubleBlock(nn.Module):
    """Joint attention and feed-forward, each with shift, scale and gate; nothing but the attention is shared by video
    and text.
    """

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
        seq_len: int | None = None,
        cond_mask_BL: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            select_modulation(rows_BTD, cond_mask_BL) for rows_BTD in self.modulation(condition_BTD)
        )
        text_shift1, text_scale1, text_gate1, text_shift2, text_scale2, text_gate2 = self.text_modulation(
            condition_BTD[:, :1]
        )

        y = kernels.ada_layer_norm(x_BLD, scale1, shift1, self.eps, cond_mask_BL)
        text_y = kernels.ada_layer_norm(text_BSD, text_scale1, text_shift1, self.eps)
        y, text_y = self.attn(y, text_y, freqs_cis_BLC, text_mask_BS, seq_len)
        x_BLD, y = kernels.residual_ada_layer_norm(x_BLD, y, gate1, scale2, shift2, self.eps, cond_mask_BL)
        text_BSD, text_y = kernels.residual_ada_layer_norm(
            text_BSD, text_y, text_gate1, text_scale2, text_shift2, self.eps
        )
        text_BSD = kernels.gated_residual(text_BSD, self.text_ffn(text_y), text_gate2)
        return kernels.gated_residual(x_BLD, self.ffn(y), gate2, cond_mask_BL), text_BSD


class AttentionAndFeedForward(nn.Module):
    """Joint attention and feed-forward side by side, with one way in and one way out, the same for video and text.

    The inputs of `out` are ordered by head: a head's K channels, then its E/H of the feed-forward. A part of the heads
    is so a contiguous part of the inputs, with its share of the feed-forward.
    """

    def __init__(self, args: HunyuanVideoArgs):
        super().__init__()
        self.head_dim = args.head_dim
        self.q, self.k, self.v, self.up = (
            Linear(args.dim, width) for width in (args.dim, args.dim, args.dim, args.ffn_dim)
        )
        self.out = JointLinear(args.dim + args.ffn_dim, args.dim)
        self.norm, self.core = HeadNorm(args), JointInnerAttention()

    def forward(
        self,
        x_BLD: Tensor,
        text_BSD: Tensor,
        freqs_cis_BLC: Tensor,
        text_mask_BS: Tensor | None = None,
        seq_len: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        q, k = self.norm(self.q(x_BLD), self.k(x_BLD), freqs_cis_BLC)
        text_q, text_k = self.norm(self.q(text_BSD), self.k(text_BSD))
        v, text_v = (self.v(y).unflatten(-1, (-1, self.head_dim)) for y in (x_BLD, text_BSD))
        out, text_out = self.core(q, k, v, text_q, text_k, text_v, text_mask_BS, seq_len)
        return self.out(self._beside(out, x_BLD), self._beside(text_out, text_BSD))

    def _beside(self, out_BLHK: Tensor, x_BLD: Tensor) -> Tensor:
        hidden_BLHE = F.gelu(self.up(x_BLD), approximate="tanh").unflatten(-1, (out_BLHK.shape[2], -1))
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
        seq_len: int | None = None,
        cond_mask_BL: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        parts = self.modulation(condition_BTD)
        shift, scale, gate = (select_modulation(rows_BTD, cond_mask_BL) for rows_BTD in parts)
        text_shift, text_scale, text_gate = (select_modulation(rows_BTD, None) for rows_BTD in parts)
        y = kernels.ada_layer_norm(x_BLD, scale, shift, self.eps, cond_mask_BL)
        text_y = kernels.ada_layer_norm(text_BSD, text_scale, text_shift, self.eps)
        y, text_y = self.attn(y, text_y, freqs_cis_BLC, text_mask_BS, seq_len)
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
    """Text tokens of a causal language model, made to know of each other."""

    def __init__(self, args: HunyuanVideoArgs):
        super().__init__()
        self.proj_in = CastLinear(args.text_dim, args.dim)
        self.blocks = nn.ModuleDict({str(i): RefinerBlock(args) for i in range(args.num_refiner_layers)})

    def forward(self, text_BSD: Tensor, condition_B1D: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        mask_B1SS = None
        if mask_BS is not None:
            # The first token is seen by all, so that padding, which sees nothing else, has something to see.
            first_S = torch.arange(mask_BS.shape[1], device=mask_BS.device) == 0
            mask_B1SS = (mask_BS[:, None, :, None] & mask_BS[:, None, None, :]) | first_S
        text_BSD = self.proj_in(text_BSD)
        for block in self.blocks.values():
            text_BSD = block(text_BSD, condition_B1D, mask_B1SS)
        return text_BSD


class HunyuanVideoModel(nn.Module):
    """See the top of the file."""

    def __init__(self, args: HunyuanVideoArgs):
        super().__init__()
        if args.dim % args.num_heads or sum(args.axes_dim) != args.head_dim or any(n % 2 for n in args.axes_dim):
            raise ValueError(
                f"HunyuanVideo: width {args.dim} in {args.num_heads} heads does not fit rotations of "
                f"{args.axes_dim} channels"
            )
        if args.ffn_dim % args.num_heads:
            raise ValueError(
                f"HunyuanVideo: feed-forward width {args.ffn_dim} does not split over {args.num_heads} heads"
            )
        self.args = args
        self.patch_embedding = CastLinear(args.in_channels * args.patch_volume, args.dim)
        self.condition = Condition(args.pooled_dim, args.dim, args.guidance)
        self.text_condition = Condition(args.text_dim, args.dim, guidance=False)
        self.text_refiner = TextRefiner(args)
        self.double_blocks = nn.ModuleDict({str(i): DoubleBlock(args) for i in range(args.num_double_layers)})
        self.single_blocks = nn.ModuleDict({str(i): SingleBlock(args) for i in range(args.num_single_layers)})
        self.head_modulation = nn.Linear(args.dim, 2 * args.dim)
        self.proj_out = nn.Linear(args.dim, args.out_channels * args.patch_volume)

    def forward(
        self,
        x_BLP: Tensor,
        pos_BL3: Tensor,
        t_B: Tensor,
        text_BSD: Tensor,
        text_mask_BS: Tensor | None = None,
        seq_len: int | None = None,
        pooled_text_BD: Tensor | None = None,
        guidance_B: Tensor | None = None,
        cond_mask_BL: Tensor | None = None,
    ) -> Tensor:
        """Velocity [B, L, P_out] of the noisy tokens x.

        x: where the model has more input than output channels, the condition's channels follow the noisy ones.
        pos: global token positions [B or 1, L, 3]; t: 1000 s, float32. text: [B, S, text_dim]; text_mask: bool, its
        tokens that count, at least one of each clip; None: all. pooled_text: [B, pooled_dim]. guidance: 1000 times the
        guidance scale, float32.
        seq_len: tokens of the whole clip, where x is one rank's slice of them or ends in padding; None: x is the clip.
        clean: bool [B or 1, L], for models with a clean first frame: tokens of x that hold no noise, whose time is 0
            instead of t. None: no token.
        """
        state = self.embed(x_BLP, t_B, text_BSD, text_mask_BS, pooled_text_BD, guidance_B)
        return self.head(*self.trunk(*state, pos_BL3, seq_len, text_mask_BS, cond_mask_BL))

    # The three parts of a forward. A pipeline stage runs those whose modules it has, and sends what `embed` and `trunk`
    # return to the next.

    def embed(
        self,
        x_BLP: Tensor,
        t_B: Tensor,
        text_BSD: Tensor,
        text_mask_BS: Tensor | None = None,
        pooled_text_BD: Tensor | None = None,
        guidance_B: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B, L, D], condition [B, T, D], text [B, S, D]."""
        if pooled_text_BD is None:
            raise ValueError(
                "HunyuanVideo needs the pooled text of each clip (pooled_text_BD): choose encoder.name to fit "
                "model.name"
            )
        if self.args.guidance != (guidance_B is not None):
            needs = (
                "takes the guidance scale of each clip"
                if self.args.guidance
                else "has no guidance input, but was given one"
            )
            raise ValueError(f"this HunyuanVideo {needs} (guidance_B)")
        t_BT = torch.stack([t_B, torch.zeros_like(t_B)], dim=1) if self.args.clean_first_frame else t_B.unsqueeze(1)
        condition_BTD = self.condition(t_BT, pooled_text_BD, guidance_B)
        text_condition_B1D = self.text_condition(t_B.unsqueeze(1), masked_mean(text_BSD, text_mask_BS))
        return self.patch_embedding(x_BLP), condition_BTD, self.text_refiner(text_BSD, text_condition_B1D, text_mask_BS)

    def trunk(
        self,
        x_BLD: Tensor,
        condition_BTD: Tensor,
        text_BSD: Tensor,
        pos_BL3: Tensor,
        seq_len: int | None = None,
        text_mask_BS: Tensor | None = None,
        cond_mask_BL: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if cond_mask_BL is not None and not self.args.clean_first_frame:
            raise ValueError(
                "this HunyuanVideo knows no clean tokens (cond_mask_BL): choose a token_replace model.flavor"
            )
        freqs_cis_BLC = rope_freqs_cis(pos_BL3, self.args.axes_dim, self.args.rope_theta)
        kept_BS = None if text_mask_BS is None else leading(text_mask_BS)
        for blocks in (self.double_blocks, self.single_blocks):
            for block in blocks.values():
                x_BLD, text_BSD = block(x_BLD, text_BSD, condition_BTD, freqs_cis_BLC, kept_BS, seq_len, cond_mask_BL)
        return x_BLD, condition_BTD, text_BSD

    def head(self, x_BLD: Tensor, condition_BTD: Tensor, text_BSD: Tensor) -> Tensor:
        """The clean tokens' velocity, which nobody asks for, is computed as if they were noisy, as in the public code."""
        scale, shift = self.head_modulation(F.silu(condition_BTD[:, :1])).chunk(2, dim=-1)
        return self.proj_out(kernels.ada_layer_norm(x_BLD, scale, shift, self.args.eps))


def masked_mean(text_BSD: Tensor, mask_BS: Tensor | None) -> Tensor:
    """Mean of each text's own tokens, [B, D]."""
    if mask_BS is None:
        return kernels.upcast(text_BSD).mean(1)
    weights_BS1 = mask_BS.unsqueeze(-1).to(kernels.upcast(text_BSD).dtype)
    return (kernels.upcast(text_BSD) * weights_BS1).sum(1) / weights_BS1.sum(1)


def leading(mask_BS: Tensor) -> Tensor:
    """The public code counts a text's tokens and lets the blocks see that many from the first on; in a mask without
    gaps it is the same.
    """
    return torch.arange(mask_BS.shape[1], device=mask_BS.device) < mask_BS.sum(1, keepdim=True)


def init_parameter(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """Fill one whole parameter in place, as the public code starts:

    all modulation, and so every block's effect, at zero.
    """
    if "modulation" in name or name.startswith("proj_out.") or name.endswith("bias"):
        tensor.zero_()
    elif "norm" in name:
        tensor.fill_(1)
    elif ".time." in name or ".guidance." in name:
        tensor.normal_(0, 0.02, generator=generator)
    else:
        xavier_uniform_(tensor, generator)
