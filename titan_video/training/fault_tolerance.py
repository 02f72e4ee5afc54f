"""Clean stops: on a signal, and on a loss or gradient norm that is not finite."""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from titan_video.tools import signals
from titan_video.tools.logging import logger


class StopAgreement:
    """Whether to stop, agreed over the ranks of a group whose collectives take host tensors, such as gloo."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def requested(self, *others: bool) -> bool | list[bool]:
        """Whether any rank has received a signal; with `others`, a list that has for each whether it is true anywhere.
        All ranks ask together.
        """
        flags = torch.tensor([signals.stop_requested(), *others], dtype=torch.int32)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.group)
        agreed = [bool(flag) for flag in flags.tolist()]
        return agreed if others else agreed[0]

    def guard(self, model: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The model, for validation: before each call the ranks agree whether to go on; Stopped if not."""

        def call(**kwargs: Tensor) -> Tensor:
            if self.requested():
                raise signals.Stopped("stopped during validation")
            return model(**kwargs)

        return call


class NonFiniteGuard:
    """Leaves out updates with a loss or gradient norm that is not finite.

    policy: `stop` raises at the first one; `skip` raises after max_steps of them in a row.
    """

    def __init__(self, policy: Literal["stop", "skip"], max_steps: int):
        self.policy = policy
        self.max_steps = max_steps
        self.num_skipped = 0

    @staticmethod
    def update(optimizer: torch.optim.Optimizer, numbers: Tensor) -> None:
        """`optimizer.step()`, unless one of the numbers is not finite.

        A fused optimizer checks this on the device. For others it costs a host-device synchronisation.
        """
        finite = numbers.isfinite().all()
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = (~finite).float()  # the attribute by which torch.amp.GradScaler skips a step
            optimizer.step()
            del optimizer.found_inf
        elif finite:
            optimizer.step()

    def check(self, loss: float, grad_norm: float, step: int) -> bool:
        """Whether the update was applied. loss and grad_norm are global, so all ranks decide the same.

        FloatingPointError: the run must stop.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.num_skipped = 0
            return True
        what = f"step {step}: loss {loss}, gradient norm {grad_norm}"
        if self.policy == "stop":
            raise FloatingPointError(
                f"{what} is not finite; the update was not applied. "
                "Resume from the last checkpoint with a lower optimizer.lr, or set fault_tolerance.nonfinite to skip."
            )
        self.num_skipped += 1
        if self.num_skipped >= self.max_steps:
            raise FloatingPointError(
                f"{what} is not finite, as in the {self.num_skipped - 1} steps before: "
                "fault_tolerance.max_nonfinite_steps is reached."
            )
        logger.warning(
            f"{what} is not finite: update skipped ({self.num_skipped} of at most {self.max_steps} in a row)"
        )
        return False
