"""Traces of steps, and histories of GPU memory."""

from dataclasses import dataclass

from titan_video.config.option import opt


@dataclass(frozen=True)
class Profiling:
    enable_profiling: bool = opt(False, "Write a trace of a step every profile_freq steps, on every rank.")
    save_traces_folder: str = opt("profile_traces", "Folder of the traces, inside job.dump_folder.")
    profile_freq: int = opt(10, "Steps between traces, and between memory snapshots.", ge=2)
    profiler_warmup: int = opt(
        1, "Steps before a traced one in which the profiler runs and its output is discarded.", ge=0
    )
    profiler_active: int = opt(1, "Steps in a trace.", ge=1)
    enable_memory_snapshot: bool = opt(
        False, "Write the history of GPU allocations every profile_freq steps and at an out-of-memory error."
    )
    save_memory_snapshot_folder: str = opt("memory_snapshot", "Folder of the memory snapshots, inside job.dump_folder.")
