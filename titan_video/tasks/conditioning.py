"""Given frames among the tokens of one rank: the same for training, validation and sampling."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_video.distributed.sequence import SequenceShard
from titan_video.models.conditioning import ConditioningSpec
from titan_video.models.layers import Patch, patchify, token_shape


class FrameConditioning:
    """What this rank's tokens are given of known frames: condition channels [B, L, P'], or clean tokens [B, L, P] with
    their mask.

    given: latents as in `ConditioningSpec.channels`; None with conditions that have none. latent_FHW: size of the clips.
    shard: only this rank's tokens (None: all). ValueError where the two do not fit.
    """

    def __init__(
        self,
        conditioning: ConditioningSpec,
        cond_latents_BCFHW: Tensor | None,
        latent_FHW: tuple[int, ...],
        patch: Patch,
        shard: SequenceShard | None = None,
    ):
        self.channels_BLP: Tensor | None = None
        self.cond_BLP: Tensor | None = None
        self.cond_mask_BL: Tensor | None = None
        if not conditioning.num_cond_frames:
            assert cond_latents_BCFHW is None
            return
        if cond_latents_BCFHW is None:
            raise ValueError("this model.flavor is given a frame of each clip (image-to-video), but there is none")
        num_frames = latent_FHW[0]
        slice_ = shard.slice if shard is not None else lambda x: x
        if conditioning.is_clean:
            shape = token_shape(latent_FHW, patch)
            clean = torch.arange(shape.num_tokens, device=cond_latents_BCFHW.device) < shape.height * shape.width
            self.cond_mask_BL = slice_(clean.unsqueeze(0))
            self.cond_BLP = slice_(patchify(F.pad(cond_latents_BCFHW, [0, 0, 0, 0, 0, num_frames - 1]), patch))
        else:
            self.channels_BLP = slice_(patchify(conditioning.channels(cond_latents_BCFHW, num_frames), patch))

    def apply(self, x_BLP: Tensor) -> Tensor:
        """Tokens with the clean ones in their place."""
        return (
            x_BLP if self.cond_mask_BL is None else torch.where(self.cond_mask_BL.unsqueeze(-1), self.cond_BLP, x_BLP)
        )

    def build_input(self, x_BLP: Tensor) -> Tensor:
        """Noisy tokens as the model takes them: clean ones in their place, condition channels after the noisy ones."""
        x_BLP = self.apply(x_BLP)
        return x_BLP if self.channels_BLP is None else torch.cat([x_BLP, self.channels_BLP], dim=-1)

    @property
    def arguments(self) -> dict[str, Any]:
        """Further arguments of the model."""
        return {} if self.cond_mask_BL is None else {"cond_mask_BL": self.cond_mask_BL}


def guidance(conditioning: ConditioningSpec, scale: float, like_B: Tensor) -> dict[str, Any]:
    """The model's argument for the guidance scale, float32, of models that are told it."""
    return {"guidance_B": torch.full(like_B.shape, 1000 * scale, device=like_B.device)} if conditioning.guidance else {}
