"""Given frames (image-to-video) as a model takes them: the one way for the cache, for validation and for sampling."""

import torch
from torch import Tensor

from titan_video.encoders.spec import Encoders
from titan_video.flow.conditions import Conditions, grey_video


@torch.no_grad()
def encode_given(encoders: Encoders, conditions: Conditions, given_CNHW: Tensor, num_frames: int) -> Tensor:
    """Normalised latents, float32: of the first frame alone [C, 1, h, w], or, for mask_first, of a clip of `num_frames`
    with these frames only.

    given: uint8 RGB [3, N, H, W], N = conditions.num_given.
    """
    assert given_CNHW.shape[1] == conditions.num_given and num_frames > 1
    if conditions.form == "mask_first":
        return encoders.encode_video(grey_video(given_CNHW, num_frames)[None])[0].float()
    return encoders.encode_video(given_CNHW[None, :, :1])[0].float()


@torch.no_grad()
def encode_images(encoders: Encoders, given_CNHW: Tensor) -> Tensor:
    """Image tokens of the given frames, one frame after the other, [tokens, image_dim]."""
    return encoders.encode_images(given_CNHW.transpose(0, 1)).flatten(0, 1)
