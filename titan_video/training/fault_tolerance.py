"""Clean stops: on a signal, and on a loss or gradient norm that is not finite."""

import math
import os
import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

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
