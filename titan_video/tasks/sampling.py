"""Generating clips with the training model itself: noise -> Euler steps with guidance -> clean latents."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from titan_video.distributed.sequence import SequenceShard
from titan_video.flow.matching import NUM_TRAIN_TIMESTEPS
from titan_video.flow.noise import draw_noise
from titan_video.flow.solver import euler, guided
from titan_video.models.conditioning import TEXT_ONLY, ConditioningSpec
from titan_video.models.layers import Patch, patchify, positions, token_shape, unpatchify
from titan_video.tasks.conditioning import FrameConditioning, guidance


class Experts:
    """Two models that share the noise levels (Wan 2.2 A14B), called like one:

    `high` at and above the boundary, `low` below. One level a call.
    """

    def __init__(self, high: Callable[..., Tensor], low: Callable[..., Tensor], boundary: float):
        self.high, self.low, self.boundary = high, low, boundary

    def __call__(self, x_BLP: Tensor, pos_BL3: Tensor, t_B: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        model = self.high if t_B[0].item() >= NUM_TRAIN_TIMESTEPS * self.boundary else self.low
        return model(x_BLP, pos_BL3, t_B, *args, **kwargs)


@torch.no_grad()
def sample_latents(
    model: nn.Module | Experts,
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
    conditioning: ConditioningSpec = TEXT_ONLY,
    cond: dict[str, Tensor] | None = None,
    null_cond: dict[str, Tensor] | None = None,
    embedded_guidance: float = 1.0,
) -> Tensor:
    """Normalised latents [B, C, F, H, W], float32, on the device of `text_BLD`.

    text, null: embeddings of the prompts and of the empty prompt, [B or 1, L, D], with their masks. ids: one number per
    clip, which with the seed keys its first noise. A guidance scale of 1 runs the model once per step, any other twice
    as large a batch.
    shard: each rank integrates its own tokens, and all get the whole clip at the end.
    conditions, cond: what the model is given beside the text, as in `Batch.cond`; null_cond: what of it the empty
        prompt has instead.
    embedded_guidance: the scale told to models that take it.
    """
    device, B = text_BLD.device, text_BLD.shape[0]
    shape = token_shape(latent_CFHW[1:], patch)
    pos_BL3 = positions(shape, device)
    use_guidance = guidance_scale != 1
    cond = dict(cond or {})
    cond_latents_BCFHW = cond.pop("cond_latents_BCFHW", None)
    given = FrameConditioning(conditioning, cond_latents_BCFHW, latent_CFHW[1:], patch, shard)
    if use_guidance:
        null = {name: (null_cond or {}).get(name, x).expand_as(x) for name, x in cond.items()}
        cond = {name: torch.cat([x, null[name]]) for name, x in cond.items()}
        text_BLD, mask_BL = (
            torch.cat([text_BLD, null_BLD.expand(B, -1, -1)]),
            torch.cat([mask_BL, null_mask_BL.expand(B, -1)]),
        )

    seq_len = None
    if shard is not None and shard.size > 1:
        seq_len, pos_BL3 = shape.num_tokens, shard.slice_for_attention(pos_BL3)

    def velocity(x_BLP: Tensor, sigma_B: Tensor) -> Tensor:
        copies = 2 if use_guidance else 1
        x_BLP, t_B = given.build_input(x_BLP).repeat(copies, 1, 1), NUM_TRAIN_TIMESTEPS * sigma_B.repeat(copies)
        told = guidance(conditioning, embedded_guidance, t_B)
        v = model(x_BLP, pos_BL3, t_B, text_BLD, mask_BL, seq_len, **cond, **given.arguments, **told).float()
        return guided(*v.chunk(2), guidance_scale) if use_guidance else v

    x_BLP = patchify(
        conditioning.start(
            draw_noise(seed, torch.tensor(ids), latent_CFHW, device, stream="sampling"), cond_latents_BCFHW
        ),
        patch,
    )
    if seq_len is None:
        return unpatchify(given.apply(euler(velocity, x_BLP, num_steps, shift)), shape, patch)
    x_BLP = given.apply(euler(velocity, shard.slice(x_BLP), num_steps, shift))
    return unpatchify(shard.gather(x_BLP, seq_len), shape, patch)
