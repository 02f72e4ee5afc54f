"""Generating clips with the training model itself: noise -> steps of a solver with guidance -> latents."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from titan_video.distributed.sequence import SequenceShard, whole_sequence
from titan_video.flow.matching import NUM_TRAIN_TIMESTEPS
from titan_video.flow.noise import draw_noise
from titan_video.flow.solver import euler, guided
from titan_video.models.layers import patchify, token_shape, unpatchify
from titan_video.tasks.conditioning import COND_LATENTS, FrameConditioning, guidance_kwargs
from titan_video.tools.parts import resolve


@dataclass(frozen=True)
class Prompt:
    """Embedded prompts of a batch of clips.

    text: [B, L, D], zero beyond each text's length; mask: bool [B, L]. cond: what else the model takes (`Batch.cond`).
    """

    text_BLD: Tensor
    mask_BL: Tensor
    cond: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> "Prompt":
        cond = {name: x.to(device) for name, x in self.cond.items()}
        return Prompt(self.text_BLD.to(device), self.mask_BL.to(device), cond)


@dataclass(frozen=True)
class SamplerSettings:
    """guidance_scale: classifier-free guidance; 1 runs the model once a step, any other with twice the batch. Or the
    scale as a function of sigma.

    shift: of the schedule of sigmas. embedded_guidance: input of models that take a guidance scale, and param_dtype, in
    which they round it. seed: with the clips' ids it keys their first noise. solver: as in [validation].
    """

    num_steps: int
    guidance_scale: float | Callable[[float], float]
    shift: float
    embedded_guidance: float = 1.0
    seed: int = 0
    solver: str = "euler"
    param_dtype: str = "float32"


@torch.no_grad()
def sample_latents(
    model: nn.Module | Callable[..., Tensor],
    args: Any,
    prompt: Prompt,
    null: Prompt,
    latent_CFHW: tuple[int, ...],
    ids: Sequence[int],
    settings: SamplerSettings,
    shard: SequenceShard | None = None,
) -> Tensor:
    """Normalised latents [B, C, F, H, W], float32, on the device of the prompt.

    args: the model's (see ModelSpec). null: the negative prompt, [B or 1, ...]; its cond holds only what differs.
    ids: one number per clip. shard: each rank integrates its own tokens, and all return the whole clips.
    """
    shard = shard or whole_sequence()
    spec, patch, device = args.conditioning, args.patch, prompt.text_BLD.device
    shape = token_shape(latent_CFHW[1:], patch)
    cond = dict(prompt.cond)
    cond_latents = cond.pop(COND_LATENTS, None)
    frames = FrameConditioning(spec, cond_latents, latent_CFHW[1:], patch, shard)
    use_guidance = settings.guidance_scale != 1
    copies = 2 if use_guidance else 1
    text_BLD, mask_BL = prompt.text_BLD, prompt.mask_BL
    if use_guidance:
        text_BLD = torch.cat([text_BLD, null.text_BLD.expand_as(text_BLD)])
        mask_BL = torch.cat([mask_BL, null.mask_BL.expand_as(mask_BL)])
        cond = {name: torch.cat([x, null.cond.get(name, x).expand_as(x)]) for name, x in cond.items()}
    fixed = {
        "pos_BL3": shard.positions(shape, device),
        "text_BSD": text_BLD,
        "text_mask_BS": mask_BL,
        "layout": shard.layout(shape.num_tokens),
        **cond,
        **frames.kwargs,
    }

    def velocity(x_BLP: Tensor, sigma_B: Tensor) -> Tensor:
        x_BLP = frames.build_input(x_BLP).repeat(copies, 1, 1)
        t_B = NUM_TRAIN_TIMESTEPS * sigma_B.repeat(copies)
        guidance = guidance_kwargs(spec, settings.embedded_guidance, t_B, settings.param_dtype)
        v, scale = model(x_BLP=x_BLP, t_B=t_B, **fixed, **guidance).float(), settings.guidance_scale
        return guided(*v.chunk(2), scale(sigma_B[0].item()) if callable(scale) else scale) if use_guidance else v

    noise = draw_noise(settings.seed, torch.tensor(ids), latent_CFHW, device, stream="sampling")
    x_BLP = shard.slice(patchify(spec.initial_latents(noise, cond_latents), patch))
    solve = euler if settings.solver == "euler" else resolve("titan_video.flow.unipc:unipc", "validation.solver")
    x_BLP = frames.apply(solve(velocity, x_BLP, settings.num_steps, settings.shift))
    return unpatchify(shard.gather(x_BLP, shape.num_tokens), shape, patch)


def file_name(prompt: str) -> str:
    """A short file name made of a prompt's letters and digits."""
    words = "".join(ch if ch.isalnum() else " " for ch in prompt).split()
    return "_".join(words)[:60] or "empty"
