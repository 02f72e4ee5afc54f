"""The Wan video diffusion transformer: tokens in, velocity tokens out.

    x_BLP -- patch_embedding ---------------------+                      +-- norm, modulate -- proj_out -- v_BLP
    image -- image_embedder --+                   |                      |
    text -- text_embedder ----+-- context --+     |                      |
    t -- time_embedder -- time_proj -- (+ table of each block) -- blocks: self-attention, cross-attention, feed-forward

How the conditioning frame of image-to-video reaches the model depends on the variant:
    Wan 2.1          as channels of x beside the noised ones, and as image tokens: CLIP features of the first frame, or
                     of the first and the last
    Wan 2.2 A14B     as channels of x only; two models of one architecture share the noise levels (see `boundary`)
    Wan 2.2 TI2V-5B  as tokens: the first latent frame of x holds no noise, and its tokens' time is 0

Architecture: Wan Team 2025, "Wan: open and advanced large-scale video generative models", and its public code
(Wan-Video/Wan2.1, wan/modules/model.py); the tests compare with `diffusers.WanTransformer3DModel`.

Letters: B batch, L video tokens, S context tokens (image, then text), D width, H heads, K head width, P patch width,
C = K / 2 RoPE frequencies, T times of a clip: 1, or 2 where the first frame may be a conditioning frame (row 0 is the
time of the noised tokens, row 1 that of the conditioning tokens, 0).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_video import kernels
from titan_video.models.layers import (
    CastLinear,
    FeedForward,
    InnerAttention,
    Linear,
    RMSStats,
    linear_and_bias,
    local_shard,
    project_and_norm,
    rope_freqs_cis,
    select_modulation,
    time_features,
    xavier_uniform_,
)
from titan_video.models.spec import StepLayout
from titan_video.models.wan.args import WanArgs
from titan_video.tools.parts import resolve

EXPERTS = "titan_video.models.experts"  # optional
IMAGE_EPS = 1e-5  # torch's default


class Attention(nn.Module):
    """Projections of multi-head attention; RMSNorm of q and k runs over the full width, before heads are split."""

    def __init__(self, args: WanArgs):
        super().__init__()
        self.head_dim, self.eps = args.head_dim, args.eps
        self.q, self.k, self.v, self.o = (Linear(args.dim, args.dim) for _ in range(4))
        self.norm_q, self.norm_k = (nn.Parameter(torch.empty(args.dim)) for _ in range(2))
        self.rms_stats = RMSStats()
        self.inner_attention = InnerAttention()

    def project(self, x_BLD: Tensor, context_BSD: Tensor | None, freqs_cis_BLC: Tensor | None) -> tuple | None:
        """See `project_and_norm`; not where a rank has a part of what a norm runs over."""
        if type(self.rms_stats) is not RMSStats:
            return None
        linears, norms = (self.q, self.k, self.v), (self.norm_q, self.norm_k)
        return project_and_norm(x_BLD, context_BSD, linears, norms, freqs_cis_BLC, self.head_dim, self.eps)

    def heads(self, x_BLD: Tensor) -> Tensor:
        return x_BLD.unflatten(-1, (-1, self.head_dim))


class SelfAttention(Attention):
    """Attention among the video tokens, with RoPE. Returns as `linear_and_bias` does."""

    def forward(
        self, x_BLD: Tensor, freqs_cis_BLC: Tensor, layout: StepLayout | None = None
    ) -> tuple[Tensor, Tensor | None]:
        projected = self.project(x_BLD, None, freqs_cis_BLC)
        if projected is not None:
            q, k, v = projected
        else:
            q, k, v = self.q(x_BLD), self.k(x_BLD), self.heads(self.v(x_BLD))
            square_q, square_k = self.rms_stats(q, k)
            q = kernels.rms_norm_rope(q, local_shard(self.norm_q), freqs_cis_BLC, self.eps, square_q)
            k = kernels.rms_norm_rope(k, local_shard(self.norm_k), freqs_cis_BLC, self.eps, square_k)
        return linear_and_bias(self.o, self.inner_attention(q, k, v, layout).flatten(2))


class CrossAttention(Attention):
    """Attention to the text. The same queries attend to the image tokens, if any, with keys and values of their own.

    Returns as `linear_and_bias` does.
    """

    def __init__(self, args: WanArgs):
        super().__init__(args)
        self.text_len = args.text_len
        self.k_image, self.v_image = (Linear(args.dim, args.dim) if args.image_dim else None for _ in range(2))
        self.norm_k_image = nn.Parameter(torch.empty(args.dim)) if args.image_dim else None

    def forward(self, x_BLD: Tensor, context_BSD: Tensor) -> tuple[Tensor, Tensor | None]:
        projected = None if self.k_image is not None else self.project(x_BLD, context_BSD, None)
        if projected is not None:
            return linear_and_bias(self.o, self.inner_attention(*projected).flatten(2))
        image_BSD, text_BSD = context_BSD[:, : -self.text_len], context_BSD[:, -self.text_len :]
        sources = [(self.k(text_BSD), self.norm_k, self.v(text_BSD))]
        if self.k_image is not None:
            sources.append((self.k_image(image_BSD), self.norm_k_image, self.v_image(image_BSD)))
        q = self.q(x_BLD)
        square_q, *squares = self.rms_stats(q, *(k for k, _, _ in sources))
        q = self.heads(kernels.rms_norm(q, local_shard(self.norm_q), self.eps, square_q))
        outputs = []
        for (k, weight, v), square in zip(sources, squares, strict=True):
            k = self.heads(kernels.rms_norm(k, local_shard(weight), self.eps, square))
            outputs.append(self.inner_attention(q, k, self.heads(v)))
        return linear_and_bias(self.o, sum(outputs[1:], outputs[0]).flatten(2))


class Block(nn.Module):
    """Self-attention and feed-forward, each with shift, scale and gate from the time; between them cross-attention."""

    def __init__(self, args: WanArgs, has_experts: bool = False):
        super().__init__()
        self.eps = args.eps
        self.self_attn = SelfAttention(args)
        self.cross_attn = CrossAttention(args)
        self.ffn = None if has_experts else FeedForward(args.dim, args.ffn_dim)
        self.moe = _experts("MoE")(args.dim, args.experts) if has_experts else None
        self.norm_weight, self.norm_bias = (nn.Parameter(torch.empty(args.dim)) for _ in range(2))

    def forward(
        self,
        x_BLD: Tensor,
        context_BSD: Tensor,
        modulation_BT6D: Tensor,
        freqs_cis_BLC: Tensor,
        layout: StepLayout | None = None,
        cond_mask_BL: Tensor | None = None,
        routing: Any = None,
    ) -> Tensor:
        """routing: of a block with experts (models/experts.py)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = select_modulation(modulation_BT6D, cond_mask_BL).unbind(2)
        norm_weight, norm_bias = local_shard(self.norm_weight), local_shard(self.norm_bias)
        y, x_BLD = kernels.ada_layer_norm_and_input(x_BLD, scale1, shift1, self.eps, cond_mask_BL)
        y, bias = self.self_attn(y, freqs_cis_BLC, layout)
        x_BLD, y = kernels.residual_layer_norm(x_BLD, y, gate1, norm_weight, norm_bias, self.eps, cond_mask_BL, bias)
        y, bias = self.cross_attn(y, context_BSD)
        x_BLD, y = kernels.residual_ada_layer_norm(x_BLD, y, None, scale2, shift2, self.eps, cond_mask_BL, bias)
        y, bias = self.ffn(y) if self.moe is None else self.moe(y, x_BLD, routing, layout)
        return kernels.gated_residual(x_BLD, y, gate2, cond_mask_BL, bias)


def _experts(name: str) -> Any:
    return resolve(f"{EXPERTS}:{name}", asked_by="model.flavor")


class TextEmbedder(nn.Module):
    def __init__(self, args: WanArgs):
        super().__init__()
        self.up, self.down = CastLinear(args.text_dim, args.dim), nn.Linear(args.dim, args.dim)

    def forward(self, text_BSD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(text_BSD), approximate="tanh"))


class ImageEmbedder(nn.Module):
    """Image tokens [B, I, image_dim] -> [B, I, D].

    Its LayerNorm and GELU follow torch's defaults, unlike the rest of Wan's.
    """

    def __init__(self, args: WanArgs):
        super().__init__()
        width = args.image_dim
        self.positions = nn.Parameter(torch.empty(args.image_len, width)) if args.image_positions else None
        self.norm_in_weight, self.norm_in_bias = (nn.Parameter(torch.empty(width)) for _ in range(2))
        self.up, self.down = CastLinear(width, width), nn.Linear(width, args.dim)
        self.norm_out_weight, self.norm_out_bias = (nn.Parameter(torch.empty(args.dim)) for _ in range(2))

    def forward(self, image_BSD: Tensor) -> Tensor:
        image_BSD = image_BSD.to(torch.promote_types(image_BSD.dtype, self.norm_in_weight.dtype))
        if self.positions is not None:
            image_BSD = image_BSD + self.positions
        y = kernels.layer_norm(image_BSD, self.norm_in_weight, self.norm_in_bias, IMAGE_EPS)
        return kernels.layer_norm(self.down(F.gelu(self.up(y))), self.norm_out_weight, self.norm_out_bias, IMAGE_EPS)


class TimeEmbedder(nn.Module):
    def __init__(self, args: WanArgs):
        super().__init__()
        self.freq_dim = args.freq_dim
        self.up, self.down = nn.Linear(args.freq_dim, args.dim), nn.Linear(args.dim, args.dim)

    def forward(self, t: Tensor) -> Tensor:
        return self.down(F.silu(self.up(time_features(t, self.freq_dim).to(self.up.weight.dtype))))


class WanModel(nn.Module):
    """See the top of the file.

    Each block's modulation table and router belong to the root, not to the block: the root holds all float32
    parameters, so one small FSDP unit keeps them and each block's unit has a single type.
    """

    def __init__(self, args: WanArgs):
        super().__init__()
        if args.dim % args.num_heads or args.head_dim % 2:
            raise ValueError(f"Wan: width {args.dim} does not split into {args.num_heads} heads of even width")
        self.args = args
        self.patch_embedding = CastLinear(args.in_channels * args.patch_volume, args.dim)
        self.text_embedder = TextEmbedder(args)
        self.image_embedder = ImageEmbedder(args) if args.image_dim else None
        self.time_embedder = TimeEmbedder(args)
        self.time_proj = nn.Linear(args.dim, 6 * args.dim)
        self.modulation = nn.ParameterDict(
            {str(i): nn.Parameter(torch.empty(6, args.dim)) for i in range(args.num_layers)}
        )
        with_experts = args.experts.blocks(args.num_layers) if args.experts else range(0)
        self.blocks = nn.ModuleDict({str(i): Block(args, i in with_experts) for i in range(args.num_layers)})
        self.routers = nn.ModuleDict({str(i): _experts("Router")(args.dim, args.experts) for i in with_experts})
        self.head_modulation = nn.Parameter(torch.empty(2, args.dim))
        self.proj_out = nn.Linear(args.dim, args.out_channels * args.patch_volume)

    def forward(
        self,
        x_BLP: Tensor,
        pos_BL3: Tensor,
        t_B: Tensor,
        text_BSD: Tensor,
        text_mask_BS: Tensor | None = None,
        layout: StepLayout | None = None,
        image_BSD: Tensor | None = None,
        cond_mask_BL: Tensor | None = None,
    ) -> Tensor:
        """Velocity [B, L, P_out] of the noised tokens x.

        x: conditioning channels, if any, follow the noised ones. pos: global token positions [B or 1, L, 3]. t: 1000
        sigma, float32. text: [B, text_len, text_dim], zero beyond each prompt's length; Wan attends to that padding
        too, so text_mask is not used. layout: where x is one rank's slice of the clip; None: x is the clip.
        image: [B, image_len, image_dim], tokens of the first, then of the last conditioning frame.
        cond_mask: bool [B or 1, L], the tokens of a conditioning first frame; None: there is none.
        """
        state = self.embed(x_BLP, t_B, text_BSD, image_BSD)
        state = self.trunk(*state, pos_BL3=pos_BL3, layout=layout, cond_mask_BL=cond_mask_BL, t_B=t_B)
        return self.head(*state, cond_mask_BL=cond_mask_BL)

    # The three parts of a forward. A pipeline stage runs those whose modules it has, and sends what `embed` and `trunk`
    # return to the next stage.

    def embed(
        self, x_BLP: Tensor, t_B: Tensor, text_BSD: Tensor, image_BSD: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens [B, L, D], time [B, T, D] and its projection [B, T, 6D], context [B, S, D]."""
        self._check(text_BSD, image_BSD)
        t_BT = torch.stack([t_B, torch.zeros_like(t_B)], dim=1) if self.args.clean_first_frame else t_B.unsqueeze(1)
        time_BTD = self.time_embedder(t_BT)
        context_BSD = self.text_embedder(text_BSD)
        if image_BSD is not None:
            context_BSD = torch.cat([self.image_embedder(image_BSD), context_BSD], dim=1)
        return self.patch_embedding(x_BLP), time_BTD, self.time_proj(F.silu(time_BTD)), context_BSD

    def trunk(
        self,
        x_BLD: Tensor,
        time_BTD: Tensor,
        time_BTE: Tensor,
        context_BSD: Tensor,
        pos_BL3: Tensor,
        layout: StepLayout | None = None,
        cond_mask_BL: Tensor | None = None,
        t_B: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The state after the blocks, in the shapes of `embed`."""
        assert cond_mask_BL is None or self.args.clean_first_frame
        freqs_cis_BLC = rope_freqs_cis(pos_BL3, self.args.axes_dim, self.args.rope_theta)
        time_BT6D = time_BTE.unflatten(-1, (6, -1))
        for name, block in self.blocks.items():
            modulation = time_BT6D + self.modulation[name]
            routing = self.routers[name](t_B) if name in self.routers else None
            x_BLD = block(x_BLD, context_BSD, modulation, freqs_cis_BLC, layout, cond_mask_BL, routing)
        return x_BLD, time_BTD, time_BTE, context_BSD

    def head(
        self, x_BLD: Tensor, time_BTD: Tensor, time_BTE: Tensor, context_BSD: Tensor, cond_mask_BL: Tensor | None = None
    ) -> Tensor:
        """Velocity tokens from the trunk's state."""
        shift, scale = select_modulation(time_BTD.unsqueeze(2) + self.head_modulation, cond_mask_BL).unbind(2)
        return self.proj_out(kernels.ada_layer_norm(x_BLD, scale, shift, self.args.eps, cond_mask_BL))

    def _check(self, text_BSD: Tensor, image_BSD: Tensor | None) -> None:
        if text_BSD.shape[1] != self.args.text_len:
            raise ValueError(
                f"Wan was built for {self.args.text_len} text tokens, got {text_BSD.shape[1]}: set "
                f"encoder.max_text_length to fit"
            )
        num_image_tokens = 0 if image_BSD is None else image_BSD.shape[1]
        if num_image_tokens != self.args.image_len:
            raise ValueError(
                f"Wan was built for {self.args.image_len} image tokens, got {num_image_tokens}: choose "
                f"model.flavor to fit the conditioning frames"
            )


def init_parameter(name: str, tensor: Tensor, generator: torch.Generator, shape: torch.Size | None = None) -> None:
    """Fill one full parameter in place, as the public code initialises its training runs. shape: see ModelSpec."""
    if name.endswith("modulation") or name.startswith("modulation."):
        tensor.normal_(0, (shape or tensor.shape)[-1] ** -0.5, generator=generator)
    elif name.startswith("proj_out.") or name.endswith(("bias", ".positions")):
        tensor.zero_()
    elif "norm" in name:
        tensor.fill_(1)
    elif name.startswith(("text_embedder.", "time_embedder.")):
        tensor.normal_(0, 0.02, generator=generator)
    else:
        xavier_uniform_(tensor, generator, shape)
