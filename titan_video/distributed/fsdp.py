"""FSDP2: parameters, gradients and optimizer state sharded over the `fsdp` meshes; also on one rank, so that mixed
precision has one meaning.
One rank in float32 throughout is the exception: there the model is left as it is.

Units: each block, over dp_shard x cp; each other root module that has weights, and the root itself, which holds the
plan's float32 parts, over dp_shard x cp x tp. The ranks of cp and tp have different tokens, so the sum over them is
part of the same reduce-scatter.
Gradients are summed, never averaged: the loss is divided by the global element count before backward, which stays right
when ranks hold unequal amounts. Every micro-batch is reduced at once into sharded float32 gradients; putting the
reduction off would hold a whole float32 gradient on each rank.
"""

import warnings

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from titan_video.distributed.parallel_dims import Meshes
from titan_video.models.spec import ParallelPlan

# A Linear of a 3-D input returns a view. The warning is about in-place changes of it, which no model here makes.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


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
) -> None:
    """Shard in place. cpu_offload: shards and their gradients live in host memory, and weights are copied to the device
    to be gathered.

    reshard_after_forward: "always" frees a block's gathered weights after its forward and gathers them again for
    backward; "never" keeps them; "default" is "always", but "never" where the weights are on one rank, as nothing is
    gathered there.
    """
    if meshes.fsdp_root.size() == 1 and param_dtype == reduce_dtype == torch.float32 and not cpu_offload:
        return  # nothing to shard, send or cast: the units would only copy weights and gradients

    # Inputs are cast by the modules themselves: a policy's cast would also hit times, rotations and modulation, which
    # stay in float32.
    low = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    high = MixedPrecisionPolicy(
        param_dtype=torch.promote_types(param_dtype, torch.float32),
        reduce_dtype=reduce_dtype,
        cast_forward_inputs=False,
    )
    offload = CPUOffloadPolicy(pin_memory=meshes.world.device_type == "cuda") if cpu_offload else OffloadPolicy()
    shard_degree = meshes.fsdp.shape[-1]
    reshard = reshard_after_forward == "always" or (reshard_after_forward == "default" and shard_degree > 1)

    blocks = [container[key] for container, key in get_blocks(model, plan)]
    for block in blocks:
        fully_shard(block, mesh=meshes.fsdp, mp_policy=low, offload_policy=offload, reshard_after_forward=reshard)
    for name, child in model.named_children():
        if name not in plan.fp32 and name not in plan.blocks and any(True for _ in child.parameters()):
            fully_shard(
                child, mesh=meshes.fsdp_root, mp_policy=low, offload_policy=offload, reshard_after_forward=reshard
            )
    fully_shard(model, mesh=meshes.fsdp_root, mp_policy=high, offload_policy=offload, reshard_after_forward=False)

    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Both are needed: gloo has no pre-multiplied sum, and a factor of 1 alone would still ask for one.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    for this, following in zip(blocks, blocks[1:]):
        this.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([this])


def reshard(model: nn.Module) -> None:
    """Free gathered weights that a forward without backward has left.

    Until then a change of the sharded weights would not be seen.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
