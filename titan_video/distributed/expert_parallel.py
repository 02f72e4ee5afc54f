"""Expert parallel, folded: the experts of a mixture over the ranks of data, context and tensor parallel.

    attention  pp x dp_replicate x dp_shard x ring x ulysses x tp
    experts    pp x dp_replicate x     expert_fsdp     x      ep      the same ranks; ep innermost, so on neighbours

A rank of `ep` has E / ep of the experts, which FSDP shards over `expert_fsdp`. Each rank routes its own tokens; outside
attention that is a slice of a clip, whatever the degrees are. They go to the ranks of their experts and come back:

    rows by expert --all-to-all--> rows by (source, own expert) -- by own expert -- experts -- back --all-to-all--> rows

How many rows go where is known on the device only: the host waits for it, once a forward of a layer.
The gradient of an expert needs no factor: the rows of all ranks of `ep` have reached its owner, expert_fsdp sums over
the others, and the loss is divided by the global count (fsdp.py).

Liu et al. 2025, "MoE Parallel Folding" (arXiv 2504.14960). The parameters are laid out by FSDP2 itself, on two meshes.

Letters: N rows (a token for each of its experts), D width, E experts, e experts of this rank, R ranks of ep.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from titan_video.config.job_config import JobConfig, Parallelism
from titan_video.config.values import divisors
from titan_video.distributed.collectives import rank_group, ready
from titan_video.distributed.fsdp import get_blocks
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.distributed.utils import has
from titan_video.models.spec import ParallelPlan, RankGroup


def build_expert_meshes(dims: ParallelDims, device_type: str) -> tuple[DeviceMesh, DeviceMesh]:
    """(expert_fsdp, ep): see `Meshes`. Collective."""
    sizes = (dims.pp, dims.dp_replicate, dims.dp_shard * dims.cp * dims.tp // dims.ep, dims.ep)
    mesh = init_device_mesh(device_type, sizes, mesh_dim_names=("pp", "dp_replicate", "expert_fsdp", "ep"))
    mesh["expert_fsdp", "ep"]._flatten("experts")  # over which DTensor sums the norm of gradients at once
    is_hybrid = dims.dp_replicate > 1
    return mesh["dp_replicate", "expert_fsdp"] if is_hybrid else mesh["expert_fsdp"], mesh["ep"]


def apply_expert_parallel(model: nn.Module, plan: ParallelPlan, mesh: DeviceMesh) -> None:
    """Divide the experts of each block over the 1-D `mesh`, in place. The parameters may be on the meta device."""
    for container, key in get_blocks(model, plan):
        for path in (path for path in plan.experts if has(container[key], path)):
            experts, parent = (container[key].get_submodule(name) for name in (path, path.rpartition(".")[0]))
            for name, full in list(experts.named_parameters()):
                shard = distribute_tensor(full.detach(), mesh, [Shard(0)], src_data_rank=None)
                experts.register_parameter(name, nn.Parameter(shard, requires_grad=full.requires_grad))
            parent.dispatch = ExpertExchange(rank_group(mesh))


class ExpertExchange(nn.Module):
    """Rows to the experts and back (models.experts.Dispatch), where each rank of a group has some of the experts."""

    def __init__(self, group: RankGroup):
        super().__init__()
        self.group = group

    def forward(self, rows_ND: Tensor, counts_E: Tensor, experts: nn.Module) -> Tensor:
        """rows: sorted by expert; counts: of each of all experts, int64, on the device. Returns the experts' rows in
        the same order.
        """
        counts_Re = counts_E.view(self.group.size, -1)
        received_Re = ready(all_to_all_single_autograd(counts_Re, None, None, self.group.name))
        to, of, received = host_numbers(counts_Re, received_Re, rows_ND.shape[0])
        by_source = _all_to_all(rows_ND, received=of, sent=to, group=self.group)
        rows = experts(_regroup(by_source, received), received_Re.sum(0), num_rows=sum(of))
        by_source = _regroup(rows, [list(part) for part in zip(*received, strict=True)])
        return _all_to_all(by_source, received=to, sent=of, group=self.group)


def host_numbers(sent_Re: Tensor, received_Re: Tensor, num_rows: int) -> tuple[list[int], list[int], list[list[int]]]:
    """Rows to each rank, rows of each rank, and the latter by this rank's experts [R][e]. The host waits for them.

    num_rows: that are sent in all.
    """
    sent, received = torch.stack([sent_Re, received_Re]).tolist()
    return [sum(part) for part in sent], [sum(part) for part in received], received


def _all_to_all(x: Tensor, received: list[int], sent: list[int], group: RankGroup) -> Tensor:
    """Rows to each rank and from each rank, in rank order. Backward is the same in the other direction."""
    return ready(all_to_all_single_autograd(x.contiguous(), received, sent, group.name))


def _regroup(x: Tensor, sizes: list[list[int]]) -> Tensor:
    """Pieces of rows of sizes [i][j] in the order of (i, j) -> in the order of (j, i)."""
    pieces, width = x.split([n for part in sizes for n in part]), len(sizes[0])
    return torch.cat([pieces[i * width + j] for j in range(width) for i in range(len(sizes))])


def layout_errors(dims: ParallelDims, section: Parallelism, args: Any) -> Iterator[str]:
    """What a model's architecture does not allow, one line per mistake. args: the model's (see ModelSpec)."""
    experts, where = getattr(args, "experts", None), f"parallelism.expert_parallel_degree: given {dims.ep}"
    if experts is None:
        yield f"{where}, but the model has no experts; set it to 1, or choose a model.flavor with experts"
    elif experts.num_experts % dims.ep:
        legal = divisors(experts.num_experts, dims.dp_shard * dims.cp * dims.tp)
        yield f"{where}, which does not divide the model's {experts.num_experts} experts; legal: {legal}"


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about expert parallel, one line per mistake. Those of all mixtures of experts are in
    training/expert_balance.py.
    """
    p = config.parallelism
    where = f"parallelism.expert_parallel_degree: given {p.expert_parallel_degree}"
    if p.expert_parallel_degree == 1:
        return
    num_ranks = config.encoder.num_training_ranks(world_size)
    num_ranks //= p.pipeline_parallel_degree * p.data_parallel_replicate_degree
    if num_ranks % p.expert_parallel_degree:
        yield (
            f"{where}, which does not divide the {num_ranks} ranks of a model's copy (data_parallel_shard_degree x "
            f"context_parallel_degree x tensor_parallel_degree); legal: {divisors(num_ranks)}"
        )
    if config.compile.enable:
        yield (
            f"{where}, but the number of rows that a rank gets for its experts is known at run time only, which a "
            f"compiled block cannot be; set compile.enable to false"
        )
