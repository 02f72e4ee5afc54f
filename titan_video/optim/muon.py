"""Muon's orthogonalization (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"), and how
ranks share that work.

Orthogonalization brings all singular values of an update near 1, which needs the full matrix. The matrices of a mesh
are assigned to its ranks in turn (round robin), several to each rank at a time:

    shards of W0 W1 W2 ...  --send to owners-->  full W0 | W1 | W2 ...  --orthogonalize-->  --send back-->  shards

torch.optim.Muon (2.13) gathers and computes every matrix on every rank.
"""

from itertools import cycle

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from titan_video.distributed.utils import gather_objects, get_mesh

Slices = tuple[slice, slice]


MAX_ELEMENTS = 1 << 30  # of the matrices that are orthogonalized together: 2 GiB in bfloat16, five times


def orthogonalize(x: Tensor) -> Tensor:
    """About U V^T for x = U S V^T, in the dtype of x: five Newton-Schulz steps, which bring all singular values to
    between 0.7 and 1.2. x: a matrix, or a batch of them [N, R, C], which takes as many launches as one.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    y = x.mT if x.shape[-2] > x.shape[-1] else x
    dims = None if x.ndim == 2 else (-2, -1)
    y = y / (torch.linalg.vector_norm(y, dim=dims, keepdim=dims is not None) + 1e-7)
    for _ in range(5):
        gram = y @ y.mT
        if x.ndim == 2:
            y = a * y + torch.addmm(gram, gram, gram, beta=b, alpha=c) @ y
        else:
            y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if x.shape[-2] > x.shape[-1] else y


class RoundRobinOwners:
    """Orthogonalizes sharded matrices; each matrix is computed by one rank. Collective: all ranks construct it."""

    def __init__(self, names: dict[Tensor, str]):
        """names: the name of every matrix that has a shard on this rank."""
        self.names = names
        slices = {name: shard_slices(p) for p, name in names.items() if p.ndim == 2}
        self.slices_by_rank = gather_objects(slices) if dist.is_initialized() else [slices]

    def orthogonalize(self, shards: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """{parameter: this rank's shard of the result} from {parameter: this rank's shard of the update}.

        The parameters are those of one mesh. Collective over that mesh, with the same parameters in the same order.
        Compute and communication are in the shards' dtype. In bfloat16, matrices of one shape that a rank owns are
        computed together, up to MAX_ELEMENTS. The shards given are overwritten.
        """
        results = {p: orthogonalize_experts(p, shards[p]) for p in shards if p.ndim == 3}
        params = sorted((p for p in shards if p.ndim == 2), key=lambda p: (-p.numel(), *p.shape))
        mesh = get_mesh(params[0]) if params else None
        ranks = mesh.mesh.flatten().tolist() if mesh else [0]
        while params:
            size = len(ranks) * max(MAX_ELEMENTS // max(params[0].numel(), 1), 1)
            wave, params = params[:size], params[size:]
            results |= self._orthogonalize_wave({p: shards[p].contiguous() for p in wave}, ranks)
        return results

    def _orthogonalize_wave(self, shards: dict[Tensor, Tensor], ranks: list[int]) -> dict[Tensor, Tensor]:
        """As `orthogonalize`, in one exchange there and one back. Ranks own the parameters in turn."""
        this_rank = ranks[0] if len(ranks) == 1 else dist.get_rank()
        owners = dict(zip(shards, cycle(ranks), strict=False))
        sent = [(owner, shards[p]) for p, owner in owners.items() if owner != this_rank]
        batches: dict[torch.Size, list[Tensor]] = {}
        for p in (p for p, owner in owners.items() if owner == this_rank):
            batches.setdefault(p.shape, []).append(p)
        stacks = [shards[owned[0]].new_empty(len(owned), *shape) for shape, owned in batches.items()]
        full = {
            p: x
            for stack, owned in zip(stacks, batches.values(), strict=True)
            for p, x in zip(owned, stack, strict=True)
        }
        own = {p: full[p][shard_slices(p)] for p in full}
        others = [
            (rank, full[p][self.slices_by_rank[rank][self.names[p]]])
            for p in full
            for rank in ranks
            if rank != this_rank
        ]
        # Shards of rows are received in place, shards of columns beside it.
        received = [(rank, x if x.is_contiguous() else torch.empty_like(x)) for rank, x in others]
        _exchange(sent, received)
        copied = [(x, y) for (_, x), (_, y) in zip(others, received, strict=True) if x is not y]
        _copy([(own[p], shards[p]) for p in full] + copied)
        for stack in stacks:
            for x in [stack] if stack.dtype == torch.bfloat16 else stack:
                x.copy_(orthogonalize(x))
        _exchange([(rank, x.contiguous()) for rank, x in others], sent)
        _copy([(shards[p], own[p]) for p in full])
        return shards


def orthogonalize_experts(p: Tensor, shard_ERC: Tensor) -> Tensor:
    """This rank's shard of the orthogonalized experts of `p` [E, R, C], each a matrix of its own.

    Where FSDP shards the experts' rows, the ranks exchange them, so that each computes some of the experts. Collective
    over `p`'s mesh then; else nothing is sent.
    """
    axis = next((i for i, place in enumerate(p.placements) if place.is_shard(1)), None) if get_mesh(p) else None
    if axis is None:
        return torch.stack([orthogonalize(x) for x in shard_ERC]) if len(shard_ERC) else shard_ERC
    group, num_ranks = p.device_mesh.get_group(axis), p.device_mesh.size(axis)
    E, R, C = shard_ERC.shape
    own = [len(part) for part in torch.empty(E, 0).tensor_split(num_ranks)]  # experts that each rank computes
    num_own = own[p.device_mesh.get_local_rank(axis)]
    sent, received = [n * R * C for n in own], [num_own * R * C] * num_ranks
    rows = shard_ERC.new_empty(sum(received))
    dist.all_to_all_single(rows, shard_ERC.flatten(), received, sent, group=group)
    full = rows.view(num_ranks, num_own, R, C).transpose(0, 1).reshape(num_own, num_ranks * R, C)
    full = torch.stack([orthogonalize(x) for x in full]) if num_own else full
    rows = full.view(num_own, num_ranks, R, C).transpose(0, 1).flatten()
    shard = torch.empty_like(shard_ERC)
    dist.all_to_all_single(shard.view(-1), rows, sent, received, group=group)
    return shard


def shard_slices(p: Tensor) -> Slices:
    """The rows and columns of a matrix that this rank's shard covers."""
    shape, offset = p.shape, (0, 0)
    if isinstance(p, DTensor):
        shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def _exchange(sent: list[tuple[int, Tensor]], received: list[tuple[int, Tensor]]) -> None:
    """Send each tensor to its rank, and fill those that come from a rank, in one operation. Empty ones are skipped.

    Two ranks list what they exchange in one order.
    """
    operations = [dist.P2POp(dist.isend, t, rank) for rank, t in sent if t.numel()]
    operations += [dist.P2POp(dist.irecv, t, rank) for rank, t in received if t.numel()]
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()


def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy the second tensor of each pair to the first, in few launches."""
    if pairs:
        to, of = zip(*pairs, strict=True)
        torch._foreach_copy_(to, of)
