"""Warm-up, stable, decay: the learning rate as a function of the step alone."""

import math

import torch

from titan_video.config.job_config import LrScheduler
from titan_video.tools.logging import logger


def num_warmup_steps(total_steps: int, section: LrScheduler) -> int:
    """`section.warmup_steps`, or in a run too short for these and the decay, what the decay leaves."""
    return min(section.warmup_steps, total_steps - round(section.decay_ratio * total_steps))


def lr_factor(step: int, total_steps: int, section: LrScheduler) -> float:
    """Fraction of the peak rate at optimizer step `step`, counted from 1.

    It rises linearly from 1/W to 1 (W: `num_warmup_steps`), stays at 1, and over the last decay_ratio of the run falls
    to min_lr_factor, which the last step has.
    """
    warmup_steps, decay_steps = num_warmup_steps(total_steps, section), round(section.decay_ratio * total_steps)
    if step <= warmup_steps:
        return step / warmup_steps
    if step <= total_steps - decay_steps:
        return 1.0
    progress = min((step - (total_steps - decay_steps)) / decay_steps, 1.0)
    shapes = {"linear": 1 - progress, "sqrt": 1 - math.sqrt(progress), "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return section.min_lr_factor + (1 - section.min_lr_factor) * shapes[section.decay_type]


class Scheduler:
    """Sets the learning rate of each step: in each parameter group, the rate of the step times its "lr_scale".

    It has no state: a resumed run gets the same rates, and a changed schedule takes effect at once.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, section: LrScheduler, peak_lr: float, total_steps: int):
        self.optimizer = optimizer
        self.section = section
        self.peak_lr = peak_lr
        self.total_steps = total_steps
        if (steps := num_warmup_steps(total_steps, section)) < section.warmup_steps:
            logger.info(
                f"lr_scheduler.warmup_steps: {steps} instead of {section.warmup_steps}, as this run has {total_steps} "
                f"steps, {total_steps - steps} of them decay"
            )

    def set_step(self, step: int) -> float:
        """Set the rate of optimizer step `step`, counted from 1, and return it without any "lr_scale"."""
        lr = self.peak_lr * lr_factor(step, self.total_steps, self.section)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        return lr
