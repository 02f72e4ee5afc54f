"""The memory of one block under any checkpointing, from the log of its trace."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from titan_video.planner.candidate import Checkpointing
from titan_video.planner.trace.recorder import monomials
from titan_video.planner.trace.traces import BlockTrace, EndsTrace, Log


@dataclass(frozen=True)
class BackwardPart:
    """Bytes beside what a block has saved, until the gradients of one of its FSDP units are there.

    working: at the most, of which `recomputed` are activations. left: at the end, when gradients are reduced.
    """

    working: float
    recomputed: float
    left: float


@dataclass(frozen=True)
class BlockMemory:
    """Bytes of one block for one micro-batch.

    saved: on the device from its forward to its backward; host: in host memory. parts: of its backward, one for each
    FSDP unit: of experts if they are one, then of the rest. working: the most of the parts.
    """

    saved: float
    host: float
    parts: tuple[BackwardPart, ...]

    @property
    def working(self) -> float:
        return max(part.working for part in self.parts)


class Replay:
    """What a backward allocates and frees. events: of storage and sign. experts_end: how many of them precede the
    reduction of the experts' gradients; 0: they are reduced with the others.
    """

    def __init__(
        self,
        log: Log,
        saved: frozenset[int],
        events: list[tuple[int, int]],
        experts_end: int,
        recomputed: frozenset[int] = frozenset(),
    ):
        self.log, self.saved, self.recomputed = log, sorted(saved), sorted(recomputed)
        found = np.array(events, dtype=int).reshape(-1, 2)
        self.coefficients = log.sizes[found[:, 0]] * found[:, 1:]
        self.of_experts = np.isin(found[:, 0], sorted(log.expert_gradients))
        self.experts_end = experts_end

    @cached_property
    def _inputs(self) -> list[int]:
        return sorted(self.log.inputs)

    def memory(self, clips: int, length: int, offload: bool, load: float = 1.0, experts: float = 1.0) -> BlockMemory:
        """load: see `monomials`. experts: of a rank / those of the trace."""
        values = monomials(clips, length, load)
        sizes = self.log.sizes @ values
        changes = self.coefficients @ values
        changes[self.of_experts] *= experts
        course = np.cumsum(changes)
        saved, host = sizes[self.saved], 0.0
        if offload:
            # What is at least as large as the tokens, the largest input.
            moved = saved[saved >= sizes[self._inputs].max()].sum() if self._inputs else 0.0
            host = float(moved)
        kept = float(saved.sum()) - host
        recomputed = float(sizes[self.recomputed].sum()) + 2 * host
        courses = [course]
        if end := self.experts_end:  # from there on without their gradients
            courses = [course[:end], course[end:] - experts * float(sizes[sorted(self.log.expert_gradients)].sum())]
        parts = []
        for part in courses:
            # Offloaded tensors come back for this block and, ahead of its backward, for the one before.
            working = max(0.0, float(part.max(initial=0.0))) + 2 * host
            parts.append(BackwardPart(working, min(recomputed, working), float(part[-1]) if len(part) else 0.0))
        return BlockMemory(kept, host, tuple(parts))


def block_replay(trace: BlockTrace, checkpointing: Checkpointing, is_long: bool) -> Replay:
    """is_long: whether the micro-batch's attention has at least activation_checkpoint.save_min_kv keys."""
    log = trace.log
    if checkpointing.mode == "none":
        return Replay(log, log.kept, *_backward(log, set(log.kept), frozenset()))
    selected = trace.selected[checkpointing.save, is_long]
    results = {s for outer in selected for s in log.outputs[outer] if log.allocated_by[s] == outer}
    saved = log.inputs | results
    live, events = set(saved), []
    for storage, sign in log.forward[: log.last_pack].tolist():
        if storage in log.inputs or log.allocated_by[storage] in selected:
            continue  # is there, or is not computed again
        (live.add if sign > 0 else live.discard)(storage)
        events.append((storage, sign))
    for storage in sorted(live - log.kept - saved):
        live.discard(storage)
        events.append((storage, -1))
    recomputed = frozenset(live - saved)
    backward, end = _backward(log, live, frozenset(saved))
    return Replay(log, frozenset(saved), events + backward, len(events) + end if end else 0, recomputed)


def _backward(log: Log, live: set[int], until_end: frozenset[int]) -> tuple[list[tuple[int, int]], int]:
    """(the backward's events, how many of them precede `log.experts_end`).

    until_end: storages that checkpointing holds until the block's backward has ended.
    """
    live, events, experts_end = set(live), [], 0
    for i, (storage, sign) in enumerate(log.backward.tolist(), start=1):
        if sign > 0:
            live.add(storage)
            events.append((storage, 1))
        elif storage in live and storage not in until_end:
            live.discard(storage)
            events.append((storage, -1))
        if i == log.experts_end:
            experts_end = len(events)
    return events + [(storage, -1) for storage in sorted(until_end & live)], experts_end


@dataclass(frozen=True)
class EndsMemory:
    """Bytes of what is outside the blocks, for one micro-batch.

    inputs, embed, trunk, head: kept from forward to backward. head_working: beside all these, from the head's forward
    to the end of its backward. embed_working: beside inputs, embed and trunk, in the backward of `embed`, with the
    gradients of its weights. state, last_unit: see EndsTrace.
    """

    inputs: float
    embed: float
    trunk: float
    head: float
    head_working: float
    embed_working: float
    state: float
    last_unit: str


def ends_memory(trace: EndsTrace, clips: int, length: int, ratio: float) -> EndsMemory:
    """ratio: ranks of a clip / those of the trace. Inputs are as long as the clip, whatever a rank computes of it."""
    values, log = monomials(clips, length), trace.log
    whole = monomials(clips, length * ratio)
    sizes = log.sizes @ values
    forward, backward = (np.cumsum(sizes[e[:, 0]] * e[:, 1]) for e in (log.forward, log.backward))
    first = forward[trace.head_start - 1] if trace.head_start else 0.0
    end = forward[-1]
    head = float(trace.head @ values)
    course = np.concatenate([forward[trace.head_start :] - first, end - first + backward[: trace.embed_start]])
    after = end - first + backward[trace.embed_start :]
    return EndsMemory(
        inputs=float(trace.inputs @ whole),
        embed=float(trace.embed @ values),
        trunk=float(trace.trunk @ values),
        head=head,
        head_working=max(0.0, float(course.max(initial=0.0)) - head),
        embed_working=max(0.0, float(after.max(initial=0.0))),
        state=float(trace.state @ values),
        last_unit=trace.last_unit,
    )
