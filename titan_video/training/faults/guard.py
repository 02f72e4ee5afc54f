"""Which updates are left out, and what follows: skip, rollback, and a guard against spikes."""

import math
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from titan_video.config.job_config import FaultTolerance, JobConfig
from titan_video.training.fault_tolerance import NonFiniteGuard

NORMAL = 1.4826  # standard deviations of a normal distribution in one median absolute deviation
LEAST = 0.01  # a deviation is at least this fraction of the median: of equal numbers it would be 0
INFINITE = (float("inf"), float("inf"))
STOP = (
    "stop",
    "; the update was not applied. Resume from the last checkpoint with a lower optimizer.lr, or set "
    "fault_tolerance.nonfinite to skip or rollback",
)


class FaultGuard(NonFiniteGuard):
    """Leaves out updates with numbers that are not finite and, with spike_deviations, with a loss or gradient norm
    above median + spike_deviations x deviation of the last spike_window good steps.

    The deviation is 1.4826 times the median absolute deviation (Rousseeuw and Croux 1993, "Alternatives to the Median
    Absolute Deviation"), which single outliers do not move. The limits come from earlier steps, so the device compares
    without waiting for the host. Checkpoints hold the state; older ones lack it.
    """

    is_optional = True

    def __init__(self, section: FaultTolerance):
        super().__init__()
        self.section = section
        self.num_skipped = 0  # in a row
        self.num_rollbacks = 0  # in the run
        self.history: deque[tuple[float, float]] = deque(maxlen=section.spike_window)  # of good steps: loss, norm
        self.limits = INFINITE
        self.is_spike = False

    def update(self, optimizer: torch.optim.Optimizer, numbers: Tensor) -> None:
        if self.section.spike_deviations and dist.is_initialized() and dist.get_world_size() > 1:
            # Groups of ranks may have added in another order. A limit must not fall between two roundings.
            dist.broadcast(numbers, src=0)
        super().update(optimizer, numbers)

    def is_good(self, numbers: Tensor) -> Tensor:
        loss_limit, norm_limit = self.limits
        return super().is_good(numbers) & (numbers[0] <= loss_limit) & (numbers[2] <= norm_limit)

    def check(self, loss: float, grad_norm: float, step: int) -> str:
        found = [
            f"{name} {value:.6g} is above {limit:.6g}"
            for name, value, limit in zip(("loss", "gradient norm"), (loss, grad_norm), self.limits, strict=True)
            if value > limit
        ]
        self.is_spike = bool(found) and math.isfinite(loss) and math.isfinite(grad_norm)
        if self.is_spike:
            window, k = self.section.spike_window, self.section.spike_deviations
            return f"step {step}: {' and '.join(found)}, {k:g} deviations over the median of {window} good steps"
        fault = super().check(loss, grad_norm, step)
        if not fault:
            self.num_skipped = 0
            if self.section.spike_deviations:
                self.history.append((loss, grad_norm))
                self._set_limits()
        return fault

    def _set_limits(self) -> None:
        is_full = len(self.history) == self.section.spike_window
        columns = zip(*self.history, strict=True)
        self.limits = tuple(limit(c, self.section.spike_deviations) for c in columns) if is_full else INFINITE

    def decide(self, last_saved: int) -> tuple[Literal["stop", "skip", "rollback"], str]:
        """What follows a fault, and the words for it. last_saved: step of the last checkpoint; below 1: none."""
        s = self.section
        if self.is_spike or s.nonfinite == "skip":
            return self._skip()
        if s.nonfinite == "stop":
            return STOP
        if last_saved < 1:
            return "stop", ", and there is no checkpoint yet to roll back to; the run stops, the update was not applied"
        if self.num_rollbacks >= s.max_rollbacks:
            return "stop", f", after {self.num_rollbacks} rollbacks: fault_tolerance.max_rollbacks is reached"
        self.num_rollbacks += 1
        self.num_skipped = 0
        return "rollback", f": rolled back ({self.num_rollbacks} of at most {s.max_rollbacks} times in a run)"

    def _skip(self) -> tuple[Literal["stop", "skip"], str]:
        most = self.section.max_nonfinite_steps
        self.num_skipped += 1
        if self.num_skipped < most:
            return "skip", f": update skipped ({self.num_skipped} of at most {most} in a row)"
        before = f"as in the {self.num_skipped - 1} steps before"
        return "stop", f", {before}: fault_tolerance.max_nonfinite_steps is reached"

    # ---- state ----

    def counters(self) -> dict[str, Any]:
        return {"guard": self}

    def state_dict(self) -> dict[str, Any]:
        return {
            "skipped": self.num_skipped,
            "rollbacks": self.num_rollbacks,
            "history": [list(numbers) for numbers in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_skipped, self.num_rollbacks = state["skipped"], state["rollbacks"]
        self.history.clear()
        self.history.extend((loss, norm) for loss, norm in state["history"])
        if self.section.spike_deviations:
            self._set_limits()


def limit(values: Sequence[float], deviations: float) -> float:
    """median + deviations x the robust deviation of the values, as a float32: device and host then find the same."""
    median = statistics.median(values)
    deviation = NORMAL * statistics.median(abs(value - median) for value in values)
    largest = median + deviations * max(deviation, LEAST * abs(median))
    return torch.tensor(largest, dtype=torch.float32).item()


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about rolling back, one line per mistake."""
    if config.fault_tolerance.nonfinite != "rollback":
        return
    where, fix = "fault_tolerance.nonfinite: given rollback, but", "choose stop or skip"
    if not config.checkpoint.enable:
        yield f"{where} checkpoint.enable is false; enable it, or {fix}"
    if config.encoder.placement == "separate":
        yield f"{where} encoder ranks (encoder.placement separate) get their list of clips once; {fix}"
