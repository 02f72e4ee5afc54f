"""What follows a step whose update was left out, on all ranks together."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from titan_video.data.loader import LatentLoader
from titan_video.data.prefetch import Prefetch
from titan_video.tools.logging import logger
from titan_video.training.fault_tolerance import NonFiniteGuard
from titan_video.training.faults.guard import STOP, FaultGuard
from titan_video.training.faults.report import report
from titan_video.training.metrics import MetricsLogger
from titan_video.training.step_numbers import UnreadStep


@dataclass(frozen=True)
class FaultHandler:
    """checkpoint: checkpoint.manager.CheckpointManager. steps: the run's data. folder: the run's. group: all ranks, on
    the host.
    """

    guard: NonFiniteGuard
    checkpoint: Any
    metrics: MetricsLogger
    steps: Prefetch
    folder: Path
    group: dist.ProcessGroup

    def handle(self, fault: str, unread: UnreadStep, num_steps: int) -> int:
        """Name the clips of the step; then return the step from which the run of `num_steps` goes on: this one, or that
        of the checkpoint to which it was rolled back. Either way its data go on after this step.

        FloatingPointError: the run stops.
        """
        step, loader = unread.step, self.steps.loader
        losses = [self.guard.losses[number] for number in sorted(self.guard.losses)]
        with as_after(loader, unread.data_state):
            clips, record = report(self.folder, step, fault, losses, unread.batches, loader, self.group)
        self.guard.losses.clear()
        decides = isinstance(self.guard, FaultGuard)
        action, words = self.guard.decide(self.checkpoint.last_step) if decides else STOP
        go_on_from = step
        if action == "rollback":
            go_on_from = self.checkpoint.roll_back()
            self.metrics.rewind(go_on_from)
            if loader.state_before != unread.data_state:  # the next step has got its data, and gives them back
                loader.commit(loader.state_before)
            self.steps.restart(num_steps - go_on_from)
            words += f" to step {go_on_from}"
        # After a rollback the record counts as one of the next step: it is written again if that step is run again.
        self.metrics.log_event(min(step, go_on_from + 1), "fault", {**record, "action": action})
        if action == "stop":
            raise FloatingPointError(f"{fault}{words}.{clips}")
        logger.warning(f"{fault}{words}.{clips}")
        return go_on_from


@contextmanager
def as_after(loader: LatentLoader, before: dict[str, Any]) -> Iterator[None]:
    """Inside, the last step that the loader has given is the one that began at the state `before`: it, or the last but
    one.
    """
    after, now = loader.state_before, loader.state_dict()
    is_last = after == before
    if not is_last:
        loader.commit(before)
        loader.commit(after)
    try:
        yield
    finally:
        if not is_last:
            loader.commit(now)
