"""The result of a dry run, and how it is printed."""

from dataclasses import dataclass
from types import MappingProxyType

from titan_video.planner.dry_run.step_tracker import TEMPORARY, Collective

OFFLOADED = "offloaded activations"
SWAPPED = "swapped weights"
STATE = ("parameters", "optimizer", "ema", "gradients")  # in host memory with training.enable_cpu_offload
CATEGORIES = (  # in the order in which they are printed
    "parameters",
    "optimizer",
    "ema",
    "gradients",
    "gathered weights",
    "reduction buffers",
    "inputs",
    "pipeline buffers",
    "activations",
    TEMPORARY,
    OFFLOADED,
    SWAPPED,
)
UNCOUNTED = (
    "Not counted: the CUDA context, NCCL's buffers, gaps that the allocator leaves, workspaces of matrix "
    "products, validation."
)
GIB = 2**30
# GPUs by the size in their name: GiB that torch finds on an RTX 4090, an L40S (with ECC), an H100 and an H200.
CAPACITY = MappingProxyType({24: 23.5, 48: 44.4, 80: 79.1, 141: 139.7})
CONTEXT, NCCL, GAPS = 0.6, 1.0, 0.05  # GiB, GiB of more than one rank, and a share of the total


def with_reserve(total: float, num_ranks: int) -> float:
    """GiB that a GPU must have for `total` bytes that are counted, with a reserve for what is not."""
    return total / GIB * (1 + GAPS) + CONTEXT + (NCCL if num_ranks > 1 else 0)


def usable_bytes(gib: float, num_ranks: int) -> float:
    """Bytes that may be counted on a GPU of `gib` GiB: `with_reserve` the other way round."""
    return (gib - CONTEXT - (NCCL if num_ranks > 1 else 0)) * GIB / (1 + GAPS)


@dataclass(frozen=True)
class Report:
    """What rank `rank` of `world_size` does in a step. Memory in bytes by category, FLOPs of this rank by phase.

    tokens: rows of the model's input on this rank, for all clips of a micro-batch.
    accumulation: how often a step repeats what is counted: one micro-batch, or all `microbatches` of a pipeline's step.
    stages: with pipelines, the number of blocks of each stage of this rank, by the stage's index.
    largest: the maximum of each category. at_peak: each category when `total`, the sum on the device, is largest.
    on_host: the maximum in host memory.
    model_flops: this rank's share of the FLOPs of the model's forward and backward, without recomputation.
    """

    world_size: int
    rank: int
    degrees: dict[str, int]
    bucket: tuple[int, ...]
    tokens: int
    accumulation: int
    microbatches: int
    stages: dict[int, int]
    largest: dict[str, int]
    at_peak: dict[str, int]
    total: int
    on_host: int
    flops: dict[str, int]
    model_flops: float
    collectives: list[Collective]
    seconds: float

    @property
    def needed(self) -> float:
        """GiB that a GPU must have: the total, and a reserve for what is not counted."""
        return with_reserve(self.total, self.world_size)

    @property
    def fits(self) -> dict[int, bool]:
        """By the GPU's size in GB."""
        return {size: self.needed <= gib for size, gib in CAPACITY.items()}


def describe(report: Report, state_on_host: bool) -> str:
    """The report as text. state_on_host: training.enable_cpu_offload."""
    degrees = " x ".join(f"{axis} {n}" for axis, n in report.degrees.items() if n > 1) or "one rank"
    size = "x".join(map(str, report.bucket))
    step_tflops = report.accumulation * sum(report.flops.values()) / 1e12
    model_tflops = report.accumulation * report.model_flops / 1e12
    lines = [
        f"rank {report.rank} of {report.world_size}: {degrees}",
        f"bucket {size}: {report.tokens:,} tokens on this rank, {_describe_micro_batches(report)}",
        "",
        *_memory_table(report, state_on_host),
        UNCOUNTED,
        *_fits_lines(report),
        "",
        *_collectives_table(report),
        "",
        f"{step_tflops:,.0f} TFLOP a step on this rank; the model needs {model_tflops:,.0f} of them",
        f"dry run took {report.seconds:.1f} s; compile is off in it",
    ]
    return "\n".join(lines)


def _describe_micro_batches(report: Report) -> str:
    if report.stages:
        stages = ", ".join(f"stage {stage} of {n} blocks" for stage, n in report.stages.items())
        return f"{stages}, through which {report.microbatches} micro-batches pass in a step"
    if report.accumulation == 1:
        return "1 micro-batch a step"
    return f"{report.accumulation} micro-batches a step (memory: from the second on)"


def _memory_table(report: Report, state_on_host: bool) -> list[str]:
    lines = [f"{'memory in GiB':<20}{'at the peak':>12}{'largest':>10}"]
    for category in CATEGORIES:
        largest, at_peak = report.largest.get(category, 0), report.at_peak.get(category, 0)
        if largest:
            is_on_host = category in (OFFLOADED, SWAPPED) or (state_on_host and category in STATE)
            place = "  on the host" if is_on_host else ""
            lines.append(f"{category:<20}{at_peak / GIB:>12.2f}{largest / GIB:>10.2f}{place}")
    return [*lines, f"{'total':<20}{report.total / GIB:>12.2f}"]


def _fits_lines(report: Report) -> list[str]:
    reserve = f"{GAPS:.0%} for gaps and workspaces, {CONTEXT} GiB for the CUDA context"
    reserve += f", {NCCL} GiB for NCCL" if report.world_size > 1 else ""
    gpus = [f"{size} GB ({gib}) {'yes' if report.fits[size] else 'no'}" for size, gib in CAPACITY.items()]
    return [f"With a reserve of {reserve}: {report.needed:.2f} GiB.", f"Fits a GPU (its GiB): {', '.join(gpus)}"]


def _collectives_table(report: Report) -> list[str]:
    counted = "a step" if report.stages else "a micro-batch"
    lines = [f"{counted + ' sends':<28}{'axis':<14}{'ranks':>6}{'calls':>7}{'MiB':>11}"]
    for c in report.collectives:
        name = f"{c.phase} {c.kind}".strip()
        lines.append(f"{name:<28}{c.axis:<14}{c.ranks:>6}{c.count:>7}{c.sent / 2**20:>11.1f}")
    return lines if report.collectives else [*lines, "nothing"]
