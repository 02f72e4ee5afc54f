"""What a plan chooses, what it is predicted to cost, and the names of both: plain data, which search and reports share.

A step runs `microbatches` micro-batches on each data-parallel rank. With pipelines they are what passes the stages.
"""

from dataclasses import dataclass, field

from titan_video.planner.dry_run.describe import CATEGORIES, OFFLOADED, STATE, SWAPPED, with_reserve

# Parts of a step's seconds, in the order in which they are printed. Communication counts where compute waits for it.
PARTS = (
    "products",  # matrix products of forward and backward
    "attention",
    "memory-bound",  # norms, residuals, RoPE, GELU: whatever reads and writes more than it computes
    "recomputation",  # of checkpointed blocks, exchanges that are repeated included
    "all-gather",  # of weights
    "reduce-scatter",  # of gradients
    "all-reduce",  # of gradients over dp_replicate
    "all-to-all",  # of Ulysses
    "expert parallel",  # tokens to their experts and back; the sum of the experts' load
    "ring",
    "tensor parallel",
    "offload",  # of activations or weights, where the link to the host is slower than compute
    "pipeline sends",
    "pipeline bubble",
    "optimizer",
    "encoders",
    "data",
    "host",  # where launching takes longer than computing
)


@dataclass(frozen=True)
class Checkpointing:
    """What one block saves; the fields of [activation_checkpoint]. mode: "none", "selective" or "full"."""

    mode: str = "none"
    save: tuple[str, ...] = ()  # for selective, in the order of the option's values
    offload: bool = False

    def __str__(self) -> str:
        name = self.mode if self.mode != "selective" else "+".join(self.save)
        return f"{name} offloaded" if self.offload else name


NONE, FULL = Checkpointing(), Checkpointing("full")


@dataclass(frozen=True)
class Range:
    """Blocks `first` to `last` - 1, in forward order, and how they are checkpointed."""

    first: int
    last: int
    checkpointing: Checkpointing = NONE


@dataclass(frozen=True)
class Candidate:
    """One layout. Degrees are those of ParallelDims; all else has the meaning of the option in the comment.

    local_batch_size: clips of a micro-batch, in pipelines of what passes the stages at a time; with a token budget, of
        the bucket with the most tokens.
    microbatches: of a step, on each data-parallel rank.
    ranges: in order, without gaps; empty: every block saves everything.
    split: the first block of each stage, beginning with 0; empty: balanced, as the trainer does by itself.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    ring: int = 1
    ulysses: int = 1
    tp: int = 1
    ep: int = 1
    local_batch_size: int = 1
    microbatches: int = 1
    tokens_per_microbatch: int = 0  # data.tokens_per_microbatch
    reshard: bool = True  # parallelism.fsdp_reshard_after_forward
    schedule: str = "1F1B"  # parallelism.pipeline_parallel_schedule
    ranges: tuple[Range, ...] = ()
    split: tuple[int, ...] = ()
    optimizer: str = "AdamW"  # optimizer.name
    enable_cpu_offload: bool = False  # training.enable_cpu_offload
    placement: str = "cached"  # encoder.placement
    encoder_ranks: int = 0  # encoder.num_ranks; they are not in the degrees

    @property
    def dp(self) -> int:
        return self.dp_replicate * self.dp_shard

    @property
    def cp(self) -> int:
        return self.ring * self.ulysses

    @property
    def num_training_ranks(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    @property
    def world_size(self) -> int:
        return self.num_training_ranks + self.encoder_ranks


@dataclass(frozen=True)
class StageMemory:
    """Bytes at the peak on a rank of one pipeline stage, by category (describe.CATEGORIES).

    on_host: categories that are in host memory.
    """

    stage: int
    by_kind: dict[str, int]
    on_host: tuple[str, ...] = (OFFLOADED, SWAPPED)
    num_ranks: int = 1  # of the run: one rank needs no room for NCCL

    @property
    def total(self) -> int:
        """On the device."""
        return sum(size for kind, size in self.by_kind.items() if kind not in self.on_host)

    @property
    def host_total(self) -> int:
        return sum(size for kind, size in self.by_kind.items() if kind in self.on_host)

    @property
    def needed(self) -> float:
        """GiB that a GPU must have, with the dry run's reserve for what is not counted."""
        return with_reserve(self.total, self.num_ranks)


@dataclass(frozen=True)
class Prediction:
    """A step of one candidate. All parts of `seconds` sum to the step's wall time; there are no others.

    seconds: by PARTS, of an average step: buckets weighted by their share.
    memory: of each pipeline stage's ranks, for the worst bucket.
    flops: that one rank executes, with recomputation. model_flops: its share of the model's forward and backward.
    tokens, clips: of all ranks in a step.
    """

    seconds: dict[str, float]
    memory: tuple[StageMemory, ...]
    flops: float
    model_flops: float
    tokens: float
    clips: float
    peak_flops: float  # FLOP/s of one GPU, for the MFU
    encoder_ranks: int = 0
    notes: tuple[str, ...] = field(default=())  # assumptions that this candidate alone needs

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization of the training ranks, from 0 to 1."""
        return self.model_flops / self.step_seconds / self.peak_flops

    @property
    def fullest(self) -> StageMemory:
        """The stage that needs the most memory on the device."""
        return max(self.memory, key=lambda stage: stage.total)


assert set(STATE) <= set(CATEGORIES)
