"""How many bytes context parallel sends: closed forms, equal to what the tests count.

One Traffic is what one rank sends to others in one attention core, in one direction (forward or backward), by one kind of collective.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    collective: str  # "all_to_all", "all_gather" or "reduce_scatter"
    calls: int
    sent: int  # bytes, all calls together


def ulysses_traffic(qkv_elements: int, degree: int, itemsize: int) -> tuple[list[Traffic], list[Traffic]]:
    """(forward, backward). qkv_elements: B L H K, of this rank's q.

    q, k and v go in one exchange, the output in another; of each, 1 / degree stays. Backward sends the same the other way.
    """
    sent = 4 * qkv_elements * itemsize * (degree - 1) // degree
    both = [Traffic("all_to_all", 2, sent)]
    return both, both


def ring_traffic(kv_elements: int, degree: int, itemsize: int, rotate: str) -> tuple[list[Traffic], list[Traffic]]:
    """(forward, backward). kv_elements: B S H K, of this rank's k: under Ulysses of the exchanged one, which is as large.

    Forward, a chunk of k and v passes degree - 1 times. Backward, so does it again, and so does its gradient, in float32 (float64 for float64).
    """
    chunk, steps = 2 * kv_elements, degree - 1
    sum_size = max(itemsize, 4)
    if rotate == "allgather":
        gather = Traffic("all_gather", 1, steps * chunk * itemsize)
        return [gather], [gather, Traffic("reduce_scatter", 1, steps * chunk * sum_size)]
    forward = Traffic("all_to_all", steps, steps * chunk * itemsize)
    return [forward], [Traffic("all_to_all", 2 * steps, steps * chunk * (itemsize + sum_size))]


def exchange_bytes(q_elements: int, ring: int, ulysses: int, itemsize: int, rotate: str = "alltoall") -> tuple[int, int]:
    """Bytes that a rank sends in one attention core, (forward, backward). q_elements: B L H K of this rank's slice, after tensor parallel."""
    totals = []
    for direction in (0, 1):
        parts = ulysses_traffic(q_elements, ulysses, itemsize)[direction] if ulysses > 1 else []
        parts = parts + (ring_traffic(q_elements, ring, itemsize, rotate)[direction] if ring > 1 else [])
        totals.append(sum(part.sent for part in parts))
    return totals[0], totals[1]
