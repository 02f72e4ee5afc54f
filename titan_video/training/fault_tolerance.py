"""Clean stops: on a signal, and on a loss or gradient norm that is not finite."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titan_video.tools import signals


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

    def check(self, message: str) -> None:
        """Stopped, with the message, if any rank has received a signal. All ranks ask together."""
        if self.requested():
            raise signals.Stopped(message)

    def guard(self, model: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The model, for validation: before each call the ranks agree whether to go on; Stopped if not."""

        def call(**kwargs: Tensor) -> Tensor:
            self.check("stopped during validation")
            return model(**kwargs)

        return call


class NonFiniteGuard:
    """Leaves out updates with a loss or gradient norm that is not finite. What follows: training/faults (optional).

    The numbers are global, so all ranks decide the same.
    """

    def __init__(self):
        self.losses: dict[int, Tensor] = {}  # of a step's clips, by micro-batch, on the device

    def sum(self, number: int, loss_B: Tensor) -> Tensor:
        """The sum of the losses of micro-batch `number`. Those of its clips are kept, in case the step is wrong."""
        self.losses[number] = loss_B.detach()
        return loss_B.sum()

    def update(self, optimizer: torch.optim.Optimizer, numbers: Tensor) -> None:
        """`optimizer.step()`, unless the numbers forbid it: loss, largest loss of a rank, gradient norm.

        A fused optimizer checks this on the device. For others it costs a host-device synchronisation.
        """
        is_good = self.is_good(numbers)
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = (~is_good).float()  # the attribute by which torch.amp.GradScaler skips a step
            optimizer.step()
            del optimizer.found_inf
        elif is_good:
            optimizer.step()

    def is_good(self, numbers: Tensor) -> Tensor:
        """Whether a step's numbers allow its update: a truth value on their device."""
        return numbers[::2].isfinite().all()

    def check(self, loss: float, grad_norm: float, step: int) -> str:
        """The same on the host: what is wrong with the numbers of `step`; "": nothing, and the update was applied."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.losses.clear()
            return ""
        return f"step {step}: loss {loss}, gradient norm {grad_norm} is not finite"

    def counters(self) -> dict[str, Any]:
        """Further state of checkpoints."""
        return {}
