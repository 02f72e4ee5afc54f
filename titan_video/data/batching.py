"""How many clips of a size make a micro-batch, and which micro-batches cost the same."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from titan_video.config.job_config import Data, JobConfig, Parallelism, Training
from titan_video.config.manager import ConfigError
from titan_video.config.values import divisors, nearest_multiples
from titan_video.data.sampler import CostClass

Bucket = tuple[int, int, int]  # frames (4k+1), height, width
SAME_COST = 1.05  # micro-batches of one class differ by at most this factor


@dataclass(frozen=True)
class Work:
    """The cost of one clip of a bucket: its tokens, and the FLOPs of a forward."""

    tokens: int
    flops: float


@dataclass(frozen=True)
class Batching:
    """How clips make up micro-batches and steps. Nothing in it depends on the number of ranks.

    micro_batches: of all data-parallel ranks in a step, drawn in `groups_per_step` groups of equal size.
    clips: clips in a micro-batch, if there is no token budget.
    token_budget: tokens of a micro-batch, which then holds as many clips as fit, at least one. 0: no budget.
    multiple: clips that pass a pipeline together; all micro-batches of a step then have one size. 0: no pipeline.
    """

    micro_batches: int
    clips: int = 1
    token_budget: int = 0
    groups_per_step: int = 1
    multiple: int = 0

    @classmethod
    def of(cls, data: Data, training: Training, parallelism: Parallelism, micro_batches: int) -> "Batching":
        is_pipelined = parallelism.pipeline_parallel_degree > 1
        return cls(
            micro_batches,
            clips=training.local_batch_size,
            token_budget=data.tokens_per_microbatch,
            groups_per_step=data.groups_per_step,
            multiple=parallelism.pipeline_parallel_microbatch_size if is_pipelined else 0,
        )

    def clips_per_micro_batch(self, tokens: int) -> int:
        """Clips of `tokens` tokens each in a micro-batch, where there are enough of them."""
        if not self.token_budget:
            return self.clips
        unit = max(1, self.multiple)
        return max(1, self.token_budget // (tokens * unit)) * unit

    def classes(self, counts: Sequence[int], works: Sequence[Work]) -> list[CostClass]:
        """Group buckets into classes of equal cost, the most expensive first.

        counts, works: of each bucket, its number of clips and the cost of one.
        With a token budget, a micro-batch shrinks where a group would otherwise take clips of a class more than once.
        In pipelines it does not: their schedules need a fixed number of micro-batches.
        """
        if not self.token_budget or self.multiple:
            return [CostClass((b,), self.clips_per_micro_batch(work.tokens)) for b, work in enumerate(works)]
        clips = [self.clips_per_micro_batch(work.tokens) for work in works]
        groups: list[list[int]] = []
        for b in sorted(range(len(counts)), key=lambda b: (clips[b], -works[b].flops, b)):
            first = groups[-1][0] if groups else b
            if groups and clips[first] == clips[b] and works[first].flops <= SAME_COST * works[b].flops:
                groups[-1].append(b)
            else:
                groups.append([b])
        per_group = self.micro_batches // self.groups_per_step
        most = [max(1, sum(counts[b] for b in group) // per_group) for group in groups]
        return [CostClass(tuple(g), min(clips[g[0]], limit)) for g, limit in zip(groups, most, strict=True)]


def gradient_accumulation(config: JobConfig, dp: int) -> int:
    """Micro-batches per optimizer step on each of `dp` data-parallel ranks.

    ConfigError: it is not a whole number.
    """
    errors = list(batch_size_errors(config, dp))
    if errors:
        raise ConfigError("\n".join(errors))
    t, d = config.training, config.data
    if d.tokens_per_microbatch:
        return max(1, d.global_micro_batches // dp)
    return max(1, t.global_batch_size // (t.local_batch_size * dp))


def num_data_ranks(config: JobConfig, world_size: int) -> int:
    """The data-parallel degree on `world_size` ranks, at least 1 where the degrees do not fit."""
    return max(config.encoder.num_training_ranks(world_size) // config.parallelism.model_parallel_degree, 1)


# ---- rules of the configuration: each yields one line per mistake ----


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    yield from batch_size_errors(config, num_data_ranks(config, world_size))


def batch_size_errors(config: JobConfig, dp: int) -> Iterator[str]:
    """What is wrong with the batch size of a step on `dp` data-parallel ranks."""
    data, local = config.data, config.training.local_batch_size
    if data.tokens_per_microbatch:
        yield from _unused_batch_sizes(config)
        name, value, unit = "data.global_micro_batches", data.global_micro_batches, dp
        explained = f"{dp} data-parallel ranks"
    else:
        name, value, unit = "training.global_batch_size", config.training.global_batch_size, local * dp
        explained = f"training.local_batch_size {local} x {dp} ranks"
        if data.global_micro_batches != -1:
            yield (
                f"data.global_micro_batches: given {data.global_micro_batches}, but data.tokens_per_microbatch is 0; "
                f"set that, or use training.global_batch_size"
            )
    accumulation = max(value, unit) // unit
    if value != -1 and (value <= 0 or value % unit):
        yield (
            f"{name}: given {value}; legal: a multiple of {unit} ({explained}), nearest "
            f"{nearest_multiples(value, unit)}, or -1 for {unit}"
        )
    elif accumulation % data.groups_per_step:
        yield (
            f"data.groups_per_step: given {data.groups_per_step}; a rank has {accumulation} micro-batches in a step; "
            f"legal: {divisors(accumulation)}"
        )
    if data.groups_per_step > 1 and config.parallelism.pipeline_parallel_degree > 1:
        yield (
            f"data.groups_per_step: given {data.groups_per_step}, but all micro-batches of a pipeline step have one "
            f"size; leave it at 1"
        )


def _unused_batch_sizes(config: JobConfig) -> Iterator[str]:
    for name, default in (("local_batch_size", 1), ("global_batch_size", -1)):
        value = getattr(config.training, name)
        if value != default:
            yield (
                f"training.{name}: given {value}, but data.tokens_per_microbatch sets the clips of a micro-batch and "
                f"data.global_micro_batches the micro-batches of a step; leave it at {default}"
            )
