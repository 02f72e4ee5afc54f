"""The Wan video diffusion transformer: tokens in, velocity tokens out.

    x_BLP -- patch_embedding --+                                       +-- norm, modulate -- proj_out -- v_BLP
    text -- text_embedder --+  |                                       |
    t -- time_embedder -- time_proj -- (+ table of each block) -- blocks: self-attention, cross-attention, feed-forward

Architecture: Wan Team 2025, "Wan: open and advanced large-scale video generative models", and its public code
(Wan-Video/Wan2.1, wan/modules/model.py); `diffusers.WanTransformer3DModel` is the oracle of the tests.

Letters: B batch, L video tokens, S text tokens, D width, H heads, K head width, P patch width, T time tokens (1, or L for per-token time).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_video.kernels import ada_layer_norm, gated_residual, layer_norm, rms_norm, rms_norm_rope
from titan_video.models.layers import (
    AttentionCore,
    CastLinear,
    Linear,
    MeanSquares,
    Patch,
    attention_flops,
    local,
    rope_rotations,
    time_features,
    xavier_uniform_,
)


@dataclass(frozen=True)
class WanArgs:
    """Architecture. The defaults that no flavor changes are those of every public Wan."""

    dim: int
    num_heads: int
    num_layers: int
    ffn_dim: int
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    patch: Patch = (1, 2, 2)
    eps: float = 1e-6
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def axes_dim(self) -> tuple[int, int, int]:
        """Head channels that turn with the frame, the row and the column: 44, 42, 42 of 128."""
        side = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * side, side, side

    @property
    def patch_volume(self) -> int:
        return self.patch[0] * self.patch[1] * self.patch[2]

    def block_flops(self, num_tokens: int, batch: int = 1) -> int:
        """FLOPs of all blocks' forward for `batch` clips of `num_tokens` tokens."""
        L, S, D = num_tokens, self.text_len, self.dim
        linear = 2 * L * (4 * D * D + 2 * D * self.ffn_dim) + 2 * (2 * L + 2 * S) * D * D
        return self.num_layers * (batch * linear + attention_flops(batch, L, L, D) + attention_flops(batch, L, S, D))

    def flops(self, num_tokens: int, batch: int = 1) -> int:
        """FLOPs of a forward, 2 per multiply-add, for `batch` clips of `num_tokens` tokens and one time per clip. Backward takes twice as many."""
        D, patch = self.dim, self.patch_volume
        ends = 2 * num_tokens * patch * (self.in_channels + self.out_channels) * D
        text = 2 * self.text_len * (self.text_dim * D + D * D)
        time = 2 * (self.freq_dim * D + D * D + 6 * D * D)
        return self.block_flops(num_tokens, batch) + batch * (ends + text + time)


class Attention(nn.Module):
    """Multi-head attention with RMSNorm of q and k over the whole width, all heads together, before the heads are split."""

    def __init__(self, args: WanArgs):
        super().__init__()
        self.head_dim, self.eps = args.head_dim, args.eps
        self.q, self.k, self.v, self.o = (Linear(args.dim, args.dim) for _ in range(4))
        self.norm_q, self.norm_k = (nn.Parameter(torch.empty(args.dim)) for _ in range(2))
        self.mean_squares, self.core = MeanSquares(), AttentionCore()

    def forward(
        self, x_BLD: Tensor, text_BSD: Tensor | None = None, rotations_BLC: Tensor | None = None, seq_len: int | None = None
    ) -> Tensor:
        """Attention of x to the text, or without one to x itself, turned by rotations, of which seq_len tokens count."""
        source_BSD = x_BLD if text_BSD is None else text_BSD
        q, k, v = self.q(x_BLD), self.k(source_BSD), self.v(source_BSD).unflatten(-1, (-1, self.head_dim))
        square_q, square_k = self.mean_squares(q, k)
        parts = (q, local(self.norm_q), square_q), (k, local(self.norm_k), square_k)
        if rotations_BLC is not None:
            q, k = (rms_norm_rope(y, w, rotations_BLC, self.eps, square) for y, w, square in parts)
        else:
            q, k = (rms_norm(y, w, self.eps, square).unflatten(-1, (-1, self.head_dim)) for y, w, square in parts)
        return self.o(self.core(q, k, v, seq_len).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, args: WanArgs):
        super().__init__()
        self.up, self.down = Linear(args.dim, args.ffn_dim), Linear(args.ffn_dim, args.dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BLD), approximate="tanh"))


class Block(nn.Module):
    """Self-attention and feed-forward, each with shift, scale and gate from the time; cross-attention to the text between them, without."""

    def __init__(self, args: WanArgs):
        super().__init__()
        self.eps = args.eps
        self.self_attn, self.cross_attn, self.ffn = Attention(args), Attention(args), FeedForward(args)
        self.norm_weight, self.norm_bias = (nn.Parameter(torch.empty(args.dim)) for _ in range(2))

    def forward(
        self, x_BLD: Tensor, text_BSD: Tensor, modulation_BT6D: Tensor, rotations_BLC: Tensor, seq_len: int | None = None
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation_BT6D.unbind(2)
        y = ada_layer_norm(x_BLD, scale1, shift1, self.eps)
        x_BLD = gated_residual(x_BLD, self.self_attn(y, None, rotations_BLC, seq_len), gate1)
        y = layer_norm(x_BLD, local(self.norm_weight), local(self.norm_bias), self.eps)
        x_BLD = x_BLD + self.cross_attn(y, text_BSD)
        y = ada_layer_norm(x_BLD, scale2, shift2, self.eps)
        return gated_residual(x_BLD, self.ffn(y), gate2)


class TextEmbedder(nn.Module):
    def __init__(self, args: WanArgs):
        super().__init__()
        self.up, self.down = CastLinear(args.text_dim, args.dim), nn.Linear(args.dim, args.dim)

    def forward(self, text_BSD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(text_BSD), approximate="tanh"))


class TimeEmbedder(nn.Module):
    def __init__(self, args: WanArgs):
        super().__init__()
        self.freq_dim = args.freq_dim
        self.up, self.down = nn.Linear(args.freq_dim, args.dim), nn.Linear(args.dim, args.dim)

    def forward(self, t: Tensor) -> Tensor:
        return self.down(F.silu(self.up(time_features(t, self.freq_dim).to(self.up.weight.dtype))))


class WanModel(nn.Module):
    """See the top of the file. Each block's modulation table lives here and not in the block: the root holds everything that
    stays in float32, so one small FSDP unit keeps it so and the blocks' units have one type each.
    """

    def __init__(self, args: WanArgs):
        super().__init__()
        if args.dim % args.num_heads or args.head_dim % 2:
            raise ValueError(f"Wan: width {args.dim} does not split into {args.num_heads} heads of even width")
        self.args = args
        self.patch_embedding = CastLinear(args.in_channels * args.patch_volume, args.dim)
        self.text_embedder = TextEmbedder(args)
        self.time_embedder = TimeEmbedder(args)
        self.time_proj = nn.Linear(args.dim, 6 * args.dim)
        self.modulation = nn.ParameterDict({str(i): nn.Parameter(torch.empty(6, args.dim)) for i in range(args.num_layers)})
        self.blocks = nn.ModuleDict({str(i): Block(args) for i in range(args.num_layers)})
        self.head_modulation = nn.Parameter(torch.empty(2, args.dim))
        self.proj_out = nn.Linear(args.dim, args.out_channels * args.patch_volume)

    def forward(
        self, x_BLP: Tensor, pos_BL3: Tensor, t_B: Tensor, text_BSD: Tensor, text_mask_BS: Tensor | None = None, seq_len: int | None = None
    ) -> Tensor:
        """Velocity [B, L, P_out] of the noisy tokens x.

        pos: global token positions [B or 1, L, 3]; t: 1000 s, float32, [B] or [B, L]; text: [B, text_len, text_dim], zero beyond
        each prompt's length. Wan attends to those zeros too (as keys they are what the biases make of them), so the mask is not used.
        seq_len: tokens of the whole clip, where x is one rank's slice of them or ends in padding; None: x is the clip.
        """
        state = self.embed(x_BLP, t_B, text_BSD)
        return self.head(*self.trunk(*state, pos_BL3, seq_len))

    # The three parts of a forward. A pipeline stage runs those whose modules it has, and sends what `embed` and `trunk` return to the next.

    def embed(self, x_BLP: Tensor, t_B: Tensor, text_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens [B, L, D], time [B, T, D] and its projection [B, T, 6D], text [B, S, D]."""
        if text_BSD.shape[1] != self.args.text_len:
            raise ValueError(f"Wan was built for {self.args.text_len} text tokens, got {text_BSD.shape[1]}: set encoder.max_text_length to fit")
        time_BTD = self.time_embedder(t_B if t_B.ndim == 2 else t_B.unsqueeze(1))
        return self.patch_embedding(x_BLP), time_BTD, self.time_proj(F.silu(time_BTD)), self.text_embedder(text_BSD)

    def trunk(
        self, x_BLD: Tensor, time_BTD: Tensor, time_BTE: Tensor, text_BSD: Tensor, pos_BL3: Tensor, seq_len: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rotations_BLC = rope_rotations(pos_BL3, self.args.axes_dim, self.args.rope_theta)
        time_BT6D = time_BTE.unflatten(-1, (6, -1))
        for name, block in self.blocks.items():
            x_BLD = block(x_BLD, text_BSD, time_BT6D + self.modulation[name], rotations_BLC, seq_len)
        return x_BLD, time_BTD, time_BTE, text_BSD

    def head(self, x_BLD: Tensor, time_BTD: Tensor, *_: Tensor) -> Tensor:
        shift, scale = (time_BTD.unsqueeze(2) + self.head_modulation).unbind(2)
        return self.proj_out(ada_layer_norm(x_BLD, scale, shift, self.args.eps))


def init_parameter(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """Fill one whole parameter in place, as the public code starts its training runs."""
    if name.endswith("modulation") or name.startswith("modulation."):
        tensor.normal_(0, tensor.shape[-1] ** -0.5, generator=generator)
    elif name.startswith("proj_out.") or name.endswith("bias"):
        tensor.zero_()
    elif "norm" in name:
        tensor.fill_(1)
    elif name.startswith(("text_embedder.", "time_embedder.")):
        tensor.normal_(0, 0.02, generator=generator)
    else:
        xavier_uniform_(tensor, generator)
