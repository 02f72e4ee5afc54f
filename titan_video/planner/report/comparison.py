"""In the log of a run: what a step was predicted to take on a cluster, and what it takes, `[planner] cluster`.

After NUM_STEPS steps rank 0 records one step with torch's profiler and sorts its operators; the log gets a table. The
first WARM_UP steps, which compile and encode, do not count. The step is the median's, and the recorded one's shares
are scaled to it, as recording takes time itself.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from titan_video.config.job_config import JobConfig
from titan_video.config.manager import dump, parse
from titan_video.planner import cluster
from titan_video.planner.cost.model import CostModel
from titan_video.planner.dry_run.describe import GIB
from titan_video.planner.plan import own_candidate
from titan_video.tools.logging import logger

ROOT = Path(__file__).resolve().parents[3]  # where the package is
NUM_STEPS, WARM_UP = 20, 5
LONGEST = 1800  # seconds of the process that predicts
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "frozen_linear", "frozen_linear_backward", "convolution")
PRODUCTS += ("_grouped_mm", "grouped_linear", "grouped_linear_backward")
COMPUTING = ("aten::", "titan_video::", "triton_")  # of other operators, the host's time is not a kernel's
OPTIMIZER = "Optimizer.step"
ELSEWHERE = ""  # no operator that computes: waiting, copies between ranks, the host
ROWS = (  # (name, parts of the prediction, what is measured)
    ("products", ("products",), "products"),
    ("attention", ("attention",), "attention"),
    ("memory-bound", ("memory-bound",), "memory-bound"),
    ("recomputation", ("recomputation",), None),
    ("optimizer", ("optimizer",), "optimizer"),
)


class Comparison(AbstractContextManager):
    """`step` is called after each optimizer step, on every rank; only rank 0 measures.

    The prediction is made in a process of its own, while training goes on: it needs a process group that is not real.
    """

    def __init__(self, config: JobConfig, device: torch.device):
        self.config, self.device = config, device
        self.is_measuring = dist.get_rank() == 0
        self.seconds: list[float] = []  # of each step after the first
        self.last: float | None = None
        self.recording: torch.profiler.profile | None = None
        self.measured: dict[str, float] = {}
        self.predicting: Predicting | None = None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if self.recording is not None:
            self.recording.__exit__(kind, error, trace)
        if error is not None:  # a signal, too: nothing waits for a prediction then, and none goes on
            if self.predicting is not None:
                self.predicting.stop()
            return
        if self.is_measuring and self.seconds:  # a short run
            self.predicting = Predicting(self.config, dist.get_world_size())
        if self.predicting is not None:
            self._report()

    def step(self, step: int) -> None:
        """Optimizer step number `step` has ended."""
        if self.predicting is not None and self.predicting.is_ready():
            self._report()
        if not self.is_measuring:
            return
        now = time.perf_counter()
        if self.recording is not None:
            self._end_recording()
            return
        if self.last is not None:
            self.seconds.append(now - self.last)
        if len(self.seconds) >= NUM_STEPS and self._is_followed_by_a_step(step):
            kinds = torch.profiler.ProfilerActivity
            on_gpu = [kinds.CUDA] if self.device.type == "cuda" else []
            self.recording = torch.profiler.profile(activities=[kinds.CPU, *on_gpu])
            self.recording.__enter__()
        self.last = time.perf_counter()

    def _is_followed_by_a_step(self, step: int) -> bool:
        """Whether nothing but a step comes before the next call: no validation, no checkpoint."""
        c = self.config
        return step % c.checkpoint.interval != 0 and not (c.validation.enable and step % c.validation.freq == 0)

    def _end_recording(self) -> None:
        recording, self.recording, self.is_measuring = self.recording, None, False
        recording.__exit__(None, None, None)
        self.measured = scaled(sort_events(recording.events(), self.device), self._median())
        self.predicting = Predicting(self.config, dist.get_world_size())

    def _median(self) -> float:
        return statistics.median(self.seconds[WARM_UP:] or self.seconds)

    def _report(self) -> None:
        predicting, self.predicting, self.is_measuring = self.predicting, None, False
        found, median, cluster_name = predicting.result(), self._median(), self.config.planner.cluster
        if "error" in found:
            logger.warning(f"planner: a step takes {median:.3f} s; no prediction: {found['error']}")
            return
        lines = [
            f"planner: a step on {cluster_name}, and here on rank 0",
            *table(found["seconds"], self.measured, median),
        ]
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            lines.append(f"memory: predicted {found['memory'] / GIB:.2f} GiB, here {peak / GIB:.2f}")
        logger.info("\n".join(lines))


class Predicting:
    """A process that predicts the step of a configuration. num_training: ranks that train."""

    def __init__(self, config: JobConfig, num_training: int):
        self.input, self.output, self.errors = (tempfile.TemporaryFile("w+") for _ in range(3))
        self.input.write(dump(config))
        self.input.seek(0)
        # Beyond it the other ranks, which wait at the end of a run, would take this one for dead.
        self.limit = max(1.0, config.comm.train_timeout_seconds / 2)
        command = [sys.executable, "-m", "titan_video.planner.report.comparison", str(num_training)]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        # It computes nothing, and would take memory of a GPU that it sees.
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdin=self.input, stdout=self.output, stderr=self.errors, env=environment
        )

    def is_ready(self) -> bool:
        return self.process.poll() is not None

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def result(self) -> dict[str, Any]:
        """{"seconds": by part, "memory": bytes on rank 0}, or {"error": why there is no prediction}."""
        try:
            failed = self.process.wait(self.limit)
        except subprocess.TimeoutExpired:
            self.stop()
            return {"error": f"it took longer than {self.limit:.0f} s, half of comm.train_timeout_seconds"}
        for file in (self.output, self.errors):
            file.seek(0)
        if failed:
            return {"error": self.errors.read().strip().rpartition("\n")[2] or f"its process ended with {failed}"}
        return json.loads(self.output.read().strip().rpartition("\n")[2])


def predict(config: JobConfig, num_training: int) -> dict[str, Any]:
    """What `Predicting.result` returns. ValueError: no plan covers the configuration."""
    machine = cluster.load(config.planner.cluster)
    encoders = config.encoder.num_ranks if config.encoder.placement == "separate" else 0
    model = CostModel(config, machine)
    found = model.predict(own_candidate(config, num_training + encoders, model))
    return {"seconds": found.seconds, "memory": found.memory[0].total}


def sort_events(events: Any, device: torch.device) -> dict[str, float]:
    """Seconds of a recorded step by kind. What no operator accounts for is ELSEWHERE.

    Communication is not summed: it may run beside compute. Where compute waits for it, it is in ELSEWHERE.
    """
    own_time = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    found = dict.fromkeys(("products", "attention", "memory-bound", "optimizer"), 0.0)
    first, last = float("inf"), 0.0
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel, whose time its operator has
        first, last = min(first, event.time_range.start), max(last, event.time_range.end)
        if kind := kind_of(event):
            found[kind] += getattr(event, own_time) / 1e6
    whole = max(0.0, last - first) / 1e6
    return found | {ELSEWHERE: max(0.0, whole - sum(found.values()))}


def kind_of(event: Any) -> str:
    """Of an operator; ELSEWHERE for what does not compute."""
    parent = event
    while parent is not None:
        if parent.name.startswith(OPTIMIZER):
            return "optimizer"
        parent = parent.cpu_parent
    if not event.name.startswith(COMPUTING):
        return ELSEWHERE
    name = event.name.partition("::")[2] or event.name
    if "attention" in name:
        return "attention"
    return "products" if name in PRODUCTS else "memory-bound"


def scaled(found: dict[str, float], step: float) -> dict[str, float]:
    """The same shares of `step` seconds."""
    whole = sum(found.values())
    return {kind: seconds * step / whole for kind, seconds in found.items()} if whole else {}


def table(predicted: dict[str, float], measured: dict[str, float], step: float) -> Iterator[str]:
    """Lines: each part in seconds. Recomputation is, measured, part of the first three."""
    yield f"{'seconds':<34}{'predicted':>11}{'measured':>11}"
    rest = dict(predicted)
    for name, parts, kind in ROWS:
        seconds = sum(rest.pop(part, 0.0) for part in parts)
        here = "above" if kind is None else f"{measured[kind]:.4f}" if kind in measured else "-"
        yield f"{name:<34}{seconds:>11.4f}{here:>11}"
    here = f"{measured[ELSEWHERE]:.4f}" if ELSEWHERE in measured else "-"
    yield f"{'communication, bubble, data, host':<34}{sum(rest.values()):>11.4f}{here:>11}"
    total = sum(predicted.values())
    yield f"{'step':<34}{total:>11.4f}{step:>11.4f}  predicted / measured {total / step:.2f}"
    waits = [f"{part} {seconds:.4f}" for part, seconds in rest.items() if seconds > 0]
    if waits:
        yield f"predicted: {', '.join(waits)}"


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about the comparison, one line per mistake."""
    if config.profiling.enable_profiling or config.profiling.enable_memory_snapshot:
        yield (
            "planner.cluster: given beside profiling, and only one of both can record a step; leave it empty, or turn "
            "profiling.enable_profiling and enable_memory_snapshot off"
        )
    try:
        cluster.load(config.planner.cluster)
    except ValueError as e:
        yield from str(e).replace("--cluster:", "planner.cluster:").splitlines()


def main(num_training: int) -> None:
    """Reads a TOML, and prints what `predict` returns as JSON, or its error."""
    signal.alarm(LONGEST)  # where the run was killed, and nobody waits for the result
    try:
        found = predict(parse(sys.stdin.read()), num_training)
    except ValueError as e:
        found = {"error": str(e)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
