"""What stands in for the machine in a dry run: ranks that exchange nothing, a GPU's operators, batches without values.

The `watch_*` functions attach a StepTracker to a model: they set its phase and the category of live tensors.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from titan_video import kernels
from titan_video.data.batch import Batch
from titan_video.distributed.activation_checkpoint import OFFLOAD
from titan_video.distributed.fsdp import get_blocks
from titan_video.distributed.parallel_dims import Meshes
from titan_video.distributed.utils import to_local
from titan_video.kernels import attention
from titan_video.models.spec import ParallelPlan
from titan_video.planner.dry_run.describe import OFFLOADED, SWAPPED
from titan_video.planner.dry_run.step_tracker import Axis, StepTracker
from titan_video.tasks.conditioning import COND_LATENTS
from titan_video.tools.parts import find_module, resolve

QUANTIZED = "titan_video.lora.quantized_base"  # optional
EXPERT_PARALLEL = "titan_video.distributed.expert_parallel"  # optional
RING = "titan_video.distributed.context_parallel.ring"  # optional


def operator_bodies() -> dict[Any, Callable[..., Any]]:
    """Custom operators whose Python function the tracker runs in their place, to count what they allocate."""
    ops = torch.ops.titan_video
    bodies = {
        # Only pipelines read numbers: the index of a micro-batch (any index will do, as all cost the same), and once,
        # in int32, whether shapes are known.
        torch.ops.aten._local_scalar_dense: lambda number: int(number.dtype == torch.int32),
        ops.attention: attention.own_attention._init_fn,
        ops.attention_backward: attention.own_attention_backward._init_fn,
    }
    if find_module(QUANTIZED):
        quantized = resolve(QUANTIZED, asked_by="the dry run")
        bodies[ops.frozen_linear] = quantized.frozen_linear._init_fn
        bodies[ops.frozen_linear_backward] = quantized.frozen_linear_backward._init_fn
    if find_module(RING):
        ring = resolve(RING, asked_by="the dry run")
        bodies[ops.ring_attention] = ring.ring_attention._init_fn
        bodies[ops.ring_attention_backward] = ring.ring_attention_backward._init_fn
    return bodies


@contextmanager
def fake_ranks(world_size: int, rank: int) -> Iterator[None]:
    """A default process group in which this process is `rank` and no other process exists."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend too

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def get_axes(meshes: Meshes) -> dict[str, Axis]:
    """{name of a process group: its axis}. Axes with the same ranks may share a group, which then has all names."""
    meshes_by_name = {
        "fsdp": meshes.fsdp,
        "fsdp x tp": meshes.fsdp_root,
        "dp_replicate": meshes.world["dp_replicate"],
        "ulysses": meshes.ulysses,
        "ring": meshes.ring,
        "tp": meshes.tp,
        "pp": meshes.pp,
    }
    if meshes.ep is not None:
        meshes_by_name |= {"expert_fsdp": meshes.expert_fsdp, "ep": meshes.ep}
    axes: dict[str, Axis] = {}
    for name, mesh in meshes_by_name.items():
        last = mesh.ndim - 1
        group = mesh.get_group(last).group_name
        if group not in axes:
            axes[group] = Axis(name, mesh.size(last), mesh.get_local_rank(last))
        elif name != "fsdp x tp":
            axes[group] = replace(axes[group], name=f"{axes[group].name}, {name}")
    return axes


def empty_batch(args: Any, latent_CFHW: tuple[int, ...], num_clips: int, text_dtype: torch.dtype) -> Batch:
    """A micro-batch without values, with all conditioning that the model takes. args: the model's (see ModelSpec)."""
    spec = args.conditioning
    channels, frames, height, width = latent_CFHW
    cond = {}
    if spec.num_cond_frames:
        cond_frames = frames if spec.form == "mask_first" else 1
        cond[COND_LATENTS] = torch.empty(num_clips, channels, cond_frames, height, width)
    if spec.image_tokens:
        cond["image_BSD"] = torch.empty(num_clips, spec.image_tokens, args.image_dim)
    if spec.pooled_text:
        cond["pooled_text_BD"] = torch.empty(num_clips, args.pooled_dim, dtype=text_dtype)
    return Batch(
        streams={"video": torch.empty(num_clips, *latent_CFHW)},
        text_BLD=torch.empty(num_clips, args.text_len, args.text_dim, dtype=text_dtype),
        text_mask_BL=torch.empty(num_clips, args.text_len, dtype=torch.bool),
        sample_ids_B=torch.empty(num_clips, dtype=torch.int64),
        cond=cond,
    )


class _RmsNorm(torch.autograd.Function):
    """Allocates like F.rms_norm on a GPU; nothing reads the values."""

    @staticmethod
    def forward(ctx, x: Tensor, shape, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[: -len(shape)], *[1] * len(shape), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None, torch.empty_like(weight), None


def gpu_backend(name: str) -> str:
    """What `model.kernels = name` is on a GPU with triton, whatever this machine has."""
    return "triton" if name != "torch" and find_module(kernels.TRITON_PART) else "torch"


@contextmanager
def gpu_operators(backend: str) -> Iterator[None]:
    """Inside, operators save what they save on a GPU. backend: model.kernels.

    On a CPU torch decomposes RMSNorm and saves the intermediate results; on a GPU it is one kernel.
    """
    rms_norm, previous = F.rms_norm, kernels.current_backend()
    F.rms_norm = _RmsNorm.apply
    kernels.set_backend(gpu_backend(backend))
    try:
        yield
    finally:
        F.rms_norm = rms_norm
        kernels.set_backend(previous)


HostNumbers = Callable[[Tensor, Tensor, int], tuple[list[int], list[int], list[list[int]]]]


def loaded(load: float) -> HostNumbers:
    """For `experts_get`: tokens choose all experts equally often, but this rank's `load` times as often."""

    def host_numbers(sent: Tensor, received: Tensor, num_rows: int) -> tuple[list[int], list[int], list[list[int]]]:
        num_ranks, num_experts = received.shape
        of = _parts(round(load * num_rows), num_ranks)
        return _parts(num_rows, num_ranks), of, [_parts(n, num_experts) for n in of]

    return host_numbers


def _parts(number: int, count: int) -> list[int]:
    return [number * (i + 1) // count - number * i // count for i in range(count)]


@contextmanager
def experts_get(host_numbers: HostNumbers) -> Iterator[None]:
    """Inside, `host_numbers` says how many rows go where, as expert_parallel.host_numbers: fake tensors do not."""
    if not find_module(EXPERT_PARALLEL):
        yield
        return
    part = resolve(EXPERT_PARALLEL, asked_by="the dry run")
    previous = part.host_numbers
    part.host_numbers = host_numbers
    try:
        yield
    finally:
        part.host_numbers = previous


def watch_forwards(model: nn.Module, tracker: StepTracker) -> None:
    """What is alive after a forward of the model, or of a pipeline stage, is saved for backward."""
    is_first = True

    def before(module, args, kwargs):
        nonlocal is_first
        if is_first:
            tracker.categorize_live("pipeline buffers")  # receive buffers of all micro-batches of a step
        is_first, tracker.phase = False, "forward"
        set_gradients(model, tracker)  # of the previous micro-batch

    def after(module, args, output):
        for p in model.parameters():
            # Weights that FSDP does not free after forward.
            tracker.set_category_if_temporary(shard_of(p), "gathered weights")
        tracker.categorize_live("activations")
        tracker.phase = "backward"

    model.register_forward_pre_hook(before, prepend=True, with_kwargs=True)  # before FSDP gathers weights
    model.register_forward_hook(after)


def watch_recomputation(model: nn.Module, plan: ParallelPlan, tracker: StepTracker) -> None:
    """In backward, a block's forward is a recomputation, and what is alive after it are activations."""
    start = 0

    def before(module, args):
        nonlocal start
        if tracker.phase == "backward":
            start, tracker.phase = tracker.num_storages, "recompute"

    def after(module, args, output):
        if tracker.phase == "recompute":
            tracker.phase = "backward"
            tracker.categorize_live_later("activations", since=start)

    for container, key in get_blocks(model, plan):
        block = container[key]
        while hasattr(block, "_checkpoint_wrapped_module"):
            block = block._checkpoint_wrapped_module
        block.register_forward_pre_hook(before)
        # Recomputation stops by an exception once it has everything that backward needs.
        block.register_forward_hook(after, always_call=True)


@contextmanager
def watch_offload(tracker: StepTracker) -> Iterator[None]:
    """Categorize the copies that activation offload makes: on one CPU, host and device tensors look the same.

    ValueError: see `resolve`; offload is an optional part.
    """
    host_offload = resolve(OFFLOAD, asked_by="activation_checkpoint.offload = true")
    offload, start_reload = host_offload.offload, host_offload._start_reload

    def watched_offload(self, x):
        moved = offload(self, x)
        tracker.set_category(moved.host, OFFLOADED)
        return moved

    def watched_start_reload(self, moved):
        start_reload(self, moved)
        tracker.set_category(moved.device_tensor, "activations")

    host_offload.offload, host_offload._start_reload = watched_offload, watched_start_reload
    try:
        yield
    finally:
        host_offload.offload, host_offload._start_reload = offload, start_reload


def watch_swap(model: nn.Module, tracker: StepTracker) -> None:
    """Categorize the weights of swapped blocks, and their slots on the device."""
    for block in (module for module in model.modules() if hasattr(module, "swap")):
        tracker.set_category(block.host, SWAPPED)
        for slot in block.swap.allocate():
            tracker.set_category(slot, "parameters")


def set_gradients(model: nn.Module, tracker: StepTracker) -> None:
    """Categorize the gradients that exist."""
    for p in model.parameters():
        if p.grad is not None:
            tracker.set_category(shard_of(p.grad), "gradients")


@torch.no_grad()
def shard_of(tensor: Tensor) -> Tensor:
    """`to_local` that is no operator in the tracker's log."""
    return to_local(tensor)
