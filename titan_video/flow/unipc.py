"""UniPC, a second solver of the probability-flow ODE: a multistep predictor and corrector of second order.

Zhao et al. 2023, "UniPC: A unified predictor-corrector framework for fast sampling of diffusion models", algorithms 1
and 2 with B(h) = exp(h) - 1, predicting data. In rectified flow x_sigma = (1 - sigma) x_0 + sigma eps, so alpha is
1 - sigma, and the data that a velocity v predicts is x - sigma v. Schedule, orders and result are those of diffusers'
UniPCMultistepScheduler with use_flow_sigmas, which published Wan folders name, and of Wan's own solver.

Letters: m a prediction of data, lambda = log(alpha / sigma), h a step in lambda.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from titan_video.flow.matching import NUM_TRAIN_TIMESTEPS, time_shift

LAST_SIGMA = 1 / NUM_TRAIN_TIMESTEPS  # of the grid before the shift; the step that ends at 0 follows
MAX_SIGMA = 1 - 1e-6  # at 1 lambda is infinite


def unipc_sigmas(num_steps: int, shift: float) -> Tensor:
    """num_steps + 1 decreasing sigmas, float64, from nearly 1 to 0."""
    # numpy's grid: the last bit decides which whole timestep the model gets.
    grid = torch.from_numpy(np.linspace(1, LAST_SIGMA, num_steps + 1)[:-1])
    return torch.cat([time_shift(grid, shift).clamp(max=MAX_SIGMA), grid.new_zeros(1)])


def unipc(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, num_steps: int, shift: float) -> Tensor:
    """Integrate dx/dsigma = velocity(x, sigma_B) from `noise` to sigma 0, in float32; one evaluation a step.

    sigma_B: one sigma per row of x, cut to a whole timestep, as the public solvers tell the model.
    """
    sigmas = unipc_sigmas(num_steps, shift)
    times = (NUM_TRAIN_TIMESTEPS * sigmas).floor() / NUM_TRAIN_TIMESTEPS
    x, sigmas = noise.float(), sigmas.float().tolist()  # rounded as in the public solvers: near 1 it matters
    start, found = x, []  # x before the last step; predictions of data
    for i, (sigma, next_sigma) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        v = velocity(x, torch.full((x.shape[0],), times[i].item(), device=x.device)).float()
        found.append(x - sigma * v)
        if i:
            x = _correct(start, found, sigmas[max(0, i - 2) : i + 1])
        start = x
        is_first_order = i in (0, len(sigmas) - 2)  # there is no earlier prediction; the last step goes to infinity
        x = _predict(start, found[-1:] if is_first_order else found[-2:], sigmas[max(0, i - 1) : i + 1], next_sigma)
        found = found[-2:]
    return x


def _lambda(sigma: float) -> float:
    return math.inf if sigma == 0 else math.log1p(-sigma) - math.log(sigma)


def _predict(x: Tensor, found: list[Tensor], sigmas: list[float], next_sigma: float) -> Tensor:
    """x at next_sigma, from x at sigmas[-1] and the predictions of data there and, for the second order, before it."""
    h = _lambda(next_sigma) - _lambda(sigmas[-1])
    fall = math.expm1(-h)
    moved = found[-1] * (-(1 - next_sigma) * fall) + x * (next_sigma / sigmas[-1])
    if len(found) == 1:
        return moved
    ratio = (_lambda(sigmas[0]) - _lambda(sigmas[-1])) / h
    return moved - (found[0] - found[-1]) * ((1 - next_sigma) * fall * 0.5 / ratio)


def _correct(start: Tensor, found: list[Tensor], sigmas: list[float]) -> Tensor:
    """x at sigmas[-1] anew, from x at sigmas[-2], with the prediction of data that the model made there."""
    sigma = sigmas[-1]
    h = _lambda(sigma) - _lambda(sigmas[-2])
    fall = math.expm1(-h)
    before, now = found[-2], found[-1]
    moved = before * (-(1 - sigma) * fall) + start * (sigma / sigmas[-2])
    if len(found) == 2:
        return moved - (now - before) * ((1 - sigma) * fall * 0.5)
    # Weights of the two differences: the solution of [[1, 1], [ratio, 1]] rho = b (eq. 9 of the paper).
    ratio = (_lambda(sigmas[0]) - _lambda(sigmas[-2])) / h
    phi_1 = fall / -h - 1
    phi_2 = phi_1 / -h - 0.5
    b = phi_1 / fall, 2 * phi_2 / fall
    earlier = (b[1] - b[0]) / (ratio - 1)
    latest = b[0] - earlier
    difference = (found[-3] - before) * (earlier / ratio) + (now - before) * latest
    return moved - difference * ((1 - sigma) * fall)
