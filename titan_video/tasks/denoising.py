"""The default task: predict the velocity of rectified flow (flow/matching.py).

batch -- draw noise and sigma --> x_sigma = (1 - sigma) x_0 + sigma eps --> tokens of this rank --> model --> velocity
loss = w(sigma) |velocity - (eps - x_0)|^2, or its pseudo-Huber form, summed over this rank's elements
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from titan_video.data.batch import Batch
from titan_video.data.batching import Bucket, Work
from titan_video.distributed.sequence import SequenceShard
from titan_video.flow.matching import NUM_TRAIN_TIMESTEPS, FlowMatching, interpolate, velocity_target
from titan_video.flow.noise import draw_noise, draw_uniform
from titan_video.kernels import upcast
from titan_video.models.layers import patchify, token_shape
from titan_video.models.spec import ModelSpec
from titan_video.tasks.conditioning import COND_LATENTS, FrameConditioning, guidance_kwargs
from titan_video.tasks.task import BatchInfo, Evaluation, ModelInputs
from titan_video.tools.device import send


@dataclass(frozen=True)
class DenoisingInputs(ModelInputs):
    """target: velocity of this rank's tokens, [B, L, P]. weight: loss weights. num_valid: tokens that are not padding.
    cond_mask: tokens of a conditioning frame, in which nothing is to be learned; None: there are none."""

    target_BLP: Tensor
    weight_B: Tensor
    num_valid: int
    cond_mask_BL: Tensor | None


class Denoising:
    """Velocity prediction for one model on one rank.

    args: the model's (see ModelSpec). guidance_scale: input of models that take one, in training; rounded as in
    param_dtype, the model's.
    evaluator: step -> Evaluation (validation.py); None: `evaluate` finds nothing.
    """

    def __init__(
        self,
        spec: ModelSpec,
        args: Any,
        flow: FlowMatching,
        shard: SequenceShard,
        device: torch.device,
        seed: int = 0,
        guidance_scale: float = 1.0,
        param_dtype: str = "float32",
    ):
        self.spec, self.args, self.flow, self.shard = spec, args, flow, shard
        self.device, self.seed, self.guidance_scale, self.param_dtype = device, seed, guidance_scale, param_dtype
        self.evaluator: Callable[[int], Evaluation] | None = None

    def work(self, bucket: Bucket) -> Work:
        """What one clip of a bucket costs; ValueError where the model's patch does not divide it."""
        tokens = token_shape(self.spec.geometry(self.args).latent_shape(bucket)[1:], self.args.patch).num_tokens
        return Work(tokens, self.args.flops(tokens))

    def prepare(self, batch: Batch) -> DenoisingInputs:
        """A micro-batch at its noise levels: what is drawn depends on nothing but the seed and the sample ids."""
        latents_BCFHW = batch.streams["video"]
        num_tokens = token_shape(latents_BCFHW.shape[2:], self.args.patch).num_tokens
        sigma_B = self.flow.sigmas(draw_uniform(self.seed, batch.sample_ids_B), num_tokens)
        weight_B = self.flow.weights(sigma_B, num_tokens)
        noise = draw_noise(self.seed, batch.sample_ids_B, tuple(latents_BCFHW.shape[1:]), self.device)
        return self.add_noise(
            batch.to(self.device), noise, sigma_B=send(sigma_B, self.device), weight_B=send(weight_B, self.device)
        )

    def add_noise(
        self, batch: Batch, noise_BCFHW: Tensor, sigma_B: Tensor, weight_B: Tensor | None = None
    ) -> DenoisingInputs:
        """A micro-batch on the device at given noise levels.

        noise: standard normal, like batch.streams["video"]; sigma: in [0, 1], float32; weight: loss weights, float32
        (None: 1).
        """
        latents, patch, shard = batch.streams["video"], self.args.patch, self.shard
        shape = token_shape(latents.shape[2:], patch)
        t_B = NUM_TRAIN_TIMESTEPS * sigma_B
        cond = dict(batch.cond)
        frames = FrameConditioning(
            self.args.conditioning, cond.pop(COND_LATENTS, None), tuple(latents.shape[2:]), patch, shard
        )
        x_BLP = shard.slice(patchify(interpolate(latents, noise_BCFHW, sigma_B), patch))
        kwargs = {
            "x_BLP": frames.build_input(x_BLP),
            "pos_BL3": shard.positions(shape, latents.device),
            "t_B": t_B,
            "text_BSD": batch.text_BLD,
            "text_mask_BS": batch.text_mask_BL,
            "layout": shard.layout(shape.num_tokens),
            **cond,
            **frames.kwargs,
            **guidance_kwargs(self.args.conditioning, self.guidance_scale, t_B, self.param_dtype),
        }
        return DenoisingInputs(
            kwargs=kwargs,
            target_BLP=shard.slice(patchify(velocity_target(latents, noise_BCFHW), patch)),
            weight_B=torch.ones_like(sigma_B) if weight_B is None else weight_B,
            num_valid=shard.num_valid(shape.num_tokens),
            cond_mask_BL=frames.mask_BL,
        )

    def loss(
        self, prediction: Tensor, inputs: DenoisingInputs, penalty: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Weighted penalty of the velocity's error [B, L, P], summed over this rank's elements of each sample: [B],
        float32. penalty: of each element; None: that of training.

        Padding and the tokens of conditioning frames do not count; `num_loss_elements` says how many do.
        """
        error = upcast(prediction) - inputs.target_BLP
        if inputs.cond_mask_BL is not None:
            error = error.masked_fill(inputs.cond_mask_BL.unsqueeze(-1), 0)
        error = error[:, : inputs.num_valid]
        return inputs.weight_B * (penalty or self.flow.penalty)(error).flatten(1).sum(1)

    def num_loss_elements(self, batch: Batch) -> int:
        latents = batch.streams["video"]
        num_frames = latents.shape[2]
        has_cond_frame = self.args.conditioning.form == "clean" and COND_LATENTS in batch.cond
        return latents.numel() // num_frames * (num_frames - has_cond_frame)

    def describe(self, batch: Batch) -> BatchInfo:
        latents = batch.streams["video"]
        num_tokens = token_shape(latents.shape[2:], self.args.patch).num_tokens
        size = self.spec.geometry(self.args).pixel_shape(latents.shape[2:])
        return BatchInfo(
            num_clips=len(latents),
            num_tokens=num_tokens,
            num_frames=size[0],
            flops=self.args.flops(num_tokens, len(latents)),
            label="x".join(map(str, size)),
        )

    def evaluate(self, step: int) -> Evaluation:
        return self.evaluator(step) if self.evaluator else Evaluation()
