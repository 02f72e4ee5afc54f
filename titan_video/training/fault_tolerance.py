"""Clean stops: on a signal, and on a loss or gradient norm that is not finite."""

import math
import os
import signal
from types import FrameType
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from titan_video.tools.logging import logger

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


class SignalFlag:
    """Turns SIGTERM and SIGUSR2 into a flag that all ranks read together at the end of a step.

    The first signal sets the flag. A second one ends the process at once, with exit code 128 + its number. `close`, or
    leaving the `with` block, restores the previous handlers. Construct it in the main thread.
    Processes that are forked later inherit the handler: they exit on SIGTERM, which their parent uses to terminate
    them, and ignore SIGUSR2.
    """

    def __init__(self):
        self._signum = 0
        self._pid = os.getpid()
        self._previous = {s: signal.signal(s, self._handle) for s in SIGNALS}

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            if signum == signal.SIGTERM:
                os._exit(128 + signum)
            return
        if self._signum:
            os._exit(128 + signum)
        self._signum = signum
        # The signal may have interrupted a print, so only os.write is safe here.
        os.write(
            2,
            f"{signal.Signals(signum).name}: saving at the end of this step, then stopping. A second signal "
            f"stops at once.\n".encode(),
        )

    def requested(self, group: dist.ProcessGroup | None = None) -> bool:
        """Whether any rank of `group` (a CPU group such as gloo) has received a signal. Collective.

        group: None asks this process alone.
        """
        if group is None:
            return self._signum != 0
        flag = torch.tensor(self._signum, dtype=torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
        return flag.item() != 0

    def close(self) -> None:
        for s, handler in self._previous.items():
            signal.signal(s, handler)
        self._previous = {}

    def __enter__(self) -> "SignalFlag":
        return self

    def __exit__(self, *exc) -> None:
        self.close()


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
