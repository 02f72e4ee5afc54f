"""The conditioning of one micro-batch as a rank's tokens: the same for training, validation and sampling."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_video.distributed.sequence import SequenceShard
from titan_video.models.conditioning import ConditioningSpec
from titan_video.models.layers import Patch, patchify, token_shape

COND_LATENTS = "cond_latents_BCFHW"  # in Batch.cond


class FrameConditioning:
    """The conditioning frames of a micro-batch: channels [B, L, P'], or tokens and their mask.

    cond_latents: latents as in `ConditioningSpec.channels`; None: the micro-batch is text-to-video.
    latent_FHW: size of the clips. ValueError where weights of this kind cannot do without conditioning frames.
    """

    def __init__(
        self,
        spec: ConditioningSpec,
        cond_latents_BCFHW: Tensor | None,
        latent_FHW: tuple[int, ...],
        patch: Patch,
        shard: SequenceShard,
    ):
        self.channels_BLP: Tensor | None = None
        self.tokens_BLP: Tensor | None = None
        self.mask_BL: Tensor | None = None
        if cond_latents_BCFHW is None:
            if spec.num_cond_frames and not spec.frames_are_optional:
                raise ValueError("this model.flavor needs a conditioning frame of each clip (image-to-video), got none")
            return
        assert spec.num_cond_frames, "a text-to-video model takes no conditioning frames"
        num_frames = latent_FHW[0]
        if spec.form == "clean":
            shape = token_shape(latent_FHW, patch)
            in_first_frame = torch.arange(shape.num_tokens, device=cond_latents_BCFHW.device) < (
                shape.height * shape.width
            )
            self.mask_BL = shard.slice(in_first_frame.unsqueeze(0))
            padded = F.pad(cond_latents_BCFHW, [0, 0, 0, 0, 0, num_frames - 1])
            self.tokens_BLP = shard.slice(patchify(padded, patch))
        else:
            self.channels_BLP = shard.slice(patchify(spec.channels(cond_latents_BCFHW, num_frames), patch))

    def apply(self, x_BLP: Tensor) -> Tensor:
        """Tokens, with the conditioning tokens in their place."""
        return x_BLP if self.mask_BL is None else torch.where(self.mask_BL.unsqueeze(-1), self.tokens_BLP, x_BLP)

    def build_input(self, x_BLP: Tensor) -> Tensor:
        """Noised tokens as the model takes them: conditioning tokens in their place, conditioning channels appended."""
        x_BLP = self.apply(x_BLP)
        return x_BLP if self.channels_BLP is None else torch.cat([x_BLP, self.channels_BLP], dim=-1)

    @property
    def kwargs(self) -> dict[str, Any]:
        """Further arguments of the model."""
        return {} if self.mask_BL is None else {"cond_mask_BL": self.mask_BL}


def guidance_kwargs(spec: ConditioningSpec, scale: float, like_B: Tensor, dtype: str = "float32") -> dict[str, Any]:
    """The guidance scale as an argument, float32, of models that take it: x1000 in the model's dtype, as in
    HunyuanVideo-I2V's hyvideo/diffusion/flow/transport.py and in diffusers. bfloat16 makes 6016 of 6.
    """
    scale_B = torch.full(like_B.shape, scale, dtype=getattr(torch, dtype), device=like_B.device)
    return {"guidance_B": (1000 * scale_B).float()} if spec.guidance else {}
