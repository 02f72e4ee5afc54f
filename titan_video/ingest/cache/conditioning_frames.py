"""Conditioning frames (image-to-video) as a model takes them. The cache, validation and sampling all use this."""

import torch
from torch import Tensor

from titan_video.encoders.spec import Encoders
from titan_video.models.conditioning import ConditioningSpec


@torch.no_grad()
def encode_cond_frames(
    encoders: Encoders, conditioning: ConditioningSpec, cond_frames_CNHW: Tensor, num_frames: int
) -> Tensor:
    """Normalised latents, float32: of the first frame alone [C, 1, h, w], or, for mask_first, of a clip of `num_frames`
    frames that is grey but for these.

    cond_frames_CNHW: uint8 RGB [3, N, H, W], N = conditioning.num_cond_frames.
    """
    assert cond_frames_CNHW.shape[1] == conditioning.num_cond_frames and num_frames > 1
    if conditioning.form == "mask_first":
        return encoders.encode_video(grey_video(cond_frames_CNHW, num_frames)[None])[0].float()
    return encoders.encode_video(cond_frames_CNHW[None, :, :1])[0].float()


@torch.no_grad()
def encode_images(encoders: Encoders, cond_frames_CNHW: Tensor) -> Tensor:
    """Image tokens of the conditioning frames, one frame after the other, [tokens, image_dim]."""
    return encoders.encode_images(cond_frames_CNHW.transpose(0, 1)).flatten(0, 1)


def grey_video(cond_frames_CNHW: Tensor, num_frames: int) -> Tensor:
    """A clip with only the conditioning frames known: float32 [3, num_frames, H, W], -1 to 1, grey elsewhere.

    cond_frames: uint8, N = 1 (the first frame) or 2 (the first and the last).
    """
    known = cond_frames_CNHW.float() / 127.5 - 1
    video = known.new_zeros(known.shape[0], num_frames, *known.shape[2:])
    video[:, 0] = known[:, 0]
    if known.shape[1] == 2:
        video[:, -1] = known[:, 1]
    return video
