"""How many clips of a size make a micro-batch, and which micro-batches cost the same."""

from collections.abc import Sequence
from dataclasses import dataclass

from titan_video.config.job_config import Data, Parallelism, Training
from titan_video.data.sampler import CostClass

Bucket = tuple[int, int, int]  # frames (4k+1), height, width
SAME_COST = 1.05  # micro-batches of one class differ by at most this factor


@dataclass(frozen=True)
class Work:
    """What one clip of a bucket takes: tokens, and FLOPs of a forward."""

    tokens: int
    flops: float


@dataclass(frozen=True)
class Batching:
    """How clips make up micro-batches and steps; nothing in it depends on the number of ranks.

    micro_batches: of all data ranks in a step, drawn in so many equal `parts`. clips: in a micro-batch; with a
    token_budget as many as fit into that, at least one. multiple: with pipelines, the clips that pass it together; then
    a step's micro-batches are all of one size.
    """

    micro_batches: int
    clips: int = 1
    token_budget: int = 0
    parts: int = 1
    multiple: int = 0

    @classmethod
    def of(cls, data: Data, training: Training, parallelism: Parallelism, micro_batches: int) -> "Batching":
        multiple = parallelism.pipeline_parallel_microbatch_size if parallelism.pipeline_parallel_degree > 1 else 0
        return cls(micro_batches, training.local_batch_size, data.tokens_per_microbatch, data.groups_per_step, multiple)

    def clips_of(self, tokens: int) -> int:
        """Clips of so many tokens in a micro-batch, where there are enough of them."""
        if not self.token_budget:
            return self.clips
        unit = max(1, self.multiple)
        return max(1, self.token_budget // (tokens * unit)) * unit

    def classes(self, counts: Sequence[int], works: Sequence[Work]) -> list[CostClass]:
        """Buckets, given by their numbers of clips and the work of one, in classes of equal cost, the costliest first.

        With a token budget a micro-batch shrinks where a part would otherwise take a class's clips more than once (not
        in pipelines, whose schedules need their number of micro-batches).
        """
        if not self.token_budget or self.multiple:
            return [CostClass((b,), self.clips_of(work.tokens)) for b, work in enumerate(works)]
        order = sorted(range(len(counts)), key=lambda b: (self.clips_of(works[b].tokens), -works[b].flops, b))
        groups: list[list[int]] = []
        for b in order:
            first = works[groups[-1][0]] if groups else None
            if (
                first
                and self.clips_of(first.tokens) == self.clips_of(works[b].tokens)
                and first.flops <= SAME_COST * works[b].flops
            ):
                groups[-1].append(b)
            else:
                groups.append([b])
        per_part = self.micro_batches // self.parts
        enough = [max(1, sum(counts[b] for b in group) // per_part) for group in groups]
        return [
            CostClass(tuple(group), min(self.clips_of(works[group[0]].tokens), most))
            for group, most in zip(groups, enough, strict=True)
        ]
