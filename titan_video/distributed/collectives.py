"""Collectives that autograd and torch.compile see through, under one name in every supported torch.

What they send is made contiguous, as torch 2.11 requires.
"""

import math

import torch
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from titan_video.models.spec import RankGroup

# Renamed in torch 2.13, where the old names warn.
_all_gather = getattr(functional, "all_gather_single_autograd", None) or functional.all_gather_tensor_autograd
_reduce_scatter = (
    getattr(functional, "reduce_scatter_single_autograd", None) or functional.reduce_scatter_tensor_autograd
)


def rank_group(mesh: DeviceMesh) -> RankGroup:
    """The process group of a 1-D mesh, as data."""
    return RankGroup(name=mesh.get_group().group_name, rank=mesh.get_local_rank(), size=mesh.size())


def all_gather(x: Tensor, dim: int, group: RankGroup) -> Tensor:
    """The ranks' tensors, concatenated along `dim`. Backward is a reduce-scatter."""
    # Always sent along dim 0 and rearranged here: torch 2.13, asked for dim 1 of one clip, returns a view that loses
    # its gradient when it is waited for.
    if _is_outermost(x, dim):
        rows = ready(_all_gather(x.flatten(0, dim).contiguous(), 0, group.name))
        return rows.view(*x.shape[:dim], -1, *x.shape[dim + 1 :])
    return torch.cat(ready(_all_gather(x.contiguous(), 0, group.name)).chunk(group.size), dim)


def reduce_scatter(x: Tensor, dim: int, group: RankGroup) -> Tensor:
    """Sum the ranks' tensors and keep this rank's chunk of `dim`. Backward is an all-gather."""
    if _is_outermost(x, dim):
        rows = ready(_reduce_scatter(x.flatten(0, dim).contiguous(), "sum", 0, group.name))
        return rows.view(*x.shape[:dim], -1, *x.shape[dim + 1 :])
    return ready(_reduce_scatter(torch.cat(x.chunk(group.size, dim)), "sum", 0, group.name))


def all_reduce(x: Tensor, group: RankGroup) -> Tensor:
    """The sum of the ranks' tensors. Backward is an all-reduce."""
    return ready(functional.all_reduce(x.contiguous(), "sum", group.name))


def _is_outermost(x: Tensor, dim: int) -> bool:
    """Whether `dim` is the slowest one in memory, as the tokens of a single clip are: then nothing is copied."""
    return math.prod(x.shape[:dim]) == 1


def ready(x: Tensor) -> Tensor:
    """x when the collective that makes it has ended."""
    return x.wait() if isinstance(x, functional.AsyncCollectiveTensor) else x
