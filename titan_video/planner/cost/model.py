"""What a candidate costs: seconds by part and bytes by kind, from traced blocks (trace/) and a cluster (cluster.py).

    model = CostModel(config, cluster)    # traces blocks as they are asked for, once in the process
    model.workload                        # buckets, their tokens and shares
    model.layers                          # block type of each layer
    model.layout(candidate)               # what does not depend on checkpointing: for the search
    model.predict(candidate)              # all of it
    model.fits(candidate)

`layout` and what it is made of are cached; `predict` is arithmetic on it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from titan_video.config.job_config import JobConfig
from titan_video.distributed.pipeline_parallel.stages import split_blocks
from titan_video.models import get_args, get_spec
from titan_video.planner.candidate import Candidate, Checkpointing, Prediction, StageMemory
from titan_video.planner.cluster import Cluster
from titan_video.planner.cost.layout import Layout, LayoutBuilder
from titan_video.planner.cost.memory_model import StageInput, backwards, rank_memory
from titan_video.planner.cost.step_clock import StepClock
from titan_video.planner.cost.timeline import BlockTimes, StepTimes
from titan_video.planner.dry_run.describe import OFFLOADED, STATE, SWAPPED
from titan_video.planner.dry_run.run import num_clip_tokens
from titan_video.planner.trace.replay import BlockMemory, EndsMemory, Replay, block_replay, ends_memory
from titan_video.planner.trace.tracer import Tracer
from titan_video.planner.trace.traces import BlockTrace, EndsTrace
from titan_video.planner.trace.units import Units, UnitSizes

WORST_LOAD = 1.5  # of experts: balancing keeps the fullest below it (see training/expert_balance.py)


@dataclass(frozen=True)
class BucketWork:
    """Clips of one size [frames, height, width]; share: of micro-batches (sums to 1 over a workload)."""

    bucket: tuple[int, ...]
    tokens: int  # of one clip
    share: float


class CostModel:
    """config: the job; its degrees, batch sizes and checkpointing are not read. cluster: the machine.

    shares: {bucket: share of micro-batches}; None: equal.
    load: rows that the fullest rank's experts get / mean; memory is for it, time for an even load.
    ValueError: what is not planned (adapters, an optimizer of another package, experts that choose tokens).
    """

    def __init__(
        self,
        config: JobConfig,
        cluster: Cluster,
        shares: dict[tuple[int, ...], float] | None = None,
        load: float = WORST_LOAD,
    ) -> None:
        _check(config)
        self.config, self.cluster, self.load = config, cluster, load
        self.spec = get_spec(config.model.name)
        self.args = get_args(
            self.spec, config.model.flavor, config.model.hf_assets_path, config.encoder.max_text_length
        )
        self.experts = getattr(self.args, "experts", None)
        if self.experts and self.experts.expert_choice:
            raise ValueError(
                f"model.flavor: the experts of {config.model.flavor} choose tokens, so that no formula says how many "
                f"rows a rank has; plan the same sizes with token choice"
            )
        self.tracer = Tracer(config, self.spec, self.args)
        self.sizes = UnitSizes(config, self.spec, self.tracer.model, self.tracer.kinds)
        self.workload = self._workload(shares)
        self._replays: dict[Any, Replay] = {}
        self._block_memory: dict[Any, BlockMemory] = {}
        self._ends_memory: dict[Any, EndsMemory] = {}
        self._splits: dict[int, list[range]] = {}
        self.clock = StepClock(self)
        self.builder = LayoutBuilder(self)

    def _workload(self, shares: dict[tuple[int, ...], float] | None) -> tuple[BucketWork, ...]:
        buckets = self.config.data.sizes
        if unknown := [bucket for bucket in shares or () if bucket not in {tuple(b) for b in buckets}]:
            raise ValueError(f"--shares: given {_names(unknown)}; legal: buckets of this job, {_names(buckets)}")
        weights = [1.0 if shares is None else shares.get(tuple(bucket), 0.0) for bucket in buckets]
        if not sum(weights) > 0:
            raise ValueError(f"--shares: none for the buckets of this job, {_names(buckets)}")
        return tuple(
            BucketWork(tuple(bucket), num_clip_tokens(bucket, self.spec, self.args), weight / sum(weights))
            for bucket, weight in zip(buckets, weights, strict=True)
            if weight > 0
        )

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Type of each block, in forward order: its container, and whether it has experts."""
        of = {block: kind for kind, blocks in self.tracer.kinds.items() for block in blocks}
        return tuple(of[path, key] for path in self.spec.plan.blocks for key in self.tracer.model.get_submodule(path))

    # ---- what the search and its reports ask ----

    def layout(self, candidate: Candidate, allow_offload: bool = False) -> Layout:
        """All that does not depend on checkpointing or on the split into stages. See layout.py."""
        return self.builder.layout(candidate, allow_offload)

    def least_seconds(self, candidate: Candidate) -> float:
        """A lower bound of a step, cheap: see layout.py."""
        return self.builder.least_seconds(candidate)

    def predict(self, candidate: Candidate) -> Prediction:
        """A step of the candidate."""
        seconds, flops = self.clock.step(candidate)
        works = [(work.share, self.clips(candidate, work), work.tokens) for work in self.workload]
        step = candidate.dp * candidate.microbatches
        forward = sum(share * self.args.flops(tokens, clips) for share, clips, tokens in works)
        return Prediction(
            seconds=seconds,
            memory=self.memory(candidate),
            flops=flops,
            model_flops=3 * forward * step / candidate.num_training_ranks,
            tokens=step * sum(share * clips * tokens for share, clips, tokens in works),
            clips=step * sum(share * clips for share, clips, _ in works),
            peak_flops=self.cluster.peak_flops,
            encoder_ranks=candidate.encoder_ranks,
            notes=("float8: counted as bfloat16",) if self.config.float8.enable else (),
        )

    def fits(self, candidate: Candidate) -> bool:
        """Whether every stage's ranks have the memory, on the device and on the host."""
        memory = self.memory(candidate)
        host = self.cluster.host.memory_gib or math.inf
        return all(m.needed <= self.cluster.gpu.memory_gib and m.host_total / 2**30 <= host for m in memory)

    def block_times(self, candidate: Candidate) -> BlockTimes:
        """Of the first block, or the first with experts over ranks, for the longest clips."""
        return self.clock.block_times(candidate)

    def step_times(self, candidate: Candidate) -> StepTimes:
        """Of the stages, for an average micro-batch."""
        return self.clock.step_times(candidate)

    # ---- memory ----

    def clips(self, candidate: Candidate, work: BucketWork) -> int:
        """Of a micro-batch of this bucket."""
        if candidate.tokens_per_microbatch:
            return max(1, candidate.tokens_per_microbatch // work.tokens)
        return candidate.local_batch_size

    def trace(self, candidate: Candidate) -> tuple[dict[str, BlockTrace], EndsTrace]:
        return self.tracer.trace(candidate.ring, candidate.ulysses, candidate.tp, candidate.ep)

    def block_memory(self, candidate: Candidate, path: str, mode: Checkpointing, work: BucketWork) -> BlockMemory:
        clips = self.clips(candidate, work)
        layout = candidate.ring, candidate.ulysses, candidate.tp, candidate.ep
        is_long = work.tokens >= self.config.activation_checkpoint.save_min_kv
        key = (*layout, path, mode, is_long, clips, work.tokens)
        if key not in self._block_memory:
            replay_key = (*layout, path, mode.mode, mode.save, is_long)
            if replay_key not in self._replays:
                self._replays[replay_key] = block_replay(self.trace(candidate)[0][path], mode, is_long)
            length = -(-work.tokens // (candidate.cp * candidate.tp))
            experts = self.tracer.degrees(*layout)[3] / candidate.ep
            self._block_memory[key] = self._replays[replay_key].memory(clips, length, mode.offload, self.load, experts)
        return self._block_memory[key]

    def ends_memory(self, candidate: Candidate, work: BucketWork) -> EndsMemory:
        clips = self.clips(candidate, work)
        key = candidate.ring, candidate.ulysses, candidate.tp, clips, work.tokens
        if key not in self._ends_memory:
            length = -(-work.tokens // (candidate.cp * candidate.tp))
            traced = math.prod(self.tracer.degrees(candidate.ring, candidate.ulysses, candidate.tp))
            ratio = candidate.cp * candidate.tp / traced
            ends = self.tracer.trace(candidate.ring, candidate.ulysses, candidate.tp)[1]
            self._ends_memory[key] = ends_memory(ends, clips, length, ratio)
        return self._ends_memory[key]

    def units(self, candidate: Candidate) -> Units:
        c = candidate
        return self.sizes.units(c.dp_shard * c.cp, c.tp, c.ep, c.optimizer)

    def has_units(self, candidate: Candidate) -> bool:
        """Whether FSDP does anything: see distributed/fsdp.py."""
        t = self.config.training
        is_plain = t.mixed_precision_param == "float32" and t.mixed_precision_reduce == "float32"
        return candidate.dp * candidate.cp * candidate.tp > 1 or not is_plain or candidate.enable_cpu_offload

    def stages(self, candidate: Candidate) -> list[range]:
        """The blocks of each stage."""
        num = len(self.layers)
        count = candidate.pp * (2 if candidate.pp > 1 and candidate.schedule.startswith("Interleaved") else 1)
        if candidate.split:
            return [range(a, b) for a, b in zip(candidate.split, (*candidate.split[1:], num), strict=True)]
        if count not in self._splits:  # as keep_stages does: by FLOPs of the longest clip
            tokens = max(work.tokens for work in self.workload)
            flops = self.args.block_flops(tokens)
            end = (self.args.flops(tokens) - flops) / (flops / num) / 2
            split = split_blocks(num, count, first_cost=end, last_cost=end) if count > 1 else [range(num)]
            self._splits[count] = split
        return self._splits[count]

    def modes(self, candidate: Candidate) -> list[Checkpointing]:
        """Of each block."""
        modes = [Checkpointing()] * len(self.layers)
        for r in candidate.ranges:
            modes[r.first : r.last] = [r.checkpointing] * (r.last - r.first)
        return modes

    def stage_input(
        self, candidate: Candidate, stage: int, blocks: Sequence[tuple[str, Checkpointing]], work: BucketWork, last: int
    ) -> StageInput:
        memory = {(path, mode): self.block_memory(candidate, path, mode, work) for path, mode in set(blocks)}
        is_sharded = candidate.dp_shard * candidate.cp > 1
        return StageInput(
            blocks=blocks,
            memory=memory,
            ends=self.ends_memory(candidate, work),
            units=self.units(candidate),
            is_first=stage == 0,
            is_last=stage == last,
            num_inputs=candidate.microbatches if candidate.pp > 1 else 1,
            reshard=candidate.reshard and is_sharded,
            has_units=self.has_units(candidate),
            in_backward=self.config.optimizer.in_backward,
            pipelined=candidate.pp > 1,
            replicates=candidate.dp_replicate > 1,
        )

    def memory(self, candidate: Candidate) -> tuple[StageMemory, ...]:
        """Of the ranks of each stage, for the bucket that needs most."""
        modes, stages = self.modes(candidate), self.stages(candidate)
        state_on_host = STATE if candidate.enable_cpu_offload else ()
        on_host = (OFFLOADED, SWAPPED, *state_on_host)
        kinds = [[(self.layers[i], modes[i]) for i in blocks] for blocks in stages]
        found = []
        for rank in range(candidate.pp):
            of_buckets = []
            fullest = backwards(candidate.pp, candidate.microbatches, candidate.schedule, rank)
            for work in self.workload:
                own = [
                    self.stage_input(candidate, s, kinds[s], work, len(stages) - 1)
                    for s in range(rank, len(stages), candidate.pp)
                ]
                of_buckets.append(rank_memory(own, fullest, state_on_host))
            found.append(max(of_buckets, key=lambda m: sum(n for kind, n in m.items() if kind not in on_host)))
        return tuple(
            StageMemory(s, {kind: round(n) for kind, n in m.items()}, on_host, candidate.num_training_ranks)
            for s, m in enumerate(found)
        )


def _names(buckets: Iterable[Sequence[int]]) -> str:
    return ", ".join("x".join(map(str, bucket)) for bucket in buckets)


def _check(config: JobConfig) -> None:
    if config.lora.enable:
        raise ValueError("lora.enable: only full training is planned; a dry run says what adapters need")
    if "." in config.optimizer.name:
        raise ValueError(
            f"optimizer.name: the state of {config.optimizer.name} is not known here; plan with AdamW, whose state is "
            f"8 bytes for an element"
        )
