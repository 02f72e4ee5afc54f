"""FSDP2: parameters, gradients and optimizer state sharded over the meshes that the plan names (`ParallelPlan.units`).

One rank uses it too, so that mixed precision has one meaning, but not in float32 throughout, nor to train adapters.

Blocks are sharded over dp_shard x cp; what is outside the blocks, and the root with the plan's float32 parts, over
dp_shard x cp x tp; under expert parallel, experts over those of these ranks that have the same ones. The ranks of cp
and tp have different tokens: the same reduce-scatter sums over them.
Gradients are summed, never averaged: the loss is divided by the global element count before backward, which stays right
when ranks hold unequal amounts. Each micro-batch is reduced at once into sharded float32 gradients; a deferred
reduction would hold a full float32 gradient on each rank.
"""

import re
import warnings
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from titan_video.config.job_config import JobConfig
from titan_video.distributed.parallel_dims import Meshes
from titan_video.distributed.utils import clean_name, has, reduce_over, to_local
from titan_video.models.layers import is_adapter
from titan_video.models.spec import ParallelPlan

# A Linear of a 3-D input returns a view. The warning is about in-place changes of it, which no model here makes.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
CAN_OFFLOAD_REPLICAS = torch.__version__ >= (2, 13)  # gradients may be overwritten before: pytorch pull request 180665


def get_blocks(model: nn.Module, plan: ParallelPlan) -> list[tuple[nn.ModuleDict, str]]:
    """(container, key) of every block, in forward order."""
    return [(model.get_submodule(path), key) for path in plan.blocks for key in model.get_submodule(path)]


def apply_fsdp(
    model: nn.Module,
    plan: ParallelPlan,
    meshes: Meshes,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard_after_forward: str,
    cpu_offload: bool = False,
    symmetric_memory: bool = False,
) -> None:
    """Shard in place.

    reshard_after_forward: "always" frees a unit's gathered weights after its forward and gathers them again for
    backward; "never" keeps them; "default" is "always", but "never" where the weights are on one rank and nothing is
    gathered.
    cpu_offload: shards and their gradients live in host memory; weights are copied to the device to be gathered.
    symmetric_memory: collectives read and write NCCL's symmetric memory.

    ValueError: symmetric memory where there is none.
    """
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    is_cast = param_dtype == torch.float32 or all(map(is_adapter, trained))  # adapters cast themselves
    if symmetric_memory and (device := meshes.world.device_type) != "cuda":  # gloo would take the call
        raise ValueError(f"parallelism.enable_fsdp_symm_mem: true, but this run is on {device}; leave it false")
    if meshes.fsdp_root.size() == 1 and reduce_dtype == torch.float32 and is_cast and not cpu_offload:
        return  # nothing to shard, send or cast: the units would only copy weights and gradients

    offload = CPUOffloadPolicy(pin_memory=meshes.world.device_type == "cuda") if cpu_offload else OffloadPolicy()
    root_dtype = torch.promote_types(param_dtype, torch.float32)  # the root holds the plan's float32 parts
    blocks = [container[key] for container, key in get_blocks(model, plan)]
    in_blocks = [block.get_submodule(path) for block in blocks for path in plan.experts if has(block, path)]
    experts = {p for module in in_blocks for p in module.parameters()}
    for pattern, mesh_name in plan.units.items():
        assert hasattr(meshes, mesh_name), f"ParallelPlan.units: {pattern!r}: {mesh_name!r} not in {[*vars(meshes)]}"
        is_root = pattern == ""
        # Modules cast their inputs themselves: a policy's cast would also hit times, RoPE and modulation (float32).
        dtypes = (root_dtype, torch.promote_types(reduce_dtype, root_dtype)) if is_root else (param_dtype, reduce_dtype)
        policy = MixedPrecisionPolicy(param_dtype=dtypes[0], reduce_dtype=dtypes[1], cast_forward_inputs=False)
        mesh = getattr(meshes, mesh_name)
        if mesh is None:  # experts without expert parallel: they are in the unit of their block
            continue
        shard_degree = (mesh if mesh_name == "expert_fsdp" else meshes.fsdp).shape[-1]
        reshard = reshard_after_forward == "always" or (reshard_after_forward == "default" and shard_degree > 1)
        for module in match_modules(model, pattern):
            fully_shard(
                module,
                mesh=mesh,
                mp_policy=policy,
                offload_policy=offload,
                reshard_after_forward=reshard and not is_root,
                shard_placement_fn=partial(_shard_dim, experts=experts, degree=shard_degree) if experts else None,
            )
    _set_communication(model, blocks, symmetric_memory)


def _set_communication(model: nn.Module, blocks: list[nn.Module], symmetric_memory: bool) -> None:
    """Sums without a division, and the next block's weights on their way while a block computes."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Both are needed: gloo has no pre-multiplied sum, and a factor of 1 alone would still ask for one.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            if symmetric_memory:
                module.set_symm_mem_for_comm()
    for this, following in pairwise(blocks):
        this.set_modules_to_forward_prefetch(units_of(following))
        following.set_modules_to_backward_prefetch(units_of(this))


def units_of(block: nn.Module) -> list[FSDPModule]:
    """A block, and the units in it."""
    return [module for module in block.modules() if isinstance(module, FSDPModule)]


def _shard_dim(p: nn.Parameter, experts: set[nn.Parameter], degree: int) -> Shard:
    """The dim that FSDP shards: the first, but of stacked experts [E, R, ...] the second where `degree` ranks do not
    divide this rank's experts. There are often more ranks than experts, and FSDP would pad to a whole one on each.
    """
    local = to_local(p)
    is_second = p in experts and local.shape[0] % degree > 0 and local.shape[1] % degree == 0
    return Shard(1) if is_second else Shard(0)


def match_modules(model: nn.Module, pattern: str) -> Iterator[nn.Module]:
    """Modules with parameters whose dotted path matches; `*` stands for one path element, "" is the model itself.

    Checkpointing wrappers are no path elements. A path that a flavor or a pipeline stage lacks matches nothing.
    """
    regex = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
    seen = set()
    for name, module in model.named_modules():
        path = clean_name(f"{name}.").strip(".")
        if path in seen:
            continue  # what a checkpointing wrapper contains has the wrapper's own path
        seen.add(path)
        if regex.fullmatch(path) and next(module.parameters(), None) is not None:
            yield module


def reshard(model: nn.Module) -> None:
    """Free gathered weights that a forward without backward has left.

    Until then a change of the sharded weights would not be seen.
    """
    for module in model.modules():
        if hasattr(module, "reshard"):  # FSDP units, and blocks that are swapped
            module.reshard()


def count_parameters(model: nn.Module, pp_mesh: DeviceMesh) -> int:
    """Of all pipeline stages."""
    return int(reduce_over(pp_mesh, torch.tensor(sum(p.numel() for p in model.parameters())), "sum"))


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about FSDP's communication, one line per mistake."""
    symmetric, low = config.parallelism.enable_fsdp_symm_mem, config.training.mixed_precision_reduce == "bfloat16"
    asked = {"parallelism.enable_fsdp_symm_mem: true": symmetric, "training.mixed_precision_reduce: bfloat16": low}
    if config.encoder.num_training_ranks(world_size) <= config.parallelism.pipeline_parallel_degree:
        fix = "but there is no other rank to exchange weights and gradients with; leave it at its default"
        yield from (f"{value}, {fix}" for value, is_asked in asked.items() if is_asked)
    if symmetric and not hasattr(FSDPModule, "set_symm_mem_for_comm"):
        yield f"parallelism.enable_fsdp_symm_mem: true, which torch {torch.__version__} lacks; leave it false"
    replicas = config.parallelism.data_parallel_replicate_degree
    if config.training.enable_cpu_offload and replicas > 1 and not CAN_OFFLOAD_REPLICAS:
        yield "training.enable_cpu_offload: with replicas it needs torch 2.13; set data_parallel_replicate_degree = 1"
