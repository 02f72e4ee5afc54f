"""Generating clips with the training model itself: noise -> Euler steps with guidance -> clean latents."""

import torch
from torch import Tensor, nn

from titan_video.distributed.sequence import SequenceShard
from titan_video.flow.matching import NUM_TRAIN_TIMESTEPS
from titan_video.flow.noise import draw_noise
from titan_video.flow.solver import euler, guided
from titan_video.models.layers import Patch, patchify, positions, token_shape, unpatchify


@torch.no_grad()
def sample_latents(
    model: nn.Module,
    patch: Patch,
    text_BLD: Tensor,
    mask_BL: Tensor,
    null_BLD: Tensor,
    null_mask_BL: Tensor,
    latent_CFHW: tuple[int, ...],
    ids: list[int],
    seed: int,
    num_steps: int,
    guidance_scale: float,
    shift: float,
    shard: SequenceShard | None = None,
) -> Tensor:
    """Normalised latents [B, C, F, H, W], float32, on the device of `text_BLD`.

    text, null: embeddings of the prompts and of the empty prompt, [B or 1, L, D], with their masks. ids: one number per clip, which with
    the seed keys its first noise. A guidance scale of 1 runs the model once per step, any other twice as large a batch.
    shard: each rank integrates its own tokens, and all get the whole clip at the end.
    """
    device, B = text_BLD.device, text_BLD.shape[0]
    shape = token_shape(latent_CFHW[1:], patch)
    pos_BL3 = positions(shape, device)
    use_guidance = guidance_scale != 1
    if use_guidance:
        text_BLD, mask_BL = torch.cat([text_BLD, null_BLD.expand(B, -1, -1)]), torch.cat([mask_BL, null_mask_BL.expand(B, -1)])

    seq_len = None
    if shard is not None and shard.size > 1:
        seq_len, pos_BL3 = shape.num_tokens, shard.slice_for_attention(pos_BL3)

    def velocity(x_BLP: Tensor, s_B: Tensor) -> Tensor:
        copies = 2 if use_guidance else 1
        v = model(x_BLP.repeat(copies, 1, 1), pos_BL3, NUM_TRAIN_TIMESTEPS * s_B.repeat(copies), text_BLD, mask_BL, seq_len).float()
        return guided(*v.chunk(2), guidance_scale) if use_guidance else v

    x_BLP = patchify(draw_noise(seed, torch.tensor(ids), latent_CFHW, device, stream="sampling"), patch)
    if seq_len is None:
        return unpatchify(euler(velocity, x_BLP, num_steps, shift), shape, patch)
    return unpatchify(shard.gather(euler(velocity, shard.slice(x_BLP), num_steps, shift), seq_len), shape, patch)
