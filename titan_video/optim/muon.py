"""What Muon does to a matrix (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"), and how
ranks share that work.

An update's singular values are all brought near 1, which takes the whole matrix. The ranks of a mesh take turns in
being a matrix's owner:

    pieces of W0 W1 W2 ...  --to owners-->  whole W0 | W1 | W2 ...  --orthogonal-->  whole  --to all-->  pieces

torch.optim.Muon (2.13) has every rank gather and compute every matrix.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from titan_video.distributed.utils import gather_objects, get_mesh

Box = tuple[slice, slice]


def orthogonal(x: Tensor) -> Tensor:
    """Nearly U V^T of x = U S V^T: five Newton-Schulz steps, whose quintic takes all singular values to between 0.7 and
    1.2.

    In the type of x.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    y = x.mT if x.shape[0] > x.shape[1] else x
    y = y / (torch.linalg.vector_norm(y) + 1e-7)
    for _ in range(5):
        gram = y @ y.mT
        y = a * y + torch.addmm(gram, gram, gram, beta=b, alpha=c) @ y
    return y.mT if x.shape[0] > x.shape[1] else y


class RoundRobinOwners:
    """Gives `orthogonal` of matrices that are spread over ranks. All ranks make it together."""

    def __init__(self, names: dict[Tensor, str]):
        """names: of all matrices that this rank has a part of."""
        self.names = names
        boxes = {name: shard_slices(p) for p, name in names.items()}
        self.boxes = gather_objects(boxes) if dist.is_initialized() else [boxes]  # by rank

    def orthogonal(self, pieces: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """{parameter: this rank's piece of the result} of {parameter: its piece}, parameters of one mesh.

        All ranks of the mesh call it, with the same parameters in the same order. The arithmetic, and what is sent, is
        bfloat16 on a GPU, where that is many times faster, and of the pieces' type elsewhere.
        """
        params, results = list(pieces), {}
        mesh = get_mesh(params[0]) if params else None
        ranks = mesh.mesh.flatten().tolist() if mesh else [0]
        for start in range(0, len(params), len(ranks)):
            turn = dict(zip(params[start : start + len(ranks)], ranks))
            low = {p: (pieces[p].bfloat16() if p.is_cuda else pieces[p]).contiguous() for p in turn}
            results |= {p: piece.to(pieces[p].dtype) for p, piece in self._turn(turn, low, ranks).items()}
        return results

    def _turn(self, owners: dict[Tensor, int], pieces: dict[Tensor, Tensor], ranks: list[int]) -> dict[Tensor, Tensor]:
        """owners: {parameter: the rank that computes it}; a rank has at most one."""
        if len(ranks) == 1:
            return {p: orthogonal(piece) for p, piece in pieces.items()}
        me = dist.get_rank()
        mine = next((p for p, owner in owners.items() if owner == me), None)
        others = [rank for rank in ranks if rank != me]
        parts = {}  # of my matrix, by rank
        if mine is not None:
            boxes = {rank: self.boxes[rank][self.names[mine]] for rank in ranks}
            parts = {rank: pieces[mine].new_empty(tuple(s.stop - s.start for s in boxes[rank])) for rank in others}
        given = {owner: pieces[p] for p, owner in owners.items() if owner != me}
        _exchange(given, parts)
        if mine is not None:
            whole = pieces[mine].new_empty(mine.shape)
            for rank, part in {**parts, me: pieces[mine]}.items():
                whole[boxes[rank]] = part
            whole = orthogonal(whole)
            parts = {rank: whole[boxes[rank]].contiguous() for rank in ranks}
        results = {p: parts[me] if p is mine else torch.empty_like(pieces[p]) for p in owners}
        _exchange(
            {rank: parts[rank] for rank in others} if parts else {},
            {owner: results[p] for p, owner in owners.items() if owner != me},
        )
        return results


def shard_slices(p: Tensor) -> Box:
    """Where this rank's piece of a matrix lies in it."""
    sizes, first = p.shape, (0, 0)
    if isinstance(p, DTensor):
        sizes, first = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return tuple(slice(start, start + size) for start, size in zip(first, sizes, strict=True))


def _exchange(sent: dict[int, Tensor], received: dict[int, Tensor]) -> None:
    """Send each tensor to a rank, and fill others from ranks. Empty ones do not travel."""
    operations = [dist.P2POp(dist.isend, t, rank) for rank, t in sent.items() if t.numel()]
    operations += [dist.P2POp(dist.irecv, t, rank) for rank, t in received.items() if t.numel()]
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
