"""Seconds of a traced module on a cluster: what it computes, moves and sends, by part.

products        FLOPs / rate of such a product
attention       FLOPs / rate at so many keys
memory-bound    bytes of all other operators / copy rate; in a compiled block neighbours are one kernel
all-to-all, tensor parallel, expert parallel    each waits for its result
ring            what its attention does not hide: step i sends while step i - 1 computes
host            launches: a block is never faster than its launches, and where the host computes they add to it; and
                where the host waits for the device, as before tokens go to their experts, the next launch, for which
                the device waits
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from titan_video.planner.candidate import Candidate, Checkpointing
from titan_video.planner.cluster import Cluster, Group
from titan_video.planner.trace.recorder import GROUPED, ZERO, Op, Poly, monomials
from titan_video.planner.trace.traces import BlockTrace

COMPUTED = ("products", "attention", "memory-bound")
_PARTS = {"product": "products", "attention": "attention", "memory": "memory-bound"}
_SENT = {"ulysses": "all-to-all", "ep": "expert parallel", "tp": "tensor parallel"}  # by axis


@dataclass(frozen=True)
class Work:
    """What some operators of a trace do, summed where the cluster gives them one rate.

    computed: (part, shape, FLOPs or bytes). sent: (axis, collective, payload, how often). launches: of kernels.
    collectives: how many. waits: of the host for the device.
    """

    computed: tuple[tuple[str, tuple[Poly, ...], np.ndarray], ...]
    sent: tuple[tuple[str, str, Poly, int], ...]
    flops: np.ndarray
    launches: float
    collectives: int
    waits: int = 0

    @classmethod
    def of(cls, ops: Iterable[Op], compiled: bool, scale: "Scale | None" = None) -> "Work":
        """scale: from the degrees of the trace to those of a candidate; None: they are the same."""
        ops = scale.apply(ops) if scale else ops
        sums: dict[tuple[str, tuple[Poly, ...]], np.ndarray] = defaultdict(lambda: np.zeros(len(ZERO)))
        sent: Counter[tuple[str, str, Poly]] = Counter()
        flops, launches, waits = np.zeros(len(ZERO)), 0, 0
        for op in ops:
            if op.kind == "wait":
                waits += 1
                continue
            if op.kind == "collective":
                sent[axis_of(op.collective[1]), op.collective[0], op.moved] += round(op.count)
                continue
            amount = np.array(op.flops if op.kind != "memory" else op.fused if compiled else op.moved)
            if op.kind == "memory" and compiled and not amount.any():
                continue  # part of a neighbour's kernel
            sums[_PARTS[op.kind], op.shape] += amount
            flops += np.array(op.flops)
            launches += op.count
        computed = tuple((part, shape, amount) for (part, shape), amount in sums.items())
        return cls(computed, tuple((*what, n) for what, n in sent.items()), flops, launches, sent.total(), waits)


@dataclass(frozen=True)
class Scale:
    """From a trace's degrees to others: each rank's rows are the same, its clips' tokens and its experts are not.

    ring, ulysses, ep: degrees of the candidate; from_ring, from_ulysses, from_ep: of the trace.
    """

    ring: int
    ulysses: int
    ep: int
    from_ring: int
    from_ulysses: int
    from_ep: int

    def apply(self, ops: Iterable[Op]) -> list[Op]:
        ops = list(ops)
        tokens = self.ring * self.ulysses / (self.from_ring * self.from_ulysses)
        sends = (self.ring - 1) / (self.from_ring - 1) if self.from_ring > 1 else 1.0
        repeated = self._repeated(ops)
        found = []
        for i, op in enumerate(ops):
            if op.kind == "attention":
                keys = op.shape[0]
                keys = (*keys[:2], *(n * self.ulysses / self.from_ulysses for n in keys[2:]))
                flops = (*op.flops[:4], op.flops[4] * tokens, *op.flops[5:])
                op = replace(op, flops=flops, shape=(keys, *op.shape[1:]))
            elif op.name in GROUPED and op.kind == "product":  # fewer experts, each with more rows
                rows = tuple(n * self.ep / self.from_ep for n in op.shape[0])
                op = replace(op, shape=(rows, *op.shape[1:]))
            elif op.kind == "collective" and axis_of(op.collective[1]) == "ring":
                op = replace(op, count=sends)
            elif i in repeated:
                moved, fused = (tuple(n * sends for n in poly) for poly in (op.moved, op.fused))
                op = replace(op, moved=moved, fused=fused, count=sends)
            found.append(op)
        return found

    @staticmethod
    def _repeated(ops: list[Op]) -> set[int]:
        """Operators that merge a chunk of a ring into the result of the others: what follows its last attention.

        At the end, the result is cast and made contiguous, once; in backward, after the sums have come home.
        """
        by_ring: dict[int, list[int]] = defaultdict(list)
        rings = {op.outer for op in ops if op.kind == "collective" and axis_of(op.collective[1]) == "ring"}
        for i, op in enumerate(ops):
            if op.outer in rings:
                by_ring[op.outer].append(i)
        found: set[int] = set()
        for own in by_ring.values():
            last = max(n for n, i in enumerate(own) if ops[i].kind == "attention")
            after = own[last + 1 :]
            home = [n for n, i in enumerate(after) if ops[i].kind == "collective"]
            after = after[: home[-1]] if home else after[:-2]
            found |= {i for i in after if ops[i].kind == "memory" and ops[i].name != "zeros_like"}
        return found


def axis_of(name: str) -> str:
    """The axis of a traced collective; axes with the same ranks share a name."""
    names = name.split(", ")
    return next((axis for axis in ("ulysses", "ring", "tp", "ep") if axis in names), name)


@dataclass(frozen=True)
class Seconds:
    """by_part: of candidate.PARTS, of what a rank waits for. flops: executed. host: of the launches."""

    by_part: dict[str, float]
    flops: float
    host: float

    @property
    def device(self) -> float:
        return sum(self.by_part.values())

    @property
    def compute(self) -> float:
        """Beside which other things can be sent."""
        return sum(self.by_part.get(part, 0.0) for part in COMPUTED)


class Clock:
    """Seconds of traced work on a cluster. head_dim, backend: of the model's attention. compiled: compile.enable."""

    def __init__(self, cluster: Cluster, head_dim: int, compiled: bool, backend: str = "auto"):
        self.cluster, self.head_dim, self.compiled, self.backend = cluster, head_dim, compiled, backend
        host = cluster.host
        self.launch = (host.compiled_us if compiled else host.operator_us) * 1e-6
        # Where the host does all, what a collective takes includes the host's time.
        self.collective = 0.0 if host.synchronous else host.collective_us * 1e-6

    def seconds(self, work: Work, groups: dict[str, Group], clips: int, length: int, backward: bool) -> Seconds:
        """groups: of the axes "ulysses", "ring", "tp" and "ep"."""
        values = monomials(clips, length)
        parts: Counter[str] = Counter()
        for part, shape, amount in work.computed:
            rate = self._rate(part, shape, values, backward)
            parts[part] += float(amount @ values) / rate
        ring = 0.0
        for axis, kind, payload, times in work.sent:
            size = float(np.dot(payload, values))
            seconds = self._collective(kind, size, groups[axis], on_ring=axis == "ring")
            seconds = times * (seconds + self.cluster.links.wait_us * 1e-6)
            if axis == "ring":
                ring += seconds
            else:
                parts[_SENT[axis]] += seconds
        if ring:
            ranks = groups["ring"].ranks
            hidden = min(ring, parts["attention"] * (ranks - 1) / ranks)
            parts["ring"] = ring - hidden + (self.cluster.links.overlap_slowdown - 1) * hidden
        if work.waits:
            parts["host"] += work.waits * self.collective
        host = work.launches * self.launch + work.collectives * self.collective
        return Seconds(dict(parts), float(work.flops @ values), host)

    def _rate(self, part: str, shape: tuple[Poly, ...], values: np.ndarray, backward: bool) -> float:
        if part == "memory-bound":
            return self.cluster.model_rate
        if part == "attention":
            keys = _size(shape[0], values) if self.cluster.attention else 0.0
            return self.cluster.attention_rate(keys, self.head_dim, backward, self.backend)
        sizes = [_size(s, values) for s in shape] if self.cluster.product else [1.0, 1.0, 1.0]
        return self.cluster.product_rate(rows=sizes[0], inner=sizes[1], columns=sizes[2])

    def _collective(self, kind: str, size: float, group: Group, on_ring: bool) -> float:
        c = self.cluster
        if kind == "all-to-all":  # on a ring, all of it goes to the neighbour
            return c.send_seconds(size, group.nodes == 1) if on_ring else c.all_to_all_seconds(size, group)
        if kind == "all-reduce":
            return c.all_reduce_seconds(size, group)
        return c.gather_seconds(size, group, "all_gather" if kind == "all-gather" else "reduce_scatter")


def _size(poly: Poly, values: np.ndarray) -> float:
    return float(np.dot(poly, values))


def recomputed(trace: BlockTrace, mode: Checkpointing, is_long: bool) -> list[Op]:
    """What backward runs again."""
    if mode.mode == "none":
        return []
    selected = trace.selected[mode.save, is_long]
    last = trace.log.last_outer
    return [op for op in trace.ops if op.part == "forward" and op.outer <= last and op.outer not in selected]


def groups_of(candidate: Candidate, cluster: Cluster) -> dict[str, Group]:
    """Process groups of a candidate, by axis. "fsdp": of a block's weights; "root": of those outside the blocks;
    "expert_fsdp": of experts that are divided over "ep"; "sequence": ranks that share a clip; "batch": that do not.
    """
    c = candidate
    inner = c.tp * c.ulysses
    shards = c.dp_shard * c.cp
    return {
        "tp": cluster.group(c.tp, 1),
        "ulysses": cluster.group(c.ulysses, c.tp),
        "ring": cluster.group(c.ring, inner),
        "fsdp": cluster.group(shards, c.tp),
        "root": cluster.group(shards * c.tp, 1),
        "ep": cluster.group(c.ep, 1),
        "expert_fsdp": cluster.group(shards * c.tp // c.ep, c.ep),
        "sequence": cluster.group(c.cp * c.tp, 1),
        "batch": cluster.group(c.dp, c.cp * c.tp),
        "dp_replicate": cluster.group(c.dp_replicate, shards * c.tp),
        "pp": cluster.group(c.pp, c.num_training_ranks // c.pp),
    }
