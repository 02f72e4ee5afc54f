"""Tensor parallel with sequence-parallel norms: the ranks of a group share the matrices of each block, and, between
these matrices, the tokens.

    tokens/t -- norm, modulate --[all-gather]-- tokens -- colwise -- heads/t -- attention -- rowwise
             --[reduce-scatter]-- tokens/t -- + residual

Each of t ranks holds 1/t of the rows of a block's input matrices (q, k, v, up) and 1/t of the columns of its output
matrices (o, down), so attention runs on 1/t of the heads. Outside these pairs a rank computes with its own tokens only.
(Shoeybi et al. 2019, "Megatron-LM"; Korthikanti et al. 2022, "Reducing activation recomputation in large transformer
models".)

Which module is split how is data, `ParallelPlan.tensor`; `STYLES` implements each style. Activations are plain tensors
and collectives are written out; parameters become DTensors, so that FSDP, checkpoints and the gradient norm work.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from titan_video.config.job_config import Parallelism
from titan_video.config.values import divisors
from titan_video.distributed.collectives import all_gather, all_reduce, rank_group, reduce_scatter
from titan_video.distributed.fsdp import get_blocks
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.distributed.utils import has
from titan_video.kernels import mean_square
from titan_video.models.layers import Linear, local_shard
from titan_video.models.spec import ParallelPlan
from titan_video.tools.parts import resolve

ASYNC = "titan_video.distributed.async_tensor_parallel:async_styles"  # optional


def apply_tensor_parallel(model: nn.Module, plan: ParallelPlan, mesh: DeviceMesh, async_mode: bool) -> None:
    """Split the blocks over the 1-D `mesh`, in place; their parameters may be on the meta device. Nothing is sent.

    async_mode: overlap communication with matmuls (async_tensor_parallel.py). Parameters outside the blocks stay as
    they are, and under expert parallel experts, which FSDP shards over the ranks of tensor parallel too.
    """
    styles = STYLES
    if async_mode:
        styles = resolve(ASYNC, asked_by="parallelism.enable_async_tensor_parallel = true")(mesh)
    for container, key in get_blocks(model, plan):
        block = container[key]
        for name, style in plan.tensor.items():
            parent, _, leaf = name.rpartition(".")
            if has(block, name):  # kinds of blocks and flavors of a model differ in what they have
                styles[style](block.get_submodule(parent), leaf, mesh)
        for module in block.modules():  # experts under expert parallel are DTensors already
            for name, parameter in module.named_parameters(recurse=False):
                if not isinstance(parameter, DTensor):
                    distribute(module, name, mesh, Replicate())


# ---- styles: what becomes of attribute `name` of `parent` ----


def all_gather_input(parent: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """A module whose first argument, this rank's tokens [B, L, D], is gathered to those of the group."""
    group = rank_group(mesh)
    parent.get_submodule(name).register_forward_pre_hook(
        lambda module, args: (all_gather(args[0], 1, group), *args[1:])
    )


def colwise(parent: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """A Linear: each rank computes some of the outputs."""
    linear = parent.get_submodule(name)
    distribute(linear, "weight", mesh, Shard(0))
    distribute(linear, "bias", mesh, Shard(0))
    if linear.adapter is not None:
        distribute(linear.adapter, "up", mesh, Shard(0))


def colwise_gathered(parent: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """A Linear of few rows: each rank computes some of the outputs, then all ranks gather all of them."""
    colwise(parent, name, mesh)
    group = rank_group(mesh)
    parent.get_submodule(name).register_forward_hook(lambda module, args, out: all_gather(out, out.ndim - 1, group))


def rowwise(parent: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """A Linear: each rank has some of the inputs; it gets the outputs of its own tokens."""
    _rowwise(parent, name, mesh, (_reduce_scatter_tokens(mesh),))


def rowwise_replicated(parent: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """A Linear: each rank has some of the inputs; it gets all outputs. For text, which is replicated."""
    _rowwise(parent, name, mesh, (_all_reduce_sums(mesh),))


def rowwise_joint(parent: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """A Linear of video and of text tokens: `rowwise` for the former, `rowwise_replicated` for the latter."""
    _rowwise(parent, name, mesh, (_reduce_scatter_tokens(mesh), _all_reduce_sums(mesh)))


def shard_vector(parent: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """A vector over all heads: each rank has the part of its own heads."""
    distribute(parent, name, mesh, Shard(0))


def rms_stats(parent: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """Statistics of norms over all heads: see `AllReduceRMS`."""
    parent.register_module(name, AllReduceRMS(mesh))


STYLES: dict[str, Callable[[nn.Module, str, DeviceMesh], None]] = {
    "all_gather_input": all_gather_input,
    "colwise": colwise,
    "colwise_gathered": colwise_gathered,
    "rowwise": rowwise,
    "rowwise_replicated": rowwise_replicated,
    "rowwise_joint": rowwise_joint,
    "shard_vector": shard_vector,
    "rms_stats": rms_stats,
}


def _reduce_scatter_tokens(mesh: DeviceMesh) -> Callable[[Tensor], Tensor]:
    group = rank_group(mesh)
    return lambda sums_BLD: reduce_scatter(sums_BLD, 1, group)


def _all_reduce_sums(mesh: DeviceMesh) -> Callable[[Tensor], Tensor]:
    group = rank_group(mesh)
    return lambda sums_BLD: all_reduce(sums_BLD, group)


def _rowwise(parent: nn.Module, name: str, mesh: DeviceMesh, complete: tuple[Callable[[Tensor], Tensor], ...]) -> None:
    linear = parent.get_submodule(name)
    distribute(linear, "weight", mesh, Shard(1))
    distribute(linear, "bias", mesh, Replicate())
    if linear.adapter is not None:
        distribute(linear.adapter, "down", mesh, Shard(1))
    parent.register_module(name, UnfusedLinear(linear, complete))


def distribute(module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement) -> None:
    """Make a parameter a DTensor; each rank takes its shard of the tensor that it has. Nothing is sent."""
    full = module.get_parameter(name)
    shard = distribute_tensor(full.detach(), mesh, [placement], src_data_rank=None)
    module.register_parameter(name, nn.Parameter(shard, requires_grad=full.requires_grad))
    if name == "weight" and isinstance(getattr(module, "linear_fn", None), nn.Module):  # quantized: its scales
        distribute(module.linear_fn, "scale", mesh, placement)


class UnfusedLinear(nn.Module):
    """A Linear of one or more inputs; each matmul is completed by a function of its own before the bias is added."""

    def __init__(self, linear: Linear, complete: tuple[Callable[[Tensor], Tensor], ...]):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.adapter, self.linear_fn = linear.adapter, linear.linear_fn
        self.complete = complete

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        weight, bias = local_shard(self.weight), local_shard(self.bias)
        outputs = []
        for complete, x in zip(self.complete, inputs, strict=True):
            y = self.linear_fn(x, weight)
            if self.adapter is not None:
                y = y + self.adapter(x)
            outputs.append(complete(y) + bias)
        return tuple(outputs) if len(outputs) > 1 else outputs[0]


class AllReduceRMS(nn.Module):
    """Mean squares of q and the keys over the full width; each rank has an equal part of it.

    One all-reduce of a number per row serves all of them.
    """

    def __init__(self, mesh: DeviceMesh):
        super().__init__()
        self.group = rank_group(mesh)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        means = all_reduce(torch.cat([mean_square(x) for x in tensors], dim=1), self.group) / self.group.size
        return means.split([x.shape[1] for x in tensors], dim=1)


def layout_errors(dims: ParallelDims, section: Parallelism, args: Any) -> Iterator[str]:
    """What a model's architecture does not allow, one line per mistake. args: the model's (see ModelSpec)."""
    heads, hidden = args.num_heads, args.ffn_dim
    if heads % dims.tp or hidden % dims.tp:
        yield (
            f"parallelism.tensor_parallel_degree: given {dims.tp}, which does not divide the model's {heads} heads and "
            f"feed-forward width {hidden}; legal: {divisors(heads, hidden)}"
        )
