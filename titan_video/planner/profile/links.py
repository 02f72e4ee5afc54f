"""What ranks exchange: collectives and sends by message size and group, and computing beside them. For machine.py."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titan_video.distributed.collectives import all_gather
from titan_video.models.spec import RankGroup
from titan_video.planner.profile.stopwatch import Stopwatch, random_tensor

# Renamed in torch 2.13, where the old names warn.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

KINDS = ("all_gather", "reduce_scatter", "all_to_all")
SMALLEST = 2**12  # bytes
PIECE = 4e-3  # seconds that a rank computes between two collectives: about what a block on a CPU does, and a time slice


@dataclass(frozen=True)
class RankSet:
    """Ranks that exchange: this process's group, of one of the sizes and strides that a mesh can have."""

    ranks: int
    ranks_per_node: int
    group: dist.ProcessGroup


def group_rows(world_size: int, per_node: int) -> Iterator[tuple[int, int, list[list[int]]]]:
    """(ranks of a group, of them on a node, all groups): each size that divides the world, of neighbours, and where
    there are several nodes of one rank of each. The groups of a size exist at once, as the rows of a mesh.
    """
    seen = set()
    for size in (n for n in range(2, world_size + 1) if world_size % n == 0):
        for stride in (1, per_node) if world_size > per_node else (1,):
            here = max(1, min(size, per_node // stride))
            if world_size % (size * stride) == 0 and (size, here) not in seen:
                seen.add((size, here))
                rows = torch.arange(world_size).view(-1, size, stride).transpose(1, 2).reshape(-1, size)
                yield size, here, rows.tolist()


def build_groups(world_size: int, per_node: int) -> list[RankSet]:
    """This rank's group of each size, measured while all groups of the size are."""
    found = []
    for size, here, rows in group_rows(world_size, per_node):
        groups = [dist.new_group(ranks) for ranks in rows]  # on every rank, in the same order
        own = next(g for g, ranks in zip(groups, rows, strict=True) if dist.get_rank() in ranks)
        found.append(RankSet(size, here, own))
    return found


def message_sizes(largest: int) -> list[int]:
    """Bytes, four times as many each."""
    sizes = [SMALLEST]
    while sizes[-1] * 4 <= largest:
        sizes.append(sizes[-1] * 4)
    return sizes


def collective(kind: str, num_bytes: int, ranks: RankSet, device: torch.device) -> Callable[[], object]:
    """One collective. num_bytes: of the full tensor of a gather or scatter, of what a rank puts in an all-to-all."""
    n = max(num_bytes // 4 // ranks.ranks, 1)
    part, whole = torch.ones(n, device=device), torch.ones(n * ranks.ranks, device=device)
    other = torch.empty_like(whole)
    return {
        "all_gather": lambda: _all_gather(other, part, group=ranks.group),
        "reduce_scatter": lambda: _reduce_scatter(part, whole, group=ranks.group),
        "all_to_all": lambda: dist.all_to_all_single(other, whole, group=ranks.group),
    }[kind]


def collective_samples(watch: Stopwatch, kind: str, groups: list[RankSet], largest: int) -> list[dict[str, Any]]:
    """Rows of [[all_gather]], [[reduce_scatter]] or [[all_to_all]]."""
    samples = []
    for ranks in groups:
        for size in message_sizes(largest):
            seconds = watch.seconds(collective(kind, size, ranks, watch.device))
            samples.append(_row(ranks.ranks, ranks.ranks_per_node, size, seconds))
    return samples


def send_samples(watch: Stopwatch, world_size: int, per_node: int, largest: int) -> list[dict[str, Any]]:
    """Rows of [[send]]: between neighbours in a node, and between nodes; all pairs at once, to and fro."""
    samples = []
    for distance in [1, per_node] if world_size > per_node > 1 else [1]:
        if world_size % (2 * distance):
            continue
        rank = dist.get_rank()
        is_first = rank // distance % 2 == 0
        peer = rank + distance if is_first else rank - distance
        for size in message_sizes(largest):
            x = torch.ones(max(size // 4, 1), device=watch.device)
            there_and_back = watch.seconds(lambda x=x, peer=peer, is_first=is_first: _exchange(x, peer, is_first))
            samples.append(_row(2, 2 if distance < per_node else 1, size, there_and_back / 2))
    return samples


def _exchange(x: Tensor, peer: int, is_first: bool) -> None:
    for sends in (is_first, not is_first):
        dist.send(x, peer) if sends else dist.recv(x, peer)


def _row(ranks: int, per_node: int, size: int, seconds: float) -> dict[str, Any]:
    return {"ranks": ranks, "ranks_per_node": per_node, "bytes": size, "seconds": seconds}


def overlap_slowdown(watch: Stopwatch, ranks: RankSet, num_bytes: int, dtype: torch.dtype) -> float:
    """Seconds of products beside an all-gather / without it; 1 or more. Products last about as long as the gather."""
    a, b = (random_tensor(256, 256, dtype=dtype, device=watch.device) for _ in range(2))
    part = torch.ones(max(num_bytes // 4 // ranks.ranks, 1), device=watch.device)
    whole = torch.empty(len(part) * ranks.ranks, device=watch.device)
    gather = watch.seconds(lambda: _all_gather(whole, part, group=ranks.group))
    count = max(4, int(gather / watch.seconds(lambda: a @ b)))

    def compute() -> None:
        for _ in range(count):
            a @ b

    def beside() -> None:
        work = _all_gather(whole, part, group=ranks.group, async_op=True)
        compute()
        work.wait()

    alone = watch.seconds(compute)
    return max(1.0, watch.seconds(beside) / max(alone, gather))


def wait_seconds(watch: Stopwatch, ranks: RankSet, num_bytes: int, dtype: torch.dtype) -> float:
    """What a collective between computing takes beyond one after another: ranks reach it at different moments, threads
    that send wait for a core where others compute, and autograd's work.

    num_bytes: of the full tensor. A gather in forward and its reduce-scatter in backward, each after PIECE seconds.
    """
    a, b = (random_tensor(256, 256, dtype=dtype, device=watch.device) for _ in range(2))
    x = torch.ones(max(num_bytes // 4 // ranks.ranks, 1), device=watch.device, requires_grad=True)
    group = RankGroup(ranks.group.group_name, dist.get_rank(ranks.group), ranks.ranks)
    count = max(1, round(PIECE / watch.compute_seconds(lambda: a @ b)))
    grad = torch.ones(len(x) * ranks.ranks, device=watch.device)

    def compute() -> None:
        for _ in range(count):
            a @ b

    def both() -> None:
        compute()
        gathered = all_gather(x, 0, group)
        compute()
        gathered.backward(grad)

    alone = sum(watch.seconds(collective(kind, num_bytes, ranks, watch.device)) for kind in KINDS[:2])
    return max(0.0, watch.seconds(both) - 2 * watch.compute_seconds(compute) - alone) / 2
