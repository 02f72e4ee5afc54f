"""Rectified flow: which noise levels are trained, how noise is mixed in, what the model is asked for, and with what
weight.

    u ~ U(0,1)  ->  density's inverse CDF  ->  shift  ->  s in [min_t, max_t]
    x_s = (1 - s) x_0 + s eps,   target v = eps - x_0,   loss = w(s) |v_pred - v|^2,   the model is told t = 1000 s

s = 1 is pure noise. Levels and times are float32 throughout: bfloat16 has 8 bits, and steps of 1000 s would collapse.
Sources: Liu et al. 2022 (rectified flow); Esser et al. 2024, "Scaling rectified flow transformers", eq. 19
(logit-normal), eq. 20 (mode), eq. 23 (shift); the bell weight is that of public Wan trainers (DiffSynth-Studio's
flow-match scheduler).
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from titan_video.config.job_config import Flow, JobConfig

NUM_TRAIN_TIMESTEPS = 1000


def time_shift(s: Tensor | float, alpha: float):
    """Move levels towards noise for alpha > 1: s <- alpha s / (1 + (alpha - 1) s) (Esser et al. 2024, eq. 23)."""
    return alpha * s / (1 + (alpha - 1) * s)


def interpolate(x0: Tensor, noise: Tensor, sigma_B: Tensor) -> Tensor:
    """x_s = (1 - s) x_0 + s eps, in float32, s broadcast over all but the first dim."""
    s = sigma_B.view(-1, *[1] * (x0.ndim - 1))
    return torch.lerp(x0.float(), noise.float(), s)


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """The target v = dx_s/ds = eps - x_0, float32."""
    return noise.float() - x0.float()


def expert_sigma_range(section: Flow, expert: str, boundary: float) -> Flow:
    """The section with the noise levels of one of two experts:

    "high" trains those from the boundary on, "low" those below it; "all": as it is.
    """
    if expert == "all":
        return section
    if not boundary:
        raise ValueError(
            f'model.expert = "{expert}", but this model.flavor knows no boundary between experts; set '
            f"model.boundary, such as 0.875"
        )
    return replace(section, min_t=boundary) if expert == "high" else replace(section, max_t=boundary)


class FlowMatching:
    """Noise levels and loss weights of one run.

    The density is cut to [min_t, max_t] by drawing u between the values of the CDF there, so an expert trained on part
    of the levels sees the full density's own shape over its part.
    """

    def __init__(self, section: Flow):
        self.section = section
        self._weight_means: dict[int, float] = {}

    @property
    def interval(self) -> tuple[float, float]:
        """The noise levels that are trained."""
        return self.section.min_t, self.section.max_t

    def alpha(self, num_tokens: int) -> float:
        """The shift for clips of this many tokens."""
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
        # The paper's map falls from 1 to 0 as u rises; it is fed 1 - u so that quantiles rise.
        w = 1 - u
        return 1 - w - c.mode_scale * (torch.cos(math.pi / 2 * w) ** 2 - 1 + w)

    def _cdf(self, s: float) -> float:
        """Bisection of the quantile: exact enough for interval ends, and one code path for all densities."""
        if s <= 0 or s >= 1:
            return min(max(s, 0.0), 1.0)
        low, high = 0.0, 1.0
        for _ in range(60):
            mid = (low + high) / 2
            below = float(self._quantile(torch.tensor(mid, dtype=torch.float64))) < s
            low, high = (mid, high) if below else (low, mid)
        return (low + high) / 2

    def sigmas(self, u_B: Tensor, num_tokens: int) -> Tensor:
        """Map uniform numbers in (0, 1) to noise levels sigma_B, float32, within [min_t, max_t]."""
        c, alpha = self.section, self.alpha(num_tokens)
        low, high = (self._cdf(time_shift(t, 1 / alpha)) for t in (c.min_t, c.max_t))
        s = time_shift(self._quantile(low + (high - low) * u_B.double()), alpha)
        return s.clamp(c.min_t, c.max_t).float()

    def weights(self, sigma_B: Tensor, num_tokens: int) -> Tensor:
        """Loss weight of each level, float32, with mean 1 over the levels that this run draws."""
        if self.section.loss_weighting == "none":
            return torch.ones_like(sigma_B)
        if num_tokens not in self._weight_means:
            grid = self.sigmas((torch.arange(4096, dtype=torch.float64) + 0.5) / 4096, num_tokens)
            self._weight_means[num_tokens] = float(_bell(grid).mean())
        return _bell(sigma_B) / self._weight_means[num_tokens]


def _bell(s: Tensor) -> Tensor:
    """exp(-2 (s - 1/2)^2), lowered to 0 at both ends."""
    return torch.exp(-2 * (s - 0.5) ** 2) - math.exp(-0.5)


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about the trained sigmas, one line per mistake."""
    m, f = config.model, config.flow
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
