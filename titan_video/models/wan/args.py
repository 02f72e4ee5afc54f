"""Architecture of Wan: sizes, what it takes beside noise, time and text, and its FLOPs."""

from dataclasses import dataclass

from titan_video.models.conditioning import ConditioningSpec
from titan_video.models.layers import Patch, attention_flops
from titan_video.models.spec import ExpertArgs


@dataclass(frozen=True)
class WanArgs:
    """Architecture. The defaults that no flavor changes are those of every public Wan.

    in_channels: latent channels, then, beyond `out_channels`, conditioning channels.
    image_dim, image_len: width and number of the image tokens, 0 for none. image_positions: a table of positions is
    added to them. clean_first_frame: the first latent frame may be a conditioning frame.
    boundary: sigma at and above which the high-noise expert of two is used; 0: one model for all noise levels.
    experts: of a mixture in place of some feed-forwards.
    """

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
    image_dim: int = 0
    image_len: int = 0
    image_positions: bool = False
    clean_first_frame: bool = False
    boundary: float = 0.0
    experts: ExpertArgs | None = None

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def axes_dim(self) -> tuple[int, int, int]:
        """Head channels whose RoPE angle follows the frame, the row and the column: 44, 42, 42 of 128."""
        side = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * side, side, side

    @property
    def conditioning(self) -> ConditioningSpec:
        """What the model takes beside noise, time and text."""
        if self.in_channels > self.out_channels:
            return ConditioningSpec(
                num_cond_frames=2 if self.image_positions else 1, form="mask_first", image_tokens=self.image_len
            )
        return ConditioningSpec(num_cond_frames=1, form="clean") if self.clean_first_frame else ConditioningSpec()

    @property
    def patch_volume(self) -> int:
        return self.patch[0] * self.patch[1] * self.patch[2]

    def block_flops(self, num_tokens: int, batch: int = 1) -> int:
        """FLOPs of all blocks' forward for `batch` clips of `num_tokens` tokens."""
        L, S, D = num_tokens, self.text_len + self.image_len, self.dim
        linear = 2 * L * 4 * D * D + 2 * (2 * L + 2 * S) * D * D
        blocks = batch * linear + attention_flops(batch, L, L, D) + attention_flops(batch, L, S, D)
        return self.num_layers * blocks + 2 * self.down_flops(L, batch) + self._router_flops(L, batch)

    def down_flops(self, num_tokens: int, batch: int = 1) -> int:
        """The part of `block_flops` that is the matmul after each GELU. Of experts, those that are active."""
        widths = self.num_layers * num_tokens * self.ffn_dim
        if e := self.experts:
            num = len(e.blocks(self.num_layers))
            widths += num * (e.num_rows(num_tokens) * e.expert_dim + num_tokens * (e.shared_dim - self.ffn_dim))
        return 2 * batch * self.dim * widths

    def _router_flops(self, num_tokens: int, batch: int) -> int:
        e = self.experts
        return 2 * batch * num_tokens * self.dim * e.num_experts * len(e.blocks(self.num_layers)) if e else 0

    def flops(self, num_tokens: int, batch: int = 1) -> int:
        """FLOPs of a forward, 2 per multiply-add, for `batch` clips of `num_tokens` tokens.

        Backward takes twice as many.
        """
        D, patch = self.dim, self.patch_volume
        ends = 2 * num_tokens * patch * (self.in_channels + self.out_channels) * D
        text = 2 * self.text_len * (self.text_dim * D + D * D)
        image = 2 * self.image_len * (self.image_dim * self.image_dim + self.image_dim * D)
        time = (1 + self.clean_first_frame) * 2 * (self.freq_dim * D + D * D + 6 * D * D)
        return self.block_flops(num_tokens, batch) + batch * (ends + text + image + time)
