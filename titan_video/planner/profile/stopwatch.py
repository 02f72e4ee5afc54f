"""Seconds of a function on this machine, as a training step would have it: on all ranks at once, the slowest counts.

Every rank of the default group calls every measurement, in the same order and with the same numbers of repetitions.
Of several samples the lower quartile counts: what else runs on the machine makes some longer, none shorter.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

MIN_SAMPLES, MAX_SAMPLES = 4, 50
SHORTEST = 1e-3  # seconds of one sample: a shorter function is called several times in a sample
LONG = 0.05  # seconds of a sample that shows how ranks share cores: many time slices of the scheduler


class Stopwatch:
    """budget: seconds that one measurement should take, warm-up not counted.

    sharing: seconds on the clock / seconds of CPU, of a rank that computes while all do; see `measure_sharing`.
    """

    def __init__(self, device: torch.device, budget: float):
        self.device, self.budget, self.sharing = device, budget, 1.0

    def seconds(self, run: Callable[[], object]) -> float:
        """Of one call, on the slowest rank: what ranks wait for each other included."""
        return self._measured(run, time.perf_counter)

    def compute_seconds(self, run: Callable[[], object]) -> float:
        """Of one call that waits for nothing.

        On a CPU with one thread it is the thread's own time, which other programs do not lengthen, as often as ranks
        share a core.
        """
        if self.device.type != "cpu" or torch.get_num_threads() > 1:
            return self.seconds(run)
        return self.sharing * self._measured(run, time.thread_time)

    def measure_sharing(self, run: Callable[[], object]) -> None:
        """run: computes on one thread. No sharing is seen where a rank has several.

        It is the time until all ranks have done so much, as a rank that gets a core at once makes others wait; and the
        shortest, as other programs take cores too.
        """
        if self.device.type != "cpu" or torch.get_num_threads() > 1 or dist.get_world_size() == 1:
            return
        run()
        calls = max(1, int(LONG / self.slowest(self._sample(run, 2, time.thread_time))))
        samples = [self._shared(run, calls) for _ in range(2 * MIN_SAMPLES)]
        self.sharing = max(1.0, self.slowest(min(samples)))

    def host_seconds(self, run: Callable[[], object]) -> float:
        """Until the host is done with one call: on a GPU the launches alone."""
        if self.device.type == "cpu":
            return self.compute_seconds(run)
        run()
        samples = []
        for _ in range(2 * MIN_SAMPLES):
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            run()
            samples.append(time.perf_counter() - start)
        torch.cuda.synchronize(self.device)
        return self.slowest(statistics.median(samples))

    def slowest(self, value: float) -> float:
        """The largest of all ranks' values, on every rank."""
        if dist.get_world_size() == 1:
            return value
        found = torch.tensor(value, dtype=torch.float64)  # gloo, also beside NCCL
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found.item()

    def _measured(self, run: Callable[[], object], clock: Callable[[], float]) -> float:
        self._sample(run, 1, clock)
        calls = max(1, int(SHORTEST / self.slowest(self._sample(run, 2, clock))))
        first = self.slowest(self._sample(run, calls, time.perf_counter))
        num_samples = min(max(int(self.budget / (first * calls)), MIN_SAMPLES), MAX_SAMPLES)
        return self.slowest(lower_quartile([self._sample(run, calls, clock) for _ in range(num_samples)]))

    def _shared(self, run: Callable[[], object], calls: int) -> float:
        self._meet()
        start, own = time.perf_counter(), time.thread_time()
        for _ in range(calls):
            run()
        own = time.thread_time() - own
        self._meet()
        return (time.perf_counter() - start) / max(own, 1e-9)

    def _sample(self, run: Callable[[], object], calls: int, clock: Callable[[], float]) -> float:
        self._meet()
        return self._time(run, calls, clock) / calls

    def _meet(self) -> None:
        if dist.get_world_size() > 1:
            dist.all_reduce(torch.zeros(1))

    def _time(self, run: Callable[[], object], calls: int, clock: Callable[[], float]) -> float:
        if self.device.type != "cuda":
            start = clock()
            for _ in range(calls):
                run()
            return max(clock() - start, 1e-9)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return max(begin.elapsed_time(end) / 1e3, 1e-9)


def lower_quartile(samples: list[float]) -> float:
    return sorted(samples)[(len(samples) - 1) // 4]


def random_tensor(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal numbers: zeros would multiply faster on a GPU, which then draws less power."""
    return torch.randn(*shape, device=device, dtype=torch.float32).to(dtype)
