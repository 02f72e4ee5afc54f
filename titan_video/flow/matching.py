"""Rectified flow: which noise levels are trained, how noise is mixed in, the target, and its weight.

    u ~ U(0,1)  ->  density's inverse CDF  ->  time shift  ->  sigma in [min_t, max_t]
    x_sigma = (1 - sigma) x_0 + sigma eps,   target v = eps - x_0,   loss = w(sigma) |v_pred - v|^2,   t = 1000 sigma

sigma = 1 is pure noise. Sigmas and times are float32 throughout: bfloat16 has 8 bits, and steps of 1000 sigma would
collapse.
Sources: Liu et al. 2022 (rectified flow); Esser et al. 2024, "Scaling rectified flow transformers", eq. 19
(logit-normal), eq. 20 (mode), eq. 23 (shift); the bell weight is that of public Wan trainers (DiffSynth-Studio's
flow-match scheduler).
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from titan_video.config.job_config import Flow, JobConfig, Training

NUM_TRAIN_TIMESTEPS = 1000


def time_shift(sigma: Tensor | float, alpha: float) -> Tensor | float:
    """Move sigmas towards noise for alpha > 1: sigma <- alpha sigma / (1 + (alpha - 1) sigma) (Esser et al. eq. 23)."""
    return alpha * sigma / (1 + (alpha - 1) * sigma)


def interpolate(x0: Tensor, noise: Tensor, sigma_B: Tensor) -> Tensor:
    """x_sigma = (1 - sigma) x_0 + sigma eps, in float32, sigma broadcast over all but the first dim."""
    sigma = sigma_B.view(-1, *[1] * (x0.ndim - 1))
    return torch.lerp(x0.float(), noise.float(), sigma)


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """The target v = dx_sigma/dsigma = eps - x_0, float32."""
    return noise.float() - x0.float()


def expert_sigma_range(section: Flow, expert: str, boundary: float) -> Flow:
    """The section with the range of sigmas of one of two experts.

    "high" trains sigmas from the boundary on, "low" those below it, "all" is the section as it is.
    """
    if expert == "all":
        return section
    if not boundary:
        raise ValueError(
            f'model.expert = "{expert}", but this model.flavor knows no boundary between experts; set model.boundary, '
            f"such as 0.875"
        )
    return replace(section, min_t=boundary) if expert == "high" else replace(section, max_t=boundary)


class FlowMatching:
    """Sigmas, loss weights and the penalty of errors of one run. loss, huber_c: see `Training`.

    The density is truncated to [min_t, max_t] by drawing u between the values of its CDF there, so an expert trained on
    part of the range sees the shape of the full density over its part.
    """

    def __init__(self, section: Flow, loss: str = "mse", huber_c: float = 0.0):
        self.section, self.loss, self.huber_c = section, loss, huber_c
        self._mean_weights: dict[int, float] = {}

    @property
    def interval(self) -> tuple[float, float]:
        """The range of sigmas that is trained."""
        return self.section.min_t, self.section.max_t

    def alpha(self, num_tokens: int) -> float:
        """The time shift for clips of this many tokens."""
        c = self.section
        if c.shift == "none":
            return 1.0
        return c.shift_value if c.shift == "constant" else c.shift_value * math.sqrt(num_tokens / c.shift_base_tokens)

    def _quantile(self, u: Tensor) -> Tensor:
        """Inverse CDF of the unshifted density, increasing in u; float64."""
        c = self.section
        if c.timestep_density == "uniform":
            return u
        if c.timestep_density == "logit_normal":
            return torch.sigmoid(c.logit_mean + c.logit_std * torch.special.ndtri(u))
        # The paper's map decreases from 1 to 0 in u; 1 - u makes the quantile increase.
        w = 1 - u
        return 1 - w - c.mode_scale * (torch.cos(math.pi / 2 * w) ** 2 - 1 + w)

    def _cdf(self, sigma: float) -> float:
        """By bisection of the quantile: exact enough for the ends of a range, and one code path for all densities."""
        if sigma <= 0 or sigma >= 1:
            return min(max(sigma, 0.0), 1.0)
        low, high = 0.0, 1.0
        for _ in range(60):
            mid = (low + high) / 2
            below = float(self._quantile(torch.tensor(mid, dtype=torch.float64))) < sigma
            low, high = (mid, high) if below else (low, mid)
        return (low + high) / 2

    def sigmas(self, u_B: Tensor, num_tokens: int) -> Tensor:
        """Map uniform numbers in (0, 1) to sigmas, float32, within [min_t, max_t]."""
        c, alpha = self.section, self.alpha(num_tokens)
        low, high = (self._cdf(time_shift(t, 1 / alpha)) for t in (c.min_t, c.max_t))
        sigma_B = time_shift(self._quantile(low + (high - low) * u_B.double()), alpha)
        return sigma_B.clamp(c.min_t, c.max_t).float()

    def weights(self, sigma_B: Tensor, num_tokens: int) -> Tensor:
        """Loss weight of each sigma, float32, with mean 1 over the sigmas that this run draws."""
        if self.section.loss_weighting == "none":
            return torch.ones_like(sigma_B)
        if num_tokens not in self._mean_weights:
            grid = self.sigmas((torch.arange(4096, dtype=torch.float64) + 0.5) / 4096, num_tokens)
            self._mean_weights[num_tokens] = float(_bell(grid).mean())
        return _bell(sigma_B) / self._mean_weights[num_tokens]

    def penalty(self, error: Tensor) -> Tensor:
        """Of each element's error d: d^2, or with c = huber_c the pseudo-Huber function 2c (sqrt(d^2 + c^2) - c).

        That is d^2 (1 - d^2 / 4c^2 + ...) where d is far below c, so it tends to d^2 for large c, and grows like 2c |d|
        where d is far above c. Scaled as loss_type = "huber" of kohya's sd-scripts; diffusion-pipe's pseudo_huber_c
        leaves out the factor 2c. Charbonnier et al. 1997.
        """
        square, c = error.square(), self.huber_c
        # The difference of two numbers, nearly equal for d far below c, as a quotient.
        return square if self.loss == "mse" else 2 * c * square / ((square + c * c).sqrt() + c)


def _bell(sigma: Tensor) -> Tensor:
    """exp(-2 (sigma - 1/2)^2), lowered to 0 at both ends."""
    return torch.exp(-2 * (sigma - 0.5) ** 2) - math.exp(-0.5)


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about the trained sigmas and the loss, one line per mistake."""
    m, f, t = config.model, config.flow, config.training
    if t.loss == "mse" and t.huber_c != Training.huber_c:
        yield f"training.huber_c: given {t.huber_c}, but training.loss is mse; set that to pseudo_huber"
    if f.min_t >= f.max_t:
        yield f"flow.min_t: given {f.min_t}; must be below flow.max_t, which is {f.max_t}"
    if m.expert != "all" and (f.min_t, f.max_t) != (0, 1):
        yield (
            f"model.expert: given {m.expert}, which sets the range of sigmas; leave flow.min_t at 0 and flow.max_t at "
            f"1, or model.expert at all"
        )
    if m.expert == "all" and m.boundary:
        yield (
            f"model.boundary: given {m.boundary}, but model.expert is all; set that to high or low, or leave this at 0"
        )
