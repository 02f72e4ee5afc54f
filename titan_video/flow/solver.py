"""Sampling: the probability-flow ODE of rectified flow, from noise (sigma 1) to data (sigma 0), by Euler steps."""

from collections.abc import Callable

import torch
from torch import Tensor

from titan_video.flow.matching import time_shift


def sampling_sigmas(num_steps: int, shift: float) -> Tensor:
    """num_steps + 1 decreasing sigmas from 1 to 0, float32: a uniform grid, shifted as in training."""
    return time_shift(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift).float()


def guided(v_cond: Tensor, v_uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022, eq. 6): v_uncond + scale (v_cond - v_uncond)."""
    return torch.lerp(v_uncond, v_cond, scale)


def euler(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, num_steps: int, shift: float) -> Tensor:
    """Integrate dx/dsigma = velocity(x, sigma_B) from `noise` at sigma 1 to sigma 0, in float32.

    sigma_B: one sigma per row of x.
    """
    x = noise.float()
    sigmas = sampling_sigmas(num_steps, shift)
    for sigma, next_sigma in zip(sigmas[:-1], sigmas[1:], strict=True):
        sigma_B = torch.full((x.shape[0],), float(sigma), device=x.device)
        x = x + (next_sigma - sigma).item() * velocity(x, sigma_B).float()
    return x
