"""Memory of each pipeline stage of a candidate, by the categories of a dry run.

    state           of the stage's units: weights, optimizer, EMA; gradients as backward makes them, or from the first
                    micro-batch on
    inputs          of the micro-batches
    activations     of the micro-batches in flight: all that the blocks and the ends save
    one block       what its backward needs beside that, its gathered weights and those of the one before it, and the
                    gradients of the one after it, which are being reduced. Experts that are an FSDP unit of their own
                    are reduced and freed before the rest of their block

The peak is the largest sum over the blocks of a stage, and over its ends.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from titan_video.planner.candidate import Candidate, Checkpointing
from titan_video.planner.dry_run.step_tracker import TEMPORARY
from titan_video.planner.trace.replay import BlockMemory, EndsMemory
from titan_video.planner.trace.units import Unit, Units


@dataclass(frozen=True)
class StageInput:
    """What the memory of a stage follows from.

    blocks: of each of its blocks, in forward order, the type and the checkpointing. memory: of each kind of them.
    num_inputs: micro-batches that exist at once. has_units: whether there is FSDP (see distributed/fsdp.py).
    in_backward: optimizer.in_backward. replicates: whether gradients are also summed over dp_replicate.
    """

    blocks: Sequence[tuple[str, Checkpointing]]
    memory: dict[tuple[str, Checkpointing], BlockMemory]
    ends: EndsMemory
    units: Units
    is_first: bool = True
    is_last: bool = True
    num_inputs: int = 1
    reshard: bool = True
    has_units: bool = True
    in_backward: bool = False
    pipelined: bool = False
    replicates: bool = False


@dataclass(frozen=True)
class Backward:
    """The backward of one micro-batch on a rank: of its stage `chunk`, the first or, where schedules interleave, the
    second.

    in_flight: of each stage, micro-batches whose activations it holds, this one included. has_gradients: of each stage,
    whether there are gradients of an earlier micro-batch.
    """

    chunk: int
    in_flight: tuple[int, ...]
    has_gradients: tuple[bool, ...]

    def covers(self, other: "Backward") -> bool:
        mine, others = (*self.in_flight, *self.has_gradients), (*other.in_flight, *other.has_gradients)
        return self.chunk == other.chunk and all(m >= o for m, o in zip(mine, others, strict=True))


@lru_cache(maxsize=4096)
def backwards(pp: int, microbatches: int, schedule: str, rank: int) -> tuple[Backward, ...]:
    """Those of a step on a rank of the pipeline at which most is held, in the order of torch's schedules."""
    if pp == 1:
        return (Backward(0, (1,), (microbatches > 1,)),)
    chunks = 2 if schedule.startswith("Interleaved") else 1
    in_round = microbatches // max(1, microbatches // pp)  # a stage's micro-batches before the other stage's turn
    ahead = {"GPipe": microbatches, "1F1B": pp - rank - 1}.get(schedule, in_round + 2 * (pp - 1 - rank))
    total = chunks * microbatches
    ahead = min(ahead, total - 1)  # forwards before the first pair of a forward and a backward
    in_flight, begun, found = [0] * chunks, [False] * chunks, []
    for step in range(total + ahead):
        if step < total:
            in_flight[step // in_round % chunks] += 1
        if step >= ahead:
            chunk = chunks - 1 - (step - ahead) // in_round % chunks
            now = Backward(chunk, tuple(in_flight), tuple(begun))
            if not any(other.covers(now) for other in found):
                found = [other for other in found if not now.covers(other)] + [now]
            in_flight[chunk] -= 1
            begun[chunk] = True
    return tuple(found)


def in_flight(candidate: Candidate, stage: int) -> int:
    """Micro-batches whose activations a stage holds at most, while its rank's last stage runs backward."""
    c = candidate
    found = backwards(c.pp, c.microbatches, c.schedule, stage % c.pp)
    return max(b.in_flight[stage // c.pp] for b in found if b.chunk == len(b.in_flight) - 1)


@lru_cache(maxsize=4096)
def has_gradients_when_full(pp: int, microbatches: int, schedule: str) -> bool:
    """Whether every rank also has the gradients of all its stages when they hold as many as `in_flight` says."""
    for rank in range(pp):
        found = [b for b in backwards(pp, microbatches, schedule, rank) if b.chunk == len(b.in_flight) - 1]
        most = [max(numbers) for numbers in zip(*(b.in_flight for b in found), strict=True)]
        if not any(all(b.has_gradients) and list(b.in_flight) == most for b in found):
            return False
    return True


@dataclass
class _Peak:
    """The fullest of the moments that were offered. fixed: by category, what is there all the time. on_host: categories
    that do not count.
    """

    fixed: dict[str, float]
    grads: "_Gradients"
    on_host: tuple[str, ...]
    total: float = -1.0
    kinds: dict[str, float] = field(default_factory=dict)

    def offer(self, activations: float, temporary: float, gathered: float, reducing: float = 0.0) -> None:
        found = {
            **self.fixed,
            "gradients": self.grads.bytes,
            "activations": activations,
            TEMPORARY: temporary,
            "gathered weights": gathered,
            "reduction buffers": reducing,
        }
        found = {kind: size for kind, size in found.items() if kind not in self.on_host}
        if (total := sum(found.values())) > self.total:
            self.total, self.kinds = total, found


def rank_memory(
    stages: Sequence[StageInput], backwards: Sequence[Backward], on_host: tuple[str, ...] = ()
) -> dict[str, float]:
    """Of a rank with one stage, or with two where schedules interleave, at the fullest of its backwards; see
    `stage_memory`.
    """
    found = []
    for b in backwards:
        others = [(s, n, has) for s, n, has in zip(stages, b.in_flight, b.has_gradients, strict=True)]
        stage, number, has_gradients = others.pop(b.chunk)
        beside = sum(n * (_kept(other) - other.ends.trunk) for other, n, _ in others)
        kinds = Counter(stage_memory(stage, number, has_gradients, on_host, beside))
        for other, n, has in others:
            kinds.update(_state(other, has or "gradients" in on_host))
            kinds["pipeline buffers"] += _buffers(other)
            if b.chunk > 0:  # the first one's backward, which frees its weights, is still to come
                kinds["gathered weights"] += _gathered_after_forward(other)
            kinds["offloaded activations"] += n * sum(other.memory[block].host for block in other.blocks)
        found.append({kind: size for kind, size in kinds.items() if size})
    uncounted = (*on_host, "offloaded activations")
    return max(found, key=lambda kinds: sum(size for kind, size in kinds.items() if kind not in uncounted))


def _kept(stage: StageInput) -> float:
    """Activations of one micro-batch."""
    ends = stage.ends
    kept = ends.trunk + (ends.embed if stage.is_first else 0) + (ends.head if stage.is_last else 0)
    kept += ends.state if stage.pipelined and not stage.is_last else 0
    return kept + sum(stage.memory[block].saved for block in stage.blocks)


def _gathered_after_forward(stage: StageInput) -> float:
    """Weights that a stage leaves gathered between its forward and its backward: its root's, or all of them."""
    root = _root(stage).gathered
    return root if stage.reshard else _Gathered(stage, root).at(len(stage.blocks))


def _buffers(stage: StageInput) -> float:
    """Receive buffers of all micro-batches, for states and for gradients; torch allocates them at the start."""
    return ((not stage.is_first) + (not stage.is_last)) * stage.num_inputs * stage.ends.state


def _own(stage: StageInput) -> Unit:
    """All units of a stage."""
    own = Unit()
    for kind, _ in stage.blocks:
        own += stage.units.whole[kind] + stage.units.per_block[kind]
    for unit in _end_units(stage).values():
        own += unit
    return own


def _state(stage: StageInput, has_gradients: bool = True) -> dict[str, float]:
    own = _own(stage)
    return {
        "parameters": own.parameters,
        "optimizer": own.optimizer,
        "ema": own.ema,
        "gradients": _Gradients(stage, own, has_gradients).most if has_gradients or stage.in_backward else 0.0,
    }


def _fixed(stage: StageInput) -> dict[str, float]:
    """By category, what is there all the time."""
    fixed = _state(stage) | {"inputs": stage.ends.inputs * stage.num_inputs}
    return fixed | ({"pipeline buffers": _buffers(stage)} if stage.pipelined else {})


def stage_memory(
    stage: StageInput, in_flight: int, has_gradients: bool, on_host: tuple[str, ...] = (), beside: float = 0.0
) -> dict[str, float]:
    """Bytes by category at the peak; what is in host memory at its maximum.

    in_flight, has_gradients: see Backward. on_host: categories that do not count. beside: activations of the rank's
    other stage.
    """
    blocks, grads = stage.blocks, _Gradients(stage, _own(stage), has_gradients)
    root = _root(stage)  # gathered from the first use to the end of backward
    fixed = _fixed(stage)
    peak, gathered = _Peak(fixed, grads, on_host), _Gathered(stage, root.gathered if stage.has_units else 0)
    memory = [stage.memory[block] for block in blocks]
    # What the trunk keeps is the same for all micro-batches.
    kept = stage.ends.trunk + (stage.ends.embed if stage.is_first else 0)
    kept += (in_flight - 1) * (_kept(stage) - stage.ends.trunk) + beside
    saved = kept + sum(m.saved for m in memory)
    reducing = 0.0
    if stage.is_last:
        peak.offer(saved + stage.ends.head, stage.ends.head_working, gathered.at(len(blocks)))
        for unit in stage.units.last.values():
            grads.add(unit)
            reducing = max(reducing, unit.reduced) if stage.has_units else 0.0
    held = 0.0  # reduced shards: FSDP keeps what the replicas' all-reduce reads until the end of backward
    for i in reversed(range(len(blocks))):
        m, weights = memory[i], gathered.at(i)
        for part, unit in zip(m.parts, _units_of(stage, i), strict=True):
            peak.offer(saved + part.recomputed, part.working - part.recomputed + held, weights, reducing)
            freed = m.saved if part is m.parts[-1] else 0.0
            saved -= freed
            if stage.has_units:
                reducing, weights = unit.reduced, weights - unit.gathered
                # The unit's gathered weights are freed, its gradients are there. They are copied for their sum, and
                # freed before the sum comes.
                left = part.left + freed
                scattered = max(0.0, unit.gradients + (unit.copied or -unit.gathered))
                peak.offer(saved + min(0.0, left), max(0.0, left) + scattered + held, weights, reducing)
                held += unit.gradients if stage.replicates and grads.holds_all else 0.0
            grads.add(unit)
    if stage.is_first:  # the backward of what precedes the blocks
        largest = max((u.gathered for name, u in stage.units.first.items() if name), default=0)
        weights = gathered.root + (largest if stage.has_units else 0)
        peak.offer(kept, stage.ends.embed_working + held, weights, reducing)
    grads.add_all()
    peak.offer(kept, held, gathered.root, 2 * root.reduced)
    kinds = peak.kinds | {kind: fixed[kind] for kind in on_host if kind in fixed}
    host = in_flight * sum(m.host for m in memory)
    return {kind: size for kind, size in kinds.items() if size} | ({"offloaded activations": host} if host else {})


def _end_units(stage: StageInput) -> dict[str, Unit]:
    """Units outside the blocks that a stage has; "" is the root's."""
    found = {}
    for is_there, units in ((stage.is_first, stage.units.first), (stage.is_last, stage.units.last)):
        for name, unit in units.items() if is_there else ():
            found[name] = found[name] + unit if name in found else unit
    return found


def _root(stage: StageInput) -> Unit:
    """The root's float32 unit, with what it has of each block."""
    root = _end_units(stage).get("", Unit())
    for kind, _ in stage.blocks:
        root += stage.units.per_block[kind]
    return root


def _units_of(stage: StageInput, i: int) -> list[Unit]:
    """Of block i, in the order in which their gradients are reduced."""
    kind, _ = stage.blocks[i]
    experts = stage.units.experts.get(kind)
    return [*([experts] if experts else []), stage.units.blocks[kind]]


class _Gathered:
    """Gathered weights while block i runs backward; of len(blocks), while the head does."""

    def __init__(self, stage: StageInput, root: float):
        self.stage, self.root, ends = stage, root, _end_units(stage)
        self.blocks = [stage.units.whole[kind].gathered for kind, _ in stage.blocks]
        # While the head runs, FSDP gathers the last block, and its experts only when they are next.
        self.last = stage.units.blocks[stage.blocks[-1][0]].gathered if stage.blocks else 0
        self.others = sum(u.gathered for name, u in ends.items() if name)
        # Before the first block's backward FSDP itself gathers what ran before that block.
        self.before = ends[stage.ends.last_unit].gathered if stage.is_first and stage.ends.last_unit in ends else 0

    def at(self, i: int) -> float:
        if not self.stage.has_units:
            return 0.0
        if not self.stage.reshard:
            return self.root + sum(self.blocks[: i + 1]) + self.others
        if i == len(self.blocks) > 0:
            return self.root + self.last
        ahead = self.blocks[i - 1] if i > 0 and self.blocks else self.before
        return self.root + (self.blocks[i] if i < len(self.blocks) else 0) + ahead


class _Gradients:
    """Bytes of sharded gradients that exist: all, from the second micro-batch on.

    holds_all: whether a new gradient is added to one that exists, and is then freed.
    """

    def __init__(self, stage: StageInput, own: Unit, holds_all: bool):
        self.own, self.most = own.gradients, own.gradients
        self.stage, self.bytes, self.holds_all = stage, 0.0, holds_all
        if stage.in_backward:
            units = [*stage.units.blocks.values(), *stage.units.experts.values(), *_end_units(stage).values()]
            self.most = max(u.gradients for u in units)
        elif self.holds_all:
            self.bytes = own.gradients

    def add(self, unit: Unit) -> None:
        if self.stage.in_backward:
            self.bytes = self.most
        else:
            self.bytes = min(self.own, self.bytes + unit.gradients)

    def add_all(self) -> None:
        self.bytes = self.most if self.stage.in_backward else self.own
