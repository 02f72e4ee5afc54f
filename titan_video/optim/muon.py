"""Muon's orthogonalization (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"), and how
ranks share that work.

Orthogonalization brings all singular values of an update near 1, which needs the full matrix. The matrices of a mesh
are assigned to its ranks in turn (round robin):

    shards of W0 W1 W2 ...  --send to owners-->  full W0 | W1 | W2 ...  --orthogonalize-->  --send back-->  shards

torch.optim.Muon (2.13) gathers and computes every matrix on every rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from titan_video.distributed.utils import gather_objects, get_mesh

Slices = tuple[slice, slice]


def orthogonalize(x: Tensor) -> Tensor:
    """About U V^T for x = U S V^T, in the dtype of x: five Newton-Schulz steps, which bring all singular values to
    between 0.7 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    y = x.mT if x.shape[0] > x.shape[1] else x
    y = y / (torch.linalg.vector_norm(y) + 1e-7)
    for _ in range(5):
        gram = y @ y.mT
        y = a * y + torch.addmm(gram, gram, gram, beta=b, alpha=c) @ y
    return y.mT if x.shape[0] > x.shape[1] else y


class RoundRobinOwners:
    """Orthogonalizes sharded matrices; each matrix is computed by one rank. Collective: all ranks construct it."""

    def __init__(self, names: dict[Tensor, str]):
        """names: the name of every matrix that has a shard on this rank."""
        self.names = names
        slices = {name: shard_slices(p) for p, name in names.items()}
        self.slices_by_rank = gather_objects(slices) if dist.is_initialized() else [slices]

    def orthogonalize(self, shards: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """{parameter: this rank's shard of the result} from {parameter: this rank's shard of the update}.

        The parameters are those of one mesh. Collective over that mesh, with the same parameters in the same order.
        Compute and communication are in bfloat16 on a GPU, where that is many times faster, and in the shards' dtype
        elsewhere.
        """
        params, results = list(shards), {}
        mesh = get_mesh(params[0]) if params else None
        ranks = mesh.mesh.flatten().tolist() if mesh else [0]
        for start in range(0, len(params), len(ranks)):
            group = params[start : start + len(ranks)]
            inputs = {p: (shards[p].bfloat16() if p.is_cuda else shards[p]).contiguous() for p in group}
            outputs = self._orthogonalize_group(inputs, ranks)
            results |= {p: output.to(shards[p].dtype) for p, output in outputs.items()}
        return results

    def _orthogonalize_group(self, shards: dict[Tensor, Tensor], ranks: list[int]) -> dict[Tensor, Tensor]:
        """As `orthogonalize`, for at most as many parameters as ranks: the i-th parameter is computed by ranks[i]."""
        if len(ranks) == 1:
            return {p: orthogonalize(shard) for p, shard in shards.items()}
        this_rank = dist.get_rank()
        round_robin_owner = dict(zip(shards, ranks, strict=False))  # there may be fewer matrices than ranks
        owned = next((p for p, owner in round_robin_owner.items() if owner == this_rank), None)
        not_owned = {owner: p for p, owner in round_robin_owner.items() if owner != this_rank}
        results = {p: torch.empty_like(shards[p]) for p in not_owned.values()}
        if owned is None:
            _exchange(sent={owner: shards[p] for owner, p in not_owned.items()}, received={})
            _exchange(sent={}, received={owner: results[p] for owner, p in not_owned.items()})
            return {p: results[p] for p in shards}
        slices = {rank: self.slices_by_rank[rank][self.names[owned]] for rank in ranks}
        received = {
            rank: shards[owned].new_empty([s.stop - s.start for s in slices[rank]])
            for rank in ranks
            if rank != this_rank
        }
        _exchange(sent={owner: shards[p] for owner, p in not_owned.items()}, received=received)
        full = shards[owned].new_empty(owned.shape)
        for rank, shard in {**received, this_rank: shards[owned]}.items():
            full[slices[rank]] = shard
        full = orthogonalize(full)
        sent = {rank: full[slices[rank]].contiguous() for rank in ranks}
        results[owned] = sent.pop(this_rank)
        _exchange(sent=sent, received={owner: results[p] for owner, p in not_owned.items()})
        return {p: results[p] for p in shards}


def shard_slices(p: Tensor) -> Slices:
    """The rows and columns of a matrix that this rank's shard covers."""
    shape, offset = p.shape, (0, 0)
    if isinstance(p, DTensor):
        shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def _exchange(sent: dict[int, Tensor], received: dict[int, Tensor]) -> None:
    """Send a tensor to each rank of `sent` and fill those of `received`. Empty tensors are skipped."""
    operations = [dist.P2POp(dist.isend, t, rank) for rank, t in sent.items() if t.numel()]
    operations += [dist.P2POp(dist.irecv, t, rank) for rank, t in received.items() if t.numel()]
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
