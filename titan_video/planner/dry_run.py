"""One rank's training step without the machine: `python -m titan_video.planner.dry_run CONFIG.toml --world-size N [--rank r]
[--section.field value ...]`.

Rank r of N is built on a process group that sends nothing and on tensors that hold nothing, and runs one micro-batch of
the largest bucket forward and backward, on one CPU; in a pipeline, where micro-batches overlap, all of a step by the
real schedule. What is allocated, sent and is allocated, sent and computed is counted (planner/step_tracker.py) and
printed. Nothing is read but the TOML (and with model.flavor hf the folder's config.json).

Operators run as on a GPU in what they keep: attention keeps its output and log-sum-exp, RMSNorm its input and one
number a row. The fused kernels, which keep less, are counted where model.kernels is triton; auto is counted as torch,
on the safe side.
Compile is off: it fuses element-wise operators, so a compiled step keeps and takes less than is printed here. Float8 is
    off: it keeps the same.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import DTensor

from titan_video import kernels
from titan_video.config.check import check
from titan_video.config.job_config import Compile, JobConfig
from titan_video.config.manager import ConfigError, main_guard, parse_args
from titan_video.data.batch import Batch
from titan_video.data.batching import Batching, gradient_accumulation
from titan_video.distributed.activation_checkpoint import chosen_blocks
from titan_video.distributed.context_parallel import ring
from titan_video.distributed.fsdp import get_blocks
from titan_video.distributed.offload import HostOffload
from titan_video.distributed.parallel_dims import Meshes, ParallelDims, check_layout
from titan_video.distributed.parallelize import parallelize
from titan_video.distributed.pipeline_parallel import Pipeline, Stages, check_microbatches, keep_stages
from titan_video.distributed.sequence import SequenceShard
from titan_video.distributed.utils import clean_name
from titan_video.kernels import attention
from titan_video.lora.adapters import add_adapters
from titan_video.models import get_args, get_spec
from titan_video.models.layers import cast_params, latent_shape, num_clip_tokens
from titan_video.models.spec import ModelSpec
from titan_video.optim.optimizer import state_bytes, updated_by
from titan_video.planner.step_tracker import TEMPORARY, Axis, Collective, StepTracker
from titan_video.tasks.denoising import ModelInputs, model_inputs, predict, velocity_loss

OFFLOADED = "offloaded activations"
KINDS = (
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
)
BODIES = {
    # Numbers are asked for by pipelines only: which micro-batch it is, of many that are alike, and once, in int32,
    # whether shapes are known.
    torch.ops.aten._local_scalar_dense: lambda number: int(number.dtype == torch.int32),
    torch.ops.titan_video.attention: attention.own_attention._init_fn,
    torch.ops.titan_video.attention_backward: attention.own_attention_backward._init_fn,
    torch.ops.titan_video.ring_attention: ring.ring_attention._init_fn,
    torch.ops.titan_video.ring_attention_backward: ring.ring_attention_backward._init_fn,
}
STATE = ("parameters", "optimizer", "ema", "gradients")  # on the host with training.enable_cpu_offload
UNCOUNTED = (
    "Not counted: the CUDA context, NCCL's buffers, gaps that the allocator leaves, workspaces of matrix "
    "products, validation."
)


@dataclass(frozen=True)
class Report:
    """What rank `rank` of `world_size` does in a step. Bytes, by kind of memory, and FLOPs of this rank, by phase.

    tokens: rows of the model's input on this rank, all samples of a micro-batch. at_peak: what of each kind there is
    when `total`, the sum of those on the device, is largest. on_host: the most that there is elsewhere. A step is
    `accumulation` times what is counted.
    stages: how many blocks each pipeline stage of this rank has, by its number, where what is counted is a step of
        `microbatches`.
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


class _RmsNorm(torch.autograd.Function):
    """Allocates like F.rms_norm on a GPU; the values are never looked at."""

    @staticmethod
    def forward(ctx, x: Tensor, shape, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[: -len(shape)], *[1] * len(shape), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None, torch.empty_like(weight), None


@contextmanager
def as_on_gpu(kernels_name: str) -> Iterator[None]:
    """The kernels asked for; torch's RMSNorm as the GPU's one kernel:

    on a CPU torch takes it apart, and keeps the parts for backward.
    """
    original, before = F.rms_norm, kernels.current_backend()
    F.rms_norm = _RmsNorm.apply
    kernels.set_backend("triton" if kernels_name == "triton" else "torch")
    try:
        yield
    finally:
        F.rms_norm = original
        kernels.set_backend(before)


@contextmanager
def fake_ranks(world_size: int, rank: int) -> Iterator[None]:
    """A default process group of which this process is `rank`, and no other process exists."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend too

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def dry_run(config: JobConfig, world_size: int, rank: int = 0) -> Report:
    """Run rank `rank`'s step on nothing. No process group may exist.

    ValueError for what no machine could run, and for what is not covered.
    """
    start = time.perf_counter()
    check(config, world_size, files=False)
    world_size = config.encoder.num_training_ranks(world_size)
    if not 0 <= rank < world_size:
        raise ValueError(f"--rank: given {rank}; legal: 0 to {world_size - 1}")
    if config.activation_checkpoint.mode == "memory_budget":
        raise ValueError(
            "activation_checkpoint.mode: memory_budget is the compiler's, which a dry run does without; look at "
            "selective and full"
        )
    spec = get_spec(config.model.name)
    args = get_args(spec, config.model.flavor, config.model.hf_assets_path, config.encoder.max_text_length)
    attention.check(
        config.model.attention, getattr(torch, config.training.mixed_precision_param), args.head_dim, spec.masks_text
    )
    check_layout(config.parallelism, args, world_size)
    dims = ParallelDims.of(config.parallelism, world_size)
    bucket = max(
        config.data.sizes,
        key=lambda b: num_clip_tokens(b, args) * micro_batches(config, dims, num_clip_tokens(b, args))[0],
    )
    tokens = num_clip_tokens(bucket, args)
    size, accumulation, microbatches = micro_batches(config, dims, tokens)
    with fake_ranks(world_size, rank):
        meshes = dims.build_mesh("cpu")
        model, stages = build(config, spec, args, meshes, tokens)
        dtype, cpu = getattr(torch, config.training.mixed_precision_param), torch.device("cpu")
        pipeline = Pipeline(model, stages, spec.plan, meshes.pp, config.parallelism, dtype, cpu) if stages else None
        tracker = StepTracker(get_axes(meshes), bodies=BODIES)
        shard = SequenceShard(meshes.sequence, dims.tp)
        with FakeTensorMode(allow_non_fake_inputs=True):
            batches = [make_batch(config, args, bucket, size) for _ in range(microbatches)]
            noisy = partial(noisy_inputs, args, shard, config.training.guidance)
            if pipeline:
                pipeline.state(noisy(batches[0]))  # its shapes are found on the meta device, before anything is counted
            with tracker, as_on_gpu(config.model.kernels), offload_seen(tracker):
                run_step(model, pipeline, spec, batches, noisy, tracker, accumulation > 1, config.optimizer.in_backward)
        static = static_bytes(model, config.optimizer.name, spec.plan.blocks, config.ema.enable)
    host = (OFFLOADED, *(STATE if config.training.enable_cpu_offload else ()))
    peak = tracker.peak(elsewhere=host)
    largest, at_peak = peak.largest | static, peak.at_peak | static
    return Report(
        world_size,
        rank,
        asdict(dims),
        bucket,
        size * shard.length(tokens),
        accumulation,
        microbatches,
        {stage: len(blocks) for stage, blocks in stages.blocks.items()} if stages else {},
        largest,
        at_peak,
        total=sum(n for kind, n in at_peak.items() if kind not in host),
        on_host=sum(largest.get(kind, 0) for kind in host),
        flops=dict(tracker.flops),
        model_flops=3 * args.flops(tokens, microbatches * size) * dims.dp / world_size,
        collectives=tracker.collectives(),
        seconds=time.perf_counter() - start,
    )


def micro_batches(config: JobConfig, dims: ParallelDims, tokens: int) -> tuple[int, int, int]:
    """(clips in one, how often what is counted is done in a step, how many are counted), for clips of so many tokens.
    ValueError for what a pipeline's schedule cannot run."""
    accumulation = gradient_accumulation(config, dims.dp)
    local = Batching.of(config.data, config.training, config.parallelism, accumulation * dims.dp).clips_per_micro_batch(
        tokens
    )
    if dims.pp == 1:
        return local, accumulation, 1
    size = config.parallelism.pipeline_parallel_microbatch_size
    check_microbatches(config.parallelism, accumulation * local // size)
    return size, 1, accumulation * local // size


def build(
    config: JobConfig, spec: ModelSpec, args: Any, meshes: Meshes, num_tokens: int
) -> tuple[nn.Module, Stages | None]:
    """The sharded model, of a pipeline this rank's stages, on the meta device. It must not be made inside the fake
    mode, where each of its tensors costs much more."""
    with torch.device("meta"):
        model = spec.build(args)
    if config.lora.enable:
        add_adapters(model, spec, config.lora, getattr(torch, config.training.mixed_precision_param))
    else:
        cast_params(model, spec.plan.fp32, getattr(torch, config.training.dtype))
    stages, checkpointed = None, chosen_blocks(model, spec.plan, config.activation_checkpoint.layers)
    if meshes.pp.size() > 1:
        stages = keep_stages(model, spec.plan, meshes.pp, config.parallelism, args, num_tokens)
    parallelism = replace(config.parallelism, enable_async_tensor_parallel=False)  # the compiler's
    off = Compile(enable=False)
    parallelize(model, spec.plan, meshes, parallelism, config.training, config.activation_checkpoint, off, checkpointed)
    return model, stages


def run_step(
    model: nn.Module,
    pipeline: Pipeline | None,
    spec: ModelSpec,
    batches: list[Batch],
    noisy: Callable[[Batch], ModelInputs],
    tracker: StepTracker,
    accumulating: bool,
    in_backward: bool,
) -> None:
    """Forward and backward of one micro-batch, or of all of a pipeline. accumulating: not the first of a step, so
    gradients are there already.
    in_backward: each gradient is freed as soon as it is there."""

    def free(p: Tensor) -> None:
        tracker.set_kind(to_local(p.grad), "gradients")
        p.grad = None

    model.to_empty(device="cpu")
    for p in model.parameters():
        tracker.set_kind(to_local(p), "parameters")
        if in_backward and p.requires_grad:
            p.register_post_accumulate_grad_hook(free)
        if accumulating and p.requires_grad:
            p.grad = torch.zeros_like(p)
    watch_forwards(model, tracker)
    watch_recomputation(model, spec, tracker)

    for batch in batches:
        for t in (batch.streams["video"], batch.text_BLD, batch.text_mask_BL, batch.sample_ids_B, *batch.cond.values()):
            tracker.set_kind(t, "inputs")
    inputs = [noisy(batch) for batch in batches]
    tracker.keep("inputs")

    def loss_fn(velocity: Tensor, i: int) -> Tensor:
        loss = velocity_loss(velocity, inputs[i]).sum() / batches[i].streams["video"].numel()
        tracker.keep("activations")
        tracker.phase = "backward"
        return loss

    if pipeline:
        pipeline.step(inputs, loss_fn)
    else:
        loss_fn(predict(model, inputs[0]), 0).backward()
    for name, p in ((name, p) for name, p in model.named_parameters() if p.requires_grad and not in_backward):
        assert p.grad is not None, f"{name} got no gradient"
        tracker.set_kind(to_local(p.grad), "gradients")


def noisy_inputs(args: Any, shard: SequenceShard, guidance: float, batch: Batch) -> ModelInputs:
    noise, (sigma_B, weight_B) = torch.empty_like(batch.streams["video"]), torch.empty(2, len(batch.sample_ids_B))
    return model_inputs(args.patch, batch, noise, sigma_B, weight_B, shard, args.conditioning, guidance)


def watch_forwards(model: nn.Module, tracker: StepTracker) -> None:
    """What a forward of the model, or of a pipeline stage, leaves alive is for backward."""
    started = False

    def before(module, args, kwargs):
        nonlocal started
        if not started:
            tracker.keep("pipeline buffers")  # for what is received, all micro-batches of a step
        started, tracker.phase = True, "forward"
        for p in model.parameters():
            if p.grad is not None:  # of the micro-batch before
                tracker.set_kind(to_local(p.grad), "gradients")

    def after(module, args, output):
        for p in model.parameters():
            tracker.keep_tensor(to_local(p), "gathered weights")  # those that FSDP does not free after forward
        tracker.keep("activations")
        tracker.phase = "backward"

    model.register_forward_pre_hook(before, prepend=True, with_kwargs=True)  # before FSDP gathers weights
    model.register_forward_hook(after)


def watch_recomputation(model: nn.Module, spec: ModelSpec, tracker: StepTracker) -> None:
    """In backward a block's forward is a recomputation, and what it leaves alive are activations."""
    started = 0

    def before(module, args):
        nonlocal started
        if tracker.phase == "backward":
            started, tracker.phase = tracker.clock, "recompute"

    def after(module, args, output):
        if tracker.phase == "recompute":
            tracker.phase = "backward"
            tracker.save_later("activations", since=started)

    for container, key in get_blocks(model, spec.plan):
        block = getattr(container[key], "_checkpoint_wrapped_module", container[key])
        block.register_forward_pre_hook(before)
        # Recomputation stops by an exception once it has all that backward needs.
        block.register_forward_hook(after, always_call=True)


@contextmanager
def offload_seen(tracker: StepTracker) -> Iterator[None]:
    """Copies that activation offload makes on the host, and those that it fetches back:

    on one CPU there is no telling them apart.
    """
    send, start = HostOffload.send, HostOffload._start

    def send_seen(self, x):
        moved = send(self, x)
        tracker.set_kind(moved.host, OFFLOADED)
        return moved

    def start_seen(self, moved):
        start(self, moved)
        tracker.set_kind(moved.here, "activations")

    HostOffload.send, HostOffload._start = send_seen, start_seen
    try:
        yield
    finally:
        HostOffload.send, HostOffload._start = send, start


@torch.no_grad()  # to_local is an operator otherwise
def to_local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def static_bytes(model: nn.Module, optimizer: str, blocks: tuple[str, ...], ema: bool) -> dict[str, int]:
    """The optimizer's state of each shard, its step count among it; the averaged weights, in float32."""
    shards = {clean_name(name): tuple(to_local(p).shape) for name, p in model.named_parameters() if p.requires_grad}
    kinds = {name: updated_by(name, len(shape), optimizer, blocks) for name, shape in shards.items()}
    sizes = {"optimizer": sum(state_bytes(kinds[name], shape) + 4 for name, shape in shards.items())}
    return sizes | ({"ema": 4 * sum(map(math.prod, shards.values()))} if ema else {})


def make_batch(config: JobConfig, args: Any, bucket: tuple[int, ...], size: int) -> Batch:
    """`size` clips, with all that the model's conditions ask for."""
    c, text_dtype = args.conditioning, getattr(torch, config.encoder.dtype)
    channels, frames, height, width = latent_shape(bucket, args)
    cond = {}
    if c.num_cond_frames:
        cond["cond_latents_BCFHW"] = torch.empty(size, channels, frames if c.form == "mask_first" else 1, height, width)
    if c.image_tokens:
        cond["image_BSD"] = torch.empty(size, c.image_tokens, args.image_dim)
    if c.pooled_text:
        cond["pooled_text_BD"] = torch.empty(size, args.pooled_dim, dtype=text_dtype)
    return Batch(
        streams={"video": torch.empty(size, channels, frames, height, width)},
        text_BLD=torch.empty(size, args.text_len, args.text_dim, dtype=text_dtype),
        text_mask_BL=torch.empty(size, args.text_len, dtype=torch.bool),
        sample_ids_B=torch.empty(size, dtype=torch.int64),
        cond=cond,
    )


def get_axes(meshes: Meshes) -> dict[str, Axis]:
    """{process group's name: its axis}.

    Axes of the same ranks may share a group, which then goes by all their names.
    """
    named = {
        "fsdp": meshes.fsdp,
        "fsdp x tp": meshes.fsdp_root,
        "dp_replicate": meshes.world["dp_replicate"],
        "ulysses": meshes.ulysses,
        "ring": meshes.ring,
        "tp": meshes.tp,
        "pp": meshes.pp,
    }
    axes: dict[str, Axis] = {}
    for name, mesh in named.items():
        last = mesh.ndim - 1
        group = mesh.get_group(last).group_name
        if group not in axes:
            axes[group] = Axis(name, mesh.size(last), mesh.get_local_rank(last))
        elif name != "fsdp x tp":
            axes[group] = replace(axes[group], name=f"{axes[group].name}, {name}")
    return axes


# ---- what is printed ----


def describe(report: Report, host: bool) -> str:
    r, gib = report, 2**30
    degrees = " x ".join(f"{axis} {n}" for axis, n in r.degrees.items() if n > 1) or "one rank"
    flops = sum(r.flops.values())
    micro = (
        "1 micro-batch a step"
        if r.accumulation == 1
        else f"{r.accumulation} micro-batches a step (memory: from the second on)"
    )
    what = "a micro-batch"
    if r.stages:
        stages = ", ".join(f"stage {stage} of {n} blocks" for stage, n in r.stages.items())
        micro, what = f"{stages}, through which {r.microbatches} micro-batches pass in a step", "a step"
    lines = [
        f"rank {r.rank} of {r.world_size}: {degrees}",
        f"bucket {'x'.join(map(str, r.bucket))}: {r.tokens:,} tokens on this rank, {micro}",
        "",
        f"{'memory in GiB':<20}{'at the peak':>12}{'largest':>10}",
    ]
    for kind in KINDS:
        if r.largest.get(kind):
            place = "  on the host" if kind == OFFLOADED or host and kind in STATE else ""
            lines.append(f"{kind:<20}{r.at_peak.get(kind, 0) / gib:>12.2f}{r.largest[kind] / gib:>10.2f}{place}")
    lines += [f"{'total':<20}{r.total / gib:>12.2f}", UNCOUNTED, ""]
    lines += [f"{what + ' sends':<28}{'axis':<14}{'ranks':>6}{'calls':>7}{'MiB':>11}"]
    for c in r.collectives:
        lines.append(
            f"{(c.phase + ' ' + c.kind).strip():<28}{c.axis:<14}{c.ranks:>6}{c.count:>7}{c.sent / 2**20:>11.1f}"
        )
    if not r.collectives:
        lines.append("nothing")
    lines += [
        "",
        f"{r.accumulation * flops / 1e12:,.0f} TFLOP a step on this rank, of which the model needs "
        f"{r.accumulation * r.model_flops / 1e12:,.0f}",
        f"dry run took {r.seconds:.1f} s; compile is off in it",
    ]
    return "\n".join(lines)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    about = (
        "Memory, collectives and FLOPs of one rank's training step, without the machine. --section.field VALUE "
        "overrides the TOML."
    )
    parser = argparse.ArgumentParser(
        prog="python -m titan_video.planner.dry_run", description=about, allow_abbrev=False
    )
    parser.add_argument("config", type=Path, help="TOML of the run")
    parser.add_argument("--world-size", type=int, required=True, help="ranks of the run")
    parser.add_argument("--rank", type=int, default=0, help="the rank to build")
    parser.add_argument("--json", type=Path, help="file to write the numbers to, in bytes")
    return parser.parse_known_args(argv)


def main(argv: list[str]) -> None:
    options, rest = parse(argv)
    with main_guard():
        if options.world_size < 1:
            raise ConfigError(f"--world-size: given {options.world_size}; legal: at least 1")
        config = parse_args(["--job.config_file", str(options.config), *rest])
    try:
        report = dry_run(config, options.world_size, options.rank)
    except ValueError as e:
        sys.exit(f"error: {e}")
    print(describe(report, config.training.enable_cpu_offload))
    if options.json:
        options.json.write_text(json.dumps(asdict(report), indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
