"""Sampling: the probability-flow ODE of rectified flow, from noise at s = 1 to data at s = 0, by Euler steps."""

from collections.abc import Callable

import torch
from torch import Tensor

from titan_video.flow.matching import time_shift


def sampling_sigmas(num_steps: int, shift: float) -> Tensor:
    """num_steps + 1 falling levels from 1 to 0, float32: a uniform grid, shifted as in training."""
    return time_shift(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift).float()


def guided(v_cond: Tensor, v_uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022, eq. 6): v_uncond + scale (v_cond - v_uncond)."""
    return torch.lerp(v_uncond, v_cond, scale)


def euler(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, num_steps: int, shift: float) -> Tensor:
    """Integrate dx/ds = velocity(x, sigma_B) from `noise` (level 1) to level 0 in float32; sigma_B is one level per row of x."""
    x = noise.float()
    sigmas = sampling_sigmas(num_steps, shift)
    for s, s_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        sigma_B = torch.full((x.shape[0],), float(s), device=x.device)
        x = x + (s_next - s).item() * velocity(x, sigma_B).float()
    return x
