"""What is minimised: one function for training, gradient accumulation and validation."""

import torch
from torch import Tensor, nn

from titan_video.data.batch import Batch
from titan_video.flow.matching import NUM_TRAIN_TIMESTEPS, interpolate, velocity
from titan_video.models.layers import Patch, patchify, positions, token_shape


def compute_loss(model: nn.Module, patch: Patch, batch: Batch, noise_BCFHW: Tensor, s_B: Tensor, weight_B: Tensor) -> Tensor:
    """Weighted squared error of the velocity, summed over the elements of each sample: [B], float32.

    The caller divides by the number of elements that count over all ranks and micro-batches of the step.
    noise: standard normal, like batch.latents_BCFHW; s_B: noise levels in [0, 1], float32; weight_B: loss weights, float32.
    """
    latents = batch.latents_BCFHW
    shape = token_shape(latents.shape[2:], patch)
    x_BLP = patchify(interpolate(latents, noise_BCFHW, s_B), patch)
    target_BLP = patchify(velocity(latents, noise_BCFHW), patch)
    pos_BL3 = positions(shape, latents.device)
    v_BLP = model(x_BLP, pos_BL3, NUM_TRAIN_TIMESTEPS * s_B, batch.text_BLD, batch.text_mask_BL, **batch.cond)
    return weight_B * (v_BLP.float() - target_BLP).square().flatten(1).sum(1, dtype=torch.float32)
