"""Collectives that autograd and torch.compile see through, under one name in every supported torch.

What they send is made contiguous, as torch 2.11 asks.
"""

import math

import torch
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

# Renamed in torch 2.13, where the old names warn.
_all_gather = getattr(functional, "all_gather_single_autograd", None) or functional.all_gather_tensor_autograd
_reduce_scatter = (
    getattr(functional, "reduce_scatter_single_autograd", None) or functional.reduce_scatter_tensor_autograd
)


def all_gather(x: Tensor, dim: int, mesh: DeviceMesh) -> Tensor:
    """The ranks' tensors, concatenated along `dim`. Backward is a reduce-scatter."""
    # Always sent along dim 0 and arranged here. torch 2.13, asked for dim 1 of one clip, gives a view that loses its
    # gradient when waited for.
    if _is_outermost(x, dim):
        rows = _ready(_all_gather(x.flatten(0, dim).contiguous(), 0, mesh.get_group()))
        return rows.view(*x.shape[:dim], -1, *x.shape[dim + 1 :])
    return torch.cat(_ready(_all_gather(x.contiguous(), 0, mesh.get_group())).chunk(mesh.size()), dim)


def reduce_scatter(x: Tensor, dim: int, mesh: DeviceMesh) -> Tensor:
    """The sum of the ranks' tensors, of which each rank keeps its chunk of `dim`. Backward is an all-gather."""
    if _is_outermost(x, dim):
        rows = _ready(_reduce_scatter(x.flatten(0, dim).contiguous(), "sum", 0, mesh.get_group()))
        return rows.view(*x.shape[:dim], -1, *x.shape[dim + 1 :])
    return _ready(_reduce_scatter(torch.cat(x.chunk(mesh.size(), dim)), "sum", 0, mesh.get_group()))


def all_reduce(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of the ranks' tensors. Backward is an all-reduce."""
    return _ready(functional.all_reduce(x.contiguous(), "sum", mesh.get_group()))


def all_to_all(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Chunk i of dim 0 goes to rank i; the result holds the chunks received, in rank order.

    Backward is an all-to-all.
    """
    return _ready(functional.all_to_all_single_autograd(x.contiguous(), None, None, mesh.get_group()))


def _is_outermost(x: Tensor, dim: int) -> bool:
    """Whether `dim` is the slowest one in memory, as the tokens of a single clip are: nothing is then copied."""
    return math.prod(x.shape[:dim]) == 1


def _ready(x: Tensor) -> Tensor:
    return x.wait() if isinstance(x, functional.AsyncCollectiveTensor) else x
