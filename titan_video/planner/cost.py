"""What a candidate costs: seconds by part and bytes by kind, from traced blocks (trace.py) and a cluster (cluster.py).

    model = CostModel(config, cluster)                 # traces blocks as they are asked for, once in the process
    model.workload                                     # buckets, their tokens and shares
    model.block_types                                  # ("double_blocks", "single_blocks"), in forward order
    model.layers                                       # block type of each layer
    model.layout(candidate)                            # what does not depend on checkpointing: for the search
    model.predict(candidate)                           # all of it
    model.fits(candidate)

`layout` and `block` are cached; `predict` is arithmetic on what they return.
"""

from dataclasses import dataclass

from titan_video.config.job_config import JobConfig
from titan_video.planner.candidate import Candidate, Checkpointing, Prediction
from titan_video.planner.cluster import Cluster


@dataclass(frozen=True)
class BucketWork:
    """Clips of one size [frames, height, width]; share: of micro-batches (sums to 1 over a workload)."""

    bucket: tuple[int, ...]
    tokens: int  # of one clip
    share: float


@dataclass(frozen=True)
class Option:
    """One block under one checkpointing: what is paid for what is kept.

    recompute: seconds that are added to its backward, for one micro-batch. saved: bytes on the device from its forward
    to its backward, for one micro-batch. host: bytes in host memory. working: bytes beside all that is saved, at the
    peak of its backward (its recomputed activations and temporaries). flops: recomputed.
    """

    checkpointing: Checkpointing
    recompute: float
    saved: int
    host: int
    working: int
    flops: float


@dataclass(frozen=True)
class BlockCost:
    """One block of one type on one rank, for one micro-batch of one bucket.

    forward, backward: seconds by part (candidate.PARTS), communication that overlaps not included (see `LayoutCost`).
    options: by checkpointing, all that the layout allows.
    """

    forward: dict[str, float]
    backward: dict[str, float]
    options: dict[Checkpointing, Option]
    flops: float  # forward and backward

    @property
    def forward_seconds(self) -> float:
        return sum(self.forward.values())

    @property
    def backward_seconds(self) -> float:
        return sum(self.backward.values())


class CostModel:
    """config: the job; its degrees, batch sizes and checkpointing are not read. cluster: the machine.

    shares: {bucket: share of micro-batches}; None: equal.
    ValueError: what no plan covers (LoRA with swapped blocks, an optimizer of another package).
    """

    def __init__(
        self, config: JobConfig, cluster: Cluster, shares: dict[tuple[int, ...], float] | None = None
    ) -> None: ...

    def block(self, kind: str, tp: int, ulysses: int, ring: int, batch: int, bucket: tuple[int, ...]) -> BlockCost: ...

    def predict(self, candidate: Candidate) -> Prediction: ...

    def fits(self, candidate: Candidate) -> bool:
        """Whether every stage's ranks have the memory, on the device and on the host."""
