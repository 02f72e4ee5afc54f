"""Encoding during training on the ranks that train.

    a window of micro-batches -- shared by cost among the ranks that have the same clips -- decoded (workers) -- encoded
    -- all-gathered -- given out

A window has at least one clip for each of these ranks, so that all of them encode at a time. What is made are entries
of the cache, the same bytes that encoding beforehand gives, and EntryReader makes batches of them as ever.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor

from titan_video.data.latent_cache import LatentCache
from titan_video.data.loader import DrawPlan, Item
from titan_video.data.sampler import MicroBatch
from titan_video.ingest.encode import ClipEncoder, EncodeStats, Job, draw_job, missing, share
from titan_video.models.conditioning import ConditioningSpec


class OverlayCache:
    """A cache with the entries of the moment in front of it."""

    def __init__(self, cache: LatentCache):
        self.cache, self.entries = cache, {}

    @property
    def conditioning(self) -> ConditioningSpec:
        return self.cache.conditioning

    def read(self, kind: str, key: str) -> Tensor:
        return self.entries[kind, key] if (kind, key) in self.entries else self.cache.read(kind, key)


class Colocated:
    """Each rank of `group` (None: this one alone), which have the same clips, encodes others of them.

    idle: what becomes of the encoders between two windows: they stay on the device, go to host memory, or are dropped
        and loaded again.
    """

    def __init__(
        self,
        maker: ClipEncoder,
        dp_rank: int,
        dp_size: int,
        group: dist.ProcessGroup | None,
        idle: Literal["keep", "offload", "free"],
    ):
        self.maker, self.dp_rank, self.dp_size, self.group = maker, dp_rank, dp_size, group
        self.rank, self.size = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
        self.cache = OverlayCache(maker.cache)
        self.rest = {"keep": lambda: None, "offload": maker.encoders.offload_to_cpu, "free": maker.encoders.free}[idle]

    def items(self, order: DrawPlan, steps: Iterable[list[MicroBatch]], num_steps: int | None) -> Iterator[Item]:
        windows: deque[tuple[list[Item], list[tuple[Job, Job]]]] = deque()
        mine = (order.item(m) for step in steps for m in step[self.dp_rank :: self.dp_size])
        for decoded in self.maker.decoded(self._parts(mine, windows)):
            window, jobs = windows.popleft()
            made: dict[Any, Tensor] = {}
            error = None
            for (job, part), frames in zip(jobs, decoded, strict=True):
                try:
                    made |= self.maker.entries(job, part, frames)
                except ValueError as e:
                    error = e
            self.rest()
            self.cache.entries = self._gathered(made, error)
            yield from window

    def _parts(self, items: Iterator[Item], windows: deque) -> Iterator[list[Job]]:
        """What this rank is to encode of each window; `windows` receives the window with the whole jobs."""
        for item in items:
            window = [item]
            while sum(map(len, window)) < self.size and (following := next(items, None)):
                window.append(following)
            jobs = {
                job.keys: job
                for item in window
                for clip, text_key, _ in item
                for job in [draw_job(self.maker.cache, clip, text_key)]
            }
            mine = share(sorted(jobs.values(), key=lambda job: (-job.cost, job.keys)), self.rank, self.size)
            parts = [missing(self.maker.cache, job) for job in mine]
            windows.append((window, list(zip(mine, parts, strict=True))))
            yield parts

    def _gathered(self, made: dict[Any, Tensor], error: ValueError | None) -> dict[Any, Tensor]:
        """The entries that all ranks made; one's error is raised on all."""
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
        spent, self.maker.spent = self.maker.spent, EncodeStats()
        return spent.numbers()

    def close(self) -> None:
        self.maker.cache.flush()
