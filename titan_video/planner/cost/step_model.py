"""Seconds of blocks, ends and steps of a candidate, with what FSDP sends beside them.

A block computes while the weights of the next one are gathered and the gradients of the last one are reduced. What is
longer than the computing beside it is waited for; what is hidden slows the computing down (`links.overlap_slowdown`).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from titan_video.planner.candidate import PARTS, Candidate
from titan_video.planner.cluster import Cluster
from titan_video.planner.cost.seconds import Seconds, groups_of
from titan_video.planner.trace.units import Unit

UPDATE_BYTES = {"AdamW": 28, "Muon": 60, "AdamW8bit": 110}  # read and written for an element, by optimizer.name
CLIP_BYTES, EMA_BYTES = 12, 12  # gradient norm and scaling; EMA


@dataclass(frozen=True)
class Traffic:
    """Seconds of what FSDP sends for a unit: a gather of its weights, a reduction of its gradients.

    partial: the sum over tensor parallel's ranks that precedes it (see Unit), for which all else waits. wait: beside
    each gather and reduction, what no computing hides (links.unit_wait_us).
    """

    gather: float = 0.0
    reduce: float = 0.0
    all_reduce: float = 0.0
    partial: float = 0.0
    wait: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def forward(self) -> dict[str, float]:
        """Seconds by part, without `wait`."""
        return {"all-gather": self.gather}

    def backward(self, reshard: bool) -> dict[str, float]:
        """The same, with a second gather of weights that forward has freed."""
        gather = self.gather if reshard else 0.0
        return {"all-gather": gather, "reduce-scatter": self.reduce, "all-reduce": self.all_reduce}

    def waits(self, sent: dict[str, float]) -> float:
        """Of what is sent, together."""
        return self.wait * sum(seconds > 0 for seconds in sent.values())


def traffic(candidate: Candidate, cluster: Cluster, unit: Unit, axis: str = "fsdp", has_units: bool = True) -> Traffic:
    """axis: "fsdp" of a block, "expert_fsdp" of its experts, "root" of what is outside the blocks."""
    if not has_units:
        return Traffic()
    groups = groups_of(candidate, cluster)
    group, copies = groups[axis], groups["dp_replicate"]
    gather = cluster.gather_seconds(unit.gathered, group)
    reduce = cluster.gather_seconds(unit.reduced, group, "reduce_scatter")
    if candidate.enable_cpu_offload:
        gather += cluster.host_copy_seconds(unit.parameters)
        reduce += cluster.host_copy_seconds(unit.gradients)
    copied = cluster.all_reduce_seconds(unit.reduced / group.ranks, copies) if copies.ranks > 1 else 0.0
    partial = cluster.all_reduce_seconds(unit.partial, groups["tp"])
    return Traffic(gather, reduce, copied, partial, cluster.links.unit_wait_us * 1e-6)


@dataclass(frozen=True)
class BlockTime:
    """One block, one micro-batch. parts: all that its stage waits for, by candidate.PARTS; they sum to both times."""

    parts: dict[str, float]
    forward: float
    backward: float
    flops: float


def block_time(
    forward: Seconds,
    backward: Seconds,
    again: Seconds,
    sent: Traffic,
    reshard: bool,
    cluster: Cluster,
    moved: float,
) -> BlockTime:
    """again: what is recomputed. moved: seconds in which saved activations go to host memory, or come back."""
    slowdown, synchronous = cluster.links.overlap_slowdown, cluster.host.synchronous
    parts: Counter[str] = Counter(forward.by_part)
    parts.update(backward.by_part)
    parts["recomputation"] += again.device
    if sent.partial:
        parts["tensor parallel"] += sent.partial
    waits = _waits(sent.forward(), forward.compute, slowdown, sent.wait)
    waits_back = _waits(sent.backward(reshard), backward.compute + again.compute, slowdown, sent.wait)
    first = forward.device + sum(waits.values())
    second = backward.device + again.device + sent.partial + sum(waits_back.values())
    parts.update(waits)
    parts.update(waits_back)
    # Copies to and from the host overlap with all else.
    parts["offload"] += max(0.0, moved - first) + max(0.0, moved - second)
    first, second = max(first, moved), max(second, moved)
    launches = added(forward.host, first, synchronous), added(backward.host + again.host, second, synchronous)
    parts["host"] += sum(launches)
    first, second = first + launches[0], second + launches[1]
    flops = forward.flops + backward.flops + again.flops
    return BlockTime({part: value for part, value in parts.items() if value}, first, second, flops)


def added(host: float, other: float, synchronous: bool) -> float:
    """What launches of `host` seconds add to `other` seconds, beside which a GPU's host launches."""
    return host if synchronous else max(0.0, host - other)


def _waits(sent: dict[str, float], compute: float, slowdown: float, each: float) -> dict[str, float]:
    """What compute waits for, and what it loses beside the rest, shared by parts as they are sent.

    each: see Traffic.wait.
    """
    total = sum(sent.values())
    if not total:
        return {}
    hidden = min(total, compute)
    share = (total - hidden + (slowdown - 1) * hidden) / total
    return {part: value * share + each for part, value in sent.items() if value}


@dataclass(frozen=True)
class StageTime:
    """A stage, one micro-batch: parts sum to forward + backward."""

    parts: dict[str, float]
    forward: float
    backward: float
    flops: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


def add_times(times: Sequence[tuple[float, BlockTime | StageTime]]) -> StageTime:
    """Weighted sum."""
    parts: Counter[str] = Counter()
    forward = backward = flops = 0.0
    for weight, time in times:
        for part, value in time.parts.items():
            parts[part] += weight * value
        forward += weight * time.forward
        backward += weight * time.backward
        flops += weight * time.flops
    return StageTime(dict(parts), forward, backward, flops)


@dataclass(frozen=True)
class StepFixed:
    """What a step has beside its micro-batches.

    parts: seconds after the last one. send: seconds of a boundary between stages, for one micro-batch, both ways.
    slowdown: links.pipeline_slowdown, of a pipeline's stages and its bubble.
    at_least: by part, what runs beside the whole step and is waited for where it is longer.
    """

    parts: dict[str, float]
    send: float = 0.0
    slowdown: float = 1.0
    at_least: dict[str, float] = field(default_factory=dict)


def bubble(pp: int, microbatches: int, chunks: int) -> float:
    """What the slowest rank waits in a step, in units of its seconds for one micro-batch. chunks: stages on a rank.

    A rank starts on its next stage when it has run the last one for min(m, p) micro-batches, or when the first of them
    has passed the other ranks, whichever is later. With m >= p it is (p - 1) / chunks, as for 1F1B and GPipe.
    """
    return max(0, pp - microbatches) + (min(microbatches, pp) - 1) / chunks


def waited(microbatches: int, waiting: float, slowdown: float) -> float:
    """All that the slowest rank waits, in the units of `bubble`. waiting: the bubble."""
    return slowdown * (microbatches + waiting) - microbatches


def step_parts(
    candidate: Candidate, slowest: float, parts: dict[str, float], fixed: StepFixed, interleaved: bool
) -> dict[str, float]:
    """Seconds of a step by PARTS, from those of its slowest rank's stages for one micro-batch.

    Pipelines: see `bubble`.
    """
    m, pp = candidate.microbatches, candidate.pp
    found: Counter[str] = Counter({part: m * value for part, value in parts.items()})
    if pp > 1:
        waiting = bubble(pp, m, 2 if interleaved else 1)
        found["pipeline bubble"] += waited(m, waiting, fixed.slowdown) * slowest
        found["pipeline sends"] += (m + pp - 1) * fixed.send * (2 if interleaved else 1)
    for part, value in fixed.parts.items():
        found[part] += value
    for part, value in fixed.at_least.items():
        found[part] += max(0.0, value - sum(found.values()))
    return {part: found[part] for part in PARTS if found[part]}


def update_seconds(cluster: Cluster, candidate: Candidate, own: Unit, clips_norm: bool, ema: bool) -> float:
    """Of the optimizer's step on one rank's shards, and of clipping."""
    elements = own.sharded
    size = elements * (
        UPDATE_BYTES.get(candidate.optimizer, 28) + (CLIP_BYTES if clips_norm else 0) + (EMA_BYTES if ema else 0)
    )
    rate = cluster.host.memory_gb_per_s * 1e9 if candidate.enable_cpu_offload else cluster.copy_rate
    return size / rate + own.tensors * cluster.host.tensor_us * 1e-6


def beside_step(cluster: Cluster, candidate: Candidate, bytes_read: float, megapixels: float, clips: float) -> dict:
    """Seconds of what runs beside a step on other ranks or on the host.

    bytes_read: of one rank's clips, cached. megapixels, clips: of a step, on all ranks.
    """
    e = cluster.encoders
    if candidate.placement == "separate":
        encode = megapixels / e.megapixels_per_s + clips / e.texts_per_s
        decode = megapixels / e.decode_megapixels_per_s
        return {"encoders": max(encode, decode) / max(1, candidate.encoder_ranks)}
    if candidate.placement == "colocated":
        return {"data": megapixels / e.decode_megapixels_per_s / candidate.num_training_ranks}
    return {"data": bytes_read / (cluster.host.read_gb_per_s * 1e9)}


def encode_seconds(cluster: Cluster, candidate: Candidate, megapixels: float, clips: float) -> float:
    """Of a step, where the training ranks encode: they share its clips."""
    if candidate.placement != "colocated":
        return 0.0
    e = cluster.encoders
    return (megapixels / e.megapixels_per_s + clips / e.texts_per_s) / candidate.num_training_ranks
