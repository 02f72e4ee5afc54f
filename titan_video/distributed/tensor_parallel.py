"""Tensor parallel with sequence-parallel norms: the ranks of a group share the matrices of each block, and between these matrices the tokens.

    tokens/t -- norm, modulate --[all-gather]-- tokens -- column -- heads/t -- attention -- row --[reduce-scatter]-- tokens/t -- + residual

t ranks each hold 1/t of the rows of a block's entering matrices (q, k, v, up) and 1/t of the columns of its leaving ones (o, down), so
attention runs on 1/t of the heads. Outside these pairs a rank computes with its own tokens only. (Shoeybi et al. 2019, "Megatron-LM";
Korthikanti et al. 2022, "Reducing activation recomputation in large transformer models".)

Which module takes which part is data, `ParallelPlan.tensor`; `STYLES` says what each part means. Activations are plain tensors and collectives
are written out; parameters become DTensors, so that FSDP, checkpoints and the gradient norm know what each rank has.
"""

import operator
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from titan_video.distributed.collectives import all_gather, all_reduce, reduce_scatter
from titan_video.distributed.fsdp import blocks_of
from titan_video.kernels import mean_square
from titan_video.models.layers import local
from titan_video.models.spec import ParallelPlan


def apply_tensor_parallel(model: nn.Module, plan: ParallelPlan, mesh: DeviceMesh, async_mode: bool) -> None:
    """Split the blocks over the 1-D `mesh`, in place; their parameters may be on the meta device. Nothing is sent.

    async_mode: see `enable_async`. Parameters outside the blocks stay as they are.
    """
    if async_mode:
        enable_async(mesh)
    for container, key in blocks_of(model, plan):
        block = container[key]
        for name, style in plan.tensor.items():
            parent, _, leaf = name.rpartition(".")
            if has(block, name):  # kinds of blocks and flavors of a model differ in what they have
                STYLES[style](block.get_submodule(parent), leaf, mesh)
        for module in block.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if not isinstance(parameter, DTensor):
                    distribute(module, name, mesh, Replicate())


def has(block: nn.Module, name: str) -> bool:
    """Whether a dotted name leads to a module or a parameter."""
    try:
        return operator.attrgetter(name)(block) is not None
    except AttributeError:
        return False


# ---- styles: what becomes of attribute `name` of `parent` ----


def gather(parent: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """A module whose first argument [B, L, D], this rank's tokens, is to hold those of the whole group."""
    parent.get_submodule(name).register_forward_pre_hook(lambda module, args: (all_gather(args[0], 1, mesh), *args[1:]))


def column(parent: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """A Linear of which each rank computes some of the outputs."""
    linear = parent.get_submodule(name)
    distribute(linear, "weight", mesh, Shard(0))
    distribute(linear, "bias", mesh, Shard(0))


def row(parent: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """A Linear of which each rank has some of the inputs: see `RowLinear`."""
    linear = parent.get_submodule(name)
    distribute(linear, "weight", mesh, Shard(1))
    distribute(linear, "bias", mesh, Replicate())
    parent.register_module(name, RowLinear(linear, mesh))


def heads(parent: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """A vector over all heads, of which each rank needs that of its own."""
    distribute(parent, name, mesh, Shard(0))


def mean_squares(parent: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """Statistics of norms over all heads: see `GroupMeanSquares`."""
    parent.register_module(name, GroupMeanSquares(mesh))


STYLES: dict[str, Callable[[nn.Module, str, DeviceMesh], None]] = {
    "gather": gather,
    "column": column,
    "row": row,
    "heads": heads,
    "mean_squares": mean_squares,
}


def distribute(module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement) -> None:
    """Make a parameter a DTensor, each rank taking its part of the tensor that it has."""
    whole = module.get_parameter(name)
    part = distribute_tensor(whole.detach(), mesh, [placement], src_data_rank=None)
    module.register_parameter(name, nn.Parameter(part, requires_grad=whole.requires_grad))


class RowLinear(nn.Module):
    """[B, L, inputs/t] -> [B, L/t, outputs]: the ranks' partial sums are added and dealt out over the tokens, and then get the bias, once."""

    def __init__(self, linear: nn.Linear, mesh: DeviceMesh):
        super().__init__()
        self.weight, self.bias, self.mesh = linear.weight, linear.bias, mesh

    def forward(self, x: Tensor) -> Tensor:
        return reduce_scatter(F.linear(x, local(self.weight)), 1, self.mesh) + local(self.bias)


class GroupMeanSquares(nn.Module):
    """Mean squares of q and the keys over the whole width, of which each rank has an equal part: one all-reduce of a number per row for all."""

    def __init__(self, mesh: DeviceMesh):
        super().__init__()
        self.mesh = mesh

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        means = all_reduce(torch.cat([mean_square(x) for x in tensors], dim=1), self.mesh) / self.mesh.size()
        return means.split([x.shape[1] for x in tensors], dim=1)
