"""Encoding during training on the ranks that train.

    a window of micro-batches
        -> its clips, partitioned by cost among the ranks that have the same clips
        -> decoded by worker processes -> encoded -> all-gathered
        -> the window's micro-batches, one at a time

A window has at least one clip for each of these ranks, so that all of them encode at the same time. The results are
cache entries, the same bytes that encoding beforehand gives, and EntryReader makes batches of them as always.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor

from titan_video.data.loader import DrawPlan, MicroBatchSpec
from titan_video.data.sampler import MicroBatch
from titan_video.ingest.cache.encode import ClipEncoder, EncodeStats, Job, draw_job, missing_part, partition_jobs
from titan_video.online.encoder import OnlineEncoder, OverlayCache


class Colocated(OnlineEncoder):
    """Encodes on the training ranks. Those of `group` have the same clips, and each encodes a part of them.

    group: None: this rank alone.
    offload_policy: what happens to the encoders between two windows: they stay on the device, are moved to host memory,
        or are dropped and loaded again.
    """

    def __init__(
        self,
        clip_encoder: ClipEncoder,
        dp_rank: int,
        dp_size: int,
        group: dist.ProcessGroup | None,
        offload_policy: Literal["keep", "offload", "free"],
    ):
        self.clip_encoder = clip_encoder
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.group = group
        self.rank = dist.get_rank(group) if group else 0
        self.size = dist.get_world_size(group) if group else 1
        self.cache = OverlayCache(clip_encoder.cache)
        encoders = clip_encoder.encoders
        self.after_window = {"keep": None, "offload": encoders.offload_to_cpu, "free": encoders.free}[offload_policy]

    def specs(
        self, draw_plan: DrawPlan, steps: Iterable[list[MicroBatch]], num_steps: int | None
    ) -> Iterator[MicroBatchSpec]:
        windows: deque[tuple[list[MicroBatchSpec], list[tuple[Job, Job]]]] = deque()
        mine = (draw_plan.spec(m) for step in steps for m in step[self.dp_rank :: self.dp_size])
        for decoded in self.clip_encoder.decoded(self._missing_parts(mine, windows)):
            window, jobs = windows.popleft()
            made: dict[Any, Tensor] = {}
            error = None
            for (job, part), frames in zip(jobs, decoded, strict=True):
                try:
                    made |= self.clip_encoder.entries(job, part, frames)
                except ValueError as e:
                    error = e
            if self.after_window:
                self.after_window()
            self.cache.entries = self._gather(made, error)
            yield from window

    def _missing_parts(self, specs: Iterator[MicroBatchSpec], windows: deque) -> Iterator[list[Job]]:
        """What this rank has to encode of each window. `windows` receives the window, with the complete jobs."""
        for spec in specs:
            window = [spec]
            while sum(map(len, window)) < self.size and (following := next(specs, None)):
                window.append(following)
            draws = (draw for spec in window for draw in spec)
            jobs = {job.keys: job for job in (draw_job(self.clip_encoder.cache, d.clip, d.text_key) for d in draws)}
            by_cost = sorted(jobs.values(), key=lambda job: (-job.cost, job.keys))
            mine = partition_jobs(by_cost, self.rank, self.size)
            parts = [missing_part(self.clip_encoder.cache, job) for job in mine]
            windows.append((window, list(zip(mine, parts, strict=True))))
            yield parts

    def _gather(self, made: dict[Any, Tensor], error: ValueError | None) -> dict[Any, Tensor]:
        """The entries that all ranks made. An error of one rank is raised on all."""
        parts: list[Any] = [(made, error)]
        if self.group:
            parts = [None] * self.size
            dist.all_gather_object(parts, (made, error), group=self.group)
        for _, error in parts:
            if error:
                raise error
        return {name: tensor for part, _ in parts for name, tensor in part.items()}

    def stats(self) -> dict[str, float]:
        """For the log: what this rank spent on encoding since the last call."""
        spent = self.clip_encoder.spent
        self.clip_encoder.spent = EncodeStats()
        return spent.numbers()

    def close(self) -> None:
        self.clip_encoder.cache.flush()
