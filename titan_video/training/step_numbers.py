"""The numbers of a step: when the host reads them, and what follows."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from titan_video.config.job_config import JobConfig
from titan_video.data.batch import Batch
from titan_video.optim.ema import EmaWeights
from titan_video.tools.device import read
from titan_video.training.fault_tolerance import NonFiniteGuard
from titan_video.training.metrics import MetricsLogger, StepMetrics


@dataclass(frozen=True)
class UnreadStep:
    """A step and its numbers on the device: loss, largest loss of a rank, gradient norm. start: when it began.

    known: the other fields of StepMetrics. batches, losses, data_state (before the step): for the report of a fault.
    """

    step: int
    start: float
    numbers: Tensor
    known: dict[str, Any]
    batches: list[Batch]
    losses: dict[int, Tensor]
    data_state: dict[str, Any]


@dataclass
class StepJudge:
    """Reads a step's numbers, its one host-device synchronisation; then EMA, log, and what follows a fault.

    With training.read_late a step is judged when the gradients of the next are under way, and before its update, which
    a fault prevents as it would have at once. What is validated or saved is judged at once.
    handle: what a fault leads to; the step from which the run goes on.
    """

    config: JobConfig
    guard: NonFiniteGuard
    ema: EmaWeights | None
    metrics: MetricsLogger
    handle: Callable[[str, UnreadStep], int]
    unread: UnreadStep | None = None
    last_read: float = 0.0

    def add(self, unread: UnreadStep) -> int:
        """Judge this step, now or later. Returns as `settle`."""
        c, step = self.config, unread.step
        self.unread, self.guard.losses = unread, {}
        used_every = [c.checkpoint.interval, c.checkpoint.export_every, c.validation.freq * c.validation.enable]
        is_used = any(n and step % n == 0 for n in used_every) or step == c.training.steps
        return step if c.training.read_late and not is_used else self.settle(step)

    def settle(self, step: int) -> int:
        """Judge what is not judged yet; `step` of the run, or that of the checkpoint to which it was rolled back."""
        unread, self.unread = self.unread, None
        if unread is None:
            return step
        loss, max_loss, norm = read(unread.numbers)
        following, self.guard.losses = self.guard.losses, unread.losses
        fault = self.guard.check(loss, norm, unread.step)
        if self.ema and not fault:
            self.ema.update(unread.step)
        start, self.last_read = max(unread.start, self.last_read), time.perf_counter()
        numbers = {"loss": loss, "max_loss": max_loss, "grad_norm": norm, "step_seconds": self.last_read - start}
        self.metrics.log(unread.step, StepMetrics(**numbers, **unread.known))
        go_on_from = self.handle(fault, unread) if fault else unread.step
        self.guard.losses = following
        return go_on_from if go_on_from < unread.step else step
