"""Seconds of a candidate's blocks, stages and steps, from the traces of its model."""

from collections import Counter
from typing import Any

from titan_video.planner.candidate import NONE, Candidate, Checkpointing
from titan_video.planner.cost.seconds import Clock, Scale, Seconds, Work, groups_of, recomputed
from titan_video.planner.cost.step_model import (
    BlockTime,
    StageTime,
    StepFixed,
    Traffic,
    add_times,
    added,
    beside_step,
    block_time,
    encode_seconds,
    step_parts,
    traffic,
    update_seconds,
)
from titan_video.planner.cost.timeline import BlockTimes, StepTimes
from titan_video.planner.trace.units import Unit

NUM_LEVELS = 4  # models.experts.NUM_LEVELS, an optional part
STEP_REDUCTIONS = 5  # of numbers over ranks: tokens, three of losses, whether to stop; the norm's is in the update
FIRST, LAST = ("embed", "trunk", "embed backward"), ("head", "loss", "head backward")


class StepClock:
    """model: the CostModel, whose traces, units and cluster are read."""

    def __init__(self, model: Any):
        self.model, self.cluster = model, model.cluster
        compiled = model.config.compile.enable
        self.clock = Clock(model.cluster, model.args.head_dim, compiled, model.config.model.attention)
        self.ends_clock = Clock(model.cluster, model.args.head_dim, compiled=False)  # only blocks are compiled
        self._works: dict[Any, Work] = {}
        self._seconds: dict[Any, Seconds] = {}
        self._traffic: dict[Any, Traffic] = {}

    # ---- blocks ----

    def block_seconds(self, c: Candidate, path: str, part: str, work: Any, mode: Checkpointing = NONE) -> Seconds:
        """part: "forward", "backward", or "again" for what `mode` recomputes."""
        clips, is_long = self.model.clips(c, work), work.tokens >= self.model.config.activation_checkpoint.save_min_kv
        trace_key = c.ring, c.ulysses, c.tp, c.ep, path, part, mode.mode, mode.save, is_long
        key = (*trace_key, clips, work.tokens)
        if key not in self._seconds:
            if trace_key not in self._works:
                trace = self.model.trace(c)[0][path]
                ops = recomputed(trace, mode, is_long) if part == "again" else None
                ops = [op for op in trace.ops if op.part == part] if ops is None else ops
                self._works[trace_key] = Work.of(ops, self.clock.compiled, self._scale(c))
            groups, length = groups_of(c, self.cluster), -(-work.tokens // (c.cp * c.tp))
            found = self.clock.seconds(self._works[trace_key], groups, clips, length, part == "backward")
            self._seconds[key] = found
        return self._seconds[key]

    def _scale(self, c: Candidate) -> Scale | None:
        ring, ulysses, _, ep = self.model.tracer.degrees(c.ring, c.ulysses, c.tp, c.ep)
        is_traced = (ring, ulysses, ep) == (c.ring, c.ulysses, c.ep)
        return None if is_traced else Scale(c.ring, c.ulysses, c.ep, ring, ulysses, ep)

    def block_traffic(self, c: Candidate, path: str) -> Traffic:
        has_units = self.model.has_units(c)
        key = path, c.dp_shard, c.cp, c.tp, c.ep, c.dp_replicate, c.enable_cpu_offload, has_units
        if key not in self._traffic:
            units = self.model.units(c)
            found = traffic(c, self.cluster, units.blocks[path], has_units=has_units)
            if path in units.experts:
                found += traffic(c, self.cluster, units.experts[path], "expert_fsdp", has_units)
            self._traffic[key] = found
        return self._traffic[key]

    def block(self, c: Candidate, path: str, mode: Checkpointing, work: Any) -> BlockTime:
        forward, backward = (self.block_seconds(c, path, part, work) for part in ("forward", "backward"))
        again = self.block_seconds(c, path, "again", work, mode)
        host = self.model.block_memory(c, path, mode, work).host if mode.offload else 0.0
        return block_time(
            forward,
            backward,
            again,
            sent=self.block_traffic(c, path),
            reshard=c.reshard,
            cluster=self.cluster,
            moved=self.cluster.host_copy_seconds(host),
        )

    # ---- ends ----

    def end(self, c: Candidate, last: bool, work: Any) -> StageTime:
        """What the first or the last stage computes beside blocks, for one micro-batch.

        The first also waits for the weights of its first block and for the reduction of the first block's gradients,
        beside which nothing is computed.
        """
        clips = self.model.clips(c, work)
        key = c.ring, c.ulysses, c.tp, "last" if last else "first"
        groups, length = groups_of(c, self.cluster), -(-work.tokens // (c.cp * c.tp))
        times = []
        for part in LAST if last else FIRST:
            if (*key, part) not in self._works:
                ops = [op for op in self.model.tracer.trace(c.ring, c.ulysses, c.tp)[1].ops if op.part == part]
                self._works[(*key, part)] = Work.of(ops, compiled=False, scale=self._scale(c))
            is_backward = part.endswith("backward")
            s = self.ends_clock.seconds(self._works[(*key, part)], groups, clips, length, is_backward)
            parts = Counter(s.by_part)
            launches = added(s.host, s.device, self.cluster.host.synchronous)
            parts["host"] += launches
            total = s.device + launches
            times.append(
                (1.0, StageTime(dict(parts), 0.0 if is_backward else total, total if is_backward else 0.0, s.flops))
            )
        return add_times([*times, (1.0, self._end_traffic(c, last))])

    def _end_traffic(self, c: Candidate, last: bool) -> StageTime:
        key = "ends", last, c.dp_shard, c.cp, c.tp, c.ep, c.dp_replicate, c.reshard, c.enable_cpu_offload
        if key not in self._traffic:
            units, has_units = self.model.units(c), self.model.has_units(c)
            sent = [
                traffic(c, self.cluster, unit, "root", has_units)
                for unit in (units.last if last else units.first).values()
            ]
            first = self.block_traffic(c, self.model.layers[0])
            sent += [] if last else [first]
            parts: Counter[str] = Counter()
            for t in sent:
                for part, seconds in t.backward(reshard=True).items():
                    parts[part] += seconds + t.wait * (seconds > 0)
            back = parts["reduce-scatter"] + parts["all-reduce"]
            found = StageTime({k: v for k, v in parts.items() if v}, parts["all-gather"], back, 0.0)
            self._traffic[key] = found
        return self._traffic[key]

    # ---- stages and steps ----

    def stages(self, c: Candidate) -> list[StageTime]:
        """Of an average micro-batch. Two stages on a rank are two entries."""
        model, modes = self.model, self.model.modes(c)
        found = []
        ranges = model.stages(c)
        for s, blocks in enumerate(ranges):
            counts = Counter((model.layers[i], modes[i]) for i in blocks)
            times = []
            for work in model.workload:
                times += [(work.share * n, self.block(c, path, mode, work)) for (path, mode), n in counts.items()]
                if s == 0:
                    times.append((work.share, self.end(c, False, work)))
                if s == len(ranges) - 1:
                    times.append((work.share, self.end(c, True, work)))
            found.append(add_times(times))
        return found

    def ranks(self, c: Candidate) -> list[StageTime]:
        stages = self.stages(c)
        return [add_times([(1.0, stage) for stage in stages[rank :: c.pp]]) for rank in range(c.pp)]

    def step(self, c: Candidate) -> tuple[dict[str, float], float]:
        """(seconds by part, FLOPs of the slowest rank)."""
        ranks = self.ranks(c)
        slowest = max(ranks, key=lambda rank: rank.total)
        parts = step_parts(c, slowest.total, slowest.parts, self.fixed(c), c.schedule.startswith("Interleaved"))
        return parts, c.microbatches * slowest.flops

    def fixed(self, c: Candidate) -> StepFixed:
        model, t = self.model, self.model.config.training
        step = c.dp * c.microbatches
        works = [(work.share, model.clips(c, work), work) for work in model.workload]
        clips = step * sum(share * n for share, n, _ in works)
        pixels = step * sum(share * n * w.bucket[0] * w.bucket[1] * w.bucket[2] / 1e6 for share, n, w in works)
        read = clips / c.dp * self._cached_bytes(works)
        update = update_seconds(self.cluster, c, self._own(c), t.max_norm > 0, model.config.ema.enable)
        wait = self.cluster.links.wait_us * 1e-6
        reductions = STEP_REDUCTIONS * wait if c.num_training_ranks > 1 else 0.0
        parts = {"optimizer": update, "host": self.cluster.host.step_us * 1e-6 + reductions}
        if balance := self._balance_seconds(c):
            parts["expert parallel"] = balance
        if encode := encode_seconds(self.cluster, c, pixels, clips):
            parts["encoders"] = encode
        send = 0.0
        if c.pp > 1:
            state = sum(share * model.ends_memory(c, w).state for share, _, w in works)
            stride = c.num_training_ranks // c.pp
            send = 2 * (self.cluster.send_seconds(state, in_node=stride * c.pp <= self.cluster.gpus_per_node) + wait)
        slowdown = self.cluster.links.pipeline_slowdown
        return StepFixed(parts, send, slowdown, beside_step(self.cluster, c, read, pixels, clips))

    def _balance_seconds(self, c: Candidate) -> float:
        """Of the sum of the experts' load over all ranks, once a step: see training/expert_balance.py."""
        if not (experts := self.model.experts):
            return 0.0
        layers = -(-len(experts.blocks(self.model.args.num_layers)) // c.pp)
        size, groups = 8 * layers * NUM_LEVELS * experts.num_experts, groups_of(c, self.cluster)
        return sum(self.cluster.all_reduce_seconds(size, groups[axis]) for axis in ("sequence", "batch"))

    def _cached_bytes(self, works: list) -> float:
        """Of an average clip: latents and text."""
        args = self.model.args
        size = sum(share * w.tokens * args.patch_volume * args.in_channels * 4 for share, _, w in works)
        return size + args.text_len * args.text_dim * 2

    def _own(self, c: Candidate) -> Unit:
        """The units of the rank that updates most."""
        units, model = self.model.units(c), self.model
        most = Unit()
        ranges = model.stages(c)
        for s, blocks in enumerate(ranges):
            own = Unit()
            for path, n in Counter(model.layers[i] for i in blocks).items():
                own += _times(units.whole[path] + units.per_block[path], n)
            for is_there, ends in ((s == 0, units.first), (s == len(ranges) - 1, units.last)):
                for unit in ends.values() if is_there else ():
                    own += unit
            most = max(most, own, key=lambda unit: unit.sharded)
        return _times(most, len(ranges) // c.pp)

    # ---- for time lines ----

    def block_times(self, c: Candidate) -> BlockTimes:
        model = self.model
        divided = model.units(c).experts
        i = next((i for i, kind in enumerate(model.layers) if kind in divided), 0)
        work, path = max(model.workload, key=lambda w: w.tokens), model.layers[i]
        again = self.block_seconds(c, path, "again", work, model.modes(c)[i])
        sent = self.block_traffic(c, path)
        forward, backward = (self.block_seconds(c, path, part, work).by_part for part in ("forward", "backward"))
        return BlockTimes(
            forward=forward,
            backward=backward,
            recompute=again.device,
            gather=sent.gather,
            gather_again=sent.gather if c.reshard else 0.0,
            reduce=sent.reduce + sent.all_reduce,
        )

    def step_times(self, c: Candidate) -> StepTimes:
        stages, fixed = self.stages(c), self.fixed(c)
        return StepTimes(
            forward=[stage.forward for stage in stages],
            backward=[stage.backward for stage in stages],
            microbatches=c.microbatches,
            before={"encoders": fixed.parts["encoders"]} if "encoders" in fixed.parts else {},
            after={name: seconds for name, seconds in fixed.parts.items() if name != "encoders"},
            schedule=c.schedule,
        )


def _times(unit: Unit, n: int) -> Unit:
    return Unit(**{name: value * n for name, value in vars(unit).items()})
