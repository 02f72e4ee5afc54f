"""What parallelism sends, as closed forms; tests count the same in a run."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from titan_video.distributed.utils import has
from titan_video.models.spec import ParallelPlan


@dataclass(frozen=True)
class Traffic:
    """What one rank sends to others by one kind of collective, in one attention and one direction."""

    collective: str  # "all_to_all", "all_gather" or "reduce_scatter"
    calls: int
    sent: int  # bytes, all calls together


def ulysses_traffic(
    q_elements: int, degree: int, itemsize: int, text_elements: int = 0
) -> tuple[list[Traffic], list[Traffic]]:
    """(forward, backward). q_elements: B L H K of this rank's q. text_elements: B S H K, with joint attention.

    q, k and v are sent in one exchange, the output in another; 1 / degree of each stays on the rank. Backward sends the
    same in the other direction. Of the text, only the output is sent: forward, a rank's heads of it to all others;
    backward, each rank's part of their gradient.
    """
    exchange = Traffic("all_to_all", 2, 4 * q_elements * itemsize * (degree - 1) // degree)
    text = text_elements * itemsize * (degree - 1) // degree
    return [exchange, *([Traffic("all_gather", 1, text)] if text else [])], [
        exchange,
        *([Traffic("reduce_scatter", 1, text)] if text else []),
    ]


def expert_traffic(rows: int, width: int, degree: int, itemsize: int) -> Traffic:
    """Of one layer of experts, in one direction, if all experts get as many rows. Backward sends the same.

    rows: of this rank, one for each expert of each token. They go to their experts in one exchange and come back in
    another. Forward, the numbers of rows are exchanged too: 8 bytes an expert, not counted here.
    """
    return Traffic("all_to_all", 2, 2 * rows * width * itemsize * (degree - 1) // degree)


def ring_traffic(kv_elements: int, degree: int, itemsize: int, rotate: str) -> tuple[list[Traffic], list[Traffic]]:
    """(forward, backward). kv_elements: B S H K of this rank's k; Ulysses' exchange does not change their number.

    Forward, a chunk of k and v is sent degree - 1 times. Backward sends it as often again, and its gradient in float32
    (float64 for float64).
    """
    chunk, steps = 2 * kv_elements, degree - 1
    sum_size = max(itemsize, 4)
    if rotate == "allgather":
        gather = Traffic("all_gather", 1, steps * chunk * itemsize)
        return [gather], [gather, Traffic("reduce_scatter", 1, steps * chunk * sum_size)]
    forward = Traffic("all_to_all", steps, steps * chunk * itemsize)
    return [forward], [Traffic("all_to_all", 2 * steps, steps * chunk * (itemsize + sum_size))]


def exchange_bytes(
    q_elements: int, ring: int, ulysses: int, itemsize: int, rotate: str = "alltoall", text_elements: int = 0
) -> tuple[int, int]:
    """Bytes that a rank sends in one attention, (forward, backward).

    q_elements: B L H K of this rank's slice, with L after tensor parallel's gather and H the heads of this rank.
    text_elements: see `ulysses_traffic`.
    """
    exchange = ulysses_traffic(q_elements, ulysses, itemsize, text_elements) if ulysses > 1 else ([], [])
    rounds = ring_traffic(q_elements, ring, itemsize, rotate) if ring > 1 else ([], [])
    forward, backward = (sum(part.sent for part in [*a, *b]) for a, b in zip(exchange, rounds, strict=True))
    return forward, backward


def collectives_per_block(plan: ParallelPlan, block: nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    """({collective: calls} in the forward, in the backward) of a tensor-parallel block.

    A checkpointed block runs its forward again. The backward also all-reduces the gradient of each replicated parameter
    (norms, and biases that follow a scatter).
    """
    used = Counter(style for name, style in plan.tensor.items() if has(block, name))
    gathers = used["all_gather_input"] + used["colwise_gathered"]
    scatters = used["rowwise"] + used["rowwise_joint"]
    sums = used["rms_stats"] + used["rowwise_replicated"] + used["rowwise_joint"]
    replicated = sum(p.requires_grad and p.placements[-1].is_replicate() for p in block.parameters())
    return (
        {"all_gather": gathers, "reduce_scatter": scatters, "all_reduce": sums},
        {"all_gather": scatters, "reduce_scatter": gathers, "all_reduce": sums + replicated},
    )


def bytes_per_collective(batch: int, tokens: int, width: int, tp: int, itemsize: int) -> int:
    """Bytes that each rank sends in one gather or scatter of activations: all parts but its own.

    tokens: of the whole group.
    """
    return (tp - 1) * batch * (tokens // tp) * width * itemsize


def state_bytes(state: Sequence[Tensor]) -> int:
    """Bytes that one micro-batch sends over each boundary between stages on different ranks; its gradients as many."""
    return sum(t.numel() * t.element_size() for t in state)
