"""What the search needs of a candidate before it chooses checkpointing and stages: thousands of times, so from tables.

Of each block type: the ways to save its activations, as (seconds, bytes) of a micro-batch. Of each stage: the bytes
left for them, and the seconds of all else. Both are what `CostModel.predict` adds up, but for the gradients and the
reduction buffers of the peak, which depend on the choice: a budget is never too small, and may be a little too large.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from titan_video.planner.candidate import FULL, NONE, Candidate, Checkpointing
from titan_video.planner.cost.memory_model import has_gradients_when_full, in_flight
from titan_video.planner.cost.step_clock import StepClock
from titan_video.planner.cost.step_model import StepFixed, bubble, waited
from titan_video.planner.dry_run.describe import usable_bytes
from titan_video.planner.search.fastest import StageBudget
from titan_video.planner.search.knapsack import Choice
from titan_video.planner.trace.selection import SAVES


@dataclass(frozen=True)
class Layout:
    """See search/fastest.Layout. microbatches, pp: the candidate's. chunks: stages on a rank."""

    stages: tuple[StageBudget, ...]
    choices: dict[str, tuple[Choice, ...]]
    held: dict[str, float]
    usable: float
    microbatches: int
    pp: int
    chunks: int
    fixed: StepFixed

    def step_seconds(self, of_stages: Sequence[float]) -> float:
        """Of a step whose stages take so many seconds for one micro-batch, as step_model.step_parts."""
        slowest = max(sum(of_stages[rank :: self.pp]) for rank in range(self.pp))
        total = self.microbatches * slowest + sum(self.fixed.parts.values())
        if self.pp > 1:
            waiting = bubble(self.pp, self.microbatches, self.chunks)
            total += waited(self.microbatches, waiting, self.fixed.slowdown) * slowest
            total += (self.microbatches + self.pp - 1) * self.fixed.send * self.chunks
        return max([total, *self.fixed.at_least.values()])


@dataclass(frozen=True)
class _Table:
    """Of one block type, bucket and layout of sequences, by mode: seconds of recomputation, and bytes."""

    device: np.ndarray
    compute: np.ndarray
    host: np.ndarray
    saved: np.ndarray
    moved: np.ndarray
    working: np.ndarray


class LayoutBuilder:
    """model: the CostModel. Everything is cached by what it depends on."""

    def __init__(self, model: Any):
        self.model, self._gib = model, model.cluster.gpu.memory_gib
        self._modes: dict[Any, list[Checkpointing]] = {}
        self._tables: dict[Any, _Table] = {}
        self._choices: dict[Any, dict[str, tuple[Choice, ...]]] = {}
        self._budgets: dict[Any, tuple[StageBudget, ...]] = {}
        self._held: dict[Any, dict[str, float]] = {}
        self._fixed: dict[Any, StepFixed] = {}
        self._least: dict[Any, float] = {}

    @property
    def clock(self) -> StepClock:
        return self.model.clock

    def least_seconds(self, c: Candidate) -> float:
        """Of a step whose blocks save everything, wait for no weights, and are spread equally over the stages."""
        key = c.ring, c.ulysses, c.tp, c.ep, c.local_batch_size, c.tokens_per_microbatch
        if key not in self._least:
            numbers = Counter(self.model.layers)
            self._least[key] = sum(
                n * work.share * self.clock.block_seconds(c, path, part, work).device
                for path, n in numbers.items()
                for part in ("forward", "backward")
                for work in self.model.workload
            )
        chunks = 2 if c.pp > 1 and c.schedule.startswith("Interleaved") else 1
        return self._least[key] * (c.microbatches + bubble(c.pp, c.microbatches, chunks)) / c.pp

    def layout(self, c: Candidate, allow_offload: bool) -> Layout:
        chunks = 2 if c.pp > 1 and c.schedule.startswith("Interleaved") else 1
        sequence = c.ring, c.ulysses, c.tp, c.ep, c.local_batch_size, c.tokens_per_microbatch
        shards = c.dp_shard, c.dp_replicate, c.enable_cpu_offload
        key = (*sequence, *shards, c.reshard, allow_offload)
        if key not in self._choices:
            self._choices[key] = {path: self._choose(c, path, allow_offload) for path in self.model.tracer.kinds}
        step = c.pp, c.schedule, c.microbatches, c.optimizer
        budget_key = (*sequence, *shards, c.reshard, *step)
        if budget_key not in self._budgets:
            self._budgets[budget_key], self._held[budget_key] = self._stages(c), self._hold(c)
        fixed_key = (*sequence, *shards, *step, c.placement, c.encoder_ranks)
        if fixed_key not in self._fixed:
            self._fixed[fixed_key] = self.clock.fixed(c)
        budgets, held, fixed = self._budgets[budget_key], self._held[budget_key], self._fixed[fixed_key]
        return Layout(
            budgets,
            self._choices[key],
            held,
            usable_bytes(self._gib, c.num_training_ranks),
            c.microbatches,
            c.pp,
            chunks,
            fixed,
        )

    def _holds_gradients(self, c: Candidate) -> bool:
        """While activations are fullest, and not only as the last backward of a step goes."""
        in_backward = self.model.config.optimizer.in_backward
        return not in_backward and has_gradients_when_full(c.pp, c.microbatches, c.schedule)

    def _hold(self, c: Candidate) -> dict[str, float]:
        """Bytes that a stage holds of each of its blocks: state, gradients, and weights that stay gathered."""
        units = self.model.units(c)
        stays = not (c.reshard and c.dp_shard * c.cp > 1)
        held = {}
        for path, unit in units.whole.items():
            own = units.per_block[path]
            size = 0.0 if c.enable_cpu_offload else unit.state + own.state
            if self._holds_gradients(c) and not c.enable_cpu_offload:
                size += unit.gradients + own.gradients
            if self.model.has_units(c):
                size += own.gathered + (unit.gathered if stays else 0)
            held[path] = size
        return held

    def modes(self, c: Candidate, allow_offload: bool) -> list[Checkpointing]:
        """What a block may save. Attention only where some clips are long enough for it (save_min_kv), and where its
        operator is visible: see kernels/attention.py.
        """
        has_exchange = c.ulysses * c.ep > 1
        key = has_exchange, allow_offload
        if key not in self._modes:
            config, longest = self.model.config, max(work.tokens for work in self.model.workload)
            is_long = longest >= config.activation_checkpoint.save_min_kv
            is_long = is_long and (config.model.attention != "flex" or config.compile.enable)
            found = [NONE, FULL]
            found += [
                Checkpointing("selective", save)
                for save in SAVES
                if ("exchange" not in save or has_exchange) and ("attention" not in save or is_long)
            ]
            if allow_offload:
                found += [Checkpointing(m.mode, m.save, offload=True) for m in found if m.mode != "none"]
            self._modes[key] = found
        return self._modes[key]

    def _table(self, c: Candidate, path: str, work: Any, allow_offload: bool) -> _Table:
        clips = self.model.clips(c, work)
        key = c.ring, c.ulysses, c.tp, c.ep, path, clips, work.tokens, allow_offload
        if key not in self._tables:
            modes = self.modes(c, allow_offload)
            again = [self.clock.block_seconds(c, path, "again", work, mode) for mode in modes]
            memory = [self.model.block_memory(c, path, mode, work) for mode in modes]
            columns = [
                [s.device for s in again],
                [s.compute for s in again],
                [s.host for s in again],
                [m.saved for m in memory],
                [self.model.cluster.host_copy_seconds(m.host) for m in memory],
                [m.working for m in memory],
            ]
            self._tables[key] = _Table(*map(np.array, columns))
        return self._tables[key]

    def _choose(self, c: Candidate, path: str, allow_offload: bool) -> tuple[Choice, ...]:
        """As step_model.block_time, for all modes at once; seconds are weighted by the buckets' shares."""
        modes, sent = self.modes(c, allow_offload), self.clock.block_traffic(c, path)
        slowdown, synchronous = self.model.cluster.links.overlap_slowdown, self.model.cluster.host.synchronous
        seconds, saved, working = np.zeros(len(modes)), np.zeros(len(modes)), np.zeros(len(modes))
        comes, comes_back = sent.forward(), sent.backward(c.reshard)
        back, waits, waits_back = sum(comes_back.values()), sent.waits(comes), sent.waits(comes_back)
        for work in self.model.workload:
            t = self._table(c, path, work, allow_offload)
            forward, backward = (self.clock.block_seconds(c, path, part, work) for part in ("forward", "backward"))
            hidden = min(sent.gather, forward.compute)
            first = forward.device + sent.gather - hidden + (slowdown - 1) * hidden + waits
            hidden = np.minimum(back, backward.compute + t.compute)
            second = backward.device + t.device + sent.partial + back - hidden + (slowdown - 1) * hidden + waits_back
            first, second = np.maximum(first, t.moved), np.maximum(second, t.moved)
            launches = np.array([forward.host]), backward.host + t.host
            if not synchronous:
                launches = np.maximum(0.0, launches[0] - first), np.maximum(0.0, launches[1] - second)
            seconds += work.share * (first + launches[0] + second + launches[1])
            saved, working = np.maximum(saved, t.saved), np.maximum(working, t.working)
        rows = zip(modes, seconds.tolist(), saved.tolist(), working.tolist(), strict=True)
        return tuple(Choice(*row) for row in rows)

    def _stages(self, c: Candidate) -> tuple[StageBudget, ...]:
        """Without what a stage holds of its blocks, whose number the split decides."""
        model = self.model
        num, units = len(model.stages(c)), model.units(c)
        works = [(work, model.ends_memory(c, work)) for work in model.workload]
        usable = usable_bytes(self._gib, c.num_training_ranks) * c.pp / num
        found = []
        for s in range(num):
            is_first, is_last = s == 0, s == num - 1
            ends = [*(units.first.items() if is_first else ()), *(units.last.items() if is_last else ())]
            fixed = 0.0
            if not c.enable_cpu_offload:
                fixed += sum(unit.state + (unit.gradients if self._holds_gradients(c) else 0) for _, unit in ends)
            if model.has_units(c):
                fixed += sum(u.gathered for name, u in ends if not name)
                if c.reshard and c.dp_shard * c.cp > 1:
                    fixed += 2 * min(unit.gathered for unit in units.whole.values())
            held = in_flight(c, s)
            fixed += max(self._kept(c, ends, is_first, is_last, held) for _, ends in works)
            seconds = sum(
                work.share * self.clock.end(c, last, work).total
                for work in model.workload
                for last in (False, True)
                if (is_last if last else is_first)
            )
            found.append(StageBudget(usable - fixed, held, seconds))
        return tuple(found)

    def _kept(self, c: Candidate, ends: Any, is_first: bool, is_last: bool, held: float) -> float:
        """Bytes of a stage's activations outside the blocks, of its inputs and its receive buffers."""
        kept = ends.trunk + (held * ends.embed if is_first else 0)
        if c.pp == 1:
            return kept + ends.inputs
        kept += held * ends.state if not is_last else 0
        buffers = ((not is_first) + (not is_last)) * c.microbatches * ends.state
        return kept + ends.inputs * c.microbatches + buffers
