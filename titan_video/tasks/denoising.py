"""What is minimised, in training, gradient accumulation and validation alike.

A forward is taken apart into what goes in, the model, and the loss, because the ends of a pipeline are on different
ranks.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from titan_video.data.batch import Batch
from titan_video.distributed.sequence import SequenceShard
from titan_video.flow.matching import NUM_TRAIN_TIMESTEPS, interpolate, velocity
from titan_video.kernels import upcast
from titan_video.models.conditioning import TEXT_ONLY, ConditioningSpec
from titan_video.models.layers import Patch, patchify, positions, token_shape
from titan_video.tasks.conditioning import FrameConditioning, guidance


@dataclass(frozen=True)
class ModelInputs:
    """One forward's arguments on one rank, and what it should give. x, target: this rank's tokens, [B, L, P]; clean:

    those that are given.
    """

    x_BLP: Tensor
    pos_BL3: Tensor
    t_B: Tensor
    text_BSD: Tensor
    text_mask_BS: Tensor
    seq_len: int | None
    cond: dict[str, Any]
    target_BLP: Tensor
    weight_B: Tensor
    num_valid: int
    cond_mask_BL: Tensor | None = None


def model_inputs(
    patch: Patch,
    batch: Batch,
    noise_BCFHW: Tensor,
    sigma_B: Tensor,
    weight_B: Tensor,
    shard: SequenceShard | None = None,
    conditioning: ConditioningSpec = TEXT_ONLY,
    guidance_scale: float = 1.0,
) -> ModelInputs:
    """Noisy tokens at the levels s and their velocity; `shard`: only this rank's tokens of them (None: all).

    conditions: what the model is given beside these, from batch.cond; guidance_scale: what models that take it are
        told.
    """
    latents = batch.streams["video"]
    shape = token_shape(latents.shape[2:], patch)
    x_BLP = patchify(interpolate(latents, noise_BCFHW, sigma_B), patch)
    target_BLP = patchify(velocity(latents, noise_BCFHW), patch)
    pos_BL3 = shard.positions(shape, latents.device) if shard is not None else positions(shape, latents.device)
    seq_len, num_valid = None, shape.num_tokens
    if shard is not None and shard.size > 1:
        seq_len, num_valid = shape.num_tokens, shard.num_valid(shape.num_tokens)
        x_BLP, target_BLP = shard.slice(x_BLP), shard.slice(target_BLP)
    t_B = NUM_TRAIN_TIMESTEPS * sigma_B
    cond = dict(batch.cond)
    given = FrameConditioning(
        conditioning, cond.pop("cond_latents_BCFHW", None), tuple(latents.shape[2:]), patch, shard
    )
    cond |= given.arguments | guidance(conditioning, guidance_scale, t_B)
    text = batch.text_BLD, batch.text_mask_BL
    return ModelInputs(
        given.build_input(x_BLP),
        pos_BL3,
        t_B,
        *text,
        seq_len,
        cond,
        target_BLP,
        weight_B,
        num_valid,
        given.cond_mask_BL,
    )


def predict(model: nn.Module, inputs: ModelInputs) -> Tensor:
    """The model's velocity [B, L, P]."""
    i = inputs
    return model(i.x_BLP, i.pos_BL3, i.t_B, i.text_BSD, i.text_mask_BS, i.seq_len, **i.cond)


def velocity_loss(v_BLP: Tensor, inputs: ModelInputs) -> Tensor:
    """Weighted squared error of the velocity, summed over the elements that this rank has of each sample, but given
    ones: [B], float32.

    How many of a whole batch count: `ConditioningSpec.counted`.
    """
    error = upcast(v_BLP) - inputs.target_BLP
    if inputs.cond_mask_BL is not None:
        error = error.masked_fill(inputs.cond_mask_BL.unsqueeze(-1), 0)
    error = error[:, : inputs.num_valid]
    return inputs.weight_B * error.square().flatten(1).sum(1)


def compute_loss(
    model: nn.Module,
    patch: Patch,
    batch: Batch,
    noise_BCFHW: Tensor,
    sigma_B: Tensor,
    weight_B: Tensor,
    shard: SequenceShard | None = None,
    conditioning: ConditioningSpec = TEXT_ONLY,
    guidance_scale: float = 1.0,
) -> Tensor:
    """`velocity_loss` of the model: [B], float32; over all ranks of the `sequence` axis these are to be summed.

    The caller divides by the number of elements that count over all ranks and micro-batches of the step.
    noise: standard normal, like batch.streams["video"]; sigma_B: noise levels in [0, 1], float32; weight_B: loss weights,
        float32.
    """
    inputs = model_inputs(patch, batch, noise_BCFHW, sigma_B, weight_B, shard, conditioning, guidance_scale)
    return velocity_loss(predict(model, inputs), inputs)
