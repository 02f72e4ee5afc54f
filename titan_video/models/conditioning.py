"""What a model takes beside noise, time and text: declared by its arguments, prepared from data, joined to its tokens.

    form         how the conditioning frames of image-to-video reach the model              models
    mask_first   4 mask channels, then the latents of a clip that is grey elsewhere         Wan 2.1, Wan 2.2 A14B
    mask_last    latents of the first frame, zero elsewhere, then 1 mask channel            HunyuanVideo latent_concat
    clean        the first latent frame holds no noise, and its tokens' time is 0           Wan 2.2 TI2V-5B,
                                                                                            HunyuanVideo token_replace

The channels follow the noised ones. Letters: B batch, C latent channels, F H W latent frames, height, width,
N conditioning frames.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

MASK_CHANNELS = 4  # pixel frames of a latent frame


@dataclass(frozen=True)
class ConditioningSpec:
    """The conditioning of a model's weights; the defaults are text-to-video.

    num_cond_frames: conditioning frames of a clip: 0, 1 (the first) or 2 (the first and the last). form: see above.
    image_tokens: image-encoder tokens of all conditioning frames together. text_image_tokens: tokens of the first frame
    that precede the text's. pooled_text: one vector of the whole text. guidance: the guidance scale is an input.
    first_frame_weight: weight of the first frame in all frames of the initial sample; the rest is noise.
    """

    num_cond_frames: Literal[0, 1, 2] = 0
    form: Literal["", "mask_first", "mask_last", "clean"] = ""
    image_tokens: int = 0
    text_image_tokens: int = 0
    pooled_text: bool = False
    guidance: bool = False
    first_frame_weight: float = 0.0

    @property
    def frames_are_optional(self) -> bool:
        """Whether the weights also take a clip without conditioning frames: the input has the same shape then."""
        return self.form == "clean"

    def initial_latents(self, noise_BCFHW: Tensor, cond_latents_BCFHW: Tensor | None) -> Tensor:
        """What sampling starts from. cond_latents: as in `channels`."""
        if not self.first_frame_weight or cond_latents_BCFHW is None:
            return noise_BCFHW
        return noise_BCFHW * (1 - self.first_frame_weight) + cond_latents_BCFHW * self.first_frame_weight

    def channels(self, cond_latents_BCFHW: Tensor, num_frames: int) -> Tensor | None:
        """What follows the noised channels of a clip of `num_frames` latent frames, [B, C', F, H, W]; None for "clean".

        cond_latents: for mask_first the latents of the whole grey clip, else of the first frame alone.
        """
        B, _, _, H, W = cond_latents_BCFHW.shape
        if self.form == "mask_first":
            # The first latent frame stands for a single pixel frame, which is marked 4 times.
            mask = cond_latents_BCFHW.new_zeros(B, MASK_CHANNELS, num_frames, H, W)
            mask[:, :, 0] = 1
            if self.num_cond_frames == 2:
                mask[:, -1, -1] = 1
            return torch.cat([mask, cond_latents_BCFHW], dim=1)
        if self.form == "mask_last":
            mask = cond_latents_BCFHW.new_ones(B, 1, 1, H, W)
            return F.pad(torch.cat([cond_latents_BCFHW, mask], dim=1), [0, 0, 0, 0, 0, num_frames - 1])
        return None


TEXT_ONLY = ConditioningSpec()
