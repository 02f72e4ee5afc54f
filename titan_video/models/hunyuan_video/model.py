"""The HunyuanVideo diffusion transformer: tokens in, velocity tokens out.

    t, guidance, pooled text -- condition ----------- one vector that modulates every norm below
    x_BLP -- patch_embedding --+
    text -- text_refiner ------+- double blocks: separate weights for video and text
              |                   single blocks: shared weights -- proj_out -- v_BLP
    t, mean text -- text_condition

In each block video and text tokens attend to each other in one attention, which leaves out the text's padding. How the
conditioning frame of image-to-video reaches the model depends on the variant:
    latent_concat   as channels of x beside the noised ones: the frame's latents, zero elsewhere, and a mask channel
    token_replace   as tokens: the first latent frame of x holds no noise, and its tokens are modulated with time 0

Architecture: Kong et al. 2024, "HunyuanVideo: a systematic framework for large video generative models", and its public
code (Tencent-Hunyuan/HunyuanVideo, hyvideo/modules); the tests compare with
`diffusers.HunyuanVideoTransformer3DModel`.

Float32: the public code computes condition and modulation in the type of the weights. Here the small networks that make
the condition, and the last modulation, keep float32 weights. A block's modulation is a third of the block's weights, so
its weights have the block's type, and it is float32 only before and after the matmul.

Letters: B batch, L video tokens, S text tokens, D width, H heads, K head width, E feed-forward width, P patch width,
C = K / 2 RoPE frequencies, T times of a clip: 1, or 2 where the first frame may be a conditioning frame (row 0 is the
time of the noised tokens, row 1 that of the conditioning tokens, 0).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_video import kernels
from titan_video.models.hunyuan_video.args import HunyuanVideoArgs
from titan_video.models.hunyuan_video.blocks import Condition, DoubleBlock, SingleBlock, TextRefiner
from titan_video.models.layers import CastLinear, rope_freqs_cis, xavier_uniform_
from titan_video.models.spec import StepLayout


class HunyuanVideoModel(nn.Module):
    """See the top of the file."""

    def __init__(self, args: HunyuanVideoArgs):
        super().__init__()
        if args.dim % args.num_heads or sum(args.axes_dim) != args.head_dim or any(n % 2 for n in args.axes_dim):
            raise ValueError(
                f"HunyuanVideo: width {args.dim} in {args.num_heads} heads does not fit RoPE over "
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
        layout: StepLayout | None = None,
        pooled_text_BD: Tensor | None = None,
        guidance_B: Tensor | None = None,
        cond_mask_BL: Tensor | None = None,
    ) -> Tensor:
        """Velocity [B, L, P_out] of the noised tokens x.

        x: conditioning channels, if any, follow the noised ones. pos: global token positions [B or 1, L, 3].
        t: 1000 sigma, float32. text: [B, S, text_dim]. text_mask: bool [B, S], the text tokens that count, at least one
        per clip; None: all. layout: where x is one rank's slice of the clip; None: x is the clip.
        pooled_text: [B, pooled_dim]. guidance: 1000 times the guidance scale, float32.
        cond_mask: bool [B or 1, L], the tokens of a conditioning first frame; None: there is none.
        """
        state = self.embed(x_BLP, t_B, text_BSD, text_mask_BS, pooled_text_BD, guidance_B)
        state = self.trunk(*state, pos_BL3=pos_BL3, layout=layout, text_mask_BS=text_mask_BS, cond_mask_BL=cond_mask_BL)
        return self.head(*state)

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
                "takes the guidance scale of each clip" if self.args.guidance else "has no guidance input, but got one"
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
        layout: StepLayout | None = None,
        text_mask_BS: Tensor | None = None,
        cond_mask_BL: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if cond_mask_BL is not None and not self.args.clean_first_frame:
            raise ValueError(
                "this HunyuanVideo takes no conditioning first frame (cond_mask_BL): choose a token_replace "
                "model.flavor"
            )
        freqs_cis_BLC = rope_freqs_cis(pos_BL3, self.args.axes_dim, self.args.rope_theta)
        visible_BS = None if text_mask_BS is None else leading(text_mask_BS)
        for blocks in (self.double_blocks, self.single_blocks):
            for block in blocks.values():
                x_BLD, text_BSD = block(x_BLD, text_BSD, condition_BTD, freqs_cis_BLC, visible_BS, layout, cond_mask_BL)
        return x_BLD, condition_BTD, text_BSD

    def head(self, x_BLD: Tensor, condition_BTD: Tensor, text_BSD: Tensor) -> Tensor:
        """Velocity tokens. Those of a conditioning frame, which no loss reads, are modulated like noised ones, as in
        the public code."""
        scale, shift = self.head_modulation(F.silu(condition_BTD[:, :1])).chunk(2, dim=-1)
        return self.proj_out(kernels.ada_layer_norm(x_BLD, scale, shift, self.args.eps))


def masked_mean(text_BSD: Tensor, mask_BS: Tensor | None) -> Tensor:
    """Mean of each text's own tokens, [B, D]."""
    if mask_BS is None:
        return kernels.upcast(text_BSD).mean(1)
    weights_BS1 = mask_BS.unsqueeze(-1).to(kernels.upcast(text_BSD).dtype)
    return (kernels.upcast(text_BSD) * weights_BS1).sum(1) / weights_BS1.sum(1)


def leading(mask_BS: Tensor) -> Tensor:
    """The mask that the public code gives to the blocks: as many leading tokens as the text has tokens that count.

    In a mask without gaps it is the same.
    """
    return torch.arange(mask_BS.shape[1], device=mask_BS.device) < mask_BS.sum(1, keepdim=True)


def init_parameter(name: str, tensor: Tensor, generator: torch.Generator, shape: torch.Size | None = None) -> None:
    """Fill one full parameter in place, as the public code initialises: all modulation, and so every block, at zero.

    shape: see ModelSpec.
    """
    if "modulation" in name or name.startswith("proj_out.") or name.endswith("bias"):
        tensor.zero_()
    elif "norm" in name:
        tensor.fill_(1)
    elif ".time." in name or ".guidance." in name:
        tensor.normal_(0, 0.02, generator=generator)
    else:
        xavier_uniform_(tensor, generator, shape)
