"""Tensor parallel with sequence-parallel norms: the ranks of a group share the matrices of each block, and between
these matrices the tokens.

    tokens/t -- norm, modulate --[all-gather]-- tokens -- column -- heads/t -- attention -- row --[reduce-scatter]--
    tokens/t -- + residual

t ranks each hold 1/t of the rows of a block's entering matrices (q, k, v, up) and 1/t of the columns of its leaving
ones (o, down), so attention runs on 1/t of the heads. Outside these pairs a rank computes with its own tokens only.
(Shoeybi et al. 2019, "Megatron-LM"; "Megatron-LM"; Korthikanti et al. 2022, "Reducing activation recomputation in large
transformer models".)

Which module takes which part is data, `ParallelPlan.tensor`; `STYLES` says what each part means. Activations are plain
tensors and collectives are written out; parameters become DTensors, so that FSDP, checkpoints and the gradient norm
know what each rank has.
"""

import operator
import warnings
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from titan_video.config.job_config import JobConfig
from titan_video.distributed.collectives import all_gather, all_reduce, reduce_scatter
from titan_video.distributed.fsdp import get_blocks
from titan_video.kernels import mean_square
from titan_video.models.layers import Linear, local
from titan_video.models.spec import ParallelPlan


def apply_tensor_parallel(model: nn.Module, plan: ParallelPlan, mesh: DeviceMesh, async_mode: bool) -> None:
    """Split the blocks over the 1-D `mesh`, in place; their parameters may be on the meta device. Nothing is sent.

    async_mode: see `enable_async`. Parameters outside the blocks stay as they are.
    """
    if async_mode:
        enable_async(mesh)
    styles = ASYNC_STYLES if async_mode else STYLES
    for container, key in get_blocks(model, plan):
        block = container[key]
        for name, style in plan.tensor.items():
            parent, _, leaf = name.rpartition(".")
            if has(block, name):  # kinds of blocks and flavors of a model differ in what they have
                styles[style](block.get_submodule(parent), leaf, mesh)
        for module in block.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if not isinstance(parameter, DTensor):
                    distribute(module, name, mesh, Replicate())


def enable_async(mesh: DeviceMesh) -> None:
    """Let the compiler break each gather and scatter into parts that are sent while the product with another part is
    computed.

    ValueError where that cannot work. Not yet run on GPUs. What torch 2.13's pass
    (torch/_inductor/fx_passes/micro_pipeline_tp.py) takes, and
    finds in a compiled Wan block: an all-gather along any dim whose result is multiplied, by one matrix or, for q, k
    product whose result is reduce-scattered. A bias within the product (`addmm`) hides the first, hence
    gathers and 3 scatters of a block are taken; backward all 3 gathers and 2 scatters: what q, k and v send back is a
    sum of products.
    """
    if mesh.device_type != "cuda":
        raise ValueError(
            f"parallelism.enable_async_tensor_parallel: true, but it needs GPUs that see each other's memory, "
            f"and this run is on "
            f"{mesh.device_type}; leave it false"
        )
    import torch._inductor.config
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    torch._inductor.config._micro_pipeline_tp = True
    with warnings.catch_warnings():  # torch 2.13 calls it needless, yet its pass skips groups without it
        warnings.simplefilter("ignore", FutureWarning)
        enable_symm_mem_for_group(mesh.get_group().group_name)


def collectives_per_block(plan: ParallelPlan, block: nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    """How often each collective is called for tensor parallel in the forward of a split block, which a checkpointed
    its backward, where the gradient of each whole parameter (norms and biases that follow a scatter) is added up over
    the ranks."""
    used = Counter(style for name, style in plan.tensor.items() if has(block, name))
    gathers = used["gather"] + used["column_gathered"]
    scatters = used["row"] + used["row_joint"]
    sums = used["rms_stats"] + used["row_replicated"] + used["row_joint"]
    whole = sum(p.requires_grad and p.placements[-1].is_replicate() for p in block.parameters())
    return (
        {"all_gather": gathers, "reduce_scatter": scatters, "all_reduce": sums},
        {"all_gather": scatters, "reduce_scatter": gathers, "all_reduce": sums + whole},
    )


def bytes_per_collective(batch: int, tokens: int, width: int, tp: int, itemsize: int) -> int:
    """Bytes that each rank sends in one gather or scatter of activations: all parts but its own. tokens:

    of the whole group.
    """
    return (tp - 1) * batch * (tokens // tp) * width * itemsize


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
    if linear.adapter is not None:
        distribute(linear.adapter, "up", mesh, Shard(0))


def column_gathered(parent: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """A Linear of few rows, of which each rank computes some of the outputs and then has all."""
    column(parent, name, mesh)
    parent.get_submodule(name).register_forward_hook(lambda module, args, out: all_gather(out, out.ndim - 1, mesh))


def row(parent: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """A Linear of which each rank has some of the inputs, and gets the outputs of its own tokens."""
    _row(parent, name, mesh, _own_tokens(mesh))


def row_replicated(parent: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """A Linear of which each rank has some of the inputs, and gets all outputs:

    for text, which is whole on each rank.
    """
    _row(parent, name, mesh, _all_tokens(mesh))


def row_joint(parent: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """A Linear of video and of text tokens: `row` for the former, `row_replicated` for the latter."""
    _row(parent, name, mesh, _own_tokens(mesh), _all_tokens(mesh))


def heads(parent: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """A vector over all heads, of which each rank needs that of its own."""
    distribute(parent, name, mesh, Shard(0))


def rms_stats(parent: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """Statistics of norms over all heads: see `AllReduceRMS`."""
    parent.register_module(name, AllReduceRMS(mesh))


STYLES: dict[str, Callable[[nn.Module, str, DeviceMesh], None]] = {
    style.__name__: style
    for style in (gather, column, column_gathered, row, row_replicated, row_joint, heads, rms_stats)
}


def gather_in_chunks(parent: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """`gather`, always with the concatenation that the compiler's pass looks for."""

    def hook(module: nn.Module, args: tuple) -> tuple:
        return torch.cat(all_gather(args[0], 0, mesh).chunk(mesh.size()), dim=1), *args[1:]

    parent.get_submodule(name).register_forward_pre_hook(hook)


def column_unfused(parent: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """`column`, with a product that the compiler's pass sees: the bias is added after it."""
    column(parent, name, mesh)
    parent.register_module(name, UnfusedLinear(parent.get_submodule(name), (lambda x: x,)))


ASYNC_STYLES = {**STYLES, "gather": gather_in_chunks, "column": column_unfused}


def _own_tokens(mesh: DeviceMesh) -> Callable[[Tensor], Tensor]:
    return lambda sums_BLD: reduce_scatter(sums_BLD, 1, mesh)


def _all_tokens(mesh: DeviceMesh) -> Callable[[Tensor], Tensor]:
    return lambda sums_BLD: all_reduce(sums_BLD, mesh)


def _row(parent: nn.Module, name: str, mesh: DeviceMesh, *complete: Callable[[Tensor], Tensor]) -> None:
    linear = parent.get_submodule(name)
    distribute(linear, "weight", mesh, Shard(1))
    distribute(linear, "bias", mesh, Replicate())
    if linear.adapter is not None:
        distribute(linear.adapter, "down", mesh, Shard(1))
    parent.register_module(name, UnfusedLinear(linear, complete))


def distribute(module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement) -> None:
    """Make a parameter a DTensor, each rank taking its part of the tensor that it has."""
    whole = module.get_parameter(name)
    part = distribute_tensor(whole.detach(), mesh, [placement], src_data_rank=None)
    module.register_parameter(name, nn.Parameter(part, requires_grad=whole.requires_grad))


class UnfusedLinear(nn.Module):
    """A Linear of one or more inputs, whose products with the weight are completed, each by its function, before the
    bias is added.
    """

    def __init__(self, linear: Linear, complete: tuple[Callable[[Tensor], Tensor], ...]):
        super().__init__()
        self.weight, self.bias, self.adapter, self.product = linear.weight, linear.bias, linear.adapter, linear.product
        self.complete = complete

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        weight, bias = local(self.weight), local(self.bias)
        products = (
            self.product(x, weight) if self.adapter is None else self.product(x, weight) + self.adapter(x)
            for x in inputs
        )
        outputs = tuple(complete(y) + bias for complete, y in zip(self.complete, products, strict=True))
        return outputs if len(outputs) > 1 else outputs[0]


class AllReduceRMS(nn.Module):
    """Mean squares of q and the keys over the whole width, of which each rank has an equal part:

    one all-reduce of a number per row for all.
    """

    def __init__(self, mesh: DeviceMesh):
        super().__init__()
        self.mesh = mesh

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        means = all_reduce(torch.cat([mean_square(x) for x in tensors], dim=1), self.mesh) / self.mesh.size()
        return means.split([x.shape[1] for x in tensors], dim=1)


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about asynchronous tensor parallel, one line per mistake."""
    p = config.parallelism
    if p.enable_async_tensor_parallel and not config.compile.enable:
        yield (
            "parallelism.enable_async_tensor_parallel: true, but the compiler does the overlap; set compile.enable, or "
            "leave it false"
        )
    if p.enable_async_tensor_parallel and p.tensor_parallel_degree == 1:
        yield (
            "parallelism.enable_async_tensor_parallel: true, but parallelism.tensor_parallel_degree is 1; raise that, "
            "or leave it false"
        )
