"""Process groups, reductions over named axes, sharded tensors, and initial weights that do not depend on the layout."""

import hashlib
import operator
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import fields
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor


def init_distributed(device: torch.device, timeout_seconds: int, **ranks: Any) -> None:
    """Join the process group that torchrun set up, or make a group of one. On a GPU, host tensors go through gloo.

    ranks: store, rank and world_size of another group, as `dist.init_process_group` takes them.
    """
    if not ranks and "RANK" not in os.environ:
        ranks = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds), **ranks)


def set_timeout(timeout_seconds: int, meshes: Any) -> None:
    """From here on a collective of the default group or of any axis of `meshes` (Meshes) fails after this time."""
    views = [mesh for f in fields(meshes) if (mesh := getattr(meshes, f.name)) is not None]
    for group in [None, *(group for mesh in views for group in mesh.get_all_groups())]:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_seconds), group)


def reduce_over(mesh: DeviceMesh, value: Tensor, op: str) -> Tensor:
    """`value` summed ("sum") or maximised ("max") over a 1-D mesh; `value` itself is unchanged."""
    assert mesh.ndim == 1, "a reduction names one axis"
    result = value.detach().clone()
    dist.all_reduce(result, op=dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX, group=mesh.get_group())
    return result


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list:
    """`value` of every rank, in rank order, on all ranks."""
    if dist.get_world_size(group) == 1:
        # Gloo would copy a large value in a thread of its own, whose OpenMP team makes libgomp count more threads than
        # cores; from then on it puts ours to sleep after each operator: half the speed of a small model.
        return [value]
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast_from_rank0(function: Callable[[], Any], group: dist.ProcessGroup | None = None) -> Any:
    """The result of `function`, called on rank 0, on all ranks; its exception is raised on all, so that none waits."""
    if dist.get_world_size(group) == 1:
        return function()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except Exception as e:
            outcome[1] = e
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def clean_name(name: str) -> str:
    """A parameter's name without what checkpointing and compile wrappers insert."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def derive_seed(name: str, seed: int) -> int:
    """A seed for one purpose, from its name and the run's seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1


@torch.no_grad()
def initialise(
    model: nn.Module,
    init_parameter: Callable[[str, Tensor, torch.Generator], None],
    seed: int,
    which: Callable[[str], bool] | None = None,
) -> None:
    """Fill every parameter, or those whose name `which` accepts, so that all layouts start from the same weights.

    Each rank draws each full tensor on the host, from a generator keyed by (seed, name), one at a time, and keeps its
    shard; nothing is sent. (torch's own initialisers give the shards of a CPU mesh equal values, and on GPUs values
    that depend on the layout.)
    """
    for name, p in model.named_parameters():
        name = clean_name(name)
        if which is not None and not which(name):
            continue
        full = torch.empty(p.shape, dtype=torch.float32)
        init_parameter(name, full, torch.Generator().manual_seed(derive_seed(name, seed)))
        if isinstance(p, DTensor):
            full = distribute_tensor(full.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
        p.copy_(full)


@torch.no_grad()
def clip_grad_norm(model: nn.Module, max_norm: float, pp_mesh: DeviceMesh | None = None) -> Tensor:
    """The 2-norm of all gradients over all ranks, a plain scalar; gradients are scaled down to `max_norm` if it is > 0.

    pp_mesh: the axis over whose ranks the parameters are partitioned. A norm that is not finite is returned as it is;
    the caller decides what follows.
    """
    groups = defaultdict(list)
    for grad in (p.grad for p in model.parameters() if p.grad is not None):
        groups[get_mesh(grad), sharded_axes(grad), grad.dtype].append(to_local(grad))
    norms = [_norm(grads, [mesh[axis] for axis in axes]) for (mesh, axes, _), grads in groups.items()]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if pp_mesh is not None and pp_mesh.size() > 1:
        norm = reduce_over(pp_mesh, norm.square(), "sum").sqrt()
    if max_norm > 0:
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        for grads in groups.values():
            torch._foreach_mul_(grads, scale)
    return norm


def _norm(shards: list[Tensor], axes: list[DeviceMesh]) -> Tensor:
    """The 2-norm of tensors of one dtype, of which each rank of the 1-D meshes `axes` has its shards.

    Over local tensors: for a list of DTensors torch first derives placements of each, in the first step of a layout.
    """
    norms = torch.stack(torch._foreach_norm(shards)).to(torch.promote_types(shards[0].dtype, torch.float32))
    squares = norms.square() if axes else None
    for axis in axes:
        squares = reduce_over(axis, squares, "sum")
    return torch.linalg.vector_norm(squares.sqrt() if axes else norms)


def to_local(t: Tensor) -> Tensor:
    """This rank's shard of a tensor, in the same memory, without gradient; `models.layers.local_shard` has one."""
    return t.to_local() if isinstance(t, DTensor) else t


def get_mesh(parameter: Tensor) -> DeviceMesh | None:
    """The mesh that a parameter is sharded over."""
    return parameter.device_mesh if isinstance(parameter, DTensor) else None


def sharded_axes(t: Tensor) -> tuple[str, ...]:
    """Names of the axes of a tensor's mesh over which it is sharded, not replicated."""
    if not isinstance(t, DTensor):
        return ()
    names, placements = t.device_mesh.mesh_dim_names, t.placements
    return tuple(name for name, place in zip(names, placements, strict=True) if not place.is_replicate())


def has(block: nn.Module, name: str) -> bool:
    """Whether a dotted name leads to a module or a parameter."""
    try:
        return operator.attrgetter(name)(block) is not None
    except AttributeError:
        return False
