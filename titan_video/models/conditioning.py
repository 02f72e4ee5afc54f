"""What a model is given beside noise, time and text: declared by its architecture arguments, prepared from data, joined
to its tokens.

    form            how the given frames of image-to-video come in                                        models
    mask_first      4 channels mark their pixel frames, then latents of the clip with all others grey     Wan 2.1, Wan 2.2 A14B
    mask_last       latents of the first frame, zero beyond it, then 1 channel marks it                   HunyuanVideo latent_concat
    clean           the first latent frame is no noise but theirs; its tokens' time is 0                  Wan 2.2 TI2V-5B, HunyuanVideo token_replace

Channels follow the noisy ones. Letters: B batch, C latent channels, F H W latent frames, height, width, N given frames.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

MASK_CHANNELS = 4  # pixel frames of a latent frame


@dataclass(frozen=True)
class ConditioningSpec:
    """All empty: text-to-video.

    num_cond_frames: frames of the clip that the model is given: 0, 1 (the first), 2 (the first and the last). form: see
        above.
    image_tokens: tokens of the given frames from an image encoder, of all frames together. text_image_tokens: tokens of
    the first frame with which the text begins. pooled_text: a vector of the whole text. guidance: the guidance scale is
    an input.
    still: share of the first frame, in all frames, in what sampling starts from; the rest is noise.
    """

    num_cond_frames: Literal[0, 1, 2] = 0
    form: Literal["", "mask_first", "mask_last", "clean"] = ""
    image_tokens: int = 0
    text_image_tokens: int = 0
    pooled_text: bool = False
    guidance: bool = False
    still: float = 0.0

    @property
    def is_clean(self) -> bool:
        """Whether the first latent frame is given, so nothing is to be learned there."""
        return self.form == "clean"

    def num_loss_elements(self, latents_BCFHW: Tensor) -> int:
        """Elements of clips that count in the loss."""
        frames = latents_BCFHW.shape[2]
        return latents_BCFHW.numel() // frames * (frames - self.is_clean)

    def start(self, noise_BCFHW: Tensor, cond_latents_BCFHW: Tensor | None) -> Tensor:
        """What sampling starts from. given: as in `channels`."""
        return noise_BCFHW * (1 - self.still) + cond_latents_BCFHW * self.still if self.still else noise_BCFHW

    def channels(self, cond_latents_BCFHW: Tensor, num_frames: int) -> Tensor | None:
        """What follows the noisy channels of a clip of `num_frames` latent frames, [B, C', F, H, W]; None for other
        forms.

        given: for mask_first the latents of the whole grey clip, else of the first frame alone.
        """
        B, _, _, H, W = cond_latents_BCFHW.shape
        if self.form == "mask_first":
            # A latent frame stands for 4 pixel frames, the first one for a single frame, which is marked 4 times.
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


def grey_video(cond_frames_CNHW: Tensor, num_frames: int) -> Tensor:
    """A clip of which only the first frame, or the first and the last, is known: float32 [3, num_frames, H, W], from -1
    to 1, grey between.

    given: uint8, N = 1 or 2.
    """
    known = cond_frames_CNHW.float() / 127.5 - 1
    video = known.new_zeros(known.shape[0], num_frames, *known.shape[2:])
    video[:, 0] = known[:, 0]
    if known.shape[1] == 2:
        video[:, -1] = known[:, 1]
    return video
