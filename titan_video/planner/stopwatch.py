"""Seconds of a function on this machine, as a training step would have it: on all ranks at once, the slowest counts.

Every rank of the default group calls every measurement, in the same order and with the same numbers of repetitions.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

MIN_SAMPLES, MAX_SAMPLES = 3, 50
SHORTEST = 1e-3  # seconds of one sample: a shorter function is called several times in a sample


class Stopwatch:
    """budget: seconds that one measurement should take, warm-up not counted."""

    def __init__(self, device: torch.device, budget: float):
        self.device, self.budget = device, budget

    def seconds(self, run: Callable[[], object]) -> float:
        """Of one call: the median of several samples, after a warm-up, on the slowest rank."""
        self._sample(run, 1)
        calls = max(1, int(SHORTEST / self.slowest(self._sample(run, 2))))
        first = self.slowest(self._sample(run, calls))
        num_samples = min(max(int(self.budget / (first * calls)), MIN_SAMPLES), MAX_SAMPLES)
        return self.slowest(statistics.median(self._sample(run, calls) for _ in range(num_samples)))

    def seconds_alone(self, run: Callable[[], object]) -> float:
        """The same on rank 0 while the other ranks wait."""
        found = 0.0
        if dist.get_rank() == 0:
            run()
            found = statistics.median(self._time(run, 1) for _ in range(2 * MIN_SAMPLES))
        return self.slowest(found)

    def host_seconds(self, run: Callable[[], object]) -> float:
        """Until the host is done: on a GPU the launches alone."""
        return self.seconds(run) if self.device.type == "cpu" else self.slowest(self._host_median(run))

    def slowest(self, value: float) -> float:
        """The largest of all ranks' values, on every rank."""
        if dist.get_world_size() == 1:
            return value
        found = torch.tensor(value, dtype=torch.float64)  # gloo, also beside NCCL
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found.item()

    def _sample(self, run: Callable[[], object], calls: int) -> float:
        if dist.get_world_size() > 1:
            dist.all_reduce(torch.zeros(1))  # all begin together
        return self._time(run, calls) / calls

    def _time(self, run: Callable[[], object], calls: int) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(calls):
                run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def _host_median(self, run: Callable[[], object]) -> float:
        run()
        samples = []
        for _ in range(2 * MIN_SAMPLES):
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            run()
            samples.append(time.perf_counter() - start)
        torch.cuda.synchronize(self.device)
        return statistics.median(samples)


def random_tensor(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal numbers: zeros would multiply faster on a GPU, which then draws less power."""
    return torch.randn(*shape, device=device, dtype=torch.float32).to(dtype)
