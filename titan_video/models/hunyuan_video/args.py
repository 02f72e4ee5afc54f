"""Architecture of HunyuanVideo: sizes, what it takes beside noise, time and text, and its FLOPs."""

from dataclasses import dataclass

from titan_video.models.conditioning import ConditioningSpec
from titan_video.models.layers import Patch, attention_flops

TIME_DIM = 256  # width of the time features
IMAGE_TOKENS = 576  # of one image, before they are thinned out
FIRST_FRAME_WEIGHT = 0.001  # of the first frame in what the public image-to-video samplers start from
REFINER_RATIO = 4  # feed-forward width of the text refiner, in widths


@dataclass(frozen=True)
class HunyuanVideoArgs:
    """Architecture. The defaults that no flavor changes are those of every public HunyuanVideo.

    in_channels: latent channels, then, beyond `out_channels`, conditioning channels. pooled_dim: width of the vector of
    the whole text. guidance: the guidance scale is an input (a distilled model).
    axes_dim: head channels whose RoPE angle follows the frame, the row and the column.
    image_condition: "", "latent_concat" or "token_replace".
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
        """Double and single blocks."""
        return self.num_double_layers + self.num_single_layers

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def conditioning(self) -> ConditioningSpec:
        """What the model takes beside noise, time and text."""
        common = {"pooled_text": True, "guidance": self.guidance}
        if self.image_condition == "latent_concat":
            return ConditioningSpec(
                num_cond_frames=1,
                form="mask_last",
                text_image_tokens=IMAGE_TOKENS // 2,
                first_frame_weight=FIRST_FRAME_WEIGHT,
                **common,
            )
        if self.image_condition == "token_replace":
            return ConditioningSpec(
                num_cond_frames=1,
                form="clean",
                text_image_tokens=IMAGE_TOKENS // 4,
                first_frame_weight=FIRST_FRAME_WEIGHT,
                **common,
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
        """Whether the first latent frame may be a conditioning frame."""
        return self.image_condition == "token_replace"

    def block_flops(self, num_tokens: int, batch: int = 1) -> int:
        """FLOPs of all blocks' forward for `batch` clips of `num_tokens` tokens."""
        N, D, T = num_tokens + self.text_len, self.dim, 1 + self.clean_first_frame
        linear = 2 * N * (4 * D * D + 2 * D * self.ffn_dim)
        double = linear + 2 * (T + 1) * 6 * D * D  # the text is modulated by one time only
        single = linear + 2 * T * 3 * D * D
        attention = self.num_layers * attention_flops(batch, N, N, D)
        return batch * (self.num_double_layers * double + self.num_single_layers * single) + attention

    def down_flops(self, num_tokens: int, batch: int = 1) -> int:
        """The part of `block_flops` that is the matmul after each GELU; a single block's also reads the attention."""
        inputs = self.num_double_layers * self.ffn_dim + self.num_single_layers * (self.dim + self.ffn_dim)
        return batch * 2 * (num_tokens + self.text_len) * self.dim * inputs

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
