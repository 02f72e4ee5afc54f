"""A small cost model with the planner's interface, for tests of the search: every number is a short formula.

It says nothing about a real machine. Its predictions do not use the search's code, so that they can judge it.
"""

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from titan_video.planner.candidate import FULL, NONE, Candidate, Checkpointing, Prediction, StageMemory
from titan_video.planner.cost.model import BucketWork
from titan_video.planner.cost.timeline import BlockTimes, StepTimes
from titan_video.planner.dry_run.describe import GIB
from titan_video.planner.search.fastest import StageBudget
from titan_video.planner.search.knapsack import Choice
from titan_video.planner.search.space import Space, StepClips

ATTENTION = Checkpointing("selective", ("attention",))
MODES = (NONE, ATTENTION, FULL)


@dataclass(frozen=True)
class SmallLayout:
    stages: list[StageBudget]
    choices: dict[str, tuple[Choice, ...]]
    held: dict[str, float]
    usable: float
    microbatches: int
    fixed: float

    def step_seconds(self, of_stages):
        return (self.microbatches + len(of_stages) - 1) * max(of_stages) + self.fixed


@dataclass(frozen=True)
class SmallModel:
    """usable: bytes of a GPU. compute, saved: seconds and bytes of a block of each type for a clip on one rank."""

    layers: tuple[str, ...]
    usable: float
    compute: dict[str, float]
    saved: dict[str, float]
    workload: tuple[BucketWork, ...] = (BucketWork((17, 64, 64), 1000, 1.0),)
    weights: float = 1.0 * GIB
    exchange: float = 0.02
    gather: float = 0.05
    experts: float = 0.0  # share of the weights that expert parallel divides
    tokens: float = 0.01  # seconds of sending them to the experts
    recompute: tuple[float, ...] = (0.0, 0.1, 0.3)  # shares of compute, by MODES
    kept: tuple[float, ...] = (1.0, 0.2, 0.08)  # shares of saved

    def block(self, c: Candidate, kind: str, mode: Checkpointing) -> tuple[float, float, float]:
        """(seconds, saved, working) of a block for a micro-batch."""
        i, ranks = MODES.index(mode), c.cp * c.tp
        compute = self.compute[kind] * c.local_batch_size / ranks
        seconds = compute * (1 + self.recompute[i])
        seconds += self.exchange * (c.ulysses - 1 + 0.5 * (c.ring - 1) + 2 * (c.tp - 1)) / ranks * c.local_batch_size
        gathered = (1 - self.experts) / c.tp + self.experts / c.ep
        seconds += self.gather * (1.5 if c.reshard else 1.0) * gathered * (0.5 + 0.1 * c.dp_replicate)
        seconds += self.tokens * (c.ep - 1) / c.ep * c.local_batch_size / ranks
        saved = self.saved[kind] * c.local_batch_size / ranks
        return seconds, saved * self.kept[i], saved * (1.1 - self.kept[i])

    def held_bytes(self, c: Candidate, blocks: int) -> float:
        """Of the weights of so many blocks."""
        shards = c.dp_shard * c.cp * c.tp
        gathered = (0.3 if c.reshard else 1.0) * (1 - self.experts + self.experts / c.ep)
        return self.weights * (4 / shards + gathered) * blocks / len(self.layers)

    def in_flight(self, c: Candidate, stage: int) -> int:
        return min(c.microbatches, c.pp - stage)

    def end_seconds(self, c: Candidate, stage: int) -> float:
        return 0.03 * ((stage == 0) + (stage == c.pp - 1)) / c.cp

    def layout(self, c: Candidate, allow_offload: bool = False) -> SmallLayout:
        stages = [StageBudget(self.usable, self.in_flight(c, s), self.end_seconds(c, s)) for s in range(c.pp)]
        choices = {k: tuple(Choice(m, *self.block(c, k, m)) for m in MODES) for k in dict.fromkeys(self.layers)}
        held = {kind: self.held_bytes(c, 1) for kind in choices}
        return SmallLayout(stages, choices, held, self.usable, c.microbatches, fixed=0.1 / c.dp_shard)

    def least_seconds(self, c: Candidate) -> float:
        compute = sum(self.compute[kind] for kind in self.layers) * c.local_batch_size / (c.cp * c.tp)
        return compute * (c.microbatches + c.pp - 1) / c.pp

    def predict(self, c: Candidate) -> Prediction:
        modes = [r.checkpointing for r in c.ranges for _ in range(r.first, r.last)]
        blocks = [self.block(c, kind, mode) for kind, mode in zip(self.layers, modes, strict=True)]
        slowest, peaks = self.of_stages(c, blocks, c.split or (0,))
        recompute = 0.001 * slowest * (modes != [NONE] * len(modes))
        parts = {
            "products": c.microbatches * slowest - recompute,
            "recomputation": recompute,
            "pipeline bubble": (c.pp - 1) * slowest,
            "optimizer": 0.1 / c.dp_shard,
        }
        cuts = (*(c.split or (0,)), len(blocks))
        stages = tuple(
            StageMemory(
                s, {"parameters": (held := self.held_bytes(c, b - a)), "activations": peak - held}, (), c.world_size
            )
            for s, (peak, (a, b)) in enumerate(zip(peaks, pairwise(cuts), strict=True))
        )
        return Prediction(parts, stages, 1e12, 1e12, 1000.0, 4.0, 1e13)

    def of_stages(self, c: Candidate, blocks, split) -> tuple[float, list[float]]:
        """(seconds of the slowest stage for a micro-batch, bytes at the peak of each stage)."""
        slowest, peaks = 0.0, []
        for stage, (first, end) in enumerate(pairwise((*split, len(blocks)))):
            total = most = 0.0
            seconds = self.end_seconds(c, stage)
            for block_seconds, saved, working in blocks[first:end]:
                seconds += block_seconds
                total += saved
                most = max(most, total + working)
            slowest = max(slowest, seconds)
            peaks.append((self.in_flight(c, stage) - 1) * total + most + self.held_bytes(c, end - first))
        return slowest, peaks

    def every_plan(self, candidates: Iterable[Candidate]) -> Iterator[tuple[float, Candidate]]:
        """(seconds, candidate) of every candidate, checkpointing and split that fits."""
        num_blocks = len(self.layers)
        for c in candidates:
            ways = [[self.block(c, kind, mode) for mode in MODES] for kind in self.layers]
            fixed = 0.1 / c.dp_shard
            for cuts in itertools.combinations(range(1, num_blocks), c.pp - 1):
                for blocks in itertools.product(*ways):
                    slowest, peaks = self.of_stages(c, blocks, (0, *cuts))
                    if max(peaks) <= self.usable:
                        yield (c.microbatches + c.pp - 1) * slowest + fixed, c

    def block_times(self, c: Candidate) -> BlockTimes:
        seconds, _, _ = self.block(c, self.layers[0], c.ranges[0].checkpointing)
        forward = {"products": 0.2 * seconds, "attention": 0.1 * seconds, "all-to-all": 0.03 * seconds}
        backward = {part: 2 * value for part, value in forward.items()}
        return BlockTimes(forward, backward, 0.01 * seconds, 0.3 * seconds, 0.3 * seconds, 0.5 * seconds)

    def step_times(self, c: Candidate) -> StepTimes:
        modes = [r.checkpointing for r in c.ranges for _ in range(r.first, r.last)]
        blocks = [self.block(c, kind, mode) for kind, mode in zip(self.layers, modes, strict=True)]
        cuts = (*(c.split or (0,)), len(blocks))
        ends = [self.end_seconds(c, s) + sum(b[0] for b in blocks[a:e]) for s, (a, e) in enumerate(pairwise(cuts))]
        after = {"optimizer": 0.1 / c.dp_shard}
        return StepTimes([e / 3 for e in ends], [2 * e / 3 for e in ends], c.microbatches, {}, after, c.schedule)

    def fits(self, c: Candidate) -> bool:
        return all(stage.total <= self.usable for stage in self.predict(c).memory)


def random_case(seed: int) -> tuple[SmallModel, Space]:
    """A model of 2 to 5 blocks of one or two types, every second one with experts, and a space of 2 to 6 ranks; memory
    is scarce in most.
    """
    draw = random.Random(seed)
    first = draw.randint(1, 3)
    layers = ("double",) * first + ("single",) * draw.randint(1 if first == 1 else 0, 2)
    compute = {"double": draw.uniform(0.5, 2), "single": draw.uniform(0.2, 1)}
    saved = {"double": draw.uniform(0.5, 4) * GIB, "single": draw.uniform(0.2, 2) * GIB}
    model = SmallModel(
        layers,
        usable=draw.uniform(1.5, 9) * GIB,
        compute=compute,
        saved=saved,
        weights=draw.uniform(0.2, 2) * GIB,
        exchange=draw.uniform(0, 0.1),
        gather=draw.uniform(0, 0.2),
        recompute=(0.0, draw.uniform(0.02, 0.2), draw.uniform(0.2, 0.4)),
        kept=(1.0, draw.uniform(0.15, 0.6), 0.08),
        experts=draw.uniform(0.3, 0.8) if seed % 2 else 0.0,
        tokens=draw.uniform(0, 0.1),
    )
    step = StepClips(draw.choice((2, 4)))
    world = draw.choice((2, 4, 6))
    return model, Space(
        world,
        draw.choice((2, world)),
        draw.choice((2, 6)),
        12,
        len(layers),
        step,
        1000,
        experts=4 if seed % 2 else 1,
        schedules=("1F1B",),
    )
