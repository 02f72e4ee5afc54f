"""Traces of steps, and snapshots of GPU memory. Field names follow torchtitan.

[profiling] enable_profiling         a trace of one step every profile_freq steps, for chrome://tracing or Perfetto
            enable_memory_snapshot   the history of GPU allocations at the same steps and at an out-of-memory error,
                                     for https://pytorch.org/memory_viz
"""

import pickle
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.distributed as dist

from titan_video.config.job_config import JobConfig, Profiling
from titan_video.tools.files import atomic_write, optional_write
from titan_video.tools.logging import logger

MAX_ENTRIES = 100_000  # allocations in a memory snapshot


class Profiler(AbstractContextManager):
    """`step` is called after each optimizer step; without any option it does nothing.

    folder: the run's; every rank writes files of its own in it.
    ValueError: a memory snapshot is asked for without a GPU.
    """

    def __init__(self, section: Profiling, folder: Path, device: torch.device):
        self.section, self.device = section, device
        self.rank = dist.get_rank()
        self.traces = folder / section.save_traces_folder
        self.snapshots = folder / section.save_memory_snapshot_folder
        self.step_number = 0
        self._profiler: torch.profiler.profile | None = None
        if section.enable_memory_snapshot:
            if device.type != "cuda":
                raise ValueError("profiling.enable_memory_snapshot: true, but only a GPU's allocations are recorded")
            torch.cuda.memory._record_memory_history(max_entries=MAX_ENTRIES)

    def __enter__(self) -> "Profiler":
        s = self.section
        if s.enable_profiling:
            kinds = torch.profiler.ProfilerActivity
            activities = [kinds.CPU, *([kinds.CUDA] if self.device.type == "cuda" else [])]
            wait = s.profile_freq - s.profiler_warmup - s.profiler_active
            schedule = torch.profiler.schedule(wait=wait, warmup=s.profiler_warmup, active=s.profiler_active)
            self._profiler = torch.profiler.profile(
                activities=activities, schedule=schedule, on_trace_ready=self._write_trace, record_shapes=True
            )
            self._profiler.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            self._write_snapshot("out-of-memory")
        if self._profiler is not None:
            self._profiler.__exit__(kind, error, trace)

    def step(self, step: int) -> None:
        """Optimizer step number `step` has ended."""
        self.step_number = step
        if self._profiler is not None:
            self._profiler.step()
        if step % self.section.profile_freq == 0:
            self._write_snapshot(f"step-{step}")

    def _write_trace(self, profiler: torch.profiler.profile) -> None:
        start = time.perf_counter()
        folder = self.traces / f"step-{self.step_number}"
        with optional_write("traces", folder):
            folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(folder / f"rank{self.rank}_trace.json"))
            logger.info(f"trace of step {self.step_number} in {folder} ({time.perf_counter() - start:.1f} s)")

    def _write_snapshot(self, name: str) -> None:
        if not self.section.enable_memory_snapshot:
            return
        path = self.snapshots / name / f"rank{self.rank}_memory_snapshot.pickle"
        with optional_write("memory snapshots", path):
            atomic_write(path, pickle.dumps(torch.cuda.memory._snapshot()), "memory snapshot")
            logger.info(f"memory snapshot in {path}")


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about profiling, one line per mistake."""
    s = config.profiling
    if s.profiler_warmup + s.profiler_active > s.profile_freq:
        yield (
            f"profiling.profile_freq: given {s.profile_freq}, but profiling.profiler_warmup and profiler_active take "
            f"{s.profiler_warmup + s.profiler_active} steps of each; legal: at least that"
        )
