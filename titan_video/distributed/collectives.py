"""Collectives that autograd and torch.compile see through, under one name in every supported torch."""

import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

# Renamed in torch 2.13, where the old names warn.
_all_gather = getattr(functional, "all_gather_single_autograd", None) or functional.all_gather_tensor_autograd
_reduce_scatter = getattr(functional, "reduce_scatter_single_autograd", None) or functional.reduce_scatter_tensor_autograd


def all_gather(x: Tensor, dim: int, mesh: DeviceMesh) -> Tensor:
    """The ranks' tensors, concatenated along `dim`. Backward is a reduce-scatter."""
    return _ready(_all_gather(x, dim, mesh.get_group()))


def reduce_scatter(x: Tensor, dim: int, mesh: DeviceMesh) -> Tensor:
    """The sum of the ranks' tensors, of which each rank keeps its chunk of `dim`. Backward is an all-gather."""
    return _ready(_reduce_scatter(x, "sum", dim, mesh.get_group()))


def all_reduce(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of the ranks' tensors. Backward is an all-reduce."""
    return _ready(functional.all_reduce(x, "sum", mesh.get_group()))


def all_to_all(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Chunk i of dim 0 goes to rank i; the result holds the chunks received, in rank order. Backward is an all-to-all."""
    return _ready(functional.all_to_all_single_autograd(x, None, None, mesh.get_group()))


def _ready(x: Tensor) -> Tensor:
    return x.wait() if isinstance(x, functional.AsyncCollectiveTensor) else x
