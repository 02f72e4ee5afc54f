"""Warm-up, stable, decay: the learning rate as a function of the step alone."""

import math
from collections.abc import Iterator

import torch

from titan_video.config.job_config import JobConfig, LrScheduler


def lr_factor(step: int, total_steps: int, section: LrScheduler) -> float:
    """Share of the peak rate used by optimizer step `step`, counted from 1.

    Linear from 1/warmup_steps to 1; then 1; then, over the last decay_ratio of the run, down to min_lr_factor at the
    last step.
    """
    if step <= section.warmup_steps:
        return step / section.warmup_steps
    decay_steps = round(section.decay_ratio * total_steps)
    if step <= total_steps - decay_steps:
        return 1.0
    progress = min((step - (total_steps - decay_steps)) / decay_steps, 1.0)
    shape = {"linear": 1 - progress, "sqrt": 1 - math.sqrt(progress), "cosine": (1 + math.cos(math.pi * progress)) / 2}[
        section.decay_type
    ]
    return section.min_lr_factor + (1 - section.min_lr_factor) * shape


class Scheduler:
    """Sets the rate of each step. It has no state of its own:

    a resumed run sets the same rates, and a changed schedule takes effect.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, section: LrScheduler, peak_lr: float, total_steps: int):
        self.optimizer, self.section, self.peak_lr, self.total_steps = optimizer, section, peak_lr, total_steps

    def set_step(self, step: int) -> float:
        """Set and return the rate of optimizer step `step`, counted from 1."""
        lr = self.peak_lr * lr_factor(step, self.total_steps, self.section)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about the schedule, one line per mistake."""
    steps, warmup, ratio = config.training.steps, config.lr_scheduler.warmup_steps, config.lr_scheduler.decay_ratio
    decay = round(ratio * steps)
    if warmup + decay > steps:
        yield (
            f"lr_scheduler.warmup_steps: given {warmup}, which with {decay} steps of decay (lr_scheduler.decay_ratio "
            f"{ratio}) is more than training.steps {steps}; legal: at most {steps - decay}"
        )
